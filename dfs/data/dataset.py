"""In-memory image sets, their splits, and batches whose order depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Normalized images float32 (N, C, H, W) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def take(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])

    def batches(self, size: int) -> Iterator[ImageSet]:
        """In order, without augmentation; the last one may be short."""
        for start in range(0, len(self), size):
            stop = start + size
            yield ImageSet(self.images[start:stop], self.labels[start:stop])


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
    """

    name: str
    classes: int
    train: ImageSet
    gate: ImageSet
    val: ImageSet
    test: ImageSet
    shift: int
    flip: bool

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.images.shape[2], self.train.images.shape[3]

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Random translation and mirroring, drawn per image."""
        count, _, height, width = images.shape
        if self.shift:
            padded = F.pad(images, [self.shift] * 4, mode="replicate")
            offsets = torch.randint(2 * self.shift + 1, (count, 2), generator=generator)
            rows = offsets[:, :1] + torch.arange(height)
            columns = offsets[:, 1:] + torch.arange(width)
            picked = padded[
                torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]
            ]
            images = picked.permute(0, 3, 1, 2).contiguous()
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in one epoch, a function of its arguments alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def training_batch(data: DataSplits, subset: ImageSet, size: int, seed: int, step: int) -> ImageSet:
    """The augmented batch of a step, a function of its arguments alone.

    Epochs drop the images that do not fill a last batch.
    """
    size = min(size, len(subset))
    per_epoch = len(subset) // size
    epoch, place = divmod(step, per_epoch)
    index = epoch_order(len(subset), seed, epoch)[place * size : (place + 1) * size]
    batch = subset.take(index)
    generator = torch.Generator().manual_seed(seed * 7_368_787 + step)
    return ImageSet(data.augment(batch.images, generator), batch.labels)


_LOADERS: dict[str, Callable[[int], DataSplits]] = {}


def register(name: str) -> Callable[[Callable[[int], DataSplits]], Callable[[int], DataSplits]]:
    """Make a loader, which takes the seed of the gate split, known by name."""

    def add(loader: Callable[[int], DataSplits]) -> Callable[[int], DataSplits]:
        _LOADERS[name] = loader
        return loader

    return add


def load_dataset(name: str, seed: int = 0) -> DataSplits:
    """A data set by name; ValueError lists the known ones.

    Args:
        seed: decides which training images the gates get; the test images are always the same.
    """
    from dfs.data import digits  # noqa: F401  (registers itself)

    if name not in _LOADERS:
        raise ValueError(f"dataset must be one of {sorted(_LOADERS)}, got {name!r}")
    return _LOADERS[name](seed)
