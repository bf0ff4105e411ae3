"""DFSConv2d in the place of nn.Conv2d."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dfs import DFSConv2d
from dfs.nn import LSQ, MinMax
from dfs_kernels import PackedConvWeight, backends, mixed_conv2d

CONVS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "padded": {"padding": 1},
    "uneven": {"padding": (2, 0), "kernel_size": (3, 2)},
    "same": {"padding": "same"},
    "same_even_kernel": {"padding": "same", "kernel_size": (2, 4), "dilation": (3, 1)},
    "valid": {"padding": "valid"},
    "strided": {"stride": (2, 1), "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8, "padding": 1},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect_same": {"padding": "same", "padding_mode": "reflect", "kernel_size": (2, 3)},
}
every_conv = pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)


def make(options: dict[str, Any]) -> tuple[nn.Conv2d, DFSConv2d]:
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    conv, dfs_conv = nn.Conv2d(**arguments), DFSConv2d(**arguments)
    dfs_conv.load_state_dict(conv.state_dict(), strict=True)
    return conv, dfs_conv


@every_conv
@pytest.mark.parametrize("training", [False, True])
def test_without_bits_it_is_nn_conv2d(options: dict[str, Any], training: bool) -> None:
    conv, dfs_conv = make(options)
    conv.train(training)
    dfs_conv.train(training)
    for x in (torch.randn(2, 4, 9, 8), torch.randn(4, 9, 8)):
        y, expected = dfs_conv(x), conv(x)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
    assert dfs_conv.weight.grad is not None
    assert conv.weight.grad is not None
    assert torch.equal(dfs_conv.weight.grad, conv.weight.grad)


@every_conv
def test_32_bits_are_that_convolution_within_rounding(options: dict[str, Any]) -> None:
    conv, dfs_conv = make(options)
    x = torch.randn(2, 4, 9, 8)
    expected = conv(x)
    for layer in (dfs_conv.train(), dfs_conv.eval()):
        y = layer(x, 32)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@every_conv
@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
def test_eval_gives_the_bits_of_training(options: dict[str, Any], quantizer: str) -> None:
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})
    layer = DFSConv2d.from_conv(conv, quantizer=quantizer)
    x, bits = torch.randn(5, 4, 9, 8), torch.tensor([0, 2, 4, 8, 32])
    training = layer.train()(x, bits)
    evaluated = layer.eval()(x, bits)
    assert torch.equal(training, evaluated)
    assert not evaluated[0].any()
    assert evaluated[1:].flatten(1).any(1).all()


def test_mixed_bits() -> None:
    layer = DFSConv2d(8, 16, 3, padding=1)
    x = torch.randn(4, 8, 7, 7)
    y = layer(x, torch.tensor([0, 2, 8, 32]))
    assert y.shape == (4, 16, 7, 7)
    assert y.dtype == torch.float32
    assert not y[0].any()
    for n, bits in enumerate((0, 2, 8, 32)):
        assert torch.equal(layer(x, bits)[n], y[n])


def test_more_bits_come_closer_to_the_float_convolution() -> None:
    layer = DFSConv2d(16, 16, 3, padding=1)
    x = torch.randn(8, 16, 8, 8)
    exact = layer(x).detach()
    errors = [float((layer(x, bits).detach() - exact).square().mean()) for bits in (2, 4, 8)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_a_width_that_is_no_option_is_refused() -> None:
    layer = DFSConv2d(4, 6, 3, bit_options=(2, 8))
    for module in (layer.train(), layer.eval()):
        with pytest.raises(ValueError, match=r"bits\[1\] is 4"):
            module(torch.randn(2, 4, 5, 5), torch.tensor([2, 4]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bit_options": (2, 32)}, ValueError, "32 is always accepted"),
        ({"bit_options": (0, 2)}, ValueError, "bit_options may hold 1 to 16"),
        ({"bit_options": ()}, ValueError, "bit_options must not be empty"),
        ({"bit_options": (8, 4)}, ValueError, "bit_options must be ascending"),
        ({"quantizer": "dorefa"}, ValueError, "quantizer must be one of .*, got 'dorefa'"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DFSConv2d(4, 6, 3, **arguments)


# Packing


def test_eval_packs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DFSConv2d(4, 6, 3)
    packed: list[object] = []
    original = PackedConvWeight.from_float

    def counted(*args: Any, **kwargs: Any) -> PackedConvWeight:
        packed.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(PackedConvWeight, "from_float", staticmethod(counted))
    x = torch.randn(2, 4, 5, 5)
    layer(x, 8)
    assert not packed
    layer.eval()
    for bits in (2, 4, 8, 32, 8):
        layer(x, bits)
    assert len(packed) == 1
    layer.train()
    layer(x, 8)
    assert len(packed) == 1


@pytest.mark.parametrize("name", ["weight", "quantizer.weight_step"])
def test_repack_after_editing_in_place(name: str) -> None:
    layer = DFSConv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    before = layer(x, 4)
    layer.eval()
    with torch.no_grad():
        layer.get_parameter(name).mul_(2.5)
    layer.repack()
    after = layer(x, 4)
    assert not torch.equal(after, before)
    assert torch.equal(after, layer.train()(x, 4))


def test_tensors_in_the_parameters_places_are_used_at_once() -> None:
    x = torch.randn(2, 4, 5, 5)
    layer, other = DFSConv2d(4, 6, 3).eval(), DFSConv2d(4, 6, 3).eval()
    own, others = layer(x, 8), other(x, 8)
    assert torch.equal(functional_call(layer, dict(other.state_dict()), (x, 8)), others)
    assert torch.equal(layer(x, 8), own)
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    assert not torch.equal(layer(x, 8), own)


def test_loading_moving_and_casting_forget_the_packed_weight() -> None:
    x = torch.randn(2, 4, 5, 5)
    layer, other = DFSConv2d(4, 6, 3).eval(), DFSConv2d(4, 6, 3).eval()
    before = layer(x, 8)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x, 8), other(x, 8))
    assert not torch.equal(layer(x, 8), before)

    rounded = copy.deepcopy(layer).bfloat16()
    assert rounded.weight.dtype == torch.bfloat16
    fresh = DFSConv2d(4, 6, 3).eval()
    fresh.load_state_dict(rounded.float().state_dict())
    rounded = copy.deepcopy(layer).bfloat16()
    got = rounded(x, 8)
    assert got.dtype == torch.float32
    assert torch.equal(got, fresh(x, 8))
    assert not torch.equal(got, layer(x, 8))
    assert layer.to("meta").weight.is_meta
    assert layer._packed is None


def test_a_float_only_user_may_have_weights_that_cannot_be_packed() -> None:
    layer = DFSConv2d(1, 1, 1)
    with torch.no_grad():
        layer.weight.fill_(torch.inf)
    assert layer.eval()(torch.ones(1, 1, 1, 1)).item() == torch.inf
    with pytest.raises(ValueError, match="weight holds values that are not finite"):
        layer(torch.ones(1, 1, 1, 1), 8)


def test_from_conv_copies() -> None:
    conv = nn.Conv2d(4, 6, (3, 2), 2, (1, 0), 1, 2, False, "reflect", dtype=torch.float64).eval()
    layer = DFSConv2d.from_conv(conv, bit_options=(4, 8), input_signed=False)
    assert not layer.training
    assert layer.bias is None
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight, conv.weight)
    assert layer.weight.data_ptr() != conv.weight.data_ptr()
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(conv, name)
    assert layer.bit_options == (4, 8)
    assert not layer.quantizer.input_zero_point().any()
    with pytest.raises(TypeError, match=r"conv must be an nn\.Conv2d, got Linear"):
        DFSConv2d.from_conv(nn.Linear(2, 2))  # type: ignore[arg-type]


# State


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
def test_its_own_state_dict(quantizer: str) -> None:
    torch.manual_seed(1)
    layer = DFSConv2d(4, 6, 3, quantizer=quantizer)
    x = torch.randn(3, 4, 5, 5) * 3
    bits = torch.tensor([2, 8, 4])
    layer(x, bits)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = DFSConv2d(4, 6, 3, quantizer=quantizer)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other.eval()(x, bits), layer.eval()(x, bits))


def test_steps_that_were_loaded_are_not_initialised_again() -> None:
    layer = DFSConv2d(4, 6, 3)
    layer(torch.randn(2, 4, 5, 5), 8)
    other = DFSConv2d(4, 6, 3)
    other.load_state_dict(layer.state_dict())
    other(torch.randn(2, 4, 5, 5) * 100, 8)
    assert torch.equal(other.quantizer.input_scale(), layer.quantizer.input_scale())


def test_a_missing_entry_of_its_own_state_is_reported() -> None:
    layer = DFSConv2d(4, 6, 3)
    state = layer.state_dict()
    state.pop("quantizer.input_step")
    with pytest.raises(RuntimeError, match=r"Missing key.*quantizer\.input_step"):
        DFSConv2d(4, 6, 3).load_state_dict(state, strict=True)


def test_a_plain_state_dict_of_a_network_loads_strictly() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1)))
    mixed = nn.Sequential(DFSConv2d(3, 4, 3), nn.Sequential(DFSConv2d(4, 4, 1)))
    mixed.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(mixed(x), plain(x))
    inner = mixed[1][0]
    assert isinstance(inner, DFSConv2d)
    magnitude = inner.weight.detach().abs().mean((1, 2, 3))
    expected = 2 * magnitude / 8**0.5
    torch.testing.assert_close(inner.quantizer.weight_scale(inner.weight)[1].detach(), expected)


@pytest.mark.parametrize("training", [False, True])
def test_copies_and_pickles(training: bool) -> None:
    layer = DFSConv2d(4, 6, 3)
    x, bits = torch.randn(3, 4, 5, 5), torch.tensor([2, 8, 4])
    layer(x, bits)
    layer.train(training)
    expected = layer(x, bits)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, bits), expected)
        with torch.no_grad():
            other.weight.neg_()
        other.repack()
        assert not torch.equal(other(x, bits), expected)
        assert torch.equal(layer(x, bits), expected)


# Quantizers


@pytest.mark.parametrize("signed", [False, True])
def test_lsq_starts_from_the_weights_and_the_first_batch(signed: bool) -> None:
    layer = DFSConv2d(4, 6, 3, input_signed=signed)
    quantizer = layer.quantizer
    assert isinstance(quantizer, LSQ)
    magnitude = layer.weight.detach().abs().mean((1, 2, 3))
    for i, bits in enumerate((2, 4, 8)):
        expected = 2 * magnitude / 2 ** ((bits - 1) / 2)
        torch.testing.assert_close(quantizer.weight_step[i].detach(), expected)
    zeros = [2, 8, 128] if signed else [0, 0, 0]
    assert quantizer.input_zero_point().tolist() == zeros

    guess = quantizer.input_scale().detach().clone()
    x = torch.randn(64, 4, 8, 8)
    x = x if signed else x.relu()
    layer.eval()(x, 8)
    assert torch.equal(quantizer.input_scale(), guess)
    layer.train()(x, 8)
    steps = quantizer.input_scale().detach().clone()
    for i, bits in enumerate((2, 4, 8)):
        largest = 2 ** (bits - 1) if signed else 2**bits - 1
        torch.testing.assert_close(steps[i], 2 * x.abs().mean() / largest**0.5)
    torch.testing.assert_close(guess, steps, rtol=0.05, atol=0.0)
    layer(x * 50, 8)
    assert torch.equal(quantizer.input_scale(), steps)


def test_an_empty_batch_initialises_nothing() -> None:
    layer = DFSConv2d(4, 6, 3)
    before = layer.quantizer.input_scale().detach().clone()
    y = layer(torch.empty(0, 4, 5, 5), torch.empty(0, dtype=torch.int64))
    assert y.shape == (0, 6, 3, 3)
    assert torch.equal(layer.quantizer.input_scale(), before)
    layer(torch.randn(2, 4, 5, 5) * 9, 8)
    assert not torch.equal(layer.quantizer.input_scale(), before)


@pytest.mark.parametrize("bias", [False, True])
def test_training_reaches_every_parameter(bias: bool) -> None:
    layer = DFSConv2d(4, 6, 3, bias=bias)
    layer(torch.randn(4, 4, 5, 5), torch.tensor([2, 4, 8, 32])).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert torch.isfinite(parameter.grad).all(), name


def test_minmax_spans_the_observed_range() -> None:
    layer = DFSConv2d(1, 2, 1, quantizer="minmax", bit_options=(4, 8))
    quantizer = layer.quantizer
    assert isinstance(quantizer, MinMax)
    x = torch.tensor([-1.0, 0.5, 2.0, 4.0]).view(1, 1, 2, 2)
    layer(x, 8)
    torch.testing.assert_close(quantizer.input_scale(), torch.tensor([5.0 / 15, 5.0 / 255]))
    assert quantizer.input_zero_point().tolist() == [3, 51]
    layer(x * 11, 8)
    torch.testing.assert_close(quantizer.input_scale()[1], torch.tensor(10.0 / 255))
    layer(torch.full((1, 1, 2, 2), 7.0), 8)
    assert quantizer.low.item() <= 0.0
    largest = layer.weight.detach().abs().amax((1, 2, 3))
    torch.testing.assert_close(quantizer.weight_scale(layer.weight)[1], largest / 127)
    assert not list(quantizer.parameters())


def test_minmax_keeps_zero_in_a_range_of_one_sign() -> None:
    layer = DFSConv2d(1, 2, 1, quantizer="minmax", bit_options=(8,))
    layer(torch.full((1, 1, 2, 2), 7.0), 8)
    assert layer.quantizer.input_zero_point().item() == 0
    other = DFSConv2d(1, 2, 1, quantizer="minmax", bit_options=(8,))
    other(torch.full((1, 1, 2, 2), -7.0), 8)
    assert other.quantizer.input_zero_point().item() == 255


# Widths beyond the kernels


def test_widths_without_a_kernel_run_on_the_reference_and_say_so_once() -> None:
    backends._announced.clear()
    layer = DFSConv2d(4, 6, 3, padding=1, bit_options=(10, 16))
    x, bits = torch.randn(4, 4, 5, 5), torch.tensor([10, 0, 16, 32])
    with pytest.warns(RuntimeWarning, match=r"'cpu' backend is not used .*\(10, 16, 32\)") as seen:
        y = layer(x, bits)
    assert len([w for w in seen if "'cpu' backend" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluated = layer.eval()(x, bits)
    assert torch.equal(evaluated, y)
    exact = layer(x).detach()
    y = y.detach()
    assert not y[1].any()
    assert float((y[2] - exact[2]).abs().max()) < float((y[0] - exact[0]).abs().max()) < 0.1


def test_bits_go_to_the_same_convolution_as_the_function() -> None:
    layer = DFSConv2d(4, 6, 3, padding=(1, 2), stride=2)
    x, bits = torch.randn(4, 4, 6, 5), torch.tensor([2, 4, 8, 0])
    got = layer(x, bits)
    expected = mixed_conv2d(
        F.pad(x, (2, 2, 1, 1)),
        layer.weight,
        bits,
        layer.quantizer.input_scale(),
        layer.quantizer.input_zero_point(),
        weight_scale=layer.quantizer.weight_scale(layer.weight),
        bias=layer.bias,
        stride=2,
        backend="reference",
    )
    assert isinstance(expected, Tensor)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_bad_batch_leaves_the_quantizer_usable(quantizer: str, value: float) -> None:
    conv = DFSConv2d(3, 6, 3, quantizer=quantizer)
    x = torch.randn(2, 3, 5, 5)
    conv(torch.full_like(x, value), 8)
    assert torch.isfinite(conv(x, 8)).all()
