"""Class folders: pictures of any size and format, a folder for each class; streamed from disk.

Either DIR/train/CLASS/... with DIR/val or DIR/test beside it, as ImageNet is laid out, or
DIR/CLASS/... alone, of which a fifth is held out for testing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfs.data.dataset import DataSplits
from dfs.data.files import DataError
from dfs.data.picture import SUFFIXES
from dfs.data.preprocessing import Preprocessing
from dfs.data.raw import fixed_order, hold_out, share_with_gates
from dfs.data.stream import PictureFiles, StreamedImages

DEFAULT_SIZE = 224
# Evaluation sees the middle of a picture that is larger by this much (He et al., CVPR 2016).
_MARGIN = 256 / 224
# Of ImageNet's training images; what most pictures of the world are near to.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TRAIN = "train"
_VALIDATION = ("val", "valid", "validation")
_TEST = "test"
# One of so many pictures of each class is for testing, where no test folder is.
_TEST_SHARE = 5


@dataclass(frozen=True, eq=False)
class Listing:
    """The pictures under class folders: paths, their labels int64 (N,), the classes' names."""

    files: PictureFiles
    labels: Tensor
    class_names: tuple[str, ...]


def is_class_folders(root: Path) -> bool:
    """Whether ``root`` looks like one of the layouts; opens no picture."""
    return _has_classes(root / _TRAIN) or _has_classes(root)


def load_class_folders(root: Path, seed: int, size: int = 0) -> DataSplits:
    """A user's own pictures, or ImageNet.

    Where both ``val`` and ``test`` are there, they are what their names say. A ``val`` folder alone
    is what figures are reported on, and validation images are taken out of the training images.

    Args:
        seed: decides which training images the gates get.
        size: side of the network's input in pixels, 0 for 224.

    Raises:
        DataError: the layout is neither, or classes differ between the folders.
    """
    if not root.is_dir():
        raise DataError(f"--data {root}: no such folder")
    if _has_classes(root / _TRAIN):
        train, val, test = _read_splits(root)
    elif _has_classes(root):
        train, test = _split_by_class(list_classes(root))
        val = None
    else:
        raise DataError(
            f"--data {root}: holds no class folders; looked for {root}/{_TRAIN}/CLASS/PICTURE "
            f"with {root}/val or {root}/test beside it, and for {root}/CLASS/PICTURE"
        )
    size = size or DEFAULT_SIZE
    preprocessing = Preprocessing(size, round(size * _MARGIN), _MEAN, _STD, train.class_names)
    streams = StreamedImages(train.files, train.labels, preprocessing)
    learned = torch.arange(len(streams))
    if val is None:
        learned, held = hold_out(len(streams))
        validation = streams.take(held)
    else:
        validation = StreamedImages(val.files, val.labels, preprocessing)
    weights, gates = share_with_gates(learned, seed)
    return DataSplits(
        "folder",
        preprocessing.classes,
        streams.take(weights),
        streams.take(gates),
        # Calibration goes through it dozens of times.
        validation.in_memory(),
        StreamedImages(test.files, test.labels, preprocessing),
        shift=0,
        flip=True,
        preprocessing=preprocessing,
    )


def list_classes(root: Path) -> Listing:
    """Every picture under every class folder, in the order of the names.

    Raises:
        DataError: a class has no pictures.
    """
    names = _class_names(root)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(_pictures(root / name))
        if not found:
            raise DataError(f"{root / name}: a class folder without a picture in it")
        paths += found
        labels += [label] * len(found)
    return Listing(PictureFiles(paths), torch.tensor(labels), tuple(names))


def _read_splits(root: Path) -> tuple[Listing, Listing | None, Listing]:
    train = list_classes(root / _TRAIN)
    named = [root / name for name in _VALIDATION if _has_classes(root / name)]
    val = _same_classes(train, named[0]) if named else None
    if _has_classes(root / _TEST):
        return train, val, _same_classes(train, root / _TEST)
    if val is None:
        raise DataError(f"{root}: {_TRAIN} needs val or {_TEST} beside it, with class folders too")
    return train, None, val


def _same_classes(train: Listing, root: Path) -> Listing:
    listing = list_classes(root)
    odd = set(listing.class_names) ^ set(train.class_names)
    if odd:
        raise DataError(
            f"{root}: its classes must be those of the training folder; {sorted(odd)[0]!r} is in "
            "only one of them"
        )
    return listing


def _split_by_class(everything: Listing) -> tuple[Listing, Listing]:
    """(training, test): of every class its share, drawn in the one fixed order."""
    order = fixed_order(len(everything.labels))
    places = torch.empty_like(order)
    seen: dict[int, int] = {}
    for i in order.tolist():
        label = int(everything.labels[i])
        places[i] = seen[label] = seen.get(label, -1) + 1
    tested = places % _TEST_SHARE == _TEST_SHARE - 1
    if not bool(tested.any()):
        raise DataError(
            f"class folders need {_TEST_SHARE} pictures of a class to hold one out for testing"
        )

    def part(chosen: Tensor) -> Listing:
        index = chosen.nonzero().squeeze(1)
        return Listing(
            everything.files.take(index), everything.labels[index], everything.class_names
        )

    return part(~tested), part(tested)


def _class_names(root: Path) -> Sequence[str]:
    if not root.is_dir():
        return []
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def _has_classes(root: Path) -> bool:
    """Whether ``root`` has two folders with pictures, at least; looks at no more than it must."""
    filled = (name for name in _class_names(root) if next(_pictures(root / name), None))
    return len(list(itertools.islice(filled, 2))) == 2


def _pictures(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(folder, name)
