"""Image sets, their splits, and batches whose order depends on seed and step alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dfs.data.augment import Augmentation
from dfs.data.files import FileCheck
from dfs.data.preprocessing import Preprocessing


class Images(Protocol):
    """A set of images as training and evaluation see it, wherever it is kept."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of what the network gets."""

    @property
    def channels(self) -> int: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[ImageSet]:
        """In order, normalized, without augmentation; the last one may be short."""

    def first(self, count: int) -> Tensor:
        """The first images, at most ``count``, normalized: float32 (n, C, H, W)."""

    def training_batch(
        self, augmentation: Augmentation, size: int, seed: int, step: int
    ) -> ImageSet:
        """The augmented batch of a step, a function of its arguments alone."""

    def take(self, index: Tensor) -> Images:
        """Those of an index, int64 (n,)."""

    def to(self, device: torch.device | str) -> Images:
        """The same set, its batches on ``device``."""

    def prepared(self, preprocessing: Preprocessing) -> Images:
        """The same pictures, prepared as another network takes them."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory, all of one size.

    Attributes:
        images: (N, C, H, W); normalized float32, or uint8 that ``preprocessing`` normalizes.
        labels: int64 (N,), on the same device.
    """

    images: Tensor
    labels: Tensor
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        if self.images.dtype == torch.uint8 and self.preprocessing is None:
            raise ValueError("images of type uint8 need a preprocessing")

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[3]

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.preprocessing)

    def prepared(self, preprocessing: Preprocessing) -> ImageSet:
        """ValueError if what it asks for can't be made of these images."""
        if self.images.dtype != torch.uint8:
            raise ValueError("these images are kept normalized; they can't be prepared anew")
        if (preprocessing.channels, preprocessing.size) != self.images.shape[1:3]:
            raise ValueError(
                f"the network takes {preprocessing.channels} channels of {preprocessing.size} "
                f"pixels, the images have {tuple(self.images.shape[1:])}"
            )
        return ImageSet(self.images, self.labels, preprocessing)

    def take(self, index: Tensor) -> ImageSet:
        index = index.to(self.images.device, non_blocking=True)
        return ImageSet(self.images[index], self.labels[index], self.preprocessing)

    def normalized(self) -> ImageSet:
        """The same images as float32."""
        if self.images.dtype != torch.uint8:
            return self
        assert self.preprocessing is not None
        return ImageSet(self.preprocessing.normalize(self.images), self.labels)

    def first(self, count: int) -> Tensor:
        return self._slice(0, count).normalized().images

    def batches(self, size: int) -> Iterator[ImageSet]:
        for start in range(0, len(self), size):
            yield self._slice(start, start + size).normalized()

    def training_batch(
        self, augmentation: Augmentation, size: int, seed: int, step: int
    ) -> ImageSet:
        batch = self.take(step_index(len(self), size, seed, step))
        images = augmentation.apply(batch.images, step_generator(seed, step))
        return ImageSet(images, batch.labels, batch.preprocessing).normalized()

    def _slice(self, start: int, stop: int) -> ImageSet:
        return ImageSet(self.images[start:stop], self.labels[start:stop], self.preprocessing)


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set as it is trained on.

    Attributes:
        train: what weights learn from.
        gate: training images that the weights never see, on which gates learn.
        val: for choices and calibration.
        test: for reported figures only.
        shift: largest random translation of a training image, in pixels.
        flip: whether training images are mirrored at random.
        border: what a translation brings in: "replicate" the border, or "constant" black.
        preprocessing: how a picture becomes one of these images; None if it can't.
        files: the checksums of the files the set was read from.
    """

    name: str
    classes: int
    train: Images
    gate: Images
    val: Images
    test: Images
    shift: int
    flip: bool
    border: str = "replicate"
    preprocessing: Preprocessing | None = None
    files: Sequence[FileCheck] = ()

    @property
    def channels(self) -> int:
        return self.train.channels

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.image_size

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.shift, self.flip, self.border)

    def to(self, device: torch.device | str) -> DataSplits:
        """The same splits, their batches on ``device``."""
        parts: dict[str, Any] = {name: part.to(device) for name, part in self._parts().items()}
        return replace(self, **parts)

    def prepared(self, preprocessing: Preprocessing) -> DataSplits:
        """The same splits as a network takes them that was trained elsewhere.

        Raises:
            ValueError: it knows other classes, or takes other images.
        """
        if preprocessing == self.preprocessing:
            return self
        own = None if self.preprocessing is None else self.preprocessing.class_names
        if preprocessing.class_names != own:
            raise ValueError(f"the network knows other classes than data set {self.name} has")
        parts: dict[str, Any] = {
            name: part.prepared(preprocessing) for name, part in self._parts().items()
        }
        return replace(self, **parts, preprocessing=preprocessing)

    def limited(self, count: int) -> DataSplits:
        """With ``count`` of the training images at most, a tenth of them for the gates."""
        gates = max(count // 10, 1)
        train = self.train.take(torch.arange(min(count - gates, len(self.train))))
        return replace(
            self, train=train, gate=self.gate.take(torch.arange(min(gates, len(self.gate))))
        )

    def _parts(self) -> dict[str, Images]:
        return {name: getattr(self, name) for name in ("train", "gate", "val", "test")}

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of its data: plain values."""
        preprocessing = self.preprocessing
        return {
            "name": self.name,
            "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
            "files": [check.to_dict() for check in self.files],
            "unverified": [check.file for check in self.files if not check.verified],
        }


@functools.lru_cache(maxsize=8)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in one epoch. Shared between callers: not to be changed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def step_index(count: int, size: int, seed: int, step: int) -> Tensor:
    """Which of ``count`` images make up the batch of a step.

    Epochs drop the images that do not fill a last batch.
    """
    size = min(size, count)
    epoch, place = divmod(step, count // size)
    return epoch_order(count, seed, epoch)[place * size : (place + 1) * size]


def step_generator(seed: int, step: int) -> torch.Generator:
    """What the augmentation of a step is drawn from, on the CPU: the same on every device."""
    return torch.Generator().manual_seed(seed * 7_368_787 + step)


def training_batch(data: DataSplits, subset: Images, size: int, seed: int, step: int) -> ImageSet:
    """The augmented batch of a step, a function of its arguments alone."""
    return subset.training_batch(data.augmentation, size, seed, step)
