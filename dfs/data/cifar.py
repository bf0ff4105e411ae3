"""CIFAR-10 and CIFAR-100: 32x32 colour images in 10 and 100 classes.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. Both original layouts,
unpacked or in their archive: pickled batches for Python, and binary records of label bytes followed
by a red, a green and a blue plane.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from dfs.data.files import Checksums, DataError, Layout, find_layout
from dfs.data.raw import RawImages, RawSet
from dfs.data.unpickle import load_plain

SIDE = 32
_PIXELS = 3 * SIDE * SIDE

_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
    crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR10_CLASSES = tuple(_CIFAR10_NAMES.split())
CIFAR100_CLASSES = tuple(_CIFAR100_NAMES.split())

CIFAR10_PYTHON = Layout(
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)
CIFAR10_BINARY = Layout(
    "cifar-10-batches-bin",
    "cifar-10-binary.tar.gz",
    {
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
)
CIFAR100_PYTHON = Layout(
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
)
CIFAR100_BINARY = Layout(
    "cifar-100-binary",
    "cifar-100-binary.tar.gz",
    {
        "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
        "test.bin": "4499cfba6c016c1be1438163640a0898",
    },
)


CIFAR10_LAYOUTS = (CIFAR10_PYTHON, CIFAR10_BINARY)
CIFAR100_LAYOUTS = (CIFAR100_PYTHON, CIFAR100_BINARY)


def read_cifar10(root: Path, checksums: Checksums) -> RawSet:
    """CIFAR-10 from a folder that holds either layout, or its archive."""
    return _read(root, checksums, CIFAR10_LAYOUTS, CIFAR10_CLASSES)


def read_cifar100(root: Path, checksums: Checksums) -> RawSet:
    """CIFAR-100, its 100 fine classes, from a folder that holds either layout, or its archive."""
    return _read(root, checksums, CIFAR100_LAYOUTS, CIFAR100_CLASSES)


def _read(
    root: Path, checksums: Checksums, layouts: tuple[Layout, ...], classes: tuple[str, ...]
) -> RawSet:
    layout, place = find_layout(checksums.dataset, root, layouts)
    parts = {
        name: _parse(place / name, content, len(classes))
        for name, content in layout.read(place, checksums).items()
    }
    test = parts.pop(next(name for name in parts if name.startswith("test")))
    train = list(parts.values())
    return RawSet(
        RawImages(torch.cat([p.pixels for p in train]), torch.cat([p.labels for p in train])),
        test,
        classes,
    )


def _parse(path: Path, content: bytes, classes: int) -> RawImages:
    if path.suffix == ".bin":
        pixels, labels = _parse_binary(path, content, classes)
    else:
        pixels, labels = _parse_pickle(path, content, classes)
    images = torch.from_numpy(pixels.reshape(-1, 3, SIDE, SIDE).copy())
    raw = RawImages(images, torch.from_numpy(labels.astype(np.int64)))
    raw.check(path, classes)
    return raw


def _parse_binary(path: Path, content: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    # CIFAR-100 has a coarse label before the fine one.
    label_bytes = 1 if classes == len(CIFAR10_CLASSES) else 2
    row = label_bytes + _PIXELS
    if not content or len(content) % row:
        raise DataError(f"{path}: {len(content)} bytes are not whole records of {row}; cut short?")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    return rows[:, label_bytes:], rows[:, label_bytes - 1]


def _parse_pickle(path: Path, content: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    key = "labels" if classes == len(CIFAR10_CLASSES) else "fine_labels"
    try:
        batch = load_plain(content)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: not a batch of CIFAR: {error}") from error
    if not isinstance(batch, dict) or not {"data", key} <= batch.keys():
        raise DataError(f"{path}: not a batch of CIFAR: it must be a dict with 'data' and {key!r}")
    pixels, labels = batch["data"], batch[key]
    whole = isinstance(pixels, np.ndarray) and pixels.ndim == 2 and pixels.shape[1] == _PIXELS
    named = isinstance(labels, list) and all(type(v) is int for v in labels)
    if not whole or not named or len(pixels) != len(labels):
        raise DataError(
            f"{path}: not a batch of CIFAR: 'data' must be uint8 (N, {_PIXELS}), {key!r} N integers"
        )
    return pixels, np.array(labels, np.int64)
