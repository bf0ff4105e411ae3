"""Compares every instruction set of the CPU kernels with the reference on many convolutions.

    python -m tests.kernels.exactness --cases 5000 --seed 0 --out bench/results/exactness.json

Integer widths must match bit for bit, 32 bits must keep within its bound; 2 and 3 threads and a
permuted batch must give the same bits as 1 thread. Stops at the first case that does not, prints
how to run it again, and exits with 1. What is counted goes to the record: how many cases each
instruction set passed, by width, kernel, stride and groups.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from dfs_kernels import _cpu, use_backend
from tests.kernels.cases import (
    Built,
    ConvCase,
    Result,
    build,
    exact_and_bound,
    run,
    sample_bits,
    subset,
    within_bound,
)
from tests.kernels.wide_cases import KERNELS, draw_case
from tests.record import circumstances, write_record

# ISA, width, kernel, stride, groups.
Cell = tuple[str, int, str, str, str]


class MismatchError(Exception):
    """A result that is not what it should be."""


@dataclass
class Tally:
    """What has passed."""

    cases: Counter[str] = field(default_factory=Counter)
    samples: Counter[str] = field(default_factory=Counter)
    cells: Counter[Cell] = field(default_factory=Counter)

    def add(self, isa: str, case: ConvCase) -> None:
        self.cases[isa] += 1
        self.samples[isa] += len(case.bits)
        for width in set(case.bits):
            cell: Cell = (isa, width, *_kind(case))
            self.cells[cell] += 1


def _kind(case: ConvCase) -> tuple[str, str, str]:
    """Kernel, stride and groups of a case, as the record names them."""
    height, width = case.kernel
    kernel = f"{height}x{width}" if case.kernel in KERNELS else "other"
    stride = str(case.stride[0]) if case.stride[0] == case.stride[1] else "mixed"
    if case.groups == 1:
        return kernel, stride, "dense"
    return kernel, stride, "depthwise" if case.group_channels == 1 else "grouped"


def numbered_case(seed: int, number: int) -> ConvCase:
    """Case ``number`` of a run; it does not depend on the others."""
    return draw_case(Random(f"{seed} {number}"))


@contextmanager
def all_work_split() -> Iterator[None]:
    """Small work is split among threads too; thread count and instruction set are put back."""
    threads, isa, cost = torch.get_num_threads(), _cpu.isa(), _cpu.min_thread_cost()
    _cpu.set_min_thread_cost(1.0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _cpu.set_isa(isa)
        _cpu.set_min_thread_cost(cost)


def check_case(case: ConvCase, isas: Sequence[str], tally: Tally) -> None:
    """Run a case on each of ``isas``; call it within :func:`all_work_split`.

    Raises:
        MismatchError: saying where.
    """
    with use_backend("reference"):
        built = build(case)
    integers = [n for n, width in enumerate(case.bits) if width != 32]
    expected: dict[int, torch.Tensor] = {}
    if integers:
        # Without the 32-bit samples, on which the reference takes its time.
        out = run(subset(built, integers), "reference").out
        expected = {n: sample_bits(out, row) for row, n in enumerate(integers)}
    bounds = {n: exact_and_bound(built, n) for n, width in enumerate(case.bits) if width == 32}
    order = list(range(len(case.bits)))
    Random(case.seed).shuffle(order)
    permuted = subset(built, order)

    for isa in isas:
        _cpu.set_isa(isa)
        first = _run(built, 1)
        for n, width in enumerate(case.bits):
            if width == 32:
                good = within_bound(built, first.out, n, bounds[n])
            else:
                good = torch.equal(sample_bits(first.out, n), expected[n])
            if not good:
                raise MismatchError(f"{isa}: sample {n} at {width} bits differs")
        for threads in (2, 3):
            _same(first, _run(built, threads), range(len(order)), f"{isa}, {threads} threads")
        _same(first, _run(permuted, 1), order, f"{isa}, permuted batch")
        tally.add(isa, case)


def _run(built: Built, threads: int) -> Result:
    torch.set_num_threads(threads)
    result = run(built, "cpu")
    if not result.guards_kept:
        raise MismatchError(f"{_cpu.isa()}, {threads} threads: wrote outside of its output")
    return result


def _same(first: Result, again: Result, order: Sequence[int], what: str) -> None:
    for row, n in enumerate(order):
        if not torch.equal(sample_bits(first.out, n), sample_bits(again.out, row)):
            raise MismatchError(f"{what}: sample {n} is not as before")


def make_record(seed: int, first: int, cases: int, tally: Tally, seconds: float) -> dict[str, Any]:
    cells: dict[str, dict[str, int]] = {}
    for (isa, width, kernel, stride, groups), count in sorted(tally.cells.items()):
        name = f"{width} bits, {kernel} kernel, stride {stride}, {groups}"
        cells.setdefault(isa, {})[name] = count
    return {
        "seed": seed,
        "first": first,
        "cases": cases,
        "failures": 0,
        "cases_per_isa": dict(tally.cases),
        "samples_per_isa": dict(tally.samples),
        "smallest_cell": min(tally.cells.values()),
        **circumstances(seconds),
        "cells": cells,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.exactness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=5000, help="how many (5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--isa", action="append", help="one of them; may be repeated (all)")
    parser.add_argument("--out", type=Path, help="where to write the record, JSON")
    options = parser.parse_args(arguments)
    isas = options.isa or _cpu.supported_isas()
    unknown = sorted(set(isas) - set(_cpu.supported_isas()))
    if unknown:
        parser.error(f"--isa {unknown[0]}: here there are {', '.join(_cpu.supported_isas())}")
    if options.cases < 1:
        parser.error(f"--cases must be positive, got {options.cases}")

    tally = Tally()
    start = time.monotonic()
    with all_work_split():
        for number in range(options.first, options.first + options.cases):
            case = numbered_case(options.seed, number)
            try:
                check_case(case, isas, tally)
            except MismatchError as error:
                again = f"--cases 1 --seed {options.seed} --first {number}"
                print(f"case {number}: {error}\n{case}", file=sys.stderr)
                print(f"again: python -m tests.kernels.exactness {again}", file=sys.stderr)
                return 1
            done = number - options.first + 1
            if done % 1000 == 0:
                print(f"{done} of {options.cases} cases", file=sys.stderr, flush=True)
    record = make_record(
        options.seed, options.first, options.cases, tally, time.monotonic() - start
    )
    if options.out is not None:
        write_record(record, options.out)
    counts = ", ".join(f"{isa} {count}" for isa, count in tally.cases.items())
    print(
        f"exact: seed {options.seed}, cases passed: {counts}; {len(tally.cells)} cells of at least "
        f"{record['smallest_cell']}; {record['seconds']} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
