"""Data sets by name, from a folder of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from dfs.data import cifar, idx, svhn
from dfs.data.dataset import DataSplits, ImageSet
from dfs.data.digits import load_digits
from dfs.data.files import Checksums, DataError, Layout
from dfs.data.folder import is_class_folders, load_class_folders
from dfs.data.preprocessing import Preprocessing, channel_statistics
from dfs.data.raw import RawImages, RawSet, hold_out, share_with_gates

AUTO = "auto"
DIGITS = "digits"
FOLDER = "folder"


@dataclass(frozen=True)
class _Small:
    """A set that fits into memory: how it is read, recognised and augmented."""

    read: Callable[[Path, Checksums], RawSet]
    layouts: tuple[Layout, ...]
    shift: int
    flip: bool


_SMALL = {
    "cifar10": _Small(cifar.read_cifar10, cifar.CIFAR10_LAYOUTS, shift=4, flip=True),
    "cifar100": _Small(cifar.read_cifar100, cifar.CIFAR100_LAYOUTS, shift=4, flip=True),
    "svhn": _Small(svhn.read_svhn, svhn.SVHN_LAYOUTS, shift=2, flip=False),
    "mnist": _Small(idx.read_mnist, idx.MNIST_LAYOUTS, shift=2, flip=False),
    "fashion-mnist": _Small(idx.read_fashion_mnist, idx.FASHION_LAYOUTS, shift=2, flip=True),
}

DATASETS = (DIGITS, *_SMALL, FOLDER)


def load_dataset(
    name: str,
    seed: int = 0,
    folder: Path | None = None,
    image_size: int = 0,
    waived: Collection[str] = (),
) -> DataSplits:
    """A data set by name.

    Args:
        seed: decides which training images the gates get; validation and test images are always
            the same.
        folder: where the files are; only "digits" needs none.
        image_size: side of the network's input, for class folders; 0 is their default.
        waived: data sets or files that may differ from their published checksums.

    Raises:
        ValueError: an unknown name, or an argument that does not go with it.
        DataError: files are missing, damaged or not the published ones.
        ImportError: what reads them is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if image_size and name != FOLDER:
        raise ValueError(f"image_size is for class folders; {name} has a size of its own")
    if name == DIGITS:
        if folder is not None:
            raise ValueError("dataset digits comes with scikit-learn; it takes no data folder")
        return load_digits(seed)
    if folder is None:
        raise ValueError(f"dataset {name} needs the folder of its files: --data DIR")
    if name == FOLDER:
        return load_class_folders(folder, seed, image_size)
    small, checksums = _SMALL[name], Checksums(name, waived)
    raw = small.read(folder, checksums)
    return _split(name, small, raw, seed, checksums)


def recognise(folder: Path) -> str:
    """The name of the data set whose files are in ``folder``.

    Raises:
        DataError: none is, or it could be several.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    found = {
        name: (layout, place)
        for name, small in _SMALL.items()
        for layout in reversed(small.layouts)
        if (place := layout.found_in(folder)) is not None
    }
    if len({place for _, place in found.values()}) == 1:
        # MNIST and Fashion-MNIST call their files the same.
        exact = [name for name, (layout, place) in found.items() if _is_original(layout, place)]
        found = {name: found[name] for name in exact} or found
    if len(found) > 1:
        raise DataError(f"--data {folder}: could be {' or '.join(found)}; name it by --dataset")
    if found:
        return next(iter(found))
    if is_class_folders(folder):
        return FOLDER
    raise DataError(
        f"--data {folder}: holds neither class folders nor the files of {', '.join(_SMALL)}"
    )


def _is_original(layout: Layout, place: Path) -> bool:
    """Whether the smallest file has its published checksum."""
    files = [place / name for name in layout.md5 if (place / name).is_file()]
    if not files:
        return False
    smallest = min(files, key=lambda path: path.stat().st_size)
    found = hashlib.md5(smallest.read_bytes(), usedforsecurity=False).hexdigest()
    return found == layout.md5[smallest.name]


def _split(name: str, small: _Small, raw: RawSet, seed: int, checksums: Checksums) -> DataSplits:
    learned, held = hold_out(len(raw.train.labels))
    weights, gates = share_with_gates(learned, seed)
    mean, std = channel_statistics(raw.train.pixels[learned])
    side = raw.train.pixels.shape[-1]
    preprocessing = Preprocessing(side, side, mean, std, raw.class_names)

    def images(part: RawImages) -> ImageSet:
        return ImageSet(part.pixels, part.labels, preprocessing)

    train = images(raw.train)
    return DataSplits(
        name,
        preprocessing.classes,
        train.take(weights),
        train.take(gates),
        train.take(held),
        images(raw.test),
        small.shift,
        small.flip,
        border="constant",
        preprocessing=preprocessing,
        files=tuple(checksums.results),
    )
