"""The shapes of convolutions, pools and residual blocks, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class ConvShape:
    """A square convolution without a bias."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    def __str__(self) -> str:
        parts = [f"{self.kernel}x{self.kernel} {self.in_channels}>{self.out_channels}"]
        parts += [f"/{self.stride}"] * (self.stride != 1)
        parts += [f"p{self.padding}"]
        parts += [f"d{self.dilation}"] * (self.dilation != 1)
        parts += [f"g{self.groups}"] * (self.groups != 1)
        return " ".join(parts)

    def output_size(self, size: Size) -> Size:
        """(OH, OW) for an input of (H, W)."""
        reach = self.dilation * (self.kernel - 1) + 1
        height, width = ((n + 2 * self.padding - reach) // self.stride + 1 for n in size)
        return height, width

    def macs(self, size: Size) -> int:
        """Multiply-accumulates of one image, for an input of (H, W)."""
        height, width = self.output_size(size)
        taps = self.in_channels // self.groups * self.kernel**2
        return taps * self.out_channels * height * width

    def make(self) -> nn.Conv2d:
        """The plain layer."""
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=False,
        )


@dataclass(frozen=True)
class PoolShape:
    """A square max pool."""

    kernel: int
    stride: int
    padding: int

    def output_size(self, size: Size) -> Size:
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in size)
        return height, width


@dataclass(frozen=True)
class BlockShape:
    """A residual block: ReLU(shortcut(x) + branch(x)).

    Attributes:
        convs: the branch, two convolutions or more, each with its BatchNorm, ReLU between them.
        shortcut: None for the identity, else a convolution with its BatchNorm.
    """

    convs: tuple[ConvShape, ...]
    shortcut: ConvShape | None = None

    def __post_init__(self) -> None:
        if len(self.convs) < 2:
            raise ValueError(f"convs must be at least two, got {len(self.convs)}")

    def __str__(self) -> str:
        branch = ", ".join(map(str, self.convs))
        return branch if self.shortcut is None else f"{branch} + {self.shortcut}"

    @property
    def in_channels(self) -> int:
        return self.convs[0].in_channels

    @property
    def out_channels(self) -> int:
        return self.convs[-1].out_channels

    def output_size(self, size: Size) -> Size:
        for conv in self.convs:
            size = conv.output_size(size)
        return size

    def branch_macs(self, size: Size) -> int:
        """Multiply-accumulates of the branch of one image, for an input of (H, W)."""
        total = 0
        for conv in self.convs:
            total += conv.macs(size)
            size = conv.output_size(size)
        return total
