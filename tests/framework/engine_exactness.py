"""Compares frozen networks with the eager networks they were made of, on many images.

    python -m tests.framework.engine_exactness --images 10000 --seed 1 --out FILE [--data FOLDER]

Networks are drawn at random: both families, every kind of gate, several lists of choices, either
stream. Half of them see random images, the others real ones: scikit-learn's digits, or images of
the data set in FOLDER. Engine and eager network on the reference backend must agree bit
for bit in decisions and logits where no block runs at 32 bits. Where some do, float sums differ in
their last bits between backends: decisions must then agree bit for bit with the eager network on
the engine's own kernels, and may differ from the reference's only at ties, which are counted.
Results must not depend on threads, batch size or order. Each network runs on one instruction set,
drawn too. Stops at the first network that fails, prints how to run it again, and exits with 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from dfs import Engine, freeze
from dfs.data import Preprocessing, load_dataset, recognise
from dfs.engine import EngineOutput
from dfs.models import DynamicOutput, DynamicResNet
from dfs.models.architecture import Architecture
from dfs_kernels import _cpu, use_backend
from tests.framework.engine_networks import CLASSES, lively_network, small_bottlenecks
from tests.kernels.exactness import MismatchError, all_work_split
from tests.record import circumstances, write_record

BATCH = 100
# Logits of a gate that are closer than this are a tie: float sums of another order may turn it.
TIE = 1e-5
_FULL_BITS = 32
_MOST_OF_A_SPLIT = 5000
_GATES: tuple[dict[str, Any], ...] = (
    {"gate": "rnn"},
    {"gate": "feedforward"},
    {"gate": "feedforward", "gate_options": {"deviation": True}},
    {"gate": "constant"},
)
_CHOICES = ((0, 2, 4, 8), (0, 2, 4, 8), (0, 8), (2, 4), (0, 2, 4, 8, 32), (0, 4, 32))


@dataclass
class Tally:
    """What has passed.

    Attributes:
        ties: decisions that differ from the reference's, of networks with 32 bits.
        largest_tie: between the gate's two logits in question.
    """

    images: Counter[str] = field(default_factory=Counter)
    networks: Counter[str] = field(default_factory=Counter)
    decisions: Counter[int] = field(default_factory=Counter)
    ties: int = 0
    largest_tie: float = 0.0


@dataclass(frozen=True)
class Case:
    """A network, what is called of it in the record, and images for it."""

    kinds: tuple[str, ...]
    model: DynamicResNet
    engine: Engine
    images: Tensor

    @property
    def floats(self) -> Tensor:
        if self.images.dtype != torch.uint8:
            return self.images
        assert self.engine.preprocessing is not None
        return self.engine.preprocessing.normalize(self.images)


def numbered_case(seed: int, number: int, real: Tensor, batch: int = BATCH) -> Case:
    """Case ``number`` of a run; it does not depend on the others. Odd ones get real images.

    Sets the instruction set that the case is for.
    """
    random = Random(f"{seed} {number}")
    isa = random.choice(_cpu.supported_isas())
    _cpu.set_isa(isa)
    is_real = number % 2 == 1
    channels = real.shape[1] if is_real else random.choice((1, 3))
    size = (real.shape[2], real.shape[3])
    if not is_real:
        size = (random.randint(8, 20),) * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.getrandbits(32))
        shape: Architecture | int = random.choice((8, 14, 20))
        if random.random() < 0.5:
            shape = small_bottlenecks(channels)
        gate, choices = random.choice(_GATES), random.choice(_CHOICES)
        options = {
            "choices": choices,
            "stream": random.choice(("uint8", "uint8", "uint8", "float32")),
            "quantizer": random.choice(("lsq", "lsq", "minmax")),
            "ungated_bits": random.choice((8, 8, 8, 32)),
        }
        model = lively_network(shape, channels, **options, **gate)
        images = torch.randn(batch, channels, *size)
        preprocessing = None
        if is_real:
            images = real[[random.randrange(len(real)) for _ in range(batch)]]
        elif random.random() < 0.5:
            images = torch.randint(256, images.shape, dtype=torch.uint8)
            statistics = ((0.47,) * channels, (0.23,) * channels)
            names = tuple(map(str, range(CLASSES)))
            preprocessing = Preprocessing(size[0], size[0], *statistics, names)
    kinds = (
        "bottleneck" if isinstance(shape, Architecture) else "identity",
        model.gate.__class__.__name__ + (" with deviations" if model.gate.deviation else ""),
        "/".join(map(str, choices)),
        f"{options['stream']} stream",
        f"stem at {options['ungated_bits']} bits",
        isa,
        "real images" if is_real else f"random {str(images.dtype).removeprefix('torch.')} images",
    )
    return Case(kinds, model, freeze(model, size, preprocessing), images)


@torch.no_grad()
def check_case(case: Case, tally: Tally) -> None:
    """Call it within :func:`all_work_split`.

    Raises:
        MismatchError: saying where.
    """
    torch.set_num_threads(1)
    found = case.engine(case.images)
    has_floats = _FULL_BITS in (*case.model.choices, case.model.ungated_bits)
    with use_backend("reference"):
        expected = case.model.run(case.floats)
    if has_floats:
        with use_backend("cpu"):
            _same(found, case.model.run(case.floats), "the eager network on the same kernels")
        _check_ties(case, found, expected, tally)
    else:
        _same(found, expected, "the eager network on the reference")
    _check_invariance(case, found)
    tally.images["real" if "real images" in case.kinds else "random"] += len(case.images)
    tally.networks.update(case.kinds)
    tally.decisions.update(found.bits.flatten().tolist())


def _same(found: EngineOutput, expected: DynamicOutput | EngineOutput, what: str) -> None:
    for name in ("bits", "logits"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        # Compared as integers: a NaN is like no other, and -0 is like 0.
        differ = (ours.view(torch.int32) != theirs.view(torch.int32)).any(1).nonzero()
        if len(differ):
            raise MismatchError(f"{name} of image {int(differ[0])} are not those of {what}")


def _check_ties(case: Case, found: EngineOutput, expected: DynamicOutput, tally: Tally) -> None:
    assert expected.gate_logits is not None
    for n in (found.bits != expected.bits).any(1).nonzero().flatten().tolist():
        block = int((found.bits[n] != expected.bits[n]).nonzero()[0])
        both = [
            case.model.choices.index(int(bits[n, block])) for bits in (found.bits, expected.bits)
        ]
        gap = float(expected.gate_logits[n, block, both].diff().abs())
        if not gap < TIE:
            raise MismatchError(f"image {n} differs at block {block}, which is no tie: {gap}")
        tally.ties += 1
        tally.largest_tie = max(tally.largest_tie, gap)


def _check_invariance(case: Case, expected: EngineOutput) -> None:
    order = torch.randperm(len(case.images), generator=torch.Generator().manual_seed(0))
    back = order.argsort()
    for threads, size in ((2, len(order)), (3, 7), (2, 1)):
        torch.set_num_threads(threads)
        parts = [case.engine(part) for part in case.images[order].split(size)]
        whole = EngineOutput(*(torch.cat(values)[back] for values in zip(*parts, strict=True)))
        _same(whole, expected, f"one thread; {threads} threads, batches of {size}, another order")


def real_images(folder: Path | None) -> tuple[str, Tensor]:
    """Name of the data set, and images of all its splits, normalized."""
    name = "digits" if folder is None else recognise(folder)
    data = load_dataset(name, folder=folder)
    splits = (data.test, data.val, data.gate, data.train)
    return name, torch.cat([split.first(_MOST_OF_A_SPLIT) for split in splits])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.framework.engine_exactness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first network (0)")
    parser.add_argument("--data", type=Path, help="folder of a data set, such as Fashion-MNIST")
    parser.add_argument("--out", type=Path, help="where to write the record, JSON")
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error(f"--images must be positive, got {options.images}")

    data, real = real_images(options.data)
    tally = Tally()
    start = time.monotonic()
    with all_work_split():
        for number in range(options.first, options.first + -(-options.images // BATCH)):
            case = numbered_case(options.seed, number, real)
            try:
                check_case(case, tally)
            except MismatchError as error:
                again = f"--images {BATCH} --seed {options.seed} --first {number}"
                print(f"network {number}, {', '.join(case.kinds)}: {error}", file=sys.stderr)
                print(f"again: python -m tests.framework.engine_exactness {again}", file=sys.stderr)
                return 1
    record = {
        "seed": options.seed,
        "first": options.first,
        "failures": 0,
        "data": data,
        "images": dict(tally.images),
        "networks": dict(sorted(tally.networks.items())),
        "decisions": {str(bits): count for bits, count in sorted(tally.decisions.items())},
        "ties_at_32_bits": tally.ties,
        "largest_tie": tally.largest_tie,
        **circumstances(time.monotonic() - start),
    }
    if options.out is not None:
        write_record(record, options.out)
    counts = ", ".join(f"{count} {kind}" for kind, count in tally.images.items())
    print(
        f"exact: seed {options.seed}, images: {counts}; "
        f"{tally.ties} ties at 32 bits; {record['seconds']} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
