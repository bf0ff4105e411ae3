"""The names that torchvision and timm give to the tensors of a residual network."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_STEM = {"conv1": "stem", "bn1": "bn_stem"}
_BLOCK_KEY = re.compile(r"layer(\d+)\.(\d+)\.(.+)\.(\w+)")
_LAYER = re.compile(r"conv\d+|bn\d+")
_SHORTCUT = {"downsample.0": "shortcut", "downsample.1": "bn_shortcut"}


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a torchvision or timm ResNet under the keys of :class:`PlainResNet`.

    ======================================  ====================================
    torchvision, timm                       here
    ======================================  ====================================
    ``conv1.weight``                        ``stem.weight``
    ``bn1.*``                               ``bn_stem.*``
    ``layer<s>.<i>.conv<k>.weight``         ``blocks.<n>.conv<k>.weight``
    ``layer<s>.<i>.bn<k>.*``                ``blocks.<n>.bn<k>.*``
    ``layer<s>.<i>.downsample.0.weight``    ``blocks.<n>.shortcut.weight``
    ``layer<s>.<i>.downsample.1.*``         ``blocks.<n>.bn_shortcut.*``
    ``fc.weight`` (O, C)                    ``classifier.weight`` (O, C, 1, 1)
    ``fc.bias``                             ``classifier.bias``
    ======================================  ====================================

    ``<n>`` counts the blocks through all stages.

    Raises:
        ValueError: naming a key that is none of these.
    """
    found = (_BLOCK_KEY.fullmatch(key) for key in state)
    places = sorted({(int(m[1]), int(m[2])) for m in found if m})
    number = {place: n for n, place in enumerate(places)}
    result = {}
    for key, value in state.items():
        module, _, name = key.rpartition(".")
        block = _BLOCK_KEY.fullmatch(key)
        if module in _STEM:
            result[f"{_STEM[module]}.{name}"] = value
        elif module == "fc":
            result[f"classifier.{name}"] = value[:, :, None, None] if name == "weight" else value
        elif block and (_LAYER.fullmatch(block[3]) or block[3] in _SHORTCUT):
            layer = _SHORTCUT.get(block[3], block[3])
            result[f"blocks.{number[int(block[1]), int(block[2])]}.{layer}.{name}"] = value
        else:
            raise ValueError(f"state: key {key!r} is not of a torchvision ResNet")
    return result
