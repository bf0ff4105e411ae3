"""Calls past the dispatcher are the ops' in every bit, in every message, and out of their way."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfs.nn import DFSConv2d
from dfs_kernels import (
    PackedActivation,
    PackedConvWeight,
    available_backends,
    direct,
    mixed_conv2d,
    mixed_conv2d_,
    quantize_pack,
    unpack_dequantize,
    use_backend,
)
from dfs_kernels.backends import cpu
from tests.kernels.cases import ConvCase, as_bits, build, conv_cases, sample_bits

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="there are no compiled kernels to call"
)

FUNCTIONS = ("mixed_conv2d", "mixed_conv2d_", "quantize_pack", "unpack_dequantize")
CASE = ConvCase(bits=(8, 0, 2, 32, 4), relu=True, residual_form="float")


@pytest.fixture(autouse=True)
def keep_settings() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    cpu._cpu.set_isa("")


class Taken:
    """Which calls were made past the ops, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[bool] = []
        for name in FUNCTIONS:
            monkeypatch.setattr(direct, name, self._spy(getattr(direct, name)))

    def _spy(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = function(*args)
            self.calls.append(result is not None and result is not False)
            return result

        return call

    def __call__(self, run: Callable[[], Any]) -> Any:
        """The result of one call that is to be made past the ops."""
        self.calls.clear()
        result = run()
        assert self.calls == [True]
        return result

    def declined(self, run: Callable[[], Any]) -> Any:
        """The result of one call that is to be made through the ops."""
        self.calls.clear()
        result = run()
        assert True not in self.calls
        return result


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(monkeypatch)


def through_ops(run: Callable[[], Any]) -> Any:
    """What a call gives while a mode watches that changes nothing."""
    with BaseTorchFunctionMode():
        return run()


def assert_same(got: Any, expected: Any) -> None:
    """Equal in every bit that means something, and in all that can be asked of a tensor."""
    assert type(got) is type(expected)
    if isinstance(expected, PackedActivation):
        for field in fields(expected):
            a, b = getattr(got, field.name), getattr(expected, field.name)
            if isinstance(b, Tensor):
                assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), False)
            if field.name != "data":
                assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
        assert got.data.shape == expected.data.shape
        for n in range(expected.shape[0]):
            assert torch.equal(sample_bits(got, n), sample_bits(expected, n))
        return
    assert (got.dtype, got.shape, got.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )
    assert (got.requires_grad, got.is_inference()) == (
        expected.requires_grad,
        expected.is_inference(),
    )
    assert torch.equal(as_bits(got), as_bits(expected))


def arguments_of(case: ConvCase) -> dict[str, Any]:
    return build(case).arguments()


def without_output(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in arguments.items() if not name.startswith("output")}


# The same results


def respell(arguments: dict[str, Any], draw: Callable[[Any], Any]) -> dict[str, Any]:
    """The same arguments in one of the other forms that the functions take."""
    options = arguments["bit_options"]
    spelled = dict(arguments)
    for name in ("input_scale", "input_zero_point", "mul", "add", "output_scale"):
        value = spelled.get(name)
        if value is None or (name == "output_scale" and len(value) != len(options)):
            continue
        form = draw(st.sampled_from(("as is", "numbers", "tensors", "double", "strided")))
        if form == "numbers" and value.dim() == 1:
            spelled[name] = dict(zip(options, value.tolist(), strict=True))
        elif form == "tensors":
            spelled[name] = dict(zip(options, value.unbind(), strict=True))
        elif form == "double":
            spelled[name] = value.double() if value.is_floating_point() else value.long()
        elif form == "strided":
            spelled[name] = torch.stack([value, value], -1)[..., 0]
    spelled["bits"] = spelled["bits"].to(draw(st.sampled_from((torch.int32, torch.int64))))
    spelled["bit_options"] = draw(st.sampled_from((None, options, list(options))))
    if spelled.get("output_zero_point") is not None and draw(st.booleans()):
        del spelled["output_zero_point"]
    return spelled


