"""Small data and settings that the framework's tests share."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dfs.cli import main
from dfs.data import DataSplits, ImageSet
from dfs.models import Architecture, DynamicResNet
from dfs.models.architecture import basic_block
from dfs.nn import LSQ, PerWidthBatchNorm2d
from dfs.nn.shapes import BlockShape, ConvShape, PoolShape
from dfs.train import TrainConfig

TINY = TrainConfig(
    model="resnet8",
    target=0.03,
    batch_size=16,
    float_epochs=2,
    switch_epochs=1,
    exit_points=(),
    calibration_images=32,
    gate_epochs=2,
    joint_epochs=2,
    batchnorm_images=32,
    batchnorm_min_routed=4,
    cost_tolerance=1.0,
)

# The recipe of the paper's authors.
TINY_PAPER = replace(
    TINY,
    recipe="paper",
    semantics="paper",
    stream="float32",
    choices=(0, 8, 32),
    target=0.3,
    float_epochs=2,
    gate_epochs=3,
    gate_lr=0.05,
    joint_epochs=1,
    joint_lr=0.01,
    beta=0.05,
    cost_tolerance=10.0,
)


def equal_content(first: Any, second: Any) -> bool:
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return False
        return all(equal_content(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal_content, first, second))
    return bool(first == second)


def tiny_data(size: int = 8) -> DataSplits:
    """Blobs in one of four corners: learnable, and made in a moment."""
    generator = torch.Generator().manual_seed(7)

    def draw(count: int) -> ImageSet:
        labels = torch.randint(4, (count,), generator=generator)
        images = 0.3 * torch.randn(count, 1, size, size, generator=generator)
        half = size // 2
        for image, label in zip(images, labels.tolist(), strict=True):
            top, left = half * (label // 2), half * (label % 2)
            image[:, top : top + half, left : left + half] += 1.0
        return ImageSet(images, labels)

    return DataSplits("tiny", 4, draw(64), draw(32), draw(32), draw(32), shift=1, flip=False)


def settled_model(seed: int = 0, depth: int = 14, **kwargs: object) -> DynamicResNet:
    """A dynamic network with BatchNorm statistics and parameters that are not the defaults."""
    torch.manual_seed(seed)
    return settle(DynamicResNet(depth, 10, 3, **kwargs))  # type: ignore[arg-type]


def settle(model: DynamicResNet) -> DynamicResNet:
    """Give a new network statistics and parameters that are not the defaults, in evaluation."""
    for module in model.modules():
        if isinstance(module, PerWidthBatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.uniform_(module.bias, -0.2, 0.4)
        elif isinstance(module, LSQ):
            # Or the first forward in training mode would set the input steps anew.
            module.initialised.fill_(True)
    return model.eval()


def run_dfs(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """The command in this process: its exit code, what it printed, and its errors."""
    monkeypatch.setattr(sys, "argv", ["dfs", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, printed.out, printed.err


def small_bottlenecks(groups: int = 1) -> Architecture:
    """Three bottlenecks behind a max-pooled stem, in two resolutions."""

    def block(channels: int, width: int, out_channels: int, stride: int) -> BlockShape:
        convs = (
            ConvShape(channels, width, 1),
            ConvShape(width, width, 3, stride, 1, groups=groups),
            ConvShape(width, out_channels, 1),
        )
        same = channels == out_channels and stride == 1
        return BlockShape(convs, None if same else ConvShape(channels, out_channels, 1, stride))

    blocks = (block(8, 4, 16, 1), block(16, 4, 16, 1), block(16, 8, 24, 2))
    return Architecture(ConvShape(3, 8, 5, 2, 2), PoolShape(3, 2, 1), blocks, 5)


def small_basic() -> Architecture:
    """Three basic blocks behind a max-pooled stem, in two resolutions."""
    blocks = (basic_block(8, 8, 1), basic_block(8, 8, 1), basic_block(8, 12, 2))
    return Architecture(ConvShape(3, 8, 7, 2, 3), PoolShape(3, 2, 1), blocks, 5)


def sweep_result(seed: int, accuracy: float, **more: object) -> dict[str, object]:
    """What a sweep says of a dynamic network."""
    return {
        "method": "dfs",
        "label": "DFS",
        "target": 0.02,
        "seed": seed,
        "accuracy": accuracy,
        "paper_cost": 0.02,
        "bitops": 0.03,
        "latency": None,
        "milliseconds_per_image": 0.5,
        **more,
    }
