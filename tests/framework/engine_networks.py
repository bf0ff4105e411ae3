"""Small networks whose gates have something to decide, for the tests of the engine."""

from __future__ import annotations

from typing import Any

import torch

from dfs.models import DynamicResNet
from dfs.models.architecture import Architecture, bottleneck
from dfs.nn.shapes import ConvShape, PoolShape

CLASSES = 7


def small_bottlenecks(channels: int) -> Architecture:
    """Like an ImageNet network, in small: large stem, max pool, strided bottlenecks."""
    blocks = (bottleneck(8, 4, 1), bottleneck(16, 4, 1), bottleneck(16, 6, 2), bottleneck(24, 6, 1))
    pool = PoolShape(3, 2, 1)
    return Architecture(ConvShape(channels, 8, 5, 2, 2), pool, blocks, CLASSES, name="small")


def lively_network(
    architecture: Architecture | int, channels: int, **options: Any
) -> DynamicResNet:
    """In evaluation mode, its parameters such that decisions differ between images and blocks."""
    model = DynamicResNet(architecture, CLASSES, channels, **options)
    for name, parameter in model.named_parameters():
        if "bn" in name:
            parameter.data += torch.randn_like(parameter) * 0.2
        if name.startswith(("gate.embed", "gate.proj")):
            parameter.data *= 30 if name.endswith("weight") else 0
        if name == "gate.logits":
            parameter.data.normal_()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += torch.rand_like(buffer) * 0.3
    return model.eval()
