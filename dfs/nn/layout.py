"""The memory layout that float networks are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def in_fast_layout(x: Tensor) -> Tensor:
    """Features (N, C, H, W), on a CPU with their channels innermost; what follows keeps that.

    oneDNN reorders no input of a float32 convolution then: a training step of a ResNet-20 takes
    three quarters of the time. On a GPU they are left as they are.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
