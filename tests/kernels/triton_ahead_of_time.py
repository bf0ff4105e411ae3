"""Compiles the Triton kernels for a GPU that is not there, as real calls would launch them.

Run by test_triton_machine_code.py in processes of its own, since Triton looks at TRITON_INTERPRET
when a kernel is defined: ``python -m tests.kernels.triton_ahead_of_time CAPABILITY`` prints a JSON
line for each kernel that the calls below launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dfs_kernels import (
    PackedActivation,
    PackedConvWeight,
    RNNGateWeights,
    mixed_conv2d,
    mixed_conv2d_,
    quantize_pack,
    rnn_gate,
    unpack_dequantize,
)
from dfs_kernels.backends import triton as backend
from dfs_kernels.triton import configs

# Shapes of CIFAR's and ImageNet's residual networks, groups of eight, and a depthwise layer:
# (channels, outputs, groups, kernel, stride, size).
LAYERS = (
    (16, 16, 1, 3, 1, 32),
    (256, 256, 1, 3, 1, 14),
)
MORE_LAYERS = (
    (16, 32, 1, 1, 2, 32),
    (32, 32, 4, 3, 1, 16),
    (96, 96, 96, 3, 1, 28),
)
OPTIONS = (2, 4, 8)
STEPS = dict.fromkeys(OPTIONS, 0.1)


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


# What machine code is made of


def describe(compiled: Any) -> dict[str, Any]:
    """What the machine code uses."""
    ptx = compiled.asm["ptx"]
    return {
        **_resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "fp_fusion": compiled.metadata.enable_fp_fusion,
        "wgmma": len(re.findall(r"wgmma\.mma_async\S*\.s32\.s8\.s8", ptx)),
        "mma": len(re.findall(r"mma\.sync\S*\.s32\.s8\.s8\.s32", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma\S*kind::i8", ptx)),
        "tf32": len(re.findall(r"mma\S*tf32", ptx)),
        "fma": len(re.findall(r"\bfma\.rn\.f(?:32|64)", ptx)),
        "float64_in_loops": len(re.findall(r"\.f64\b", "\n".join(_loop_lines(ptx)))),
        "loads": _access_sizes("ld", ptx),
        "copies": _copy_sizes(ptx),
        "stores": _access_sizes("st", ptx),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _disassemble("-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        stack = int(found[2]) + int(found[3])
        spilled = spills_in_loops(_disassemble("-sass", file.name)) if stack else 0
    return {"registers": int(found[1]), "stack": stack, "spills_in_loops": spilled}


def _disassemble(what: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [str(tool), what, path], capture_output=True, text=True, check=True
    ).stdout


def spills_in_loops(sass: str) -> int:
    """Accesses to the stack within loops that multiply."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    lines = [(int(address, 16), text) for address, text in found]
    loops = []
    for address, text in lines:
        jump = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if jump is not None and int(jump[1], 16) < address:
            loops.append(range(int(jump[1], 16), address))
    multiply = [address for address, text in lines if re.search(r"MMA|FFMA|FMUL|IMAD", text)]
    loops = [loop for loop in loops if any(address in loop for address in multiply)]
    stack = [address for address, text in lines if re.search(r"\b(STL|LDL)\b", text)]
    return sum(any(address in loop for loop in loops) for address in stack)


def _loop_lines(ptx: str) -> list[str]:
    """The lines between a label and a jump back to it."""
    lines = ptx.splitlines()
    labels: dict[str, int] = {}
    inside: set[int] = set()
    for number, line in enumerate(lines):
        label = re.match(r"(\$\w+):", line)
        if label is not None:
            labels[label[1]] = number
        jump = re.search(r"\bbra\S*\s+(\$\w+)", line)
        if jump is not None and jump[1] in labels:
            inside.update(range(labels[jump[1]], number))
    return [lines[number] for number in sorted(inside)]


