"""The layer shapes that are timed, and tensors for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dfs_kernels import PackedConvWeight

Device = torch.device | str
INTEGER_WIDTHS = (2, 4, 8)
# Steps that cover a rectified, and a signed, input of unit variance.
UNSIGNED_STEPS = {2: 1.0, 4: 0.25, 8: 0.016}
SIGNED_STEPS = {2: 1.5, 4: 0.5, 8: 0.032}
UNSIGNED_ZERO_POINTS = {2: 0, 4: 0, 8: 0}
SIGNED_ZERO_POINTS = {2: 2, 4: 8, 8: 128}


@dataclass(frozen=True)
class Layer:
    """One convolution with padding kernel // 2.

    Attributes:
        name: what a benchmark of it is called.
        family: "square" (3x3, stride 1, as many channels out as in), "strided", "pointwise",
            "depthwise" or "stem".
        side: H and W of the input.
        batches: the batch sizes it is timed at.
    """

    name: str
    family: str
    in_channels: int
    out_channels: int
    side: int
    batches: tuple[int, ...]
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_side(self) -> int:
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def group_channels(self) -> int:
        return self.in_channels // self.groups

    @property
    def in_values(self) -> int:
        """Values of one sample's input."""
        return self.in_channels * self.side**2

    @property
    def out_values(self) -> int:
        """Values of one sample's output."""
        return self.out_channels * self.out_side**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample, padding counted as if it were data."""
        return self.out_values * self.group_channels * self.kernel**2

    @property
    def is_signed(self) -> bool:
        """Whether its input is an image, or else what a ReLU has left."""
        return self.family == "stem"

    @property
    def steps(self) -> dict[int, float]:
        return SIGNED_STEPS if self.is_signed else UNSIGNED_STEPS

    @property
    def zero_points(self) -> dict[int, int]:
        return SIGNED_ZERO_POINTS if self.is_signed else UNSIGNED_ZERO_POINTS


def _square(channels: int, side: int, batches: tuple[int, ...]) -> Layer:
    return Layer(f"{channels}x{side}x{side}", "square", channels, channels, side, batches)


def _strided(channels: int, side: int, batches: tuple[int, ...]) -> Layer:
    name = f"{channels}to{2 * channels}x{side}x{side}-s2"
    return Layer(name, "strided", channels, 2 * channels, side, batches, stride=2)


def _pointwise(
    channels: int, out_channels: int, side: int, batches: tuple[int, ...], stride: int = 1
) -> Layer:
    name = f"{channels}to{out_channels}x{side}x{side}-1x1" + (f"-s{stride}" if stride > 1 else "")
    return Layer(name, "pointwise", channels, out_channels, side, batches, kernel=1, stride=stride)


def _depthwise(channels: int, side: int, batches: tuple[int, ...]) -> Layer:
    name = f"{channels}x{side}x{side}-depthwise"
    return Layer(name, "depthwise", channels, channels, side, batches, groups=channels)


# For CIFAR: the three stages of a ResNet and what lies between them. For ImageNet: the four
# stages of ResNet-18, a bottleneck's 1x1, MobileNet's depthwise layers and the first convolution.
_CIFAR = (64, 1)
_IMAGENET = (8, 1)
LAYERS = (
    _square(16, 32, _CIFAR),
    _square(32, 16, _CIFAR),
    _square(64, 8, _CIFAR),
    _strided(16, 32, _CIFAR),
    _strided(32, 16, _CIFAR),
    _pointwise(16, 32, 32, _CIFAR, stride=2),
    _pointwise(32, 64, 16, _CIFAR, stride=2),
    _pointwise(16, 16, 32, _CIFAR),
    _pointwise(64, 64, 8, _CIFAR),
    _square(64, 56, _IMAGENET),
    _square(128, 28, _IMAGENET),
    _square(256, 14, _IMAGENET),
    _square(512, 7, _IMAGENET),
    _pointwise(256, 64, 56, _IMAGENET),
    _depthwise(96, 28, _IMAGENET),
    _depthwise(144, 14, _IMAGENET),
    Layer("3to64x224x224-7x7-s2", "stem", 3, 64, 224, (1,), kernel=7, stride=2),
)
# A GPU is filled by more: the CIFAR layers at up to 1024 images, the others at up to 64.
GPU_LAYERS = tuple(
    replace(layer, batches=(1024, 64, 1) if layer.batches == _CIFAR else (64, 1))
    for layer in LAYERS
)


@dataclass
class LayerWeights:
    """The weight of a layer in the forms that the contestants take."""

    layer: Layer
    weight: Tensor
    scales: dict[int, Tensor]

    @cached_property
    def packed(self) -> PackedConvWeight:
        return PackedConvWeight.from_float(self.weight, self.scales, INTEGER_WIDTHS)

    @cached_property
    def packed_float(self) -> PackedConvWeight:
        return PackedConvWeight.from_float(self.weight, {}, (32,))


# Two at a time: benchmarks are ordered by layer, and a comparison needs one.
@lru_cache(maxsize=2)
def layer_weights(layer: Layer, device: Device = "cpu") -> LayerWeights:
    generator = torch.Generator(device).manual_seed(7)
    fan_in = layer.group_channels * layer.kernel**2
    # A rectified input's mean square is 1/2; outputs then have about unit variance.
    deviation = (0.5 * fan_in) ** -0.5
    shape = (layer.out_channels, layer.group_channels, layer.kernel, layer.kernel)
    weight = torch.randn(shape, generator=generator, device=device) * deviation
    # 8-bit weights stay within 7 bits: on processors without VNNI the peers add two products in 16
    # bits, which would saturate. Their times do not depend on it; ours are there those of weights
    # too large for such sums, as 8 bits have them after training.
    reach = {bits: 6 if bits == 8 else 3 for bits in INTEGER_WIDTHS}
    scales = {
        bits: torch.full(
            (layer.out_channels,), reach[bits] * deviation / 2 ** (bits - 1), device=device
        )
        for bits in INTEGER_WIDTHS
    }
    return LayerWeights(layer, weight, scales)


def layer_input(layer: Layer, batch: int, device: Device = "cpu") -> Tensor:
    """Float32 (batch, C, H, W), contiguous; other numbers on another kind of device."""
    generator = torch.Generator(device).manual_seed(11)
    shape = (batch, layer.in_channels, layer.side, layer.side)
    x = torch.randn(shape, generator=generator, device=device)
    return x if layer.is_signed else x.relu_()
