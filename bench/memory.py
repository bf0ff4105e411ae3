"""How much memory a call needs beyond its arguments and its result.

A fresh process, ``python -m bench.memory KIND LAYER BATCH THREADS``, makes the arguments, runs the
layer once on a tiny image so that code is loaded and weights are tiled, gives free memory back to
the system, resets the kernel's high-water mark of resident memory, and makes the one call that
counts. What the mark then exceeds the memory before by, less the result, is the call's own:
scratch memory, and copies of the activations. The kernel counts in pages and batches its counts per
processor, so a few hundred KiB are noise.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import ours
from bench.layers import LAYERS, Layer, layer_input
from bench.prepared import Unavailable

_ALLOWED_PER_THREAD = 1 << 20
_ROOT = Path(__file__).resolve().parents[1]
_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def measure(kind: str, layer: Layer, batch: int, threads: int) -> tuple[int, int]:
    """Bytes of extra memory, and what is allowed: the packed activations and 1 MiB a thread.

    Raises:
        Unavailable: this system has no high-water mark that can be reset.
    """
    if not _RESET.exists():
        raise Unavailable(f"measuring memory needs {_RESET}, which only Linux has")
    command = [sys.executable, "-m", "bench.memory", kind, layer.name, str(batch), str(threads)]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    extra = int(json.loads(result.stdout)["extra_bytes"])
    value_bytes = 4 if kind == "float32" else 1
    return extra, batch * layer.in_values * value_bytes + threads * _ALLOWED_PER_THREAD


def _extra_bytes(kind: str, layer: Layer, batch: int) -> int:
    run, x, tiny = _arguments(kind, layer, batch)
    run(tiny)
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")  # the high-water mark
    before = _status_bytes("VmRSS")
    result = run(x)
    return max(0, _status_bytes("VmHWM") - before - _result_bytes(result))


def _arguments(kind: str, layer: Layer, batch: int) -> tuple[ours.Run, Any, Any]:
    """What to call, its input, and an input of one tiny sample."""
    small = replace(layer, side=layer.kernel)
    if kind == "packed":
        bits = ours.repeated_bits((8,), batch)
        x, tiny = ours.packed_input(layer, bits), ours.packed_input(small, bits[:1])
        return ours.run_packed(layer), x, tiny
    if kind == "float32":
        x, tiny = ours.packed_float_input(layer, batch), ours.packed_float_input(small, 1)
        return ours.run_packed_float(layer), x, tiny
    return ours.run_float_at_8(layer, batch), layer_input(layer, batch), layer_input(small, 1)


def _result_bytes(result: Any) -> int:
    tensor = result if isinstance(result, Tensor) else result.data
    return int(tensor.numel() * tensor.element_size())


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def _main(kind: str, name: str, batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    (layer,) = (layer for layer in LAYERS if layer.name == name)
    with torch.no_grad():
        print(json.dumps({"extra_bytes": _extra_bytes(kind, layer, int(batch))}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
