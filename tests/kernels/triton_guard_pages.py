"""Runs the Triton kernels on memory that lies directly against pages nobody may touch.

Run by test_triton_bounds.py in processes of its own, since an access beyond a buffer ends them:
``python -m tests.kernels.triton_guard_pages end|start [fault]`` prints each case and each kernel
as it begins, so that the last lines name the culprit. Every tensor of every launch is moved to
pages whose last byte, or first, is its own; the interpreter reads and writes through pointers, and
only where the mask says so.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfs_kernels import PackedActivation, RNNGateWeights, mixed_conv2d, quantize_pack, rnn_gate
from dfs_kernels.backends import triton as backend
from dfs_kernels.call import ConvWeight
from dfs_kernels.packing import row_bytes
from dfs_kernels.triton.configs import ConvConfig
from tests.kernels.cases import (
    INPUT_FORMS,
    OUTPUT_FORMS,
    RESIDUAL_FORMS,
    STREAM_FORM,
    ConvCase,
    assert_matches_reference,
    build,
)

_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NO_ACCESS = 0
_INTEGER_WEIGHT = backend._integer_weight


class GuardedCopies:
    """Copies of tensors between two unreadable pages."""

    def __init__(self, edge: str) -> None:
        self._edge = edge
        self._mapped: list[tuple[int, int]] = []
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor's values in its own strides; the same memory gives the same copy."""
        spans = (
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        elements = sum(spans) + 1 if tensor.numel() else 0
        key = (tensor.data_ptr(), elements * tensor.element_size())
        if key not in self._copies:
            source = tensor.as_strided((elements,), (1,))
            copy = self._allocate(elements * tensor.element_size()).view(tensor.dtype)
            self._copies[key] = (source, copy.copy_(source))
        return self._copies[key][1].as_strided(tensor.shape, tensor.stride(), 0)

    def write_back(self) -> None:
        for source, copy in self._copies.values():
            source.copy_(copy)

    def release(self) -> None:
        self._copies.clear()
        for address, size in self._mapped:
            _LIBC.munmap(address, size)

    def _allocate(self, size: int) -> Tensor:
        pages = -(-size // _PAGE) * _PAGE
        total = pages + 2 * _PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _LIBC.mmap(None, total, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        self._mapped.append((address, total))
        for guard in (address, address + _PAGE + pages):
            if _LIBC.mprotect(guard, _PAGE, _NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        start = address + _PAGE + (pages - size if self._edge == "end" else 0)
        return torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=torch.uint8)


def exact_integer_weight(weight: ConvWeight) -> tuple[Tensor, Tensor | None]:
    """The codes without the bytes that align what follows them."""
    codes, sums = _INTEGER_WEIGHT(weight)
    last = max(bits for bits in weight.options if bits != 32)
    start = weight.layout.offsets()[weight.options.index(last)]
    return codes[: start + weight.layout.segment(codes, last).numel()], sums


@contextmanager
def guarded_launches(edge: str) -> Iterator[None]:
    """Every kernel that the backend launches works between guard pages."""
    plain = backend._launch

    def launch(kernel: Any, grid: Any, device: Any, *args: Any, **constants: Any) -> None:
        print(f"  {kernel.fn.__name__}", flush=True)
        copies = GuardedCopies(edge)
        try:
            moved = (copies.of(a) if isinstance(a, Tensor) else a for a in args)
            plain(kernel, grid, device, *moved, **constants)
            copies.write_back()
        finally:
            copies.release()

    backend._launch = launch
    backend._integer_weight = exact_integer_weight
    try:
        yield
    finally:
        backend._launch = plain
        backend._integer_weight = _INTEGER_WEIGHT


# Odd runs of codes; whole words; groups as matrix products; groups one product at a time.
CHANNELS = ((5, 7, 1), (16, 18, 1), (8, 12, 2), (3, 2, 3))


def convolutions() -> Iterator[ConvCase]:
    """Every kernel of a forward pass, at shapes that end within a tile, a word and a byte."""
    for kind, (channels, outputs, groups) in enumerate(CHANNELS):
        fields: dict[str, Any] = {
            "group_channels": channels,
            "group_outputs": outputs,
            "groups": groups,
            "size": (4, 5),
        }
        for i, input_form in enumerate((*INPUT_FORMS, STREAM_FORM)):
            for j, output_form in enumerate(OUTPUT_FORMS):
                if (kind + i + 2 * j) % 3:
                    continue
                residual = RESIDUAL_FORMS[(i + j) % len(RESIDUAL_FORMS)]
                if output_form == "in_place" and residual is None:
                    residual = "packed"
                yield ConvCase(
                    **fields,
                    bits=(4, 2, 8, 32),
                    kernel=((3, 3), (2, 3), (1, 1))[(i + j) % 3],
                    stride=((1, 1), (2, 1))[j % 2],
                    dilation=((1, 1), (1, 2))[i % 2],
                    padding=((1, 2, 0, 1), (0, 0, 0, 0))[i % 2],
                    input_form=input_form,
                    residual_form=residual,
                    output_form=output_form,
                    output_bits=(2, 4, 8, 32)[(i + 2 * j) % 4],
                    packed_weight=(i + j) % 2 == 0,
                    seed=10 * i + j,
                )
        # Rows and weights that end with the codes of the one width.
        for bits in (2, 4, 8):
            for input_form in ("packed", STREAM_FORM):
                yield ConvCase(
                    **fields,
                    bits=(bits,),
                    options=(bits,),
                    centred=(bits == 2,),
                    input_form=input_form,
                    residual_form="packed",
                    output_form="own",
                )


def check_convolution(case: ConvCase, buckets: bool) -> None:
    plain = backend.conv_configs

    def configs(*sizes: int) -> tuple[ConvConfig, ...]:
        return (replace(plain(*sizes)[0], buckets=buckets),)

    backend.conv_configs = configs
    try:
        assert_matches_reference(build(case), "triton")
    finally:
        backend.conv_configs = plain


def check_gradients(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    x = torch.randn(4, 6, 5, 4, generator=generator)
    weight = torch.randn(6, 6 // groups, 2, 3, generator=generator)
    steps = torch.full((4, 6), 0.3)
    leaves = [value.requires_grad_() for value in (x, weight, steps, torch.full((4,), 0.3))]
    y = mixed_conv2d(
        x, weight, torch.tensor([8, 2, 32, 4]), leaves[3], weight_scale=steps,
        bit_options=(2, 4, 8, 32), stride=(2, 1), padding=(1, 2, 0, 1), groups=groups,
        backend="triton",
    )  # fmt: skip
    assert isinstance(y, Tensor)
    y.sum().backward()


def check_packing(bits: int) -> None:
    for channels in (1, 5, 16):
        codes = torch.randint(1 << bits, (3, channels)).to(torch.uint8)
        packed = backend.pack_bits(codes, bits)
        assert torch.equal(backend.unpack_bits(packed, bits, channels, signed=False), codes)


def check_activations(channels: int) -> None:
    bits = torch.tensor([8, 2, 5, 32, 4], dtype=torch.int32)
    options = (2, 4, 8, 32)
    data = torch.zeros(5, row_bytes(options, channels, 3, 5), dtype=torch.uint8)
    scale, zero_point = torch.ones(4), torch.ones(4, dtype=torch.int32)
    packed = PackedActivation(data, bits, scale, zero_point, options, channels, 3, 5)
    backend.quantize_pack(torch.randn(5, channels, 3, 5), packed)
    backend.unpack_dequantize(packed)


def check_gate(channels: int, packed: bool) -> None:
    hidden, choices = 5, (0, 2, 4, 8)
    shapes = ((hidden, channels), (hidden,), *((4 * hidden, hidden),) * 2, *((4 * hidden,),) * 2)
    weights = RNNGateWeights(
        *(torch.ones(shape) for shape in shapes),
        torch.ones(4, hidden),
        torch.ones(4),
        torch.ones(4, dtype=torch.float64),
    )
    x: Any = torch.ones(3, channels, 3, 5)
    if packed:
        x = quantize_pack(x, 8, {8: 0.1}, backend="reference")
    step = rnn_gate(x, weights, choices, backend="triton")
    rnn_gate(x, weights, choices, step.state, backend="triton")


def check_unknown_width(case: ConvCase) -> None:
    """Samples of a width that is not offered are filled, and read nothing."""
    built = build(case)
    call = replace(built.call(), bits=torch.tensor([8, 5, 2], dtype=torch.int32))
    quantizer = built.output_quantizer
    if quantizer is None:
        backend.mixed_conv2d(call, torch.zeros(case.output_shape))
        return
    shape = case.output_shape
    data = torch.zeros(shape[0], row_bytes(quantizer.options, *shape[1:]), dtype=torch.uint8)
    scale, zero_point = quantizer.scale, quantizer.zero_point
    out = PackedActivation(
        data, built.output_bits, scale, zero_point, quantizer.options, *shape[1:]
    )
    backend.mixed_conv2d(call, out)


@triton.jit
def faulty_copy_kernel(
    source,
    target,
    count,
    READS_TO: tl.constexpr,
    WRITES_TO: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = FIRST + tl.arange(0, BLOCK)
    inside = (place >= 0) & (place < count)
    values = tl.load(source + place, mask=inside | (place == READS_TO), other=0)
    tl.store(target + place, values, mask=inside | (place == WRITES_TO))


def check_fault(edge: str, fault: str) -> None:
    """A kernel that reads or writes one element too many, or none (of "read", "write", "none")."""
    values = torch.arange(7, dtype=torch.int32)
    beyond = 7 if edge == "end" else -1
    backend._launch(
        faulty_copy_kernel, (1,), values.device, values, torch.empty_like(values), 7,
        READS_TO=beyond if fault == "read" else 0,
        WRITES_TO=beyond if fault == "write" else 0,
        FIRST=0 if edge == "end" else -1, BLOCK=8,
    )  # fmt: skip


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for number, case in enumerate(convolutions()):
        yield str(case), partial(check_convolution, case, buckets=number % 3 == 0)
    for groups in (1, 6):
        yield f"gradients, {groups} groups", partial(check_gradients, groups)
    for bits in (2, 4, 8):
        yield f"packing {bits} bits", partial(check_packing, bits)
    for channels in (1, 5, 16):
        yield f"activations of {channels} channels", partial(check_activations, channels)
        for packed in (False, True):
            yield f"gate, {channels} channels", partial(check_gate, channels, packed)
    for groups in (1, 3):
        for form in ("float", "fixed"):
            case = ConvCase(bits=(8, 2, 2), groups=groups, output_form=form)
            yield f"unknown width, {case}", partial(check_unknown_width, case)


def main() -> None:
    edge, *fault = sys.argv[1:]
    with guarded_launches(edge):
        for name, run in (
            checks() if not fault else [(fault[0], partial(check_fault, edge, *fault))]
        ):
            print(name, flush=True)
            run()
    print("done", flush=True)


if __name__ == "__main__":
    main()
