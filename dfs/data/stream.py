"""Pictures that stay on disk and are decoded, in other processes, as they are needed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfs.data.augment import Augmentation, random_cut
from dfs.data.dataset import ImageSet, step_generator, step_index
from dfs.data.picture import PictureError, cut_pixels, network_pixels, read_picture
from dfs.data.preprocessing import Preprocessing

# Batches that each process works ahead.
_AHEAD = 2
_BATCH = 64
# Index of a picture, and the seed of its augmentation or None for none.
_Order = Sequence[tuple[int, int | None]]


class PictureFiles:
    """Paths of pictures, held in one array.

    A list of a million strings would be copied into every process that touches their counts.
    """

    def __init__(self, paths: Sequence[str] | np.ndarray) -> None:
        self._paths = (
            paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(p) for p in paths])
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Path:
        return Path(os.fsdecode(bytes(self._paths[index])))

    def take(self, index: Tensor) -> PictureFiles:
        return PictureFiles(self._paths[index.numpy()])


class _Decoder(Dataset[Tensor | str]):
    """Decodes a batch: uint8 (N, C, size, size), or what is wrong with one of its files.

    The message travels as a value: from an exception in another process little but a traceback
    would be left.
    """

    def __init__(self, files: PictureFiles, preprocessing: Preprocessing, flip: bool) -> None:
        self._files = files
        self._preprocessing = preprocessing
        self._flip = flip

    def __getitem__(self, order: _Order) -> Tensor | str:
        try:
            return torch.stack([self._pixels(index, seed) for index, seed in order])
        except PictureError as error:
            return str(error)

    def _pixels(self, index: int, seed: int | None) -> Tensor:
        path, preprocessing = self._files[index], self._preprocessing
        if seed is None:
            return network_pixels(path, preprocessing)
        generator = torch.Generator().manual_seed(seed)
        picture = read_picture(path, preprocessing.channels)
        pixels = cut_pixels(picture, random_cut(*picture.size, generator), preprocessing.size)
        mirrored = self._flip and bool(torch.rand((), generator=generator) < 0.5)
        return pixels.flip(2) if mirrored else pixels


class StreamedImages:
    """Pictures on disk with their labels: a set of images (see :class:`dfs.data.Images`).

    Training batches are cut at random, mirrored, and scaled to the network's size; evaluation sees
    the middle. What a step gets depends on seed and step alone, however many processes decode.

    Args:
        labels: int64 (N,).
        workers: processes that decode; 0 decodes in this one, None takes as many as PyTorch has
            threads.
        device: where batches go.
    """

    def __init__(
        self,
        files: PictureFiles,
        labels: Tensor,
        preprocessing: Preprocessing,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._files = files
        self._labels = labels
        self.preprocessing = preprocessing
        self.workers = torch.get_num_threads() if workers is None else workers
        self.device = torch.device(device)
        self._ahead: tuple[object, Iterator[Tensor | str]] | None = None

    @property
    def labels(self) -> Tensor:
        return self._labels

    @property
    def image_size(self) -> tuple[int, int]:
        return self.preprocessing.size, self.preprocessing.size

    @property
    def channels(self) -> int:
        return self.preprocessing.channels

    def __len__(self) -> int:
        return len(self._files)

    def take(self, index: Tensor) -> StreamedImages:
        files = self._files.take(index)
        labels = self._labels[index]
        return StreamedImages(files, labels, self.preprocessing, self.workers, self.device)

    def to(self, device: torch.device | str) -> StreamedImages:
        return StreamedImages(self._files, self._labels, self.preprocessing, self.workers, device)

    def prepared(self, preprocessing: Preprocessing) -> StreamedImages:
        return StreamedImages(self._files, self._labels, preprocessing, self.workers, self.device)

    def batches(self, size: int) -> Iterator[ImageSet]:
        places = range(0, len(self), size)
        orders = [[(i, None) for i in range(p, min(p + size, len(self)))] for p in places]
        for order, pixels in zip(orders, self._decode(iter(orders), False), strict=True):
            yield self._batch(torch.tensor([i for i, _ in order]), pixels).normalized()

    def first(self, count: int) -> Tensor:
        count = min(count, len(self))
        some = self.take(torch.arange(count))
        return torch.cat([batch.images for batch in some.batches(_BATCH)])

    def in_memory(self) -> ImageSet:
        """The same images decoded, as evaluation sees them, in uint8."""
        index = torch.arange(len(self))
        orders = ([(i, None) for i in part.tolist()] for part in index.split(_BATCH))
        pixels = [self._checked(part) for part in self._decode(orders, False)]
        return ImageSet(torch.cat(pixels), self._labels, self.preprocessing).to(self.device)

    def training_batch(
        self, augmentation: Augmentation, size: int, seed: int, step: int
    ) -> ImageSet:
        stream = (augmentation.flip, size, seed)
        if self._ahead is None or self._ahead[0] != (*stream, step):
            orders = (self._training_order(size, seed, s) for s in itertools.count(step))
            self._ahead = ((*stream, step), self._decode(orders, augmentation.flip))
        decoded = self._ahead[1]
        batch = self._batch(step_index(len(self), size, seed, step), next(decoded))
        self._ahead = ((*stream, step + 1), decoded)
        return batch.normalized()

    def _training_order(self, size: int, seed: int, step: int) -> _Order:
        index = step_index(len(self), size, seed, step).tolist()
        drawn = torch.randint(1 << 62, (len(index),), generator=step_generator(seed, step))
        return list(zip(index, drawn.tolist(), strict=True))

    def _decode(self, orders: Iterator[_Order], flip: bool) -> Iterator[Tensor | str]:
        decoder = _Decoder(self._files, self.preprocessing, flip)
        return iter(
            DataLoader(
                decoder,
                batch_size=None,
                sampler=orders,  # type: ignore[arg-type]
                num_workers=self.workers,
                prefetch_factor=_AHEAD if self.workers else None,
                pin_memory=self.device.type == "cuda",
                # From the default one it would take numbers that a resumed run does not.
                generator=torch.Generator(),
            )
        )

    def _batch(self, index: Tensor, decoded: Tensor | str) -> ImageSet:
        pixels = self._checked(decoded).to(self.device, non_blocking=True)
        return ImageSet(pixels, self._labels[index].to(self.device), self.preprocessing)

    @staticmethod
    def _checked(decoded: Tensor | str) -> Tensor:
        if isinstance(decoded, str):
            raise PictureError(decoded)
        return decoded
