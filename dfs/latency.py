"""How long the parts of a network take on one machine, measured with the packed kernels.

A table holds the milliseconds that one image takes in a part at one width: stem, residual blocks,
classifier, gates. Parts are known by their shape and the size of what they are given, so one table
serves every network that is made of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs.models import DynamicResNet
from dfs.nn.block import ResidualBlock, make_conv, make_norm
from dfs.nn.folded import FoldedConv, Stream, run_packed_stem
from dfs.nn.semantics import STREAMS
from dfs.nn.shapes import BlockShape, ConvShape, Size
from dfs.nn.stream import STREAM_BITS, StreamQuantizer, pooled_mean
from dfs_kernels import backend_info, quantize_pack
from dfs_kernels.widths import KERNEL_WIDTHS

TABLE_FORMAT_VERSION = 1
_FULL_BITS = 32
_DEFAULT_ROUNDS = 15
# The key of what has no width, such as a gate.
_NO_WIDTH = 0
# Stem and classifier can't be skipped.
_UNGATED_WIDTHS = (8, 32)

Entries = dict[tuple[str, int], float]
Progress = Callable[[str], None]


class PartTimes(NamedTuple):
    """Milliseconds per image of a network's parts.

    Attributes:
        fixed: of what no decision changes, the gates among it.
        blocks: float64 (gated blocks, choices).
        full: of stem, blocks and classifier at 32 bits, shortcuts as they are deployed, no gates.
    """

    fixed: float
    blocks: Tensor
    full: float


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds per image.

    Attributes:
        entries: by part and width; a gate counts as width 0.
        stream: how the residual stream was kept, "uint8" or "float32".
        batch: images in a batch.
        threads: what PyTorch and the kernels were allowed.
        machine: a description of where it was measured.
    """

    entries: Entries
    stream: str
    batch: int
    threads: int
    machine: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def measure(
        model: DynamicResNet,
        image_size: Size,
        batch: int = 64,
        threads: int | None = None,
        rounds: int = _DEFAULT_ROUNDS,
        progress: Progress | None = None,
    ) -> LatencyTable:
        """Time every different part of a network at every width that the kernels have.

        Each part is timed as it is deployed, packed in and packed out, on a batch at one width. The
        widths take turns, and the median over the rounds counts.

        Args:
            model: in evaluation mode; its weights do not matter, its shape and stream do.
            image_size: (H, W) of the images.
            threads: None leaves the number as it is.
            progress: told of each part before it is timed.

        Raises:
            ValueError: naming the argument, or what of the model has no packed form.
        """
        model.check_packable()
        if model.training:
            raise ValueError("model must be in evaluation mode, which is what is deployed")
        device = model.stem.weight.device
        if device.type != "cpu":
            raise ValueError(f"model must be on the CPU, which is what is timed, got {device}")
        for name, value in (("batch", batch), ("threads", threads), ("rounds", rounds)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if min(image_size) < 1:
            raise ValueError(f"image_size must be positive, got {image_size}")
        entries: Entries = {}
        with thread_count(threads), torch.no_grad():
            for name, make in _parts(model, image_size, batch).items():
                if progress is not None:
                    progress(name)
                for bits, seconds in time_in_turns(make(), rounds).items():
                    entries[name, bits] = seconds * 1e3 / batch
            used = torch.get_num_threads()
        return LatencyTable(entries, model.semantics.stream, batch, used, describe_machine())

    def look_up(self, model: DynamicResNet, image_size: Size) -> PartTimes:
        """What the parts of a network take.

        Raises:
            ValueError: naming a part that was not measured, or the stream if it is another.
        """
        if self.stream != model.semantics.stream:
            raise ValueError(
                f"latency table: measured with stream {self.stream!r}, "
                f"the network has {model.semantics.stream!r}"
            )
        names = _Names(model, image_size)
        ungated = (names.stem, names.blocks[0], names.head)
        fixed = sum(self._entry(name, model.ungated_bits) for name in ungated)
        fixed += sum(self._entry(name, _NO_WIDTH) for name in names.gates)
        everything = (names.stem, *names.blocks, names.head)
        full = sum(self._entry(name, _FULL_BITS) for name in everything)
        rows = [[self._entry(name, b) for b in model.choices] for name in names.blocks[1:]]
        return PartTimes(fixed, torch.tensor(rows, dtype=torch.float64), full)

    def _entry(self, part: str, bits: int) -> float:
        found = self.entries.get((part, bits))
        if found is None:
            widths = sorted(b for name, b in self.entries if name == part)
            known = f"it was measured at {widths} bits" if widths else "it was not measured"
            raise ValueError(f"latency table: no entry for {part!r} at {bits} bits; {known}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`save` writes."""
        parts: dict[str, dict[str, float]] = {}
        for (part, bits), milliseconds in self.entries.items():
            parts.setdefault(part, {})[str(bits)] = milliseconds
        return {
            "version": TABLE_FORMAT_VERSION,
            "stream": self.stream,
            "batch": self.batch,
            "threads": self.threads,
            "machine": dict(self.machine),
            "milliseconds_per_image": parts,
        }

    def save(self, path: Path) -> None:
        """Write it as JSON, beside and renamed."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)

    @staticmethod
    def load(path: Path) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: naming what in it is wrong.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != TABLE_FORMAT_VERSION:
                raise ValueError(
                    f"version is {content['version']!r}, this build reads {TABLE_FORMAT_VERSION}"
                )
            entries = {
                (part, int(bits)): _milliseconds(value, part)
                for part, widths in content["milliseconds_per_image"].items()
                for bits, value in widths.items()
            }
            stream, batch, threads = content["stream"], content["batch"], content["threads"]
            if stream not in STREAMS:
                raise ValueError(f"stream must be one of {STREAMS}, got {stream!r}")
            for name, value in (("batch", batch), ("threads", threads)):
                if type(value) is not int or value < 1:
                    raise ValueError(f"{name} must be a positive int, got {value!r}")
            return LatencyTable(entries, stream, batch, threads, content["machine"])
        except KeyError as error:
            raise ValueError(f"latency table {path}: entry {error} is missing") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"latency table {path}: {error}") from error


class _Names:
    """What the parts of a network are called; the same name is the same work."""

    def __init__(self, model: DynamicResNet, image_size: Size) -> None:
        shape = model.architecture
        self.sizes = [size for _, size in shape.block_sizes(image_size)]
        self.last_size = shape.blocks[-1].output_size(self.sizes[-1])
        pool = "" if shape.pool is None else f" max {shape.pool.kernel}/{shape.pool.stride}"
        self.stem = f"stem {_image(shape.in_channels, image_size)}: {shape.stem}{pool}"
        self.head = f"classifier {_image(shape.out_channels, self.last_size)} {shape.num_classes}"
        self.blocks = [
            f"block {_image(block.in_channels, size)}: {block}{_shortcut_width(model, block)}"
            for block, size in zip(shape.blocks, self.sizes, strict=True)
        ]
        self.gates = [
            f"{type(model.gate).__name__} {_image(block.in_channels, size)} "
            f"{model.gate.macs(i)} MACs"
            for i, (block, size) in enumerate(zip(shape.blocks[1:], self.sizes[1:], strict=True))
            # A gate that does not look has decided before any image comes.
            if model.gate.macs(i)
        ]


def part_names(model: DynamicResNet, image_size: Size) -> list[str]:
    """The entries that a table needs to price a network, without repeats."""
    return list(_parts(model, image_size, batch=1))


def _image(channels: int, size: Size) -> str:
    return f"{channels}x{size[0]}x{size[1]}"


def _shortcut_width(model: DynamicResNet, block: BlockShape) -> str:
    if block.shortcut is None:
        return ""
    if model.semantics.paper_skipping:
        return " at the block's bits"
    return f" at {model.ungated_bits} bits"


@dataclass(frozen=True)
class TimedPart:
    """Something to time: what it is given, and its work at each width."""

    source: Stream
    work: Mapping[int, Callable[[Stream], object]]


def _parts(
    model: DynamicResNet, image_size: Size, batch: int
) -> dict[str, Callable[[], TimedPart]]:
    """Every different part of a network by name, each made when it is its turn."""
    names, shape = _Names(model, image_size), model.architecture
    made: dict[str, Callable[[], TimedPart]] = {
        names.stem: partial(_stem_part, model, image_size, batch),
        names.head: partial(_head_part, model, names.last_size, batch),
    }
    for name, block, size in zip(names.blocks, shape.blocks, names.sizes, strict=True):
        made[name] = partial(_block_part, model, block, size, batch)
    for i, name in enumerate(names.gates):
        channels = shape.blocks[i + 1].in_channels
        made[name] = partial(_gate_part, model, i, channels, names.sizes[i + 1], batch)
    return made


def _stem_part(model: DynamicResNet, size: Size, batch: int) -> TimedPart:
    shape, semantics = model.architecture, model.semantics
    conv = make_conv(shape.stem, _UNGATED_WIDTHS, semantics, input_signed=True)
    norm = make_norm(shape.stem.out_channels, _UNGATED_WIDTHS, semantics, shape.norm_eps)
    folded, stream = FoldedConv(conv, norm), _new_stream(model)

    def run(bits: int, x: Stream) -> Stream:
        return run_packed_stem(folded, x, bits, stream, shape.pool)

    images = torch.randn(batch, shape.in_channels, *size)
    return TimedPart(images, {b: partial(run, b) for b in _UNGATED_WIDTHS})


def _block_part(model: DynamicResNet, shape: BlockShape, size: Size, batch: int) -> TimedPart:
    block = ResidualBlock(shape, KERNEL_WIDTHS, _new_stream(model), model.semantics).eval()

    def run(bits: Tensor, x: Stream) -> Stream:
        return block.run_packed(x, bits)

    widths = {b: torch.full((batch,), b, dtype=torch.int32) for b in (0, *KERNEL_WIDTHS)}
    source = _new_source(model, shape.in_channels, size, batch)
    return TimedPart(source, {b: partial(run, bits) for b, bits in widths.items()})


def _head_part(model: DynamicResNet, size: Size, batch: int) -> TimedPart:
    shape = ConvShape(model.architecture.out_channels, model.num_classes, 1)
    conv = make_conv(shape, _UNGATED_WIDTHS, model.semantics, input_signed=False, bias=True).eval()

    def run(bits: int, x: Stream) -> Tensor:
        return conv(pooled_mean(x).float()[:, :, None, None], bits)

    source = _new_source(model, shape.in_channels, size, batch)
    return TimedPart(source, {b: partial(run, b) for b in _UNGATED_WIDTHS})


def _gate_part(
    model: DynamicResNet, index: int, channels: int, size: Size, batch: int
) -> TimedPart:
    source = _new_source(model, channels, size, batch)
    state = model.gate.run(index, source, None).state

    def run(x: Stream) -> object:
        return model.gate.run(index, x, state)

    return TimedPart(source, {_NO_WIDTH: run})


def _new_stream(model: DynamicResNet) -> StreamQuantizer:
    return StreamQuantizer(model.semantics.stream == "uint8")


def _new_source(model: DynamicResNet, channels: int, size: Size, batch: int) -> Stream:
    values = torch.rand(batch, channels, *size)
    if model.semantics.stream == "float32":
        return values
    return quantize_pack(values, STREAM_BITS, {STREAM_BITS: 1 / 255})


def time_in_turns(part: TimedPart, rounds: int) -> dict[int, float]:
    """Median seconds of each width's work, the widths taking turns."""
    seconds: dict[int, list[float]] = {bits: [] for bits in part.work}
    for round_index in range(rounds + 1):
        for bits, work in part.work.items():
            # A fresh copy, as a block may update what it is given.
            given = part.source.clone()
            start = time.perf_counter()
            work(given)
            took = time.perf_counter() - start
            if round_index:  # the first warms up
                seconds[bits].append(took)
    return {bits: statistics.median(times) for bits, times in seconds.items()}


def describe_machine() -> dict[str, str]:
    """What a measurement depends on: processor, instruction set, PyTorch."""
    cpu = backend_info()["cpu"]
    return {
        "processor": _processor(),
        "isa": str(cpu.get("isa", cpu.get("reason"))),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _milliseconds(value: Any, part: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{part!r} must take a time of 0 or more, got {value!r}")
    return float(value)


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """So many threads for PyTorch and the kernels within it; None leaves their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
