"""MNIST and Fashion-MNIST: 28x28 grey images in 10 classes, in idx files, gzipped or not.

Y. LeCun, C. Cortes and C. Burges, The MNIST database, 1998; H. Xiao, K. Rasul and R. Vollgraf,
Fashion-MNIST, arXiv 1708.07747, 2017. An idx file is two zero bytes, a type, the number of
dimensions, each of them as a big-endian int32, and the values.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from dfs.data.files import Checksums, DataError, Layout, find_layout, unpack_gzip
from dfs.data.raw import RawImages, RawSet

_UINT8 = 8
_CLASSES = 10

MNIST_CLASSES = tuple("0123456789")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

MNIST_GZIP = Layout(
    "MNIST/raw",
    "",
    {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
MNIST_PLAIN = Layout(
    "MNIST/raw",
    "",
    {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
)
FASHION_GZIP = Layout(
    "FashionMNIST/raw",
    "",
    {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)
FASHION_PLAIN = Layout(
    "FashionMNIST/raw",
    "",
    {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
)


MNIST_LAYOUTS = (MNIST_GZIP, MNIST_PLAIN)
FASHION_LAYOUTS = (FASHION_GZIP, FASHION_PLAIN)


def read_mnist(root: Path, checksums: Checksums) -> RawSet:
    """MNIST from a folder that holds its four files."""
    return _read(root, checksums, MNIST_LAYOUTS, MNIST_CLASSES)


def read_fashion_mnist(root: Path, checksums: Checksums) -> RawSet:
    """Fashion-MNIST from a folder that holds its four files."""
    return _read(root, checksums, FASHION_LAYOUTS, FASHION_CLASSES)


def parse_idx(path: Path, content: bytes) -> np.ndarray:
    """The uint8 array of an idx file; DataError names ``path`` if it is anything else."""
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{path}: not an idx file")
    kind, dimensions = content[2], content[3]
    if kind != _UINT8:
        raise DataError(f"{path}: holds idx type {kind:#04x}, expected unsigned bytes, 0x08")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path}: {len(content)} bytes end within the header; cut short?")
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise DataError(
            f"{path}: {len(content)} bytes, an idx file of shape {shape} has {expected}; cut short?"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read(
    root: Path, checksums: Checksums, layouts: tuple[Layout, ...], classes: tuple[str, ...]
) -> RawSet:
    layout, place = find_layout(checksums.dataset, root, layouts)
    arrays = {}
    for name, content in layout.read(place, checksums).items():
        path = place / name
        if name.endswith(".gz"):
            content = unpack_gzip(path, content)
        arrays[name.removesuffix(".gz")] = (path, parse_idx(path, content))
    return RawSet(_join(arrays, "train"), _join(arrays, "t10k"), classes)


def _join(arrays: dict[str, tuple[Path, np.ndarray]], part: str) -> RawImages:
    path, pixels = arrays[f"{part}-images-idx3-ubyte"]
    if pixels.ndim != 3:
        raise DataError(f"{path}: must hold images (N, H, W), got shape {pixels.shape}")
    labels = arrays[f"{part}-labels-idx1-ubyte"][1].reshape(-1).astype(np.int64)
    raw = RawImages(torch.from_numpy(pixels[:, None].copy()), torch.from_numpy(labels))
    raw.check(path, _CLASSES)
    return raw
