"""What runs a frozen network, chosen by the device."""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from dfs.engine.gpu import GpuExecutor, PlainCalls
from dfs.engine.graph import EngineGraph
from dfs.engine.native import EngineRun, NativeExecutor
from dfs_kernels.arguments import is_debugging


class DeviceError(RuntimeError):
    """There is no such GPU."""


class Executor(Protocol):
    """Runs one graph on one device."""

    device: torch.device

    def weight_bytes(self) -> int:
        """Of all weights as they are held for running."""

    def run(
        self,
        images: Tensor,
        policy: Tensor | None,
        choice_bias: Tensor | None,
        timed: bool = False,
    ) -> EngineRun:
        """Classify images.

        Args:
            images: float32 or uint8 (N, C, H, W) of any strides, on the device.
            policy: int32 (N, gated blocks) there, or None for the gates' decisions.
            choice_bias: float64 (choices,) on the CPU, or None for the network's own.
            timed: measure blocks and gates.
        """


def make_executor(
    graph: EngineGraph,
    tensors: dict[str, Tensor],
    pixel_values: Tensor | None,
    device: torch.device | str,
) -> Executor:
    """What runs a graph on a CPU or a GPU.

    Raises:
        ValueError: the device is neither.
        DeviceError: there is no such GPU.
    """
    target = check_device(device)
    if target.type == "cpu":
        return NativeExecutor(graph, tensors, pixel_values)
    # Values can't be looked at while a graph is recorded.
    plain = is_debugging() or os.environ.get("DFS_NO_GRAPHS", "0") == "1"
    return GpuExecutor(graph, tensors, pixel_values, target, PlainCalls() if plain else None)


def check_device(device: torch.device | str) -> torch.device:
    """A device that an engine can run on, a GPU by its number.

    Raises:
        ValueError: it is neither a CPU nor a CUDA GPU.
        DeviceError: there is no such GPU, or PyTorch is built without CUDA.
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {str(error).partition(chr(10))[0]}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {target}")
    if target.type == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise DeviceError(f"device {target} needs CUDA, which this PyTorch is built without")
    count = torch.cuda.device_count()
    index = target.index
    if index is None:
        index = torch.cuda.current_device() if count else 0
    if index >= count:
        raise DeviceError(f"device {target} is not there: PyTorch finds {count} CUDA GPUs")
    return torch.device("cuda", index)
