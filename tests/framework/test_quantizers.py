from __future__ import annotations

import pytest
import torch
from torch import nn

from dfs.nn import DFSConv2d, PaperMinMax
from dfs.nn.fake_quant import affine_fake_quantize


@pytest.mark.parametrize(
    ("bits", "low", "high", "values", "expected"),
    [
        # 4 values from -1 to 2: -1, 0, 1, 2. Halves go to the even code: 0.5 is 1.5 steps up, 2.
        (2, -1.0, 2.0, [-5.0, -1.0, -0.5, 0.5, 1.4, 2.0, 9.0], [-1, -1, -1, 1, 1, 2, 2]),
        # Zero need not be among the values.
        (1, 0.25, 0.75, [0.0, 0.4, 0.6, 1.0], [0.25, 0.25, 0.75, 0.75]),
        # 16 values from 0 to 15.
        (4, 0.0, 15.0, [-1.0, 0.5, 1.5, 2.4, 14.6, 99.0], [0, 0, 2, 2, 15, 15]),
        # An empty range keeps a step of 1e-8, and everything is at its lower end.
        (8, 3.0, 3.0, [3.0], [3.0]),
    ],
)
def test_affine_rounding_by_hand(
    bits: int, low: float, high: float, values: list[float], expected: list[float]
) -> None:
    got = affine_fake_quantize(torch.tensor(values), torch.tensor(low), torch.tensor(high), bits)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0)


def test_gradients_pass_straight_through_outside_of_the_range_too() -> None:
    x = torch.tensor([-9.0, 0.2, 9.0], requires_grad=True)
    y = affine_fake_quantize(x, torch.tensor(0.0), torch.tensor(1.0), 2)
    (gradient,) = torch.autograd.grad(y, x, torch.tensor([1.0, 2.0, 3.0]))
    assert gradient.tolist() == [1.0, 2.0, 3.0]


def test_ranges_are_batch_means_and_the_old_value_counts_a_tenth() -> None:
    quantizer = PaperMinMax((8,), 1, input_signed=True)
    # Minima -2 and 0, maxima 4 and 2: from -1 to 3.
    first = torch.tensor([[-2.0, 4.0], [0.0, 2.0]]).view(2, 1, 1, 2)
    quantizer.quantize_input(first, 8)
    torch.testing.assert_close(quantizer.running_min, torch.tensor([-0.9]))
    torch.testing.assert_close(quantizer.running_max, torch.tensor([2.7]))
    quantizer.quantize_input(torch.tensor([-3.0, 5.0]).view(1, 1, 1, 2), 8)
    torch.testing.assert_close(quantizer.running_min, torch.tensor([-0.09 - 2.7]))
    torch.testing.assert_close(quantizer.running_max, torch.tensor([0.27 + 4.5]))


def test_training_uses_the_range_of_the_batch_and_evaluation_the_average() -> None:
    quantizer = PaperMinMax((2,), 1, input_signed=True)
    x = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 1, 4)
    assert torch.equal(quantizer.quantize_input(x, 2), x)
    quantizer.eval()
    # The average is 0 to 2.7: steps of 0.9.
    expected = torch.tensor([0.0, 0.9, 1.8, 2.7]).view(1, 1, 1, 4)
    torch.testing.assert_close(quantizer.quantize_input(x, 2), expected)
    torch.testing.assert_close(quantizer.running_max, torch.tensor([2.7]))


def test_weights_span_their_own_range() -> None:
    weight = torch.tensor([-1.0, 0.1, 0.6, 2.0]).view(4, 1, 1, 1)
    got = PaperMinMax((2,), 4, input_signed=True).quantize_weight(weight, 2)
    assert got.flatten().tolist() == [-1.0, 0.0, 1.0, 2.0]


def test_noise_only_moves_inputs_to_a_neighbouring_code_and_is_off_by_default() -> None:
    x = torch.rand(2, 3, 40, 40)
    plain, noisy = (PaperMinMax((4,), 1, True, stochastic=s) for s in (False, True))
    exact = plain.quantize_input(x, 4)
    assert torch.equal(plain.quantize_input(x, 4), exact)
    step = (x.flatten(1).amax(1).mean() - x.flatten(1).amin(1).mean()) / 15
    moved = ((noisy.quantize_input(x, 4) - exact) / step).round()
    assert set(moved.unique().tolist()) == {-1.0, 0.0, 1.0}
    # Uniform noise makes the rounding unbiased.
    inside = (x > 0.1) & (x < 0.9)
    bias = (noisy.quantize_input(x, 4) - x)[inside].mean() / step
    assert abs(float(bias)) < 0.03


def _paper_conv() -> DFSConv2d:
    conv = DFSConv2d(3, 4, 3, padding=1, bias=False, bit_options=(2, 10), quantizer="paper")
    conv.quantizer.running_min.fill_(-2.0)
    conv.quantizer.running_max.fill_(2.0)
    return conv.eval()


def test_a_convolution_simulates_each_sample_at_its_width() -> None:
    conv = _paper_conv()
    quantizer = conv.quantizer
    assert isinstance(quantizer, PaperMinMax)
    x = torch.randn(4, 3, 5, 5)
    got = conv(x, torch.tensor([10, 0, 32, 2]))
    for i, bits in ((0, 10), (3, 2)):
        weight = quantizer.quantize_weight(conv.weight, bits)
        one = nn.functional.conv2d(quantizer.quantize_input(x[i : i + 1], bits), weight, padding=1)
        torch.testing.assert_close(got[i : i + 1], one)
        assert torch.equal(conv(x[i : i + 1], bits), got[i : i + 1])
    assert torch.equal(got[1], torch.zeros(4, 5, 5))
    torch.testing.assert_close(got[2:3], conv(x[2:3]))
    assert torch.equal(conv(x, 0), torch.zeros(4, 4, 5, 5))
    assert conv(x[:0], 10).shape == (0, 4, 5, 5)


def test_each_width_is_a_batch_of_its_own_in_training() -> None:
    conv, alone = _paper_conv().train(), _paper_conv().train()
    x = torch.randn(6, 3, 5, 5)
    bits = torch.tensor([2, 10, 0, 2, 32, 10])
    conv(x, bits)
    for width in (2, 10):
        alone(x[bits == width], width)
    assert torch.equal(conv.quantizer.running_min, alone.quantizer.running_min)
    assert torch.equal(conv.quantizer.running_max, alone.quantizer.running_max)


def test_float_offsets_have_no_packed_form() -> None:
    conv = DFSConv2d(3, 4, 3, bit_options=(2, 8), quantizer="paper").eval()
    with pytest.raises(ValueError, match="quantizer 'paper'"):
        conv.packed()


def test_a_width_that_is_no_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"bits\[1\] is 4"):
        _paper_conv()(torch.randn(2, 3, 5, 5), torch.tensor([2, 4]))


def test_state_dicts_of_plain_convolutions_load_strictly() -> None:
    _paper_conv().load_state_dict(nn.Conv2d(3, 4, 3, bias=False).state_dict(), strict=True)


def test_unknown_quantizers_are_refused() -> None:
    with pytest.raises(ValueError, match="quantizer must be one of"):
        DFSConv2d(3, 4, 3, quantizer="ternary")
