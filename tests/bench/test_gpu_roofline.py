"""What a kernel has to move and to compute, counted by hand."""

from __future__ import annotations

import pytest

from bench.gpu import roofline
from bench.gpu.roofline import Peaks, Work
from bench.layers import Layer

LAYER = Layer("square", "square", 16, 16, 4, (4,))
PIXELS, WEIGHTS = 4 * 4, 16 * 16 * 9
PEAKS = Peaks(copy=1e9, int8=1e12)


def test_the_longer_of_both_times_counts() -> None:
    assert Work(2_000, 1_000).seconds(PEAKS) == pytest.approx(2e-6)
    assert Work(2_000, 5_000_000).seconds(PEAKS) == pytest.approx(5e-6)


def test_work_adds_up() -> None:
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_samples_move_their_codes_once(bits: int) -> None:
    work = roofline.convolution(LAYER, [bits] * 3)
    assert work.bytes == (3 * 2 * PIXELS * 16 + WEIGHTS) * bits // 8
    assert work.operations == 2 * 3 * PIXELS * WEIGHTS


def test_channels_that_leave_bits_over_take_whole_bytes() -> None:
    layer = Layer("odd", "square", 5, 5, 3, (1,))
    # 5 codes of 2 bits take 2 bytes, in activations and in each tap of the weight.
    assert roofline.convolution(layer, [2]).bytes == 2 * 9 * 2 + 5 * 9 * 2


def test_skipped_samples_move_nothing_but_a_float_result() -> None:
    assert roofline.convolution(LAYER, [0, 0]) == Work(0, 0)
    assert roofline.convolution(LAYER, [0, 0], output="stream") == Work(0, 0)
    assert roofline.convolution(LAYER, [0, 0], output="float") == Work(2 * 4 * 16 * PIXELS, 0)


def test_a_mix_reads_the_weights_of_each_of_its_widths_once() -> None:
    parts = [roofline.convolution(LAYER, [bits] * 2) for bits in (0, 2, 4, 8)]
    whole = roofline.convolution(LAYER, [0, 2, 4, 8] * 2)
    assert whole == parts[0] + parts[1] + parts[2] + parts[3]


def test_a_block_reads_the_stream_at_8_bits_and_writes_it_back() -> None:
    first = roofline.convolution(LAYER, [2], input_bits=8)
    assert first.bytes == PIXELS * 16 + (PIXELS * 16 + WEIGHTS) // 4
    second = roofline.convolution(LAYER, [2], output="stream")
    assert second.bytes == (PIXELS * 16 + WEIGHTS) // 4 + 2 * PIXELS * 16


def test_float_inputs_and_results_take_four_bytes_a_value() -> None:
    work = roofline.convolution(LAYER, [8], input_bits=32, output="float")
    assert work.bytes == 8 * 16 * PIXELS + WEIGHTS


def test_packing_reads_floats_and_writes_codes() -> None:
    assert roofline.quantize_pack(LAYER, 3, 4) == Work(3 * 16 * PIXELS * 9 // 2)
    assert roofline.unpack_dequantize(LAYER, 3, 4) == roofline.quantize_pack(LAYER, 3, 4)
