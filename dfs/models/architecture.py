"""What a residual network is made of: shapes, from which its plain and dynamic forms are built.

A network is a stem (one convolution, perhaps a max pool), residual blocks, global average pooling
and a linear classifier. CIFAR ResNets follow He et al. (CVPR 2016), section 4.2, ImageNet ResNets
table 1 with the stride on the 3x3 convolution of a bottleneck, as torchvision has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dfs.nn.shapes import BlockShape, ConvShape, PoolShape, Size

_CIFAR_WIDTHS = (16, 32, 64)
_IMAGENET_WIDTHS = (64, 128, 256, 512)
_EXPANSION = 4
# Blocks per stage, and whether they are bottlenecks.
_IMAGENET: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}


@dataclass(frozen=True)
class Architecture:
    """A residual network.

    Attributes:
        stem: the first convolution, with a BatchNorm and ReLU.
        pool: the max pool behind it, or None.
        blocks: the first is not gated in a dynamic network.
        norm_eps: of every BatchNorm.
        name: for people; networks that differ in it alone are equal.
    """

    stem: ConvShape
    pool: PoolShape | None
    blocks: tuple[BlockShape, ...]
    num_classes: int
    norm_eps: float = 1e-5
    name: str = field(default="resnet", compare=False)

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.in_channels < 1:
            raise ValueError(
                "num_classes and in_channels must be positive, "
                f"got {self.num_classes}, {self.in_channels}"
            )
        if len(self.blocks) < 2:
            raise ValueError(f"blocks must be at least two, got {len(self.blocks)}")
        channels = self.stem.out_channels
        for i, block in enumerate(self.blocks):
            if block.in_channels != channels:
                raise ValueError(
                    f"blocks[{i}] takes {block.in_channels} channels, but is given {channels}"
                )
            channels = block.out_channels

    @property
    def in_channels(self) -> int:
        return self.stem.in_channels

    @property
    def out_channels(self) -> int:
        """Of the last block."""
        return self.blocks[-1].out_channels

    @property
    def streams(self) -> tuple[int, ...]:
        """Which residual stream each block writes; the stem writes stream 0.

        A stream goes from one convolution shortcut to the next, since what lies between adds to it
        in place. That is a stream per resolution, and one for the stem where the first block has a
        convolution shortcut, as bottlenecks have.
        """
        indices, current = [], 0
        for block in self.blocks:
            current += block.shortcut is not None
            indices.append(current)
        return tuple(indices)

    def pooled_size(self, size: Size) -> Size:
        """(H, W) of what the first block is given, for images of (H, W)."""
        size = self.stem.output_size(size)
        return size if self.pool is None else self.pool.output_size(size)

    def block_sizes(self, size: Size) -> Iterator[tuple[BlockShape, Size]]:
        """Every block and the (H, W) it is given, for images of (H, W)."""
        size = self.pooled_size(size)
        for block in self.blocks:
            yield block, size
            size = block.output_size(size)

    def with_task(self, num_classes: int | None, in_channels: int | None) -> Architecture:
        """The same for other classes and image channels; None keeps what it had."""
        return replace(
            self,
            num_classes=self.num_classes if num_classes is None else num_classes,
            stem=replace(
                self.stem, in_channels=self.in_channels if in_channels is None else in_channels
            ),
        )


def basic_block(in_channels: int, out_channels: int, stride: int) -> BlockShape:
    """Two 3x3 convolutions; a 1x1 shortcut where the shape changes."""
    return BlockShape(
        (
            ConvShape(in_channels, out_channels, 3, stride, 1),
            ConvShape(out_channels, out_channels, 3, 1, 1),
        ),
        _shortcut(in_channels, out_channels, stride),
    )


def bottleneck(in_channels: int, width: int, stride: int) -> BlockShape:
    """1x1, 3x3 and 1x1 convolutions, the last to four times ``width``."""
    out_channels = _EXPANSION * width
    return BlockShape(
        (
            ConvShape(in_channels, width, 1),
            ConvShape(width, width, 3, stride, 1),
            ConvShape(width, out_channels, 1),
        ),
        _shortcut(in_channels, out_channels, stride),
    )


def _shortcut(in_channels: int, out_channels: int, stride: int) -> ConvShape | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return ConvShape(in_channels, out_channels, 1, stride)


def cifar_resnet(depth: int) -> Architecture:
    """The CIFAR ResNet of a depth 6n + 2: three stages of n basic blocks."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"model depth must be 6n + 2 from 8 on, or one of {tuple(_IMAGENET)}, got {depth}"
        )
    blocks, channels = [], _CIFAR_WIDTHS[0]
    for stage, width in enumerate(_CIFAR_WIDTHS):
        for i in range((depth - 2) // 6):
            blocks.append(basic_block(channels, width, 2 if stage and not i else 1))
            channels = width
    stem = ConvShape(3, _CIFAR_WIDTHS[0], 3, 1, 1)
    return Architecture(stem, None, tuple(blocks), 10, name=f"resnet{depth}")


def imagenet_resnet(depth: int) -> Architecture:
    """The ImageNet ResNet of depth 18, 34, 50 or 101."""
    if depth not in _IMAGENET:
        raise ValueError(f"model depth must be one of {tuple(_IMAGENET)}, got {depth}")
    counts, bottlenecks = _IMAGENET[depth]
    blocks, channels = [], _IMAGENET_WIDTHS[0]
    for stage, (width, count) in enumerate(zip(_IMAGENET_WIDTHS, counts, strict=True)):
        for i in range(count):
            make = bottleneck if bottlenecks else basic_block
            blocks.append(make(channels, width, 2 if stage and not i else 1))
            channels = blocks[-1].out_channels
    stem = ConvShape(3, _IMAGENET_WIDTHS[0], 7, 2, 3)
    return Architecture(stem, PoolShape(3, 2, 1), tuple(blocks), 1000, name=f"resnet{depth}")


def architecture_of(name: str) -> Architecture:
    """The architecture behind a name.

    "resnet18", 34, 50 and 101 are the ImageNet networks; every other depth 6n + 2 is CIFAR's.

    Raises:
        ValueError: naming what is wrong with ``name``.
    """
    depth = resnet_depth(name)
    return imagenet_resnet(depth) if depth in _IMAGENET else cifar_resnet(depth)


def resnet_depth(name: str) -> int:
    """The depth in a name like "resnet20"; ValueError unless there is such a network."""
    digits = name.removeprefix("resnet")
    if not name.startswith("resnet") or not digits.isdecimal():
        raise ValueError(f"model must be named like 'resnet20', got {name!r}")
    depth = int(digits)
    if depth not in _IMAGENET:
        cifar_resnet(depth)
    return depth


def as_architecture(
    architecture: Architecture | int, num_classes: int | None, in_channels: int | None
) -> Architecture:
    """An architecture, or the CIFAR ResNet of a depth, for the classes and channels of a task."""
    if isinstance(architecture, int):
        architecture = cifar_resnet(architecture)
    return architecture.with_task(num_classes, in_channels)
