"""Handwritten digits: the 1,797 real scans that scikit-learn carries; nothing is downloaded.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dfs.data.dataset import DataSplits, ImageSet
from dfs.data.preprocessing import Preprocessing
from dfs.data.raw import fixed_order, share_with_gates

SIZE = 12
_TEST, _VAL = 360, 180
_LARGEST_PIXEL = 16.0


def load_digits(seed: int = 0) -> DataSplits:
    """8x8 scans enlarged to 12x12: 1,257 for training, 180 for validation, 360 for testing."""
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise ImportError(
            "the digits data set comes with scikit-learn; "
            "install that, or this package with its [demo] extra"
        ) from error
    raw = read()
    images = torch.from_numpy(raw.images).float()[:, None] / _LARGEST_PIXEL
    images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False)
    everything = ImageSet(images, torch.from_numpy(raw.target).long())
    order = fixed_order(len(everything))
    test, val, rest = order[:_TEST], order[_TEST : _TEST + _VAL], order[_TEST + _VAL :]
    weights, gates = share_with_gates(rest, seed)
    mean, std = images[rest].mean(), images[rest].std()
    normalized = ImageSet((images - mean) / std, everything.labels)
    return DataSplits(
        "digits",
        10,
        normalized.take(weights),
        normalized.take(gates),
        normalized.take(val),
        normalized.take(test),
        shift=1,
        flip=False,
        preprocessing=Preprocessing(
            SIZE, SIZE, (float(mean),), (float(std),), tuple(map(str, raw.target_names))
        ),
    )
