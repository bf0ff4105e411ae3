"""Damages engine files, and sees that each is refused with a reason or loads to a working engine.

    python -m tests.framework.engine_fuzz --files 10000 --seed 1 --out FILE [--sanitize]

Every other file is damaged as bytes. The rest are changed in what they say (the graph, what travels
along, tensors, or a new graph with tensors made to fit it) and get a right checksum again, so that
the checks behind it are what is tried. What loads must classify images. Child processes do the
work, with an allowance of memory and of time for each file: a crash, a hang, an allocation beyond
the allowance or any error but the one that load_engine promises is a failure. All failures are
printed, with how to run them again; the exit status is then 1. ``--sanitize`` runs the C++ code
under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tests.record import circumstances, write_record

# Beyond what the process takes before it loads anything.
_MEMORY_ALLOWANCE = 2 << 30
_SECONDS_FOR_A_FILE = 60
# Images of larger networks are left out: they take long, as they should.
_MOST_MACS = 1 << 31
_LARGEST_MADE_TO_FIT = 1 << 23
_ATTEMPTS = 50
_CHUNK = 500
_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "8", [], {}, [[]], {"a": 1}, "\ud800", "\x00"),
    *(-1, 0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 255, 256, 4096, 1 << 14, 1 << 20, 1 << 24),
    *(1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 10**30, 10**400, -(1 << 63)),
    *(0.5, -0.5, 8.0, 1e-45, 1e38, 1e39, 1e308, math.nan, math.inf, -math.inf),
)
_ODD_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-45, 1e-38, 3e38, -3e38, 1e10)
_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float64)


@dataclass
class Content:
    """What an engine file says."""

    graph: Any
    extra: Any
    tensors: dict[str, Tensor]


@dataclass
class Tally:
    """Outcomes by kind of damage, the reasons of refusals, and the failures."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, found: dict[str, Any]) -> None:
        self.outcomes.setdefault(found["damage"], Counter())[found["outcome"]] += 1
        if found["outcome"] == "refused":
            self.reasons[found["reason"]] += 1
        if found["outcome"] == "failed":
            self.failures.append((found["number"], found["reason"]))


@cache
def sound_files() -> tuple[bytes, ...]:
    """Engines of several kinds, as they are saved."""
    from dfs import freeze
    from dfs.data import Preprocessing
    from tests.framework.engine_networks import CLASSES, lively_network, small_bottlenecks

    torch.manual_seed(7)
    size = (12, 12)
    colours = Preprocessing(12, 14, (0.4,) * 3, (0.2,) * 3, tuple("abcdefg"[:CLASSES]))
    networks: list[tuple[Any, dict[str, Any]]] = [
        (8, {}),
        (8, {"gate": "feedforward", "gate_options": {"deviation": True}, "stream": "float32"}),
        (8, {"gate": "constant", "choices": (0, 4, 32)}),
        (small_bottlenecks(3), {"choices": (0, 2, 4, 8, 32)}),
    ]
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for shape, options in networks:
            engine = freeze(lively_network(shape, 3, **options), size, colours)
            engine.calibrate_budget(torch.randn(20, 3, *size), points=4)
            path = Path(folder, "network.dfs")
            engine.save(path)
            files.append(path.read_bytes())
    return tuple(files)


# Damage to bytes: the checksum is wrong afterwards, or never read.


def damaged_bytes(random: Random) -> bytes:
    sound = random.choice(sound_files())
    data = bytearray(sound)
    while data == sound:
        for _ in range(random.randint(1, 3)):
            random.choice(_BYTE_DAMAGES)(random, data)
    return bytes(data)


def _flip(random: Random, data: bytearray) -> None:
    for _ in range(random.choice((1, 1, 2, 16))):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _cut(random: Random, data: bytearray) -> None:
    start = random.randrange(len(data) + 1)
    del data[start : start + random.choice((1, 8, 100, len(data)))]


def _insert(random: Random, data: bytearray) -> None:
    start = random.randrange(len(data) + 1)
    data[start:start] = random.randbytes(random.choice((1, 8, 100)))


def _overwrite(random: Random, data: bytearray) -> None:
    start = random.randrange(len(data) + 1)
    size = random.choice((1, 4, 64))
    data[start : start + size] = random.choice(
        (bytes(size), b"\xff" * size, random.randbytes(size))
    )


