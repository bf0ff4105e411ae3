"""Calls every kernel of the GPU backends once or twice, at small odd shapes, for a sanitizer.

``python -m tests.kernels.gpu_calls`` compares what they give with the reference, so that it is a
test by itself too. Everything that a kernel may read has been written before, so that a report of
uninitialised memory is about a kernel.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.backends import gpu_backends
from bench.gpu.device import machine, missing_reason
from bench.gpu.ours import bind, implementations
from dfs_kernels import GateStep, RNNGateWeights, mixed_conv2d, reference, rnn_gate
from dfs_kernels.backends import load
from tests.kernels.cases import ConvCase, assert_matches_reference, build, on_device, pack
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


def convolve(backend: str) -> None:
    for case in CASES:
        assert_matches_reference_on_gpu(case, backend)


def convolve_in_buckets(backend: str) -> None:
    """The dispatch that sorts samples by width, where the backend has one."""
    for implementation in implementations():
        if implementation.startswith(f"{backend}_"):
            bind(assert_matches_reference_on_gpu, implementation)(CASES[1])


def assert_matches_reference_on_gpu(case: ConvCase, backend: str | None = None) -> None:
    assert backend is not None
    assert_matches_reference(build(case), backend, machine().device)


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


def train(backend: str) -> None:
    for groups in (1, 4):
        case = ConvCase(
            bits=BITS,
            groups=groups,
            group_channels=8 // groups,
            group_outputs=8 // groups,
            packed_weight=False,
        )
        arguments = on_device(build(case), machine().device).arguments()
        leaves = {
            name: value.requires_grad_()
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        found = []
        for name in ("reference", backend):
            y = mixed_conv2d(**arguments, backend=name)
            assert isinstance(y, Tensor)
            found.append(torch.autograd.grad(y.sum(), list(leaves.values())))
        for got, expected in zip(found[1], found[0], strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * scale + 1e-30)


def decide(backend: str) -> None:
    """The gate, of packed features."""
    device = machine().device
    x, weights = packed_features(3, 5, 3, 7, (2, 4, 8, 32)), gate_weights(5)
    moved = RNNGateWeights(*(value.to(device) for value in weights))
    got = rnn_gate(x.to(device), moved, CHOICES, backend=backend)
    expected = rnn_gate(x, weights, CHOICES, backend="reference")
    assert_same_step(GateStep(*(value.cpu() for value in got)), expected)


def main() -> int:
    reason = missing_reason()
    if reason is not None:
        print(f"tests.kernels.gpu_calls: {reason}", file=sys.stderr)
        return 2
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for backend in gpu_backends():
            for calls in (convolve, convolve_in_buckets, convert, train, decide):
                calls(backend)
                print(f"{backend}: {calls.__name__}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
