"""Networks, dynamic and plain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfs.models.architecture import (
    Architecture,
    architecture_of,
    cifar_resnet,
    imagenet_resnet,
    resnet_depth,
)
from dfs.models.dynamic import PAPER, DynamicOutput, DynamicResNet, LayerMacs, Policy
from dfs.models.plain import PlainResNet

__all__ = [
    "PAPER",
    "Architecture",
    "DynamicOutput",
    "DynamicResNet",
    "LayerMacs",
    "PlainResNet",
    "Policy",
    "architecture_of",
    "build_model",
    "cifar_resnet",
    "imagenet_resnet",
    "resnet_depth",
]


def build_model(
    name: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    choices: Sequence[int] | None = (0, 2, 4, 8),
    stream: str = "uint8",
    **options: Any,
) -> DynamicResNet | PlainResNet:
    """A network by name.

    Args:
        name: "resnet20" or another CIFAR depth 6n + 2, or "resnet18", 34, 50 or 101, which are the
            ImageNet networks.
        num_classes: by default 10 for CIFAR, 1000 for ImageNet.
        in_channels: of the images; 3 by default.
        choices: ascending widths; None gives the plain twin.
        options: further ones of :class:`DynamicResNet`, such as ``gate``. ``**PAPER`` gives what
            the paper's authors trained.
    """
    architecture = architecture_of(name)
    if choices is None:
        return PlainResNet(architecture, num_classes, in_channels)
    return DynamicResNet(architecture, num_classes, in_channels, choices, stream, **options)