def _header_size(random: Random, data: bytearray) -> None:
    sizes = (0, 1, 2, len(data), 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1, random.getrandbits(16))
    data[:8] = random.choice(sizes).to_bytes(8, "little")


def _header_number(random: Random, data: bytearray) -> None:
    """An offset, a size or a digit of anything else in the header."""
    numbers = list(re.finditer(rb"\d+", data[8:100_000].partition(b"]}}")[0]))
    if numbers:
        place = random.choice(numbers)
        value = str(random.choice((-1, 0, 1, 7, 1 << 20, 1 << 40, 1 << 63, 10**30))).encode()
        # Of the same length where possible, so that the rest of the file is still in its place.
        width = place.end() - place.start()
        data[8 + place.start() : 8 + place.end()] = value.zfill(width)[:width]


_BYTE_DAMAGES: tuple[Callable[[Random, bytearray], None], ...] = (
    *(_flip, _cut, _insert, _overwrite, _header_size, _header_number),
)


# Damage to what a file says: the checksum is made right again.


def damaged_content(random: Random) -> bytes:
    content = _content(random.randrange(len(sound_files())))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice(_CONTENT_DAMAGES)(random, content)
    texts = [json.dumps(value) for value in (content.graph, content.extra)]
    if random.random() < 0.1:
        place = random.randrange(2)
        texts[place] = _damaged_text(random, texts[place])
    return _with_checksum(texts, content.tensors)


