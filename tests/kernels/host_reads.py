"""Finds, without a GPU, what would make the host wait for one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfs_kernels.backends import load

_READS = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), bool(), .tolist()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,  # torch.tensor(), whose numbers are copied and waited for
}
_INDEXINGS = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}
_FUNCTIONS = (
    "mixed_conv2d", "mixed_conv2d_backward", "quantize_pack", "unpack_dequantize", "pack_bits",
    "unpack_bits", "retile_weight", "rnn_gate",
)  # fmt: skip


class HostReads(TorchDispatchMode):
    """Raises where values go from the device to the host, or numbers the other way."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        by_mask = func in _INDEXINGS and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func in _READS or by_mask:
            raise RuntimeError(f"{func} would synchronize with a GPU")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(backend: str) -> Iterator[None]:
    """``torch.cuda.set_sync_debug_mode("error")`` for CPU tensors.

    Triton's kernels are not launched, as its interpreter computes with PyTorch.
    """
    module = load(backend)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        # An op's own code runs below the modes that its caller entered.
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with HostReads():
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        if backend == "triton":
            stack.enter_context(patch.object(module, "_launch", lambda *args, **constants: None))
        for name in _FUNCTIONS:
            function = watched(getattr(module, name))
            stack.enter_context(patch.object(module, name, function))
        # On a CPU the ops look at values themselves, which they don't on a GPU.
        stack.enter_context(patch("dfs_kernels.ops._may_read", lambda tensor: False))
        stack.enter_context(HostReads())
        yield
