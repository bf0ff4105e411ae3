"""Calls every kernel of the GPU backends once or twice, at small odd shapes, for a sanitizer.

``python -m tests.kernels.gpu_calls [SHARE SHARES]`` compares what they give with the reference on
the CPU, so that it is a test by itself too. Everything that a kernel may read has been written
before, so that a report of uninitialised memory is about a kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.gpu.backends import gpu_backends, gpu_candidates
from bench.gpu.device import machine, missing_reason
from bench.gpu.ours import bind, implementations
from dfs_kernels import GateStep, RNNGateWeights, mixed_conv2d, reference, rnn_gate
from dfs_kernels.backends import load
from tests.kernels.cases import Built, ConvCase, assert_matches_reference, build, on_device, pack
from tests.kernels.gate_cases import CHOICES, assert_same_step, gate_weights, packed_features

BITS = (8, 2, 4, 32, 0)
# Dense, in groups that fill matrices, and channel by channel, with every form of the arguments.
CASES = (
    ConvCase(bits=BITS, group_channels=5, group_outputs=7, residual_form="strided"),
    ConvCase(bits=BITS, group_channels=16, group_outputs=9, input_form="packed", output_form="own"),
    ConvCase(
        bits=(8, 2, 4, 0),
        options=(2, 4, 8),
        centred=(True, False, False),
        group_channels=16,
        group_outputs=16,
        size=(7, 9),
        input_form="packed",
        residual_form="packed",
        output_form="in_place",
        relu=True,
    ),
    ConvCase(bits=BITS, groups=2, group_channels=8, group_outputs=12, output_form="fixed"),
    ConvCase(bits=BITS, groups=5, group_channels=1, group_outputs=1, input_form="channels_last"),
    ConvCase(bits=BITS, input_form="requantized", stride=(2, 1), padding=(0, 2, 1, 3)),
    ConvCase(bits=BITS, kernel=(1, 1), padding=(0, 0, 0, 0), packed_weight=False, offset=3),
)


def convolve(case: ConvCase, backend: str) -> None:
    assert_matches_reference(build(case), backend, machine().device)


def convolve_in_buckets(backend: str) -> None:
    """The dispatch that sorts samples by width, where the backend has one."""
    for implementation in implementations():
        if implementation.startswith(f"{backend}_"):
            bind(convolve, implementation)(CASES[1])


def convert(backend: str) -> None:
    device, module = machine().device, load(backend)
    built = build(replace(CASES[0], residual_form=None))
    assert isinstance(built.input, Tensor)
    assert built.input_quantizer is not None
    expected = pack(built.input, built.bits, built.input_quantizer)
    got = expected.to(device)
    got.data.fill_(0xC3)  # as the reference's rows are poisoned
    module.quantize_pack(built.input.to(device), got)
    used = expected.bits != 0
    assert torch.equal(got.data.cpu()[used], expected.data[used])
    values = module.unpack_dequantize(got)
    assert torch.equal(values.cpu(), reference.unpack_dequantize(expected))
    for bits in (2, 4, 8):
        codes = torch.randint(0, 1 << bits, (3, 13)).to(torch.uint8)
        packed = module.pack_bits(codes.to(device), bits)
        assert torch.equal(packed.cpu(), reference.pack_bits(codes, bits))
        assert torch.equal(module.unpack_bits(packed, bits, 13, False).cpu(), codes)


def train(groups: int, backend: str) -> None:
    case = ConvCase(
        bits=BITS,
        groups=groups,
        group_channels=8 // groups,
        group_outputs=8 // groups,
        packed_weight=False,
    )
    built = build(case)
    expected = gradients(built, "reference")
    got = gradients(on_device(built, machine().device), backend)
    for mine, theirs in zip(got, expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-4 * scale + 1e-30)


def gradients(built: Built, backend: str) -> tuple[Tensor, ...]:
    arguments = {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in built.arguments().items()
    }
    y = mixed_conv2d(**arguments, backend=backend)
    assert isinstance(y, Tensor)
    leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    return torch.autograd.grad(y.sum(), leaves)


def decide(backend: str) -> None:
    """The gate, of packed features."""
    device = machine().device
    x, weights = packed_features(3, 5, 3, 7, (2, 4, 8, 32)), gate_weights(5)
    moved = RNNGateWeights(*(value.to(device) for value in weights))
    got = rnn_gate(x.to(device), moved, CHOICES, backend=backend)
    expected = rnn_gate(x, weights, CHOICES, backend="reference")
    assert_same_step(GateStep(*(value.cpu() for value in got)), expected)


def calls() -> list[tuple[str, Callable[[], None]]]:
    """Everything that there is to call, with names for people."""
    found: list[tuple[str, Callable[[], None]]] = []
    for backend in (*gpu_backends(), *gpu_candidates()):
        for i, case in enumerate(CASES):
            found.append((f"{backend} convolution {i}", partial(convolve, case, backend)))
    for backend in gpu_backends():
        for groups in (1, 4):
            found.append((f"{backend} training {groups}", partial(train, groups, backend)))
        for call in (convolve_in_buckets, convert, decide):
            found.append((f"{backend} {call.__name__}", partial(call, backend)))
    return found


def main(share: int = 0, shares: int = 1) -> int:
    """One of several equal shares of the calls."""
    reason = missing_reason()
    if reason is not None:
        print(f"tests.kernels.gpu_calls: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(20200100705)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name, call in calls()[share::shares]:
            print(name, flush=True)
            call()
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