def _access_sizes(instruction: str, ptx: str) -> dict[int, int]:
    """How often global memory is accessed at each number of bytes."""
    found = re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return dict(Counter(int(count or 1) * int(bits) // 8 for count, bits in found))


def _copy_sizes(ptx: str) -> dict[int, int]:
    """The same of asynchronous copies into shared memory."""
    found = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x\w+|\d+)", ptx)
    return dict(Counter(int(size, 0) for size in found))


# Calls


def run_calls() -> None:
    """Everything with the defaults, and what the tuning may choose instead at one layer."""
    with configured(0):
        for layer in LAYERS:
            convolve_packed(*layer)
            for precision in ("ieee", "tf32"):
                train(*layer, precision)
        for layer in MORE_LAYERS:
            convolve_packed(*layer)
            train(*layer, "ieee")
        pack_and_choose()
    seen: set[bool] = set()
    for number in range(1, _most_candidates()):
        with configured(number) as config:
            # All forms of the first that sorts samples into buckets.
            convolve_packed(*LAYERS[1], stream_only=not config.buckets or config.buckets in seen)
            if number < len(configs.float_configs(4096, 256)):
                train(*LAYERS[1], "ieee")
            pack_and_choose()
        seen.add(config.buckets)


def convolve_packed(
    channels: int,
    outputs: int,
    groups: int,
    kernel: int,
    stride: int,
    size: int,
    stream_only: bool = False,
) -> None:
    bits = torch.tensor([2, 4, 8, 0], dtype=torch.int32)
    weight = PackedConvWeight.from_float(
        torch.randn(outputs, channels // groups, kernel, kernel),
        {b: torch.full((outputs,), 0.1) for b in OPTIONS},
        OPTIONS,
    )
    shape = {"stride": stride, "padding": kernel // 2, "groups": groups, "backend": "triton"}
    packed = quantize_pack(torch.zeros(4, channels, size, size), bits, STEPS, backend="triton")
    stream = eight_bit_stream(channels, size)
    target = eight_bit_stream(outputs, size // stride)
    # The two convolutions of a block: read the stream and keep codes, add to the stream.
    mixed_conv2d(stream, weight, bits, STEPS, activation="relu", output_scale=STEPS, **shape)
    if stream_only:
        return
    mixed_conv2d_(packed, weight, bits, residual=target, activation="relu", **shape)
    mixed_conv2d(packed, weight, bits, output_scale=STEPS, **shape)
    mixed_conv2d(packed, weight, bits, **shape)


def eight_bit_stream(channels: int, size: int) -> PackedActivation:
    return PackedActivation(
        torch.zeros(4, channels * size * size, dtype=torch.uint8),
        torch.full((4,), 8, dtype=torch.int32),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int32),
        (8,),
        channels,
        size,
        size,
    )


def train(
    channels: int, outputs: int, groups: int, kernel: int, stride: int, size: int, precision: str
) -> None:
    backend._float_precision = lambda: precision
    image = torch.zeros(4, channels, size, size, requires_grad=True)
    weight = torch.randn(outputs, channels // groups, kernel, kernel, requires_grad=True)
    result = mixed_conv2d(
        image, weight, torch.tensor([2, 32, 8, 0]), STEPS,
        weight_scale={b: torch.ones(outputs) for b in OPTIONS}, backend="triton",
        stride=stride, padding=kernel // 2, groups=groups,
    )  # fmt: skip
    assert isinstance(result, torch.Tensor)
    result.sum().backward()


def pack_and_choose() -> None:
    for bits in OPTIONS:
        codes = backend.pack_bits(torch.zeros(64, 64, dtype=torch.uint8), bits)
        backend.unpack_bits(codes, bits, 64, signed=True)
    stream = eight_bit_stream(64, 8)
    unpack_dequantize(stream, backend="triton")
    hidden, choices = 10, (0, 2, 4, 8)
    shapes = ((hidden, 64), (hidden,), *((4 * hidden, hidden),) * 2, *((4 * hidden,),) * 2)
    weights = RNNGateWeights(
        *(torch.zeros(shape) for shape in shapes),
        torch.zeros(4, hidden), torch.zeros(4), torch.zeros(4, dtype=torch.float64),
    )  # fmt: skip
    for x in (stream, torch.zeros(4, 64, 8, 8)):
        rnn_gate(x, weights, choices, backend="triton")


_CANDIDATES = {name: getattr(configs, name) for name in dir(configs) if name.endswith("_configs")}
# Pixels, outputs, depth and widths of a layer with room for the largest tiles.
_LARGE = (4096, 256, 2304, 3)
_candidate = 0


def _most_candidates() -> int:
    return len(configs.conv_configs(*_LARGE))


@contextmanager
def configured(number: int) -> Iterator[configs.ConvConfig]:
    """Launches take the candidate of that number, or the last there is; the convolution's at hand.

    0 is the default, which GPUs take that were never tuned for.
    """
    global _candidate
    for name, candidates in _CANDIDATES.items():
        setattr(backend, name, partial(_one_of, candidates, number))
    _candidate = number
    yield backend.conv_configs(*_LARGE)[0]
    for name, candidates in _CANDIDATES.items():
        setattr(backend, name, candidates)


def _one_of(candidates: Callable[..., tuple[Any, ...]], number: int, *sizes: int) -> Any:
    found = candidates(*sizes)
    return (found[min(number, len(found) - 1)],)


# What is told of a launch beside its machine code.
_TOLD = (
    "WIDTHS", "STREAM", "OUT_INDEX", "IN_PLACE", "C", "GROUPS", "DOTS", "PRECISION", "WIDTH",
)  # fmt: skip


def main() -> None:
    driver.set_active(AbsentGpu(int(sys.argv[1])))
    # It takes CPU tensors then.
    backend._INTERPRETED = True
    backend._interpreter_fault = lambda: None
    described: dict[str, dict[str, Any]] = {}

    def compile_only(kernel: Any, grid: Any, device: Any, *args: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*args, grid=grid, **constants, enable_fp_fusion=False)
        if compiled.hash not in described:
            described[compiled.hash] = describe(compiled)
        told = {name: constants[name] for name in _TOLD if name in constants}
        line = {"kernel": kernel.__name__, "candidate": _candidate, **told}
        print(json.dumps({**line, **described[compiled.hash]}), flush=True)

    backend._launch = compile_only
    run_calls()


if __name__ == "__main__":
    main()
