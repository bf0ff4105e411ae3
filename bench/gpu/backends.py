"""Which backends have kernels for GPU tensors."""

from __future__ import annotations

from bench.gpu.device import is_rehearsal
from dfs_kernels import backend_info
from dfs_kernels.backends import load
from dfs_kernels.backends.measured import CANDIDATES


def gpu_backends() -> tuple[str, ...]:
    """Backends with kernels for GPU tensors that run here; where none does, all there are."""
    kind = "cpu" if is_rehearsal() else "cuda"
    not_for_gpus = ("reference", "cpu", "defaults", "choice")
    others = tuple(n for n in backend_info() if n not in (*not_for_gpus, *CANDIDATES))
    return tuple(name for name in others if _runs(name, kind)) or others


def gpu_candidates() -> tuple[str, ...]:
    """Variants of these that run here, which are chosen only where they measured faster."""
    kind = "cpu" if is_rehearsal() else "cuda"
    return tuple(name for name in CANDIDATES if _runs(name, kind))


def _runs(name: str, kind: str) -> bool:
    module = load(name)
    return module.unavailable_reason() is None and bool(module.supports(kind, (8,)))
