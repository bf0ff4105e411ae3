"""How the ops behave on a GPU: without waiting, in graphs and streams, compiled, in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.backends import gpu_backends
from bench.gpu.device import is_rehearsal, machine
from dfs_kernels import (
    BlockConv,
    BlockOutput,
    PackedActivation,
    RNNGateWeights,
    gated_block,
    mixed_conv2d,
    mixed_conv2d_,
    pack_bits,
    quantize_pack,
    rnn_gate,
    unpack_bits,
    unpack_dequantize,
)
from tests.kernels.cases import (
    FORMS,
    ConvCase,
    as_bits,
    build,
    on_device,
    sample_bits,
)
from tests.kernels.gate_cases import CHOICES, gate_weights, packed_features
from tests.kernels.host_reads import no_host_reads
from tests.kernels.op_calls import calls_of, check_op, checkable_forms
from tests.kernels.test_gated_block import BlockCase, assert_same_output, make_arguments

pytestmark = pytest.mark.gpu
every_backend = pytest.mark.parametrize("backend", gpu_backends())
needs_cuda = pytest.mark.skipif(is_rehearsal(), reason="there is nothing like it on a CPU")

BITS = (8, 0, 2, 32, 4)
# Long enough for a kernel that does not wait for it to be caught.
_DELAY_CYCLES = 20_000_000


def case_of(form: tuple[str, str | None, str], **fields: Any) -> ConvCase:
    return ConvCase(
        bits=BITS,
        group_channels=8,
        group_outputs=8,
        input_form=form[0],
        residual_form=form[1],
        output_form=form[2],
        relu=True,
        **fields,
    )


def call_of(arguments: dict[str, Any], output_form: str, backend: str) -> Callable[[], Any]:
    """What runs a case; in place it gives the residual."""
    if output_form != "in_place":
        return lambda: mixed_conv2d(**arguments, backend=backend)

    def in_place() -> Any:
        mixed_conv2d_(**arguments, backend=backend)
        return arguments["residual"]

    return in_place


def arguments_on(device: torch.device, case: ConvCase) -> dict[str, Any]:
    return on_device(build(case), device).arguments()


def assert_same_samples(got: Any, expected: Any) -> None:
    for n in range(expected.shape[0]):
        assert torch.equal(sample_bits(got, n), sample_bits(expected, n)), f"sample {n}"


@contextmanager
def no_synchronization(backend: str) -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    if is_rehearsal():
        with no_host_reads(backend):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Calls that do not wait


@every_backend
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0], device=x.device),
    ],
)
def test_a_synchronization_would_be_noticed(
    backend: str, wait: Callable[[Tensor], Any], device: torch.device
) -> None:
    x = torch.ones(1, device=device)
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronization(backend):
        wait(x)


@every_backend
@pytest.mark.parametrize("packed_weight", [True, False])
@pytest.mark.parametrize("form", FORMS[::5], ids=str)
def test_a_convolution_does_not_wait(
    backend: str, form: tuple[str, str | None, str], packed_weight: bool, device: torch.device
) -> None:
    run = call_of(
        arguments_on(device, case_of(form, packed_weight=packed_weight)), form[2], backend
    )
    run()  # compiles, and makes what is derived from the weight
    with no_synchronization(backend):
        run()


@every_backend
def test_packing_does_not_wait(backend: str, device: torch.device) -> None:
    x, bits = torch.randn(5, 8, 4, 4, device=device), torch.tensor(BITS, device=device)
    scale = torch.tensor([0.5, 0.2, 0.02, 1.0], device=device)
    codes = torch.ones(3, 8, dtype=torch.uint8, device=device)

    def run() -> None:
        packed = quantize_pack(x, bits, scale, backend=backend)
        unpack_dequantize(packed, backend=backend)
        unpack_bits(pack_bits(codes, 4, backend=backend), 4, 8, signed=False, backend=backend)

    run()
    with no_synchronization(backend):
        run()


@every_backend
def test_a_gate_does_not_wait(backend: str, device: torch.device) -> None:
    x = packed_features(4, 16, 5, 5).to(device)
    weights = RNNGateWeights(*(value.to(device) for value in gate_weights(16)))
    state = rnn_gate(x, weights, CHOICES, backend=backend).state
    with no_synchronization(backend):
        rnn_gate(x, weights, CHOICES, state, backend=backend)


@every_backend
def test_training_does_not_wait(backend: str, device: torch.device) -> None:
    arguments = arguments_on(device, case_of(("contiguous", "float", "float"), packed_weight=False))
    training_step(arguments, backend)
    with no_synchronization(backend):
        training_step(arguments, backend)


@every_backend
@pytest.mark.parametrize("downsamples", [False, True])
def test_a_gated_block_does_not_wait(backend: str, downsamples: bool, device: torch.device) -> None:
    arguments = block_on(device, BlockCase("basic", downsamples))
    gated_block(**arguments, backend=backend)
    with no_synchronization(backend):
        gated_block(**arguments, backend=backend)


def block_on(device: torch.device, case: BlockCase) -> dict[str, Any]:
    """Arguments of a gated block there; weights and all."""

    def move(value: Any) -> Any:
        if isinstance(value, BlockConv):
            return replace(
                value,
                weight=value.weight.to(device),
                quantizer=value.quantizer.to(device),
                mul=move(value.mul),
                add=move(value.add),
            )
        if isinstance(value, RNNGateWeights):
            return RNNGateWeights(*map(move, value))
        if isinstance(value, list):
            return [move(entry) for entry in value]
        return value.to(device) if isinstance(value, (Tensor, PackedActivation)) else value

    moved = {name: move(value) for name, value in make_arguments(case).items()}
    if case.downsamples:
        width = torch.full((len(case.bits),), 8, dtype=torch.int32, device=device)
        moved["shortcut_bits"] = width
    return moved


# Graphs and streams


@every_backend
def test_a_graph_holds_two_blocks_and_the_decision_between_them(
    backend: str, device: torch.device
) -> None:
    """The second block runs at the widths that the first one's gate chooses in each replay."""
    identity = block_on(device, BlockCase("basic"))
    down = block_on(device, BlockCase("basic", downsamples=True))
    live = {**identity, **{name: identity[name].clone() for name in ("stream", "state")}}

    def run(first: dict[str, Any], name: str) -> tuple[Tensor, BlockOutput]:
        one = gated_block(**first, backend=name)
        assert one.step is not None
        step = {"bits": one.step.bits, "state": one.step.state}
        return one.step.bits, gated_block(**{**down, **step, "stream": one.stream}, backend=name)

    results: list[tuple[Tensor, BlockOutput]] = []
    replay = machine().record(lambda: results.append(run(live, backend)), 1)
    decisions = []
    for shift in range(2):
        codes = identity["stream"].data.roll(shift, 0)
        live["stream"].data.copy_(codes)
        live["state"].copy_(identity["state"].roll(shift, 1))
        replay()
        given = replace(identity["stream"], data=codes.clone())
        bits, expected = run({**live, "stream": given}, "reference")
        assert torch.equal(live["stream"].data, given.data)
        assert torch.equal(results[-1][0], bits)
        assert_same_output(results[-1][1], expected)
        decisions.append(bits)
    assert not torch.equal(*decisions)