def _content(index: int) -> Content:
    from safetensors import safe_open

    with tempfile.NamedTemporaryFile() as file:
        file.write(sound_files()[index])
        file.flush()
        with safe_open(file.name, "pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return Content(json.loads(metadata["dfs_engine"]), json.loads(metadata["extra"]), tensors)


def _with_checksum(texts: Sequence[str], tensors: dict[str, Tensor]) -> bytes:
    from dfs.engine import file

    named = {"dfs_engine": texts[0], "extra": texts[1]}
    return save(tensors, {**named, "sha256": file._digest(named, tensors)})


def _damaged_text(random: Random, text: str) -> str:
    deep = 100_000
    start = random.randrange(len(text))
    return random.choice(
        (
            text[:start],
            text[:start] + random.choice('{}[]",:-0e') + text[start:],
            text[:start] + text[start + 1 :],
            text + text,
            "[" * deep + "]" * deep,
            '{"a":' * deep + "1" + "}" * deep,
            "9" * deep,
            "NaN",
        )
    )


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in plain data, with a key or index in it."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    for key in keys:
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from _places(data[key])


def _change_value(random: Random, data: Any) -> None:
    places = list(_places(data)) if isinstance(data, (dict, list)) else []
    if not places:
        return
    container, key = random.choice(places)
    value = container[key]
    ways = ["odd", "delete", "copy"]
    if type(value) is int:
        ways += ["near"] * 6
    if isinstance(value, list):
        ways += ["repeat", "reverse"]
    way = random.choice(ways)
    if way == "odd":
        container[key] = copy.deepcopy(random.choice(_ODD_VALUES))
    elif way == "delete":
        del container[key]
    elif way == "copy":
        container[key] = copy.deepcopy(random.choice([c[k] for c, k in places]))
    elif way == "near":
        container[key] = random.choice((value + 1, value - 1, 2 * value, value // 2, -value))
    elif way == "repeat":
        container[key] = value * random.choice((2, 3, 100))
    else:
        container[key] = value[::-1]


def _change_graph(random: Random, content: Content) -> None:
    _change_value(random, content.graph)


def _change_extra(random: Random, content: Content) -> None:
    _change_value(random, content.extra)


def _make_fit(random: Random, content: Content) -> None:
    """Another graph that is one, with random tensors as it needs them and nothing beside."""
    for _ in range(_ATTEMPTS):
        changed = copy.deepcopy(content.graph)
        for _ in range(random.randint(1, 4)):
            _change_value(random, changed)
        specs = _tensors_of(changed)
        if specs is None or changed == content.graph:
            continue
        if sum(math.prod(shape) for _, shape in specs.values()) > _LARGEST_MADE_TO_FIT:
            continue
        generator = torch.Generator().manual_seed(random.getrandbits(32))
        content.graph, content.extra = changed, {}
        content.tensors = {
            name: _random_tensor(name, *spec, generator) for name, spec in specs.items()
        }
        return


def _tensors_of(data: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
    """What a graph needs; None if it is none."""
    from dfs.engine.graph import EngineGraph

    try:
        return EngineGraph.from_json(data).tensors()
    except Exception:  # which error it is, is for the loader to show
        return None


def _random_tensor(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    if dtype == torch.uint8:
        # Read as floats, where they are weights of 32 bits, these are finite.
        return torch.randint(60, shape, dtype=dtype, generator=generator)
    if name.endswith("zero_point"):
        return torch.randint(4, shape, dtype=dtype, generator=generator)
    values = torch.rand(shape, dtype=dtype, generator=generator)
    return values + 1e-3 if name.endswith("scale") else values - 0.5


def _change_tensor(random: Random, content: Content) -> None:
    if not content.tensors:
        return
    tensors = content.tensors
    name = random.choice(sorted(tensors))
    value = tensors[name]
    other = random.choice(sorted(tensors))
    change = random.randrange(9)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors[name] = value.to(random.choice(_DTYPES))
    elif change == 2:
        shapes = (value.flatten(), value[None], value[..., :-1] if value.dim() else value)
        tensors[name] = random.choice(shapes).contiguous()
    elif change == 3:
        tensors[name], tensors[other] = tensors[other].clone(), value
    elif change == 4:
        tensors[random.choice(("", "x", "gate.more", name + ".x"))] = value.clone()
    elif change == 5:
        tensors[name] = value.new_zeros(0)
    elif value.numel() and value.is_floating_point():
        changed = value.clone().flatten()
        size = random.choice((1, len(changed)))
        start = random.randrange(len(changed) - size + 1)
        changed[start : start + size] = random.choice(_ODD_FLOATS)
        tensors[name] = changed.reshape(value.shape)
    elif value.numel():
        raw = torch.frombuffer(bytearray(random.randbytes(value.nbytes)), dtype=value.dtype)
        tensors[name] = raw.reshape(value.shape)


_CONTENT_DAMAGES: tuple[Callable[[Random, Content], None], ...] = (
    *(_change_graph, _change_extra, _make_fit, _make_fit, _change_tensor, _change_tensor),
)


def damaged_file(seed: int, number: int) -> tuple[str, bytes]:
    """File ``number`` of a run, which does not depend on the others, and the kind of its damage."""
    random = Random(f"{seed} {number}")
    if number % 2:
        return "content, checksum made right", damaged_content(random)
    return "bytes", damaged_bytes(random)


# What is done with a file, in a child process.


def try_file(path: Path) -> tuple[str, str]:
    """An outcome ("refused", "works", "large", "failed") and its reason."""
    from dfs import load_engine

    try:
        engine = load_engine(path)
    except ValueError as error:
        text = str(error)
        return ("refused", _reason(text)) if path.name in text else ("failed", f"unclear: {text}")
    except Exception as error:
        return "failed", f"load_engine raised {type(error).__name__}: {error}"
    if engine.graph.macs() > _MOST_MACS:
        return "large", ""
    try:
        _use(engine)
    except Exception as error:
        return "failed", f"the engine raised {type(error).__name__}: {error}"
    return "works", ""


def _reason(text: str) -> str:
    """Without names and numbers, so that like reasons count together."""
    kind = text.partition(".dfs ")[2]
    return re.sub(r"[-+]?\d[\d.e+-]*|\[.*|'.*'|: .*\{.*", "#", kind)[:70]


def _use(engine: Any) -> None:
    shape = (engine.graph.architecture.in_channels, *engine.graph.image_size)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *shape, generator=generator)
    for policy in (None, *engine.choices):
        _check(engine(image, policy), engine)
    _check(engine(torch.full((1, *shape), 1e30)), engine)
    if engine.preprocessing is not None:
        _check(engine(torch.zeros(1, *shape, dtype=torch.uint8)), engine)
    if engine.budget_curve is not None:
        engine.set_budget(engine.budget_curve.points[0].cost)
        _check(engine(image), engine)
    mask = torch.zeros(1, engine.gated_blocks, len(engine.choices), dtype=torch.float64)
    for cost in engine.costs.values():
        assert bool(torch.isfinite(cost(mask)).all()), "a cost is not finite"


def _check(found: Any, engine: Any) -> None:
    assert found.logits.shape == (1, engine.graph.architecture.num_classes)
    assert set(found.bits.flatten().tolist()) <= set(engine.choices), "a width that is no choice"
    assert bool(torch.isfinite(found.cost).all())


def _work(seed: int, numbers: Sequence[int], module: Path | None) -> None:
    """Try files and print what came of each, a line of JSON before and after."""
    if module is None:
        _limit_memory()
    else:
        _use_module(module)
    torch.set_num_threads(1)
    sound_files()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.dfs")
        for number in numbers:
            print(json.dumps({"begun": number}), flush=True)
            faulthandler.dump_traceback_later(_SECONDS_FOR_A_FILE, exit=True)
            damage, data = damaged_file(seed, number)
            path.write_bytes(data)
            outcome, reason = try_file(path)
            faulthandler.cancel_dump_traceback_later()
            found = {"number": number, "damage": damage, "outcome": outcome, "reason": reason}
            print(json.dumps(found), flush=True)


def _limit_memory() -> None:
    import resource

    import dfs.engine  # noqa: F401 - what it takes is no allocation of a file's

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY_ALLOWANCE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _use_module(path: Path) -> None:
    """Import the compiled module from another file than the installed one."""
    from importlib.machinery import ExtensionFileLoader
    from importlib.util import module_from_spec, spec_from_file_location

    name = "dfs_kernels._cpu"
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


# The campaign


def run_campaign(
    seed: int, first: int, files: int, module: Path | None = None, progress: bool = False
) -> Tally:
    """Try so many files, in child processes that are replaced when they die."""
    tally = Tally()
    pending = list(range(first, first + files))
    while pending:
        chunk = pending[:_CHUNK]
        finished = _run_child(seed, chunk, module, tally)
        pending = pending[finished:]
        if progress:
            print(f"{files - len(pending)} of {files} files", file=sys.stderr, flush=True)
    return tally


def _run_child(seed: int, numbers: list[int], module: Path | None, tally: Tally) -> int:
    """How many of the files were dealt with; one that the child died of counts as such."""
    command = [sys.executable, "-m", "tests.framework.engine_fuzz", "--seed", str(seed)]
    command += ["--worker", str(numbers[0]), str(numbers[-1])]
    environment = dict(os.environ)
    if module is not None:
        command += ["--module", str(module)]
        environment.update(_sanitizer_environment())
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    begun = None
    finished = 0
    for line in done.stdout.splitlines():
        said = json.loads(line)
        if "begun" in said:
            begun = said["begun"]
        else:
            tally.add(said)
            begun, finished = None, finished + 1
    if done.returncode == 0:
        return finished
    tail = " | ".join(done.stderr.strip().splitlines()[-12:])
    if begun is None:
        raise RuntimeError(f"a child process failed before its first file: {tail}")
    died = {"number": begun, "damage": ("bytes", "content, checksum made right")[begun % 2]}
    tally.add({**died, "outcome": "failed", "reason": f"status {done.returncode}: {tail}"})
    return finished + 1


def _sanitizer_environment() -> dict[str, str]:
    """The runtime comes first, as Python itself was not built with it."""
    from build_tools.toolchain import find_host_compiler

    compiler = find_host_compiler().command
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    options = "detect_leaks=0:max_allocation_size_mb=2048:allocator_may_return_null=0"
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.framework.engine_fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--files", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file (0)")
    parser.add_argument("--sanitize", action="store_true", help="run the C++ code under sanitizers")
    parser.add_argument("--out", type=Path, help="where to write the record, JSON")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--module", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        first, last = options.worker
        _work(options.seed, range(first, last + 1), options.module)
        return 0
    if options.files < 1:
        parser.error(f"--files must be positive, got {options.files}")

    module = None
    if options.sanitize:
        from build_tools.sanitized_module import build_module

        module = build_module()
    start = time.monotonic()
    tally = run_campaign(options.seed, options.first, options.files, module, progress=True)
    for number, reason in tally.failures:
        print(f"file {number}: {reason}", file=sys.stderr)
        again = f"--files 1 --seed {options.seed} --first {number}"
        print(f"again: python -m tests.framework.engine_fuzz {again}", file=sys.stderr)
    outcomes = {damage: dict(sorted(c.items())) for damage, c in sorted(tally.outcomes.items())}
    record = {
        "seed": options.seed,
        "first": options.first,
        "files": options.files,
        "failures": len(tally.failures),
        "sanitizers": "address, undefined" if options.sanitize else None,
        "outcomes": outcomes,
        "reasons": dict(tally.reasons.most_common()),
        **circumstances(time.monotonic() - start),
    }
    if options.out is not None:
        write_record(record, options.out)
    print(f"{options.files} files, seed {options.seed}: {json.dumps(outcomes)}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
