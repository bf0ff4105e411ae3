"""Compiles the Triton kernels for a GPU that is not there, as real calls would launch them.

Run by test_triton.py in processes of its own, since Triton looks at TRITON_INTERPRET when a kernel
is defined: ``python -m tests.kernels.triton_ahead_of_time CAPABILITY`` prints a JSON line for each
kernel that the calls below launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dfs_kernels import PackedActivation, PackedConvWeight, mixed_conv2d, quantize_pack
from dfs_kernels.backends import triton as backend

# Shapes of CIFAR's and ImageNet's residual networks, and a depthwise layer:
# (channels, outputs, groups, kernel, stride, size).
LAYERS = (
    (16, 16, 1, 3, 1, 32),
    (256, 256, 1, 3, 1, 14),
    (16, 32, 1, 1, 2, 32),
    (96, 96, 96, 3, 1, 28),
)
OPTIONS = (2, 4, 8)


class AbsentGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def describe(compiled: Any) -> dict[str, Any]:
    """What the machine code uses."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]) + int(found[3]),
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async\S*\.s32\.s8\.s8", ptx)),
        "mma": len(re.findall(r"mma\.sync\S*\.s32\.s8\.s8\.s32", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "fma": len(re.findall(r"\bfma\.rn\.f32", ptx)),
    }


def run_calls() -> None:
    for channels, outputs, groups, kernel, stride, size in LAYERS:
        bits = torch.tensor([2, 4, 8, 0], dtype=torch.int32)
        weight = PackedConvWeight.from_float(
            torch.randn(outputs, channels // groups, kernel, kernel),
            {b: torch.full((outputs,), 0.1) for b in OPTIONS},
            OPTIONS,
        )
        image = torch.zeros(4, channels, size, size, requires_grad=True)
        scales = dict.fromkeys(OPTIONS, 0.1)
        packed = quantize_pack(image.detach(), bits, scales, backend="triton")
        shape = {"stride": stride, "padding": kernel // 2, "groups": groups, "backend": "triton"}
        mixed_conv2d(packed, weight, bits, activation="relu", output_scale=scales, **shape)
        # The block of a residual network: read the 8-bit stream, write it back.
        stream = PackedActivation(
            torch.zeros(4, channels * size * size, dtype=torch.uint8),
            torch.full((4,), 8, dtype=torch.int32),
            torch.ones(1),
            torch.zeros(1, dtype=torch.int32),
            (8,),
            channels,
            size,
            size,
        )
        mixed_conv2d(stream, weight, bits, scales, output_scale=scales, output_bits=8, **shape)
        float_weight = torch.randn(outputs, channels // groups, kernel, kernel, requires_grad=True)
        result = mixed_conv2d(
            image, float_weight, bits, scales, **shape,
            weight_scale={b: torch.ones(outputs) for b in OPTIONS},
        )  # fmt: skip
        assert isinstance(result, torch.Tensor)
        result.sum().backward()


def main() -> None:
    driver.set_active(AbsentGpu(int(sys.argv[1])))
    backend._INTERPRETED = True  # takes CPU tensors

    def compile_only(kernel: Any, grid: Any, device: Any, *args: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*args, grid=grid, **constants, enable_fp_fusion=False)
        print(json.dumps({"kernel": kernel.__name__, **describe(compiled)}), flush=True)

    backend._launch = compile_only
    run_calls()


if __name__ == "__main__":
    main()
