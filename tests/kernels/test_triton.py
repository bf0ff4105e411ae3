"""What only the Triton backend has: its dispatch, its checks on the device, its machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from dfs_kernels import PackedActivation, available_backends, mixed_conv2d
from dfs_kernels.packing import row_bytes
from dfs_kernels.triton import configs
from tests.kernels.cases import ConvCase, assert_matches_reference, build, conv_cases

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    "triton" not in available_backends(), reason="Triton is not installed for this platform"
)

if "triton" in available_backends():
    from dfs_kernels.backends import triton as backend


@settings(max_examples=60)
@given(case=conv_cases())
def test_any_convolution(case: ConvCase) -> None:
    assert_matches_reference(build(case), "triton")


@pytest.mark.parametrize("batch", [(8, 0, 2, 32, 4, 2, 0), (0, 0), (4,), (32, 8)])
@pytest.mark.parametrize("output_form", ["float", "fixed"])
def test_buckets_give_the_same(
    monkeypatch: pytest.MonkeyPatch, batch: tuple[int, ...], output_form: str
) -> None:
    def in_buckets(*sizes: int) -> tuple[configs.ConvConfig, ...]:
        return (replace(configs.conv_configs(*sizes)[0], buckets=True),)

    monkeypatch.setattr(backend, "conv_configs", in_buckets)
    case = ConvCase(
        bits=batch,
        group_channels=8,
        group_outputs=5,
        residual_form="packed",
        output_form=output_form,
    )
    assert_matches_reference(build(case), "triton")


def test_tf32_follows_the_setting_of_pytorchs_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    try:
        for precision, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            cudnn.conv.fp32_precision = precision
            assert backend._float_precision() == expected
    finally:
        cudnn.conv.fp32_precision = before


def test_samples_are_sorted_by_width() -> None:
    bits = torch.tensor([8, 2, 0, 32, 7, 2, 4] * 30, dtype=torch.int32)
    order, starts = backend._sort_samples(bits)
    assert starts.tolist() == [0, 60, 90, 120, 150, 210]
    ranks = {2: 0, 4: 1, 8: 2, 32: 3, 0: 4, 7: 4}
    expected = sorted(range(len(bits)), key=lambda n: ranks[int(bits[n])])
    assert order.tolist() == expected


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("output_form", ["float", "fixed"])
def test_an_unknown_width_fills_its_sample(groups: int, output_form: str) -> None:
    """Nothing can be raised on a GPU without waiting for it."""
    case = ConvCase(
        bits=(8, 2, 4), groups=groups, group_channels=8, group_outputs=2, output_form=output_form
    )
    built = build(case)
    bits = built.bits.clone()
    bits[1] = 5
    call = replace(built.call(), bits=bits)
    good = replace(built.call())
    if output_form == "float":
        image, expected = (torch.zeros(case.output_shape) for _ in range(2))
        backend.mixed_conv2d(call, image)
        backend.mixed_conv2d(good, expected)
        assert bool(image[1].isnan().all())
        assert torch.equal(image[[0, 2]], expected[[0, 2]])
        return
    quantizer = built.output_quantizer
    assert quantizer is not None
    rows = [torch.zeros(3, 900, dtype=torch.uint8) for _ in range(2)]
    for data, one in zip(rows, (call, good), strict=True):
        shape = case.output_shape[1:]
        out = PackedActivation(
            data[:, : _row_bytes(quantizer.options, shape)].contiguous(),
            built.output_bits,
            quantizer.scale,
            quantizer.zero_point,
            quantizer.options,
            *shape,
        )
        backend.mixed_conv2d(one, out)
        data[:, : out.data.shape[1]] = out.data
    used = _row_bytes(quantizer.options, case.output_shape[1:])
    assert bool((rows[0][1, :used] == 0xFF).all())
    assert torch.equal(rows[0][[0, 2]], rows[1][[0, 2]])


def _row_bytes(options: tuple[int, ...], shape: tuple[int, ...]) -> int:
    return row_bytes(options, *shape)


def test_quantize_pack_fills_an_unknown_width() -> None:
    bits = torch.tensor([8, 3, 0, 2], dtype=torch.int32)
    packed = PackedActivation(
        torch.full((4, 60), 0x5A, dtype=torch.uint8),
        bits,
        torch.ones(2),
        torch.zeros(2, dtype=torch.int32),
        (2, 8),
        5,
        3,
        4,
    )
    backend.quantize_pack(torch.randn(4, 5, 3, 4), packed)
    assert bool((packed.data[1] == 0xFF).all())
    assert bool((packed.data[2] == 0x5A).all())
    assert bool(backend.unpack_dequantize(packed)[1].isnan().all())


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_gradients_equal_the_references(groups: int) -> None:
    """Groups of eight, four and one channel: matrix products, and products one by one."""
    options = (2, 4, 8, 32)
    bits = torch.tensor([8, 0, 2, 32, 4])
    x = torch.randn(5, 8, 6, 5)
    weight, residual = torch.randn(16, 8 // groups, 3, 3), torch.randn(5, 16, 3, 3)
    mul, steps = torch.rand(4, 16) + 0.5, torch.rand(4, 16) + 0.2
    values = (x, weight, mul, steps, torch.rand(4) + 0.2, residual)
    found = []
    for name in ("reference", "triton"):
        leaves = [value.clone().requires_grad_() for value in values]
        y = mixed_conv2d(
            leaves[0],
            leaves[1],
            bits,
            leaves[4],
            weight_scale=leaves[3],
            mul=leaves[2],
            residual=leaves[5],
            bit_options=options,
            stride=2,
            padding=1,
            groups=groups,
            activation="relu",
            backend=name,
        )
        assert isinstance(y, torch.Tensor)
        gradient = torch.linspace(-1, 1, y.numel()).view(y.shape)
        found.append(torch.autograd.grad(y, leaves, gradient))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=[80, 90, 100])
def machine_code(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[int, list[Any]]:
    """What each kernel compiled to for a GPU of one compute capability, and which that was."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.triton_ahead_of_time", str(request.param)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return request.param, [json.loads(line) for line in run.stdout.splitlines()]


def test_convolutions_use_the_int8_tensor_cores(machine_code: tuple[int, list[Any]]) -> None:
    capability, kernels = machine_code
    instruction = {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
    convolutions = [k for k in kernels if k["kernel"] == "mixed_conv2d_kernel"]
    assert len(convolutions) == 9  # three layers, three forms of input
    assert all(k[instruction] > 0 for k in convolutions), convolutions


def test_integer_kernels_fuse_no_multiply_and_add(machine_code: tuple[int, list[Any]]) -> None:
    """Each operation of the formulas is rounded by itself."""
    _, kernels = machine_code
    exact = {"mixed_conv2d_kernel", "grouped_conv2d_kernel", "quantize_pack_kernel"}
    assert exact <= {k["kernel"] for k in kernels}
    assert [k for k in kernels if k["kernel"] in exact and k["fma"]] == []


def test_kernels_fit_the_gpu(machine_code: tuple[int, list[Any]]) -> None:
    """Shared memory of an sm_80 block, and where it counts no registers spilled to memory."""
    _, kernels = machine_code
    hot = {
        "mixed_conv2d_kernel",
        "grouped_conv2d_kernel",
        "float_conv2d_kernel",
        "quantize_pack_kernel",
        "input_gradient_kernel",
    }
    assert hot <= {k["kernel"] for k in kernels}
    assert max(k["shared"] for k in kernels) <= 163 * 1024
    assert [k for k in kernels if k["kernel"] in hot and k["stack"]] == []
    assert max(k["stack"] for k in kernels) <= 32