@every_backend
@pytest.mark.parametrize("input_form", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("residual_form", [None, "packed"])
@pytest.mark.parametrize("output_form", ["float", "own", "fixed"])
def test_a_recorded_call_reads_the_bits_of_each_replay(
    backend: str,
    input_form: str,
    residual_form: str | None,
    output_form: str,
    device: torch.device,
) -> None:
    """A CUDA graph is made for shapes and addresses, not for the widths that it was recorded at."""
    arguments = arguments_on(device, case_of((input_form, residual_form, output_form)))
    run = call_of(arguments, output_form, backend)
    results: list[Any] = []
    replay = machine().record(lambda: results.append(run()), 1)
    for order in ((0, 1, 2, 3, 4), (3, 2, 1, 0, 4), (1, 1, 1, 1, 1)):
        arguments["bits"].copy_(torch.tensor([BITS[n] for n in order], dtype=torch.int32))
        replay()
        expected = mixed_conv2d(**arguments, backend=backend)
        assert_same_samples(results[-1], expected)


@every_backend
def test_a_recorded_block_updates_its_stream_in_place(backend: str, device: torch.device) -> None:
    """Codes and widths change between replays; a skipped sample's row does not."""
    case = case_of(("packed", "packed", "in_place"), options=(2, 4, 8), centred=(False,) * 3)
    case = ConvCase(**{**case.__dict__, "bits": (8, 0, 2, 4, 0)})
    first = arguments_on(device, case)
    second = arguments_on(device, ConvCase(**{**case.__dict__, "bits": (0, 4, 8, 0, 2), "seed": 5}))
    live = {**first, "input": first["input"].clone(), "residual": first["residual"].clone()}
    live["bits"] = live["bits"].clone()
    # Widths are held by the packed input too, and both have to say the same.
    live["input"] = PackedActivation(**{**live["input"].__dict__, "bits": live["bits"]})
    replay = machine().record(call_of(live, "in_place", backend), 1)
    for given in (first, second, first):
        fill(live, given)
        replay()
        expected = given["residual"].clone()
        mixed_conv2d_(
            **{**live, "residual": expected, "input": given["input"], "bits": given["bits"]},
            backend=backend,
        )
        assert torch.equal(live["residual"].data, expected.data)
        skipped = given["bits"] == 0
        assert torch.equal(expected.data[skipped], given["residual"].data[skipped])


def fill(live: dict[str, Any], given: dict[str, Any]) -> None:
    """Give a recording's tensors new contents."""
    live["bits"].copy_(given["bits"])
    for name in ("input", "residual"):
        live[name].data.copy_(given[name].data)
    for name in ("bits", "scale", "zero_point"):
        getattr(live["residual"], name).copy_(getattr(given["residual"], name))
    for name in ("scale", "zero_point"):
        getattr(live["input"], name).copy_(getattr(given["input"], name))


@every_backend
def test_a_recorded_gate_reads_the_stream_of_each_replay(
    backend: str, device: torch.device
) -> None:
    """Its widths go where the next block's convolutions read them."""
    weights = RNNGateWeights(*(value.to(device) for value in gate_weights(16)))
    streams = [packed_features(64, 16, 4, 4).to(device) for _ in range(2)]
    live = streams[0].clone()
    bits = torch.zeros(64, dtype=torch.int32, device=device)
    replay = machine().record(
        lambda: bits.copy_(rnn_gate(live, weights, CHOICES, backend=backend).bits), 1
    )
    for stream in reversed(streams):
        live.data.copy_(stream.data)
        replay()
        assert torch.equal(bits, rnn_gate(stream, weights, CHOICES, backend=backend).bits)


@needs_cuda
@every_backend
@pytest.mark.parametrize("form", [FORMS[0], ("packed", "packed", "own")], ids=str)
def test_a_call_runs_on_the_current_stream(
    backend: str, form: tuple[str, str | None, str], device: torch.device
) -> None:
    """Its input is written by that stream after a delay, for which no other stream waits."""
    arguments = arguments_on(device, case_of(form))
    expected = mixed_conv2d(**arguments, backend=backend)
    x = arguments["input"]
    values = x.data if isinstance(x, PackedActivation) else x
    kept = values.clone()
    values.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_DELAY_CYCLES)
        values.copy_(kept)
        got = mixed_conv2d(**arguments, backend=backend)
    stream.synchronize()
    assert_same_samples(got, expected)


