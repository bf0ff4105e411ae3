"""The CUDA kernels of csrc/cuda, for NVIDIA GPUs of compute capability 8.0 and later.

Nothing here waits for the GPU, so that calls can be captured in CUDA graphs.

``DFS_CUDA_EMULATOR`` names a module in which the same kernels are compiled for the CPU, as
``python -m build_tools.cuda_emulator`` makes it. Then they take CPU tensors: slow, but good for
checking them.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfs_kernels.backends import native
from dfs_kernels.call import ConvCall, ConvGradients, ConvWeight, GradientsWanted
from dfs_kernels.gate import GateCall, GateStep
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import PackedActivation, PackedConvWeight, new_codes, new_packed_codes
from dfs_kernels.widths import KERNEL_WIDTHS

_EMULATOR = os.environ.get("DFS_CUDA_EMULATOR", "")
_LEAST_CAPABILITY = (8, 0)
# Of what cp.async copies at once, and of what global memory hands out.
_TILE_ALIGNMENT = 128


def _load() -> Any:
    if not _EMULATOR:
        import dfs_kernels._cuda as module

        return module
    spec = importlib.util.spec_from_file_location("_cuda_emulated", Path(_EMULATOR))
    if spec is None or spec.loader is None:
        raise ImportError(f"DFS_CUDA_EMULATOR={_EMULATOR!r} is no module")
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    return emulated


try:
    _cuda = _load()
    _IMPORT_ERROR: str | None = None
except (ImportError, OSError) as error:
    _IMPORT_ERROR = f"the compiled CUDA module is missing ({error})"


@torch.compiler.assume_constant_result
def unavailable_reason() -> str | None:
    if _IMPORT_ERROR is not None or _EMULATOR:
        return _IMPORT_ERROR
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return f"there is no CUDA device ({_cuda.probe().get('error', 'PyTorch finds none')})"
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(found) < _LEAST_CAPABILITY:
        names = [f"{major}.{minor}" for major, minor in (max(found), _LEAST_CAPABILITY)]
        return f"the GPU has compute capability {names[0]}, and {names[1]} is needed"
    return None


def is_emulated() -> bool:
    return bool(_EMULATOR)


def supports(device_type: str, options: Sequence[int]) -> bool:
    device = "cpu" if _EMULATOR else "cuda"
    return device_type == device and all(bits in KERNEL_WIDTHS for bits in options)


def info() -> dict[str, Any]:
    if _EMULATOR:
        return {"device": "emulator", "tiles": tile_variant()}
    return {
        "device": torch.cuda.get_device_name(),
        "compute_capability": torch.cuda.get_device_capability(),
        "architectures": _cuda.architectures(),
        "kernels": "int8 tensor cores (mma.sync) at 2, 4 and 8 bits, float32 at 32",
        "tiles": tile_variant(),
    }


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    codes = codes.contiguous()
    channels = codes.shape[-1]
    out = new_packed_codes(codes, bits)
    if out.numel():
        rows = codes.numel() // channels
        with _on(codes.device) as stream:
            _cuda.pack_bits(codes.data_ptr(), rows, channels, bits, out.data_ptr(), stream)
    return out


def unpack_bits(packed: Tensor, bits: int, channels: int, signed: bool) -> Tensor:
    packed = packed.contiguous()
    out = new_codes(packed, channels, signed)
    if out.numel():
        rows = out.numel() // channels
        with _on(packed.device) as stream:
            _cuda.unpack_bits(
                packed.data_ptr(), rows, channels, bits, signed, out.data_ptr(), stream
            )
    return out


def quantize_pack(x: Tensor, out: PackedActivation) -> None:
    source, target = native.feature_map(_cuda, x), native.feature_map(_cuda, out)
    with _on(x.device) as stream:
        _cuda.quantize_pack(source, target, out.shape[0], stream)


def unpack_dequantize(packed: PackedActivation) -> Tensor:
    out = packed.data.new_empty(packed.shape, dtype=torch.float32)
    source, target = native.feature_map(_cuda, packed), native.feature_map(_cuda, out)
    with _on(out.device) as stream:
        _cuda.unpack_dequantize(source, target, packed.shape[0], stream)
    return out


def quantize_weight(weight: Tensor, scale: Tensor, bits: int, centred: bool, out: Tensor) -> None:
    weight, scale = weight.contiguous(), scale.contiguous()
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    with _on(weight.device) as stream:
        _cuda.quantize_weight(
            weight.data_ptr(), out_channels, kernel_h, kernel_w, group_channels,
            scale.data_ptr(), bits, centred, out.data_ptr(), stream,
        )  # fmt: skip


def tile_variant(planes: bool = False) -> str:
    """The version of the layout that the tensor cores are fed from.

    Args:
        planes: here and below, samples of 2 bits are multiplied as bit planes: see cuda_bits.py.
    """
    return f"cuda/{_cuda.tile_version}{'/planes' if planes else ''}"


def tile_bytes(
    geometry: ConvGeometry, options: Sequence[int], centred: Sequence[bool], planes: bool = False
) -> int:
    return _tile_offsets(native.geometry(_cuda, geometry), options, centred, planes)[-1]


def retile_weight(weight: PackedConvWeight, geometry: ConvGeometry, planes: bool = False) -> Tensor:
    codes = [weight.packed(bits) for bits in weight.bit_options]
    shape = native.geometry(_cuda, geometry)
    return _retile(codes, shape, weight.bit_options, weight.centred, planes)


def mixed_conv2d(call: ConvCall, out: Tensor | PackedActivation, planes: bool = False) -> None:
    geometry = native.geometry(_cuda, call.geometry)
    weight, kept = _native_weight(call.weight, geometry, planes)
    args = native.mixed_conv2d_args(_cuda, call, geometry, weight, out)
    with _on(call.bits.device) as stream:
        _cuda.mixed_conv2d(args, stream)
    del kept


def mixed_conv2d_backward(
    call: ConvCall, grad_output: Tensor, wanted: GradientsWanted
) -> ConvGradients:
    x, weight = call.input, call.weight
    if not isinstance(x, Tensor):
        raise ValueError("gradients of a mixed convolution need a float input, got a packed one")
    gradients = ConvGradients.empty(call, wanted)
    args = native.mixed_conv2d_backward_args(_cuda, call, grad_output, gradients)
    if weight.is_packed:
        kept = [_canonical_codes(weight, i) for i in range(len(weight.options))]
        args.packed_weight = [codes.data_ptr() for codes in kept]
    else:
        kept = [weight.data.contiguous()]
        args.weight = kept[0].data_ptr()
    size = _cuda.backward_scratch_bytes(args)
    scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
    with _on(x.device) as stream:
        _cuda.mixed_conv2d_backward(args, scratch.data_ptr(), _takes_tf32(), stream)
    del kept
    return gradients


def rnn_gate(call: GateCall, out: GateStep) -> None:
    weights = [value.contiguous() for value in call.weights]
    features = native.feature_map(_cuda, call.input)
    args = native.gate_args(_cuda, features, weights, call.choices, call.state, out)
    with _on(out.bits.device) as stream:
        _cuda.rnn_gate(args, stream)


def _takes_tf32() -> bool:
    return native.allows_tf32() and not _EMULATOR


def _tile_offsets(
    geometry: Any, options: Sequence[int], centred: Sequence[bool], planes: bool
) -> list[int]:
    size = functools.partial(_cuda.tile_bytes, planes=planes)
    return native.tile_offsets(size, geometry, options, centred, _TILE_ALIGNMENT)


def _retile(
    codes: Sequence[Tensor],
    geometry: Any,
    options: Sequence[int],
    centred: Sequence[bool],
    planes: bool,
) -> Tensor:
    """The tiles of all widths in one buffer, each made from its canonical codes."""
    offsets = _tile_offsets(geometry, options, centred, planes)
    # Zeros, so that the gaps between the widths are the same every time.
    tiles = torch.zeros(offsets[-1], dtype=torch.uint8, device=codes[0].device)
    with _on(tiles.device) as stream:
        for i, bits in enumerate(options):
            target = tiles.data_ptr() + offsets[i]
            _cuda.retile_weight(
                geometry, codes[i].data_ptr(), bits, centred[i], target, stream, planes
            )
    return tiles


def _native_weight(weight: ConvWeight, geometry: Any, planes: bool) -> tuple[Any, list[Tensor]]:
    """A weight as the kernels take it, and the tensors that it points into."""
    options, centred = weight.options, weight.centred
    codes = [_canonical_codes(weight, i) for i in range(len(options))]
    tiles = weight.tiles
    if tiles is None:
        tiles = _retile(codes, geometry, options, centred, planes)
    offsets = _tile_offsets(geometry, options, centred, planes)
    # Where a width has no tiles the kernels read its canonical codes.
    addresses = [
        tiles.data_ptr() + start if end > start else codes[i].data_ptr()
        for i, (start, end) in enumerate(itertools.pairwise(offsets))
    ]
    result = native.weight(_cuda, options, centred, addresses)
    result.scale = native.pointer(weight.scale)
    result.planes = planes
    return result, [tiles, *codes]


def _canonical_codes(weight: ConvWeight, index: int) -> Tensor:
    """Codes (O, KH, KW, bytes) of one width, float32 (O, KH, KW, C/groups) at 32 bits."""
    bits = weight.options[index]
    if weight.is_packed:
        segment = weight.layout.segment(weight.data, bits)
        return segment.clone() if bits == 32 and segment.data_ptr() % 4 else segment
    if bits == 32:
        return weight.data.permute(0, 2, 3, 1).contiguous()
    shape = weight.layout.segment_shape(bits)
    codes = weight.data.new_empty(shape, dtype=torch.uint8)
    quantize_weight(weight.data, weight.step(bits), bits, weight.centred[index], codes)
    return codes


class _Launch:
    """A device made current, in PyTorch and in the kernels' own CUDA runtime, and its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._guard: AbstractContextManager[Any] = torch.cuda.device(device)

    def __enter__(self) -> int:
        self._guard.__enter__()
        _cuda.set_device(torch.cuda.current_device())
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        return stream

    def __exit__(self, *exc: Any) -> None:
        self._guard.__exit__(*exc)


def _on(device: torch.device) -> AbstractContextManager[int]:
    """Yields the stream to launch on."""
    return nullcontext(0) if _EMULATOR else _Launch(device)