@settings(max_examples=300)
@given(case=conv_cases(packed_weight=True), data=st.data())
def test_any_convolution_gives_the_bits_of_the_op(case: ConvCase, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        taken = Taken(monkeypatch)
        arguments = respell(arguments_of(case), data.draw)
        call = taken if case.bits else taken.declined
        if case.output_form != "in_place":
            for _ in range(2):  # the first makes a plan
                got = call(lambda: mixed_conv2d(**arguments))
                assert_same(got, through_ops(lambda: mixed_conv2d(**arguments)))
            return
        if isinstance(arguments["residual"], Tensor):
            arguments["residual"] = arguments["residual"].contiguous()
        other = {**arguments, "residual": arguments["residual"].clone()}
        call(lambda: mixed_conv2d_(**without_output(arguments)))
        through_ops(lambda: mixed_conv2d_(**without_output(other)))
        assert_same(arguments["residual"], other["residual"])


@settings(max_examples=100)
@given(case=conv_cases(packed_weight=True, input_form="contiguous"), data=st.data())
def test_packing_and_unpacking_give_the_bits_of_the_ops(
    case: ConvCase, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        taken = Taken(monkeypatch)
        arguments = respell(arguments_of(case), data.draw)
        values = (
            arguments["input"].to(data.draw(st.sampled_from((torch.float32, torch.float16)))),
            arguments["bits"],
            arguments["input_scale"],
            arguments["input_zero_point"],
        )
        call = taken if case.bits else taken.declined
        packed = call(lambda: quantize_pack(*values, bit_options=case.options))
        expected = through_ops(lambda: quantize_pack(*values, bit_options=case.options))
        assert_same(packed, expected)
        image = call(lambda: unpack_dequantize(packed))
        assert_same(image, through_ops(lambda: unpack_dequantize(expected)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "strided"])
def test_other_float_types_and_formats(taken: Taken, dtype: torch.dtype, form: str) -> None:
    arguments = arguments_of(replace(CASE, input_form=form))
    for name in ("input", "residual", "bias"):
        arguments[name] = arguments[name].to(dtype)
    got = taken(lambda: mixed_conv2d(**arguments))
    assert_same(got, through_ops(lambda: mixed_conv2d(**arguments)))


@pytest.mark.parametrize("bits", [0, 2, 4, 8, 32])
def test_one_width_for_all(taken: Taken, bits: int) -> None:
    arguments = {**arguments_of(CASE), "bits": bits, "output_scale": {2: 0.5, 4: 0.2, 8: 0.1}}
    got = taken(lambda: mixed_conv2d(**arguments))
    assert_same(got, through_ops(lambda: mixed_conv2d(**arguments)))
    if bits != 0:
        x = arguments["input"]
        packed = taken(lambda: quantize_pack(x, bits, 0.25))
        assert_same(packed, through_ops(lambda: quantize_pack(x, bits, 0.25)))


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_numbers_do_not_depend_on_the_way_under_another_default_dtype(
    default: torch.dtype,
) -> None:
    arguments = arguments_of(CASE)
    arguments |= {"input_scale": {2: 0.3, 4: 0.2, 8: 0.1}, "input_zero_point": {2: 1, 4: 2, 8: 3}}
    torch.set_default_dtype(default)
    assert_same(mixed_conv2d(**arguments), through_ops(lambda: mixed_conv2d(**arguments)))


def test_inference_mode(taken: Taken) -> None:
    with torch.inference_mode():
        arguments = arguments_of(CASE)
        got = taken(lambda: mixed_conv2d(**arguments))
        assert_same(got, through_ops(lambda: mixed_conv2d(**arguments)))
        taken(lambda: mixed_conv2d_(**arguments))
    # What was kept from inside serves outside, where gradients may be wanted.
    outside = {**arguments_of(CASE), "weight": arguments["weight"]}
    got = taken(lambda: mixed_conv2d(**outside))
    assert_same(got, through_ops(lambda: mixed_conv2d(**outside)))


def test_adding_in_place_counts_as_a_change(taken: Taken) -> None:
    for form in ("float", "packed"):
        arguments = arguments_of(replace(CASE, residual_form=form))
        target = arguments["residual"]
        changed = target if isinstance(target, Tensor) else target.data
        before = changed._version
        taken(lambda: mixed_conv2d_(**arguments))  # noqa: B023
        assert changed._version == before + 1


# The same errors


def change(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {**arguments, **changes}


BITS = torch.tensor([8, 0, 2, 32, 4])
SCALE = torch.tensor([0.1, 0.1, 0.1, 1.0])
BAD_CALLS = {
    "bits not an option": change(bits=torch.tensor([8, 0, 3, 32, 4])),
    "bits not an option, int32": change(bits=torch.tensor([8, 0, 2, 32, 5]).int()),
    "bits not an option, int": change(bits=6),
    "bits that would wrap around": change(bits=torch.tensor([8, 0, 2**32 + 2, 32, 4])),
    "bits of another length": change(bits=torch.tensor([8])),
    "bits of floats": change(bits=BITS.float()),
    "bits True": change(bits=True),
    "stride 0": change(stride=0),
    "stride True": change(stride=True),
    "stride pair with True": change(stride=(True, 1)),
    "stride a float": change(stride=1.0),
    "stride of three": change(stride=(1, 1, 1)),
    "padding negative": change(padding=(-1, 0)),
    "padding with True": change(padding=(True, 1)),
    "groups 2": change(groups=2),
    "groups True": change(groups=True),
    "kernel too large": change(padding=0, dilation=9),
    "scale 0": change(input_scale=torch.tensor([0.1, 0.0, 0.1, 1.0])),
    "scale infinite": change(input_scale=torch.tensor([0.1, float("inf"), 0.1, 1.0])),
    "scale NaN": change(input_scale={2: float("nan"), 4: 0.1, 8: 0.1}),
    "scale too small": change(input_scale=torch.tensor([0.1, 2.0**-127, 0.1, 1.0])),
    "scale missing": change(input_scale=None, input_zero_point=None),
    "scale of another length": change(input_scale=torch.ones(2)),
    "scale of ints": change(input_scale=torch.ones(4, dtype=torch.int32)),
    "scale of an entry missing": change(input_scale={2: 0.1, 8: 0.1}),
    "zero point without scale": change(input_scale=None),
    "zero point too large": change(input_zero_point=torch.tensor([4, 0, 0, 0]).int()),
    "zero point negative": change(input_zero_point={2: 0, 4: 0, 8: -1}),
    "zero point of floats": change(input_zero_point=torch.zeros(4)),
    "mul of another shape": change(mul=torch.ones(4, 1)),
    "bias of another shape": change(bias=torch.ones(1)),
    "bias of ints": change(bias=torch.ones(2, dtype=torch.int64)),
    "residual of another shape": change(residual=torch.ones(5, 2, 1, 1)),
    "residual of ints": change(residual=torch.ones(5, 2, 4, 5, dtype=torch.int64)),
    "activation unknown": change(activation="gelu"),
    "input without a batch": change(input=torch.ones(3, 4, 5)),
    "input of ints": change(input=torch.ones(5, 3, 4, 5, dtype=torch.int64)),
    "input empty": change(input=torch.ones(5, 3, 0, 5)),
    "input of other channels": change(input=torch.ones(5, 4, 4, 5)),
    "weight_scale with a packed weight": change(weight_scale=torch.ones(4, 2)),
    "bit_options of another weight": change(bit_options=(2, 4, 8)),
    "output scale 0": change(output_scale=torch.tensor([0.1, 0.0, 0.1, 1.0])),
    "output zero point": change(output_scale=SCALE, output_zero_point=torch.tensor([9, 0, 0, 0])),
    "output bits without scale": change(output_bits=8),
    "output bits not packable": change(output_scale=0.1, output_bits=3),
    "output bits True": change(output_scale=0.1, output_bits=True),
    "backend unknown": change(backend="abacus"),
}


def error_of(run: Callable[[], object]) -> tuple[type[BaseException], str]:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        run()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("change", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors_are_those_of_the_op(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    good = arguments_of(CASE)
    for stride in (good["stride"], 1):  # so that there are plans, of arguments equal to bad ones
        mixed_conv2d(**{**good, "stride": stride})
    bad = change(good)
    assert error_of(lambda: mixed_conv2d(**bad)) == error_of(
        lambda: through_ops(lambda: mixed_conv2d(**bad))
    )
    if not any(name.startswith("output") for name in bad):
        before = good["residual"].clone()
        assert error_of(lambda: mixed_conv2d_(**bad)) == error_of(
            lambda: through_ops(lambda: mixed_conv2d_(**bad))
        )
        assert torch.equal(good["residual"], before)


def test_errors_about_packed_inputs_are_those_of_the_op() -> None:
    arguments = arguments_of(replace(CASE, input_form="packed", residual_form="packed"))
    mixed_conv2d(**arguments)
    x, residual = arguments["input"], arguments["residual"]
    other_bits = replace(x, bits=torch.tensor([4, 0, 2, 32, 4]).int())
    dropped = replace(x, bits=torch.tensor([0, 0, 2, 32, 4]).int())
    unknown = replace(residual, bits=torch.tensor([3, 0, 2, 32, 4]).int())
    outside = replace(x, zero_point=torch.tensor([-1, 99, 999, 0]).int())
    for change in (
        {"input": other_bits},
        {"input": dropped},
        {"input": dropped, "input_scale": SCALE},
        {"input": outside},
        {"residual": unknown},
    ):
        bad = {**arguments, **change}
        expected = error_of(lambda: through_ops(lambda: mixed_conv2d(**bad)))  # noqa: B023
        assert error_of(lambda: mixed_conv2d(**bad)) == expected  # noqa: B023
    bad_bits = replace(x, bits=torch.tensor([8, 0, 2, 7, 4]).int())
    assert error_of(lambda: unpack_dequantize(bad_bits)) == error_of(
        lambda: through_ops(lambda: unpack_dequantize(bad_bits))
    )


@pytest.mark.parametrize(
    "bad",
    [
        (torch.ones(1, 3, 2), 8, 0.5),
        (torch.ones(1, 3, 2, 2).int(), 8, 0.5),
        (torch.ones(1, 3, 2, 2), 7, SCALE),
        (torch.ones(1, 3, 2, 2), True, 0.5),
        (torch.ones(1, 3, 2, 2), torch.tensor([8, 8]), SCALE),
        (torch.ones(1, 3, 2, 2), torch.tensor([5]), SCALE),
        (torch.ones(1, 3, 2, 2), 8, torch.ones(2)),
        (torch.ones(1, 3, 2, 2), 8, 0.0),
        (torch.ones(1, 3, 2, 2), 8, {8: 1e39}),
        (torch.ones(1, 3, 2, 2), 8, 0.5, 256),
        (torch.ones(1, 3, 2, 2), 8, {8: 0.5}, {8: -1}),
        (torch.ones(1, 3, 2, 2), 8, {3: 0.5}),
    ],
)
def test_errors_of_packing_are_those_of_the_op(bad: tuple[Any, ...]) -> None:
    assert error_of(lambda: quantize_pack(*bad)) == error_of(
        lambda: through_ops(lambda: quantize_pack(*bad))
    )


@pytest.mark.parametrize("form", ["float", "packed"])
def test_a_residual_in_the_inputs_memory_is_refused(form: str) -> None:
    case = replace(
        CASE,
        group_outputs=3,
        input_form="contiguous" if form == "float" else "packed",
        residual_form=form,
    )
    arguments = arguments_of(case)
    arguments["residual"] = arguments["input"]
    with pytest.raises(ValueError, match="residual shares memory"):
        mixed_conv2d_(**arguments)


def test_a_residual_that_cannot_be_added_into_is_refused() -> None:
    arguments = arguments_of(CASE)
    expanded = torch.zeros(5, 2, 1, 1).expand(5, 2, 4, 5)
    for residual, error in (
        (arguments["residual"].half(), TypeError),
        (expanded, ValueError),
        (None, TypeError),
    ):
        with pytest.raises(error, match="residual must"):
            mixed_conv2d_(**{**arguments, "residual": residual})


# Whoever watches sees the ops


def test_a_dispatch_mode_sees_the_op(taken: Taken) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    arguments = arguments_of(CASE)
    with Watch():
        taken.declined(lambda: mixed_conv2d(**arguments))
    assert torch.ops.dfs.mixed_conv2d.default in seen


def test_a_profiler_sees_the_op() -> None:
    arguments = arguments_of(CASE)
    with torch.profiler.profile() as profiler:
        mixed_conv2d(**arguments)
    assert "dfs::mixed_conv2d" in {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_tracer_sees_the_op(pre_dispatch: bool) -> None:
    arguments = arguments_of(CASE)
    traced = make_fx(
        lambda x: mixed_conv2d(**{**arguments, "input": x}), pre_dispatch=pre_dispatch
    )(arguments["input"])
    targets = {node.target for node in traced.graph.nodes}
    assert torch.ops.dfs.mixed_conv2d.default in targets


def test_fake_tensors_take_the_ops(taken: Taken) -> None:
    arguments = arguments_of(CASE)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(arguments["input"])
    with mode:
        got = taken.declined(lambda: mixed_conv2d(**{**arguments, "input": fake}))
    assert got.shape == (5, 2, 4, 5)
    assert type(got) is not Tensor


def test_subclasses_take_the_ops(taken: Taken) -> None:
    class Labelled(Tensor):
        pass

    arguments = arguments_of(CASE)
    expected = mixed_conv2d(**arguments)
    for name in ("input", "residual", "mul", "bits"):
        changed = {**arguments, name: arguments[name].as_subclass(Labelled)}
        got = taken.declined(lambda: mixed_conv2d(**changed))  # noqa: B023
        assert type(got) is type(through_ops(lambda: mixed_conv2d(**changed)))  # noqa: B023
        assert torch.equal(got.as_subclass(Tensor), expected)


def test_compiled_calls_keep_the_op_in_one_graph(compiler: None) -> None:
    arguments = arguments_of(CASE)
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(
        lambda x: mixed_conv2d(**{**arguments, "input": x}), fullgraph=True, backend=backend
    )
    assert torch.equal(compiled(arguments["input"]), mixed_conv2d(**arguments))
    assert any("dfs.mixed_conv2d" in str(target) for target in targets)


@pytest.mark.parametrize(
    "name", ["input", "input_scale", "mul", "add", "bias", "residual", "weight"]
)
def test_a_wanted_gradient_takes_the_op(taken: Taken, name: str) -> None:
    arguments = arguments_of(CASE)
    mixed_conv2d(**arguments)
    # The same tensors as before, so that nothing but their flag differs.
    leaf = arguments["weight"].scales if name == "weight" else arguments[name]
    leaf.requires_grad_()
    got = taken.declined(lambda: mixed_conv2d(**arguments))
    assert got.requires_grad
    with torch.no_grad():
        assert not taken(lambda: mixed_conv2d(**arguments)).requires_grad
    with pytest.raises(RuntimeError, match="not differentiable"):
        mixed_conv2d_(**arguments)


def test_a_result_does_not_inherit_that_its_scale_wants_a_gradient(taken: Taken) -> None:
    arguments = arguments_of(replace(CASE, output_form="own"))
    arguments["output_scale"].requires_grad_()
    got = taken(lambda: mixed_conv2d(**arguments))
    assert_same(got, through_ops(lambda: mixed_conv2d(**arguments)))
    packing = (arguments["input"], arguments["bits"], arguments["output_scale"])
    packed = taken(lambda: quantize_pack(*packing))
    assert_same(packed, through_ops(lambda: quantize_pack(*packing)))


def test_packed_scales_that_want_a_gradient_take_the_ops(taken: Taken) -> None:
    arguments = arguments_of(replace(CASE, input_form="requantized"))
    packed = replace(arguments["input"], scale=arguments["input"].scale.clone().requires_grad_())
    taken.declined(lambda: mixed_conv2d(**{**arguments, "input": packed}))
    taken.declined(lambda: unpack_dequantize(packed))


def test_a_dual_tensor_gives_what_it_gives_through_the_op() -> None:
    arguments = arguments_of(CASE)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(arguments["input"], torch.ones_like(arguments["input"]))
        for run in (lambda f: f(), through_ops):
            y = run(lambda: mixed_conv2d(**{**arguments, "input": x}))
            assert forward_ad.unpack_dual(y).tangent is None


def test_a_lazily_negated_tensor_is_not_read_as_it_lies() -> None:
    arguments = arguments_of(CASE)
    for name in ("input", "residual", "mul", "add", "bias"):
        values = arguments[name]
        lazy = torch._neg_view(values.neg())
        got = mixed_conv2d(**{**arguments, name: lazy})
        assert torch.equal(got, mixed_conv2d(**arguments)), name


# Nothing old is used


@pytest.mark.parametrize(
    "edit",
    [
        lambda a: a["input_scale"].mul_(2),
        lambda a: a["input_scale"].data.mul_(2),
        lambda a: a["input_zero_point"].copy_(torch.tensor([1, 2, 3, 0])),
        lambda a: a["mul"].add_(1),
        lambda a: a["add"].numpy().__iadd__(1),
        lambda a: a["bias"].neg_(),
        lambda a: a["output_scale"].mul_(3),
        lambda a: a["output_zero_point"].copy_(torch.tensor([1, 2, 3, 0])),
        lambda a: a["weight"].scales.mul_(2),
        lambda a: setattr(a["weight"], "scales", a["weight"].scales * 2),
        lambda a: a["input"].neg_(),
        lambda a: a["residual"].neg_(),
        lambda a: a["bits"].copy_(torch.tensor([2, 4, 8, 0, 32])),
        lambda a: a.update(stride=2, residual=None),
        lambda a: a.update(padding=[1, 1]),
        lambda a: a.update(padding=(2, 1), residual=None),
        lambda a: a.update(dilation=(1, 2), residual=None),
        lambda a: a.update(activation=None),
        lambda a: a.update(input=a["input"][..., :-1].contiguous(), residual=None),
    ],
)
def test_a_changed_argument_counts_at_once(edit: Callable[[dict[str, Any]], object]) -> None:
    arguments = arguments_of(replace(CASE, output_form="own"))
    before = mixed_conv2d(**arguments)
    edit(arguments)
    got = mixed_conv2d(**arguments)
    assert_same(got, through_ops(lambda: mixed_conv2d(**arguments)))
    same = before.data.shape == got.data.shape and bool((before.data == got.data).all())
    scales = torch.equal(before.scale, got.scale) and arguments["padding"] != [1, 1]
    assert not (same and scales)


def test_a_changed_dict_counts_at_once() -> None:
    arguments = arguments_of(CASE)
    arguments["input_scale"] = {2: 0.5, 4: 0.2, 8: 0.1}
    before = mixed_conv2d(**arguments)
    arguments["input_scale"][8] = 0.05
    got = mixed_conv2d(**arguments)
    assert not torch.equal(got, before)
    assert_same(got, through_ops(lambda: mixed_conv2d(**arguments)))


def test_a_changed_list_counts_at_once() -> None:
    arguments = {**arguments_of(CASE), "residual": None, "padding": [1, 1]}
    assert mixed_conv2d(**arguments).shape[2:] == (4, 5)
    arguments["padding"][0] = 2
    assert mixed_conv2d(**arguments).shape[2:] == (6, 5)


def test_a_value_that_was_allowed_is_checked_again() -> None:
    arguments = arguments_of(CASE)
    mixed_conv2d(**arguments)
    arguments["input_scale"].data[0] = float("nan")
    with pytest.raises(ValueError, match="input_scale must lie in"):
        mixed_conv2d(**arguments)


def test_every_instruction_set_gets_its_own_tiles(taken: Taken) -> None:
    arguments = arguments_of(replace(CASE, bits=(8, 0, 2, 4)))
    expected = mixed_conv2d(**arguments, backend="reference")
    for isa in (*cpu._cpu.supported_isas(), *cpu._cpu.supported_isas()):
        cpu._cpu.set_isa(isa)
        got = taken(lambda: mixed_conv2d(**arguments))
        assert torch.equal(as_bits(got), as_bits(expected)), isa


def test_tiles_of_another_instruction_set_are_not_used(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of(CASE)
    weight = arguments["weight"]
    used = []
    for isa in ("this", "that", "this"):
        monkeypatch.setattr(cpu._cpu, "tile_variant", lambda isa=isa: isa)
        taken(lambda: mixed_conv2d(**arguments))
        used.append(weight.derived.last_plan.tiles)
        assert used[-1] is weight.derived.tiles["cpu", isa, 1]
    assert used[0] is used[2]
    assert used[0] is not used[1]


def test_the_thread_count_is_that_of_now(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(CASE)
    expected = mixed_conv2d(**arguments)
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        used = []
        original = cpu._cpu.try_mixed_conv2d
        with monkeypatch.context() as patch:
            patch.setattr(
                cpu._cpu,
                "try_mixed_conv2d",
                lambda *args: (used.append(args[-1]), original(*args))[1],  # noqa: B023
            )
            assert torch.equal(taken(lambda: mixed_conv2d(**arguments)), expected)
        assert used == [threads]


def test_a_chosen_backend_is_used(taken: Taken) -> None:
    arguments = arguments_of(CASE)
    taken(lambda: mixed_conv2d(**arguments))
    taken(lambda: mixed_conv2d(**arguments, backend="cpu"))
    taken.declined(lambda: mixed_conv2d(**arguments, backend="reference"))
    with use_backend("reference"):
        taken.declined(lambda: mixed_conv2d(**arguments))
        taken(lambda: mixed_conv2d(**arguments, backend="cpu"))
    with use_backend("cpu"):
        taken(lambda: mixed_conv2d(**arguments))
        taken.declined(lambda: mixed_conv2d(**arguments, backend="reference"))


def test_a_layer_packed_anew_uses_its_new_weight() -> None:
    layer = DFSConv2d(3, 4, 3).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = layer(x, 8)
        layer.weight.mul_(3)
        layer.repack()
        got = layer(x, 8)
        assert not torch.equal(got, before)
        assert_same(got, through_ops(lambda: layer(x, 8)))


# What is kept


def test_no_tensor_of_a_call_is_kept(taken: Taken) -> None:
    weight = build(CASE).packed_weight

    def call() -> list[weakref.ref[Tensor]]:
        arguments = {**arguments_of(replace(CASE, output_form="own")), "weight": weight}
        result = taken(lambda: mixed_conv2d(**arguments))
        tensors = (*arguments.values(), result.data, result.bits, result.scale)
        return [weakref.ref(value) for value in tensors if isinstance(value, Tensor)]

    kept = call()
    assert len(kept) >= 10
    assert [ref for ref in kept if ref() is not None] == []


def test_few_plans_are_kept() -> None:
    arguments = {**arguments_of(CASE), "residual": None}
    weight = arguments["weight"]
    for padding in range(1, 30):
        got = mixed_conv2d(**{**arguments, "padding": padding})
        assert_same(got, through_ops(lambda: mixed_conv2d(**{**arguments, "padding": padding})))  # noqa: B023
    assert len(weight.derived.plans) == direct._MAX_PLANS


def test_a_used_weight_can_be_copied_pickled_and_saved() -> None:
    arguments = arguments_of(CASE)
    expected = mixed_conv2d(**arguments)
    weight = arguments["weight"]
    for twin in (
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        PackedConvWeight.from_state_dict(weight.state_dict()),
    ):
        assert twin.derived.plans == {}
        assert twin.derived.tiles == {}
        assert torch.equal(mixed_conv2d(**{**arguments, "weight": twin}), expected)
    assert "plan" not in repr(weight)


def test_threads_may_share_a_weight() -> None:
    weight = build(CASE).packed_weight
    cases = [
        replace(CASE, size=(height, width), stride=(stride, 1), seed=seed, output_form=form)
        for seed, (height, width, stride, form) in enumerate(
            [(4, 5, 1, "own"), (9, 3, 2, "float"), (6, 6, 1, "fixed"), (4, 5, 2, "float")]
        )
    ]
    calls = [{**arguments_of(case), "weight": weight} for case in cases]
    expected = [through_ops(lambda: mixed_conv2d(**call)) for call in calls]  # noqa: B023
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(200):
                assert_same(mixed_conv2d(**calls[index]), expected[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_packed_activation_whose_tensors_were_changed_is_checked_again() -> None:
    arguments = arguments_of(replace(CASE, input_form="packed"))
    packed = arguments["input"]
    packed.data.resize_(packed.data.shape[0], packed.data.shape[1] - 1)
    assert error_of(lambda: mixed_conv2d(**arguments)) == error_of(
        lambda: through_ops(lambda: mixed_conv2d(**arguments))
    )
    assert error_of(lambda: unpack_dequantize(packed)) == error_of(
        lambda: through_ops(lambda: unpack_dequantize(packed))
    )
