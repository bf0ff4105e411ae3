"""SVHN: 32x32 colour images of house numbers' digits, in MATLAB files.

Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011. The
cropped digits, format 2: X (32, 32, 3, N) uint8 and y (N, 1), in which 10 means the digit 0.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from dfs.data.files import Checksums, DataError, Layout, find_layout
from dfs.data.raw import RawImages, RawSet

SVHN_CLASSES = tuple("0123456789")
_SIDE = 32

SVHN = Layout(
    "SVHN",
    "",
    {
        "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
        "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    },
)


SVHN_LAYOUTS = (SVHN,)


def read_svhn(root: Path, checksums: Checksums) -> RawSet:
    """SVHN's training and test images, without the extra ones.

    Raises:
        ImportError: scipy, which reads MATLAB files, is not installed.
    """
    layout, place = find_layout(checksums.dataset, root, SVHN_LAYOUTS)
    contents = layout.read(place, checksums)
    train, test = (_parse(place / name, contents[name]) for name in SVHN.md5)
    return RawSet(train, test, SVHN_CLASSES)


def _parse(path: Path, content: bytes) -> RawImages:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            "SVHN comes in MATLAB files, which scipy reads; "
            "install that, or this package with its [data] extra"
        ) from error
    try:
        found = loadmat(io.BytesIO(content), variable_names=("X", "y"))
    # A damaged file can make the reader fail in any way.
    except Exception as error:
        raise DataError(f"{path}: not a readable MATLAB file ({error})") from error
    pixels, labels = found.get("X"), found.get("y")
    if not isinstance(pixels, np.ndarray) or pixels.shape[:-1] != (_SIDE, _SIDE, 3):
        raise DataError(f"{path}: must hold X of shape ({_SIDE}, {_SIDE}, 3, N)")
    if pixels.dtype != np.uint8 or not isinstance(labels, np.ndarray):
        raise DataError(f"{path}: must hold X of type uint8 and y")
    digits = labels.reshape(-1).astype(np.int64)
    digits[digits == len(SVHN_CLASSES)] = 0
    raw = RawImages(torch.from_numpy(pixels.transpose(3, 2, 0, 1).copy()), torch.from_numpy(digits))
    raw.check(path, len(SVHN_CLASSES))
    return raw
