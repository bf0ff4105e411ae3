"""Which launch configuration a kernel takes: measured for this GPU where it was, else a default.

Nothing is ever measured unless :func:`tuning` is on, which :func:`dfs_kernels.warmup` turns on when
it is asked to. What was found is kept in a file per GPU under the user's cache folder
(``DFS_CACHE_DIR``, or ``dfs_kernels`` in ``XDG_CACHE_HOME``), over the table for that GPU that
comes with the package, if there is one (``tables/<gpu>.json``, in the same form).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from dfs_kernels.triton.configs import ConvConfig, PixelConfig

Config = TypeVar("Config", ConvConfig, PixelConfig)

TABLES = Path(__file__).parent / "tables"
_VERSION = 1
_WARMUP_MS, _REPEAT_MS = 5, 25

_active = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for.

    Attributes:
        kernel: its name. sizes: what decides its speed besides the batch. batch: samples.
    """

    kernel: str
    sizes: tuple[int | str, ...]
    batch: int

    @property
    def key(self) -> str:
        return "/".join(str(part) for part in (self.kernel, *self.sizes))

    @property
    def batch_class(self) -> int:
        """The power of two at or above the batch, as its exponent."""
        return max(self.batch - 1, 0).bit_length()


class Table:
    """The configurations known for one GPU: by kernel and sizes, then by batch class."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[int, dict[str, Any]]] = {}

    def find(self, problem: Problem, default: Config) -> Config | None:
        """The one measured at the nearest batch; None if these sizes never were."""
        by_batch = self._entries.get(problem.key)
        if not by_batch:
            return None
        nearest = min(by_batch, key=lambda found: (abs(found - problem.batch_class), found))
        return dataclasses.replace(default, **by_batch[nearest])

    def holds(self, problem: Problem) -> bool:
        """Whether it was measured at this very batch class."""
        return problem.batch_class in self._entries.get(problem.key, {})

    def add(self, problem: Problem, config: Config) -> None:
        by_batch = self._entries.setdefault(problem.key, {})
        by_batch[problem.batch_class] = dataclasses.asdict(config)

    def merge(self, path: Path) -> None:
        """Take in a file's entries. A file that is not there is an empty one.

        Raises:
            ValueError: the file is no table of this version.
        """
        try:
            text = path.read_text()
        except FileNotFoundError:
            return
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            raise ValueError(f"it is not a table of version {_VERSION}")
        for key, by_batch in content["configurations"].items():
            known = _fields_of(key)
            for batch, values in by_batch.items():
                if set(values) != known or any(type(v) not in (int, bool) for v in values.values()):
                    raise ValueError(f"{key} has fields other than {sorted(known)}")
                self._entries.setdefault(key, {})[int(batch)] = values

    def save(self, path: Path, device: str) -> None:
        """Write beside and rename, together with what another process has saved meanwhile."""
        whole = Table()
        whole.merge(path)
        for key, by_batch in self._entries.items():
            whole._entries.setdefault(key, {}).update(by_batch)
        ordered = {
            key: {str(batch): by_batch[batch] for batch in sorted(by_batch)}
            for key, by_batch in sorted(whole._entries.items())
        }
        content = {"version": _VERSION, "device": device, "configurations": ordered}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)


def _fields_of(key: str) -> set[str]:
    kind = PixelConfig if key.partition("/")[0] in PIXEL_KERNELS else ConvConfig
    return {field.name for field in dataclasses.fields(kind)}


# Kernels with a PixelConfig; the others have a ConvConfig.
PIXEL_KERNELS = frozenset(("quantize_pack_kernel", "unpack_dequantize_kernel", "rnn_gate_kernel"))


def choose(
    problem: Problem,
    device: torch.device,
    configs: Sequence[Config],
    rehearse: Callable[[Config], object],
) -> Config:
    """The configuration to launch with.

    Args:
        configs: what there is to choose from, the default first.
        rehearse: does the work without lasting effect, so that it can be timed.
    """
    if device.type != "cuda" and not _active:
        return configs[0]
    name = device_name(device)
    table = _table(name)
    if _active and not table.holds(problem):
        table.add(problem, _fastest(problem, configs, rehearse))
        table.save(cache_path(name), name)
    return table.find(problem, configs[0]) or configs[0]


def _fastest(
    problem: Problem, configs: Sequence[Config], rehearse: Callable[[Config], object]
) -> Config:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup can't tune kernels while a CUDA graph is captured")
    times = [measure(functools.partial(rehearse, config)) for config in configs]
    best = min(range(len(configs)), key=times.__getitem__)
    if math.isinf(times[best]):
        raise RuntimeError(f"no configuration of {problem.kernel} runs on this GPU: {problem.key}")
    return configs[best]


def measure(call: Callable[[], object]) -> float:
    """Median milliseconds of a launch; infinity for one that does not fit the GPU."""
    from triton import testing
    from triton.runtime.errors import OutOfResources

    try:
        time: float = testing.do_bench(
            call, warmup=_WARMUP_MS, rep=_REPEAT_MS, return_mode="median"
        )
    except OutOfResources:
        return math.inf
    return time


@contextmanager
def tuning() -> Iterator[None]:
    """Within it, every launch of a kernel at sizes that were never measured measures first."""
    global _active
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before


def device_name(device: torch.device) -> str:
    return "interpreter" if device.type == "cpu" else _cuda_name(device.index)


@functools.cache
def _cuda_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def cache_path(device: str) -> Path:
    """The file with what was measured on a GPU of this name, by this version of Triton."""
    import triton

    return cache_folder() / f"{slug(device)}-triton-{triton.__version__}.json"


def cache_folder() -> Path:
    folder = os.environ.get("DFS_CACHE_DIR")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfs_kernels"


def slug(device: str) -> str:
    """A GPU's name as a file name: "NVIDIA H100 80GB HBM3" gives h100-80gb-hbm3."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return "-".join(word for word in words if word != "nvidia") or "gpu"


@functools.cache
def _table(device: str) -> Table:
    table = Table()
    for path in (TABLES / f"{slug(device)}.json", cache_path(device)):
        try:
            table.merge(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"{path} is not used ({error}); delete it to measure again",
                RuntimeWarning,
                stacklevel=4,
            )
    return table


def forget() -> None:
    """Read the files again at the next launch."""
    _table.cache_clear()
