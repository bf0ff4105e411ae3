"""The static full-precision twin of a dynamic network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs.models.architecture import Architecture, as_architecture
from dfs.models.torchvision_keys import from_torchvision
from dfs.nn.layout import in_fast_layout
from dfs.nn.replicas import SyncedBatchNorm2d
from dfs.nn.shapes import BlockShape


class PlainBlock(nn.Module):
    """ReLU(shortcut(x) + branch(x)), its layers named as those of :class:`dfs.nn.ResidualBlock`."""

    def __init__(self, shape: BlockShape, eps: float) -> None:
        super().__init__()
        self.branch_length = len(shape.convs)
        for i, conv in enumerate(shape.convs, 1):
            setattr(self, f"conv{i}", conv.make())
            setattr(self, f"bn{i}", SyncedBatchNorm2d(conv.out_channels, eps))
        self.downsamples = shape.shortcut is not None
        if shape.shortcut is not None:
            self.shortcut = shape.shortcut.make()
            self.bn_shortcut = SyncedBatchNorm2d(shape.out_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        carried = self.bn_shortcut(self.shortcut(x)) if self.downsamples else x
        for i in range(1, self.branch_length + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            if i < self.branch_length:
                x = torch.relu(x)
        return torch.relu(carried + x)


class PlainResNet(nn.Module):
    """The static full-precision twin: (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        architecture: or an int, the depth of a CIFAR ResNet.
        num_classes, in_channels: None keeps those of the architecture.
    """

    def __init__(
        self,
        architecture: Architecture | int,
        num_classes: int | None = None,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.architecture = shape = as_architecture(architecture, num_classes, in_channels)
        self.stem = shape.stem.make()
        self.bn_stem = SyncedBatchNorm2d(shape.stem.out_channels, shape.norm_eps)
        self.blocks = nn.ModuleList(PlainBlock(b, shape.norm_eps) for b in shape.blocks)
        self.classifier = nn.Conv2d(shape.out_channels, shape.num_classes, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = pool_float(torch.relu(self.bn_stem(in_fast_layout(self.stem(x)))), self.architecture)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)

    def load_torchvision(self, state: Mapping[str, Tensor]) -> None:
        """Take the state dict of torchvision's or timm's network of the same architecture.

        The keys are mapped as :func:`dfs.models.torchvision_keys.from_torchvision` says.

        Raises:
            ValueError: naming a key that is unknown.
            RuntimeError: the state dict does not fit, as of ``load_state_dict``.
        """
        self.load_state_dict(from_torchvision(state), strict=True)


def pool_float(x: Tensor, architecture: Architecture) -> Tensor:
    """The max pool behind the stem, if there is one."""
    pool = architecture.pool
    return x if pool is None else F.max_pool2d(x, pool.kernel, pool.stride, pool.padding)


def initialise(model: nn.Module) -> None:
    """Kaiming-normal convolutions (He et al., ICCV 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
