"""Reads the pickles that CIFAR's python layout consists of, without letting them run code.

They hold dicts, lists, numbers, text and uint8 arrays. NumPy rebuilds an array from a pickle by
calling functions that the pickle names; here the three names it needs lead to plain records of what
was passed, and every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, name: object, *rest: object) -> None:
        self.name = _text(name)

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which a dtype of one byte does not have."""


class _Array:
    """Stands for numpy.ndarray."""

    value: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError("holds an array that is not of type uint8")
        raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
        if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) != len(raw):
            raise pickle.UnpicklingError(f"holds {len(raw)} bytes for an array of shape {shape}")
        array = np.frombuffer(raw, np.uint8)
        self.value = array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _ARRAY_MODULES and name == "_reconstruct":
            return self._reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return {"ndarray": _Array, "dtype": _Dtype}[name]
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        raise pickle.UnpicklingError(f"names {module}.{name}, which is not data")

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("refers to something outside itself")

    def _reconstruct(self, *arguments: object) -> _Array:
        return _Array()

    def _encode(self, text: object, encoding: object) -> bytes:
        """How Python 3 writes bytes in old protocols."""
        if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"encodes by {encoding!r}")
        return text.encode("latin1")


def load_plain(content: bytes) -> Any:
    """The dicts, lists, numbers, text and uint8 arrays of a pickle.

    Text of Python 2 comes back as str with every byte a character (latin1).

    Raises:
        pickle.UnpicklingError: damaged, or it holds anything else.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="latin1").load())
    except pickle.UnpicklingError:
        raise
    # A damaged pickle can make the machine fail in any way.
    except Exception as error:
        raise pickle.UnpicklingError(f"damaged ({type(error).__name__}: {error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_text(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, _Array):
        return value.value
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    raise pickle.UnpicklingError(f"holds a {type(value).__name__}, which is not data")


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
