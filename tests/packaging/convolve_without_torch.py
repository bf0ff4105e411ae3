"""Checks a convolution of the compiled module on every instruction set; needs nothing but Python.

    python -I -S convolve_without_torch.py dfs_kernels/_cpu....so

Prints a line for each instruction set, or raises.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

SAMPLES, CHANNELS, OUTPUTS, SIZE, KERNEL, PADDING = 3, 37, 19, 9, 3, 1
WIDTHS = (2, 4, 8)
ZERO_POINTS = {2: 1, 4: 0, 8: 255}


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(seed: int) -> Iterator[int]:
    """Of at least 16 random bits."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        yield seed >> 40


def address(array: Any) -> int:
    return ctypes.addressof(array)


def convolve(cpu: Any, values: Any, weights: dict[int, Any], scales: Any, zeros: Any) -> Any:
    """Sample i at WIDTHS[i], all scales 1; returns float32 (N, O, H, W)."""
    geometry = cpu.ConvGeometry(
        in_channels=CHANNELS,
        out_channels=OUTPUTS,
        kernel_h=KERNEL,
        kernel_w=KERNEL,
        pad_left=PADDING,
        pad_right=PADDING,
        pad_top=PADDING,
        pad_bottom=PADDING,
    )
    tiles = []
    for bits in WIDTHS:
        packed = (ctypes.c_uint8 * (OUTPUTS * KERNEL * KERNEL * ((CHANNELS * bits + 7) // 8)))()
        shape = (OUTPUTS, KERNEL, KERNEL, CHANNELS)
        cpu.quantize_weight(
            address(weights[bits]), *shape, address(scales), bits, False, address(packed), 1
        )
        tile = (ctypes.c_uint8 * cpu.tile_bytes(geometry, bits, False))()
        cpu.retile_weight(geometry, address(packed), bits, False, address(tile), 1)
        tiles.append(tile)
    image = {"height": SIZE, "width": SIZE, "stride_w": 1, "stride_h": SIZE}
    image["stride_c"] = SIZE * SIZE
    count = SAMPLES * OUTPUTS * SIZE * SIZE
    output = (ctypes.c_float * count)(*[float("nan")] * count)
    sample_bits = (ctypes.c_int32 * SAMPLES)(*WIDTHS)
    cpu.mixed_conv2d(
        cpu.MixedConv2dArgs(
            batch=SAMPLES,
            bits=address(sample_bits),
            geometry=geometry,
            weight=cpu.ConvWeight(
                widths=list(WIDTHS),
                tiles=[address(tile) for tile in tiles],
                centred=[False] * len(WIDTHS),
                scale=address(scales),
            ),
            input=cpu.FeatureMap(
                channels=CHANNELS, values=address(values), stride_n=CHANNELS * SIZE * SIZE, **image
            ),
            input_quantizer=cpu.Quantizer(
                widths=list(WIDTHS), scale=address(scales), zero_point=address(zeros)
            ),
            output=cpu.FeatureMap(
                channels=OUTPUTS, values=address(output), stride_n=OUTPUTS * SIZE * SIZE, **image
            ),
        ),
        2,
    )
    return output


def expected_sum(values: Any, weight: Any, n: int, o: int, y: int, x: int) -> int:
    total = 0
    for kh in range(KERNEL):
        for kw in range(KERNEL):
            row, column = y + kh - PADDING, x + kw - PADDING
            if not (0 <= row < SIZE and 0 <= column < SIZE):
                continue
            for c in range(CHANNELS):
                value = values[((n * CHANNELS + c) * SIZE + row) * SIZE + column]
                level = weight[((o * CHANNELS + c) * KERNEL + kh) * KERNEL + kw]
                total += int(value) * int(level)
    return total


def main(path: str) -> None:
    cpu = load(path)
    random = numbers(20200100705)
    # Whole numbers within each width's range: what is quantized with a step of 1 stays as it is.
    values = (ctypes.c_float * (SAMPLES * CHANNELS * SIZE * SIZE))()
    for i in range(len(values)):
        bits = WIDTHS[i // (CHANNELS * SIZE * SIZE)]
        values[i] = next(random) % 2**bits - ZERO_POINTS[bits]
    weights = {bits: (ctypes.c_float * (OUTPUTS * CHANNELS * KERNEL * KERNEL))() for bits in WIDTHS}
    for bits, weight in weights.items():
        for i in range(len(weight)):
            weight[i] = next(random) % 2**bits - 2 ** (bits - 1)
    scales = (ctypes.c_float * (len(WIDTHS) * OUTPUTS))(*[1.0] * (len(WIDTHS) * OUTPUTS))
    zeros = (ctypes.c_int32 * len(WIDTHS))(*[ZERO_POINTS[bits] for bits in WIDTHS])
    pixels = [(0, 0), (0, SIZE - 1), (SIZE - 1, 0), (SIZE - 1, 5), (4, 4), (3, SIZE - 1)]
    for isa in cpu.supported_isas():
        cpu.set_isa(isa)
        output = convolve(cpu, values, weights, scales, zeros)
        assert not any(value != value for value in output), f"{isa}: an output was not written"
        for n, bits in enumerate(WIDTHS):
            for o in range(OUTPUTS):
                for y, x in pixels:
                    got = output[((n * OUTPUTS + o) * SIZE + y) * SIZE + x]
                    expected = expected_sum(values, weights[bits], n, o, y, x)
                    # float32 holds these sums exactly.
                    assert got == expected, (isa, bits, o, y, x, got, expected)
        print(f"{isa}: exact")


if __name__ == "__main__":
    main(sys.argv[1])