@needs_cuda
@every_backend
@pytest.mark.parametrize("form", [FORMS[0], ("packed", "packed", "own")], ids=str)
def test_tensors_on_another_device(
    backend: str, form: tuple[str, str | None, str], device: torch.device
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    case = case_of(form)
    expected = mixed_conv2d(**arguments_on(device, case), backend=backend)
    got = mixed_conv2d(**arguments_on(other, case), backend=backend)
    assert got.device == other
    assert_same_samples(got.to("cpu"), expected.to("cpu"))


# What torch makes of the ops


@every_backend
@pytest.mark.parametrize(
    ("input_form", "residual_form", "output_form", "packed_weight"), checkable_forms()
)
def test_opcheck(
    backend: str,
    input_form: str,
    residual_form: str | None,
    output_form: str,
    packed_weight: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = case_of((input_form, residual_form, output_form), packed_weight=packed_weight)
    run = call_of(arguments_on(device, case), output_form, backend)
    for op, args, kwargs in calls_of(run, monkeypatch):
        check_op(op, args, kwargs)


@every_backend
def test_opcheck_of_packing(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 5, 2, 4, device=device)
    codes = torch.randint(0, 16, (3, 5), device=device).to(torch.uint8)
    scale = torch.tensor([0.1], device=device)
    packed = quantize_pack(x, 8, scale, bit_options=(8,), backend=backend)
    for run in (
        lambda: quantize_pack(x, 8, scale, bit_options=(8,), backend=backend),
        lambda: unpack_dequantize(packed, backend=backend),
        lambda: pack_bits(codes, 4, backend=backend),
        lambda: unpack_bits(pack_bits(codes, 4), 4, 5, signed=True, backend=backend),
    ):
        for op, args, kwargs in calls_of(run, monkeypatch):
            check_op(op, args, kwargs)


@every_backend
def test_opcheck_of_the_gate(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = packed_features(3, 6, 4, 4).to(device)
    weights = RNNGateWeights(*(value.to(device) for value in gate_weights(6)))
    calls = calls_of(lambda: rnn_gate(x, weights, CHOICES, backend=backend), monkeypatch)
    for op, args, kwargs in calls:
        check_op(op, args, kwargs)


@every_backend
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
@pytest.mark.parametrize("output_form", ["float", "fixed"])
def test_a_convolution_compiles_without_breaks(
    backend: str, mode: str, output_form: str, device: torch.device
) -> None:
    if mode == "inductor" and is_rehearsal():
        pytest.skip("it would compile for the CPU")
    arguments = arguments_on(device, case_of(("contiguous", "float", output_form)))
    names = ("input", "bits", "residual")
    fixed = {name: value for name, value in arguments.items() if name not in names}

    @torch.compile(fullgraph=True, backend=mode)
    def run(x: Tensor, bits: Tensor, residual: Tensor) -> Any:
        result = mixed_conv2d(input=x * 1.0, bits=bits, residual=residual, **fixed, backend=backend)
        return result if isinstance(result, PackedActivation) else result * 1.0

    got = run(*(arguments[name] for name in names))
    assert_same_samples(got, mixed_conv2d(**arguments, backend=backend))


@every_backend
@pytest.mark.usefixtures("compiler")
def test_in_place_compiles_without_breaks(backend: str, device: torch.device) -> None:
    arguments = arguments_on(device, case_of(("packed", "packed", "in_place")))
    target, expected = (arguments["residual"].clone() for _ in range(2))
    fixed = {name: value for name, value in arguments.items() if name != "residual"}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(residual: PackedActivation) -> None:
        mixed_conv2d_(residual=residual, **fixed, backend=backend)

    run(target)
    mixed_conv2d_(residual=expected, **fixed, backend=backend)
    assert_same_samples(target, expected)


# Arguments


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output_form", ["float", "own"])
def test_short_floats_are_upcast_exactly(
    backend: str, dtype: torch.dtype, output_form: str, device: torch.device
) -> None:
    arguments = arguments_on(device, case_of(("contiguous", "float", output_form)))
    names = ("input", "residual", "bias")
    short = {name: arguments[name].to(dtype) for name in names}
    got = mixed_conv2d(**{**arguments, **short}, backend=backend)
    exact = {name: value.float() for name, value in short.items()}
    expected = mixed_conv2d(**{**arguments, **exact}, backend=backend)
    assert_same_samples(got, expected)


@every_backend
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    arguments = arguments_on(device, case_of(("contiguous", "float", "float")))
    expected = mixed_conv2d(**arguments, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = mixed_conv2d(**arguments, backend=backend)
    assert_same_samples(got, expected)


@every_backend
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bits", torch.tensor((8, 0, 2, 32, 5), dtype=torch.int32), r"bits\[4\] is 5"),
        ("input_scale", torch.tensor((0.1, 0.1, 0.0, 1.0)), "input_scale must lie in"),
        ("input_zero_point", torch.tensor((0, 0, 256, 0), dtype=torch.int32), "input_zero_point"),
    ],
)
def test_debugging_checks_values(
    backend: str,
    name: str,
    value: Tensor,
    message: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = arguments_on(device, case_of(("contiguous", None, "float")))
    arguments[name] = value.to(device)
    monkeypatch.setenv("DFS_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        mixed_conv2d(**arguments, backend=backend)


# Training


def training_step(arguments: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """The gradients of all that have one, under a gradient that differs everywhere."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    y = mixed_conv2d(**{**arguments, **leaves}, backend=backend)
    assert isinstance(y, Tensor)
    slope = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    found = torch.autograd.grad(y, list(leaves.values()), slope)
    return dict(zip(leaves, found, strict=True))


@every_backend
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("input_form", ["contiguous", "channels_last"])
def test_gradients_equal_the_references(
    backend: str, groups: int, input_form: str, device: torch.device
) -> None:
    """Groups of eight, four and one channel: matrix products, and products one by one."""
    case = ConvCase(
        bits=BITS,
        groups=groups,
        group_channels=8 // groups,
        group_outputs=16 // groups,
        size=(6, 5),
        stride=(2, 1),
        input_form=input_form,
        packed_weight=False,
        residual_form="float",
        relu=True,
    )
    expected = training_step(build(case).arguments(), "reference")
    got = training_step(arguments_on(device, case), backend)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            got[name].cpu(),
            value,
            rtol=1e-4,
            atol=2e-5 * scale + 1e-30,
            msg=lambda t, n=name: f"{n}: {t}",
        )


@every_backend
def test_gradients_of_a_larger_layer(backend: str, device: torch.device) -> None:
    """Where the sums are split among programs, against the reference on the same device."""
    case = ConvCase(
        bits=(8, 2, 32, 4, 0, 8) * (6 if not is_rehearsal() else 1),
        group_channels=24,
        group_outputs=40,
        size=(19, 33) if not is_rehearsal() else (5, 4),
        packed_weight=False,
        output_form="float",
    )
    arguments = arguments_on(device, case)
    expected = training_step(arguments, "reference")
    got = training_step(arguments, backend)
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            got[name], value, rtol=2e-4, atol=5e-5 * scale, msg=lambda t, n=name: f"{n}: {t}"
        )


@every_backend
@pytest.mark.parametrize("groups", [1, 8])
def test_gradients_are_the_same_bits_each_time(
    backend: str, groups: int, device: torch.device
) -> None:
    case = ConvCase(
        bits=BITS * 3,
        groups=groups,
        group_channels=16 // groups,
        group_outputs=16 // groups,
        size=(19, 20) if not is_rehearsal() else (4, 5),
        packed_weight=False,
    )
    arguments = arguments_on(device, case)
    expected = training_step(arguments, backend)
    for _ in range(3 if not is_rehearsal() else 1):
        # What the allocator hands out next holds something else.
        torch.full((1 << 20,), torch.nan, device=device)
        got = training_step(arguments, backend)
        for name, value in expected.items():
            assert torch.equal(as_bits(got[name]), as_bits(value)), name


@every_backend
def test_gradients_in_tf32_are_close(backend: str, device: torch.device) -> None:
    """As PyTorch's setting allows it: eleven bits of each factor."""
    case = ConvCase(
        bits=BITS, group_channels=24, group_outputs=40, size=(9, 12), packed_weight=False
    )
    expected = training_step(build(case).arguments(), "reference")
    arguments = arguments_on(device, case)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        got = training_step(arguments, backend)
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            got[name].cpu(), value, rtol=1e-2, atol=2e-3 * scale, msg=lambda t, n=name: f"{n}: {t}"
        )


@every_backend
def test_a_recorded_training_step_reads_the_bits_of_each_replay(
    backend: str, device: torch.device
) -> None:
    arguments = arguments_on(device, case_of(("contiguous", None, "float"), packed_weight=False))
    bits = arguments["bits"].clone()
    training_step(arguments, backend)
    found: dict[str, Tensor] = {}

    def step() -> None:
        found.update(training_step({**arguments, "bits": bits}, backend))

    replay = machine().record(step, 1)
    for roll in (1, 3):
        bits.copy_(arguments["bits"].roll(roll))
        replay()
        expected = training_step({**arguments, "bits": bits.clone()}, backend)
        for name, value in expected.items():
            assert torch.equal(as_bits(found[name]), as_bits(value)), name


@every_backend
def test_skipped_samples_in_place_touch_nothing(backend: str, device: torch.device) -> None:
    case = case_of(("packed", "packed", "in_place"))
    case = ConvCase(**{**case.__dict__, "bits": (0,) * len(BITS)})
    arguments = arguments_on(device, case)
    before = arguments["residual"].clone()
    assert mixed_conv2d_(**arguments, backend=backend) is None
    assert torch.equal(arguments["residual"].data, before.data)


@every_backend
def test_in_place_equals_out_of_place(backend: str, device: torch.device) -> None:
    arguments = arguments_on(device, case_of(("contiguous", "float", "float")))
    expected = mixed_conv2d(**arguments, backend=backend)
    target = arguments["residual"].clone()
    mixed_conv2d_(**{**arguments, "residual": target}, backend=backend)
    assert torch.equal(as_bits(target), as_bits(expected))
