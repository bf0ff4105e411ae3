"""Which of the backends for GPU tensors measured faster, by convolution and batch.

There is one table for each GPU, ``tables/<gpu>.json`` beside this file, which says where it comes
from. ``bench/gpu_check.sh`` writes it. A GPU without one, and a convolution that is not in it,
take the first of the default backends.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.triton.tuning import slug

TABLES = Path(__file__).parent / "tables"
VERSION = 1
BACKENDS = ("cuda", "triton")
# May have been timed beside them.
CANDIDATES = ("cuda-bits",)


@dataclass(frozen=True)
class ConvProblem:
    """A convolution from packed weights, as far as it decides which backend is faster.

    Attributes:
        height, width: of the input. batch: samples.
    """

    geometry: ConvGeometry
    height: int
    width: int
    batch: int

    @property
    def key(self) -> str:
        """Everything but the batch, as a table names it: "64x56x56>64x56x56/3x3"."""
        g = self.geometry
        out_height, out_width = g.output_size(self.height, self.width)
        key = f"{g.in_channels}x{int(self.height)}x{int(self.width)}>"
        key += f"{g.out_channels}x{int(out_height)}x{int(out_width)}/{g.kernel_h}x{g.kernel_w}"
        if (g.dilation_h, g.dilation_w) != (1, 1):
            key += f"/d{g.dilation_h}x{g.dilation_w}"
        return key if g.groups == 1 else f"{key}/g{g.groups}"


@dataclass(frozen=True)
class BackendTable:
    """What was measured on one GPU.

    Attributes:
        device: its name.
        source: "commit" and "command" of the measurement.
        seconds: by :attr:`ConvProblem.key`, batch and backend, a call's.
    """

    device: str
    source: Mapping[str, str]
    seconds: Mapping[str, Mapping[int, Mapping[str, float]]]

    def faster(self, key: str) -> tuple[tuple[int, str], ...]:
        """The faster backend at each batch that was measured, ascending; () if none was."""
        by_batch = self.seconds.get(key, {})
        return tuple(
            (batch, min(times, key=lambda name: (times[name], name)))
            for batch, times in sorted(by_batch.items())
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "device": self.device,
            "source": dict(self.source),
            "seconds": {
                key: {str(batch): dict(times) for batch, times in sorted(by_batch.items())}
                for key, by_batch in sorted(self.seconds.items())
            },
        }

    @staticmethod
    def from_json(content: Any) -> BackendTable:
        """The table that a file holds.

        Raises:
            ValueError: saying what is wrong with it.
        """
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"it is not a table of version {VERSION}")
        source = content.get("source")
        if not isinstance(source, dict) or not all(source.get(k) for k in ("commit", "command")):
            raise ValueError("it does not name the commit and the command that it comes from")
        seconds: dict[str, dict[int, dict[str, float]]] = {}
        for key, by_batch in content["seconds"].items():
            for batch, times in by_batch.items():
                if set(times) - set(CANDIDATES) != set(BACKENDS) or not all(
                    isinstance(t, float) and 0 < t < float("inf") for t in times.values()
                ):
                    raise ValueError(f"{key} at batch {batch} must have seconds of {BACKENDS}")
                seconds.setdefault(key, {})[int(batch)] = times
        return BackendTable(str(content["device"]), source, seconds)


def order_for(order: Sequence[str], device: torch.device, problem: ConvProblem) -> tuple[str, ...]:
    """``order`` with the faster backend in front, where this GPU's table has the convolution."""
    if not _has_table(device):
        return tuple(order)
    faster = _faster(device, problem.key)
    for batch, name in faster:
        if problem.batch <= batch:
            return _to_front(name, order)
    return _to_front(faster[-1][1], order) if faster else tuple(order)


def _to_front(name: str, order: Sequence[str]) -> tuple[str, ...]:
    return (name, *(other for other in order if other != name))


# Constants to torch.compile, which can read no files.
@torch.compiler.assume_constant_result
def _has_table(device: torch.device) -> bool:
    return table_for(device) is not None


@torch.compiler.assume_constant_result
def _faster(device: torch.device, key: str) -> tuple[tuple[int, str], ...]:
    table = table_for(device)
    assert table is not None
    return table.faster(key)


def table_for(device: torch.device) -> BackendTable | None:
    """The table of a GPU, if it has one that can be read."""
    name = device_name(device)
    return None if name is None else _read(table_path(name))


def device_name(device: torch.device) -> str | None:
    """A GPU's name; None for a CPU."""
    return _cuda_name(device.index) if device.type == "cuda" else None


@functools.cache
def _cuda_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def table_path(name: str) -> Path:
    return TABLES / f"{slug(name)}.json"


@functools.cache
def _read(path: Path) -> BackendTable | None:
    try:
        return BackendTable.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not used: {error}", RuntimeWarning, stacklevel=2)
        return None


def forget() -> None:
    """Read the files again at the next call."""
    _read.cache_clear()


def describe(device: torch.device, usable: Sequence[str]) -> str:
    """For people: what chooses between the backends that a GPU can use, best first, and why."""
    name, first = device_name(device), usable[0]
    table = table_for(device)
    if table is None:
        return f"{first} throughout: there is no table of what is faster on {name}"
    choices = [backend for key in table.seconds for _, backend in table.faster(key)]
    named = [*BACKENDS, *(name for name in CANDIDATES if name in choices)]
    counts = ", ".join(f"{b} at {choices.count(b)}" for b in named)
    text = (
        f"by {table_path(str(name)).name}: of {len(choices)} convolutions and batches {counts}, "
        f"{first} at all others; measured at commit {table.source['commit']} "
        f"by {table.source['command']!r}"
    )
    missing = [b for b in BACKENDS if b not in usable]
    return f"{text}; {missing[0]} can't run here, {first} takes its place" if missing else text
