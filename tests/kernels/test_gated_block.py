"""A gated residual block as one op, on every backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfs_kernels import (
    BlockConv,
    BlockOutput,
    PackedActivation,
    PackedConvWeight,
    gated_block,
    mixed_conv2d,
    mixed_conv2d_,
    ops,
    quantize_pack,
    rnn_gate,
)
from tests.kernels.cases import CPU_BACKENDS, OTHER_BACKENDS, as_bits
from tests.kernels.gate_cases import CHOICES, assert_same_step, gate_weights
from tests.kernels.op_calls import calls_of, check_op

every_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
# Widths at which all backends give the same bits.
EXACT = (8, 0, 2, 4, 8)


@dataclass(frozen=True)
class BlockCase:
    """What makes up a block; its numbers are random."""

    kind: str  # "basic" or "bottleneck"
    downsamples: bool = False
    stream: str = "uint8"
    options: tuple[int, ...] = (2, 4, 8)
    bits: tuple[int, ...] = EXACT
    channels: int = 6
    size: tuple[int, int] = (5, 4)

    def __str__(self) -> str:
        parts = [self.kind, "downsampling" if self.downsamples else "identity", self.stream]
        return "-".join([*parts, *(["32"] if 32 in self.options else [])])

    @property
    def outputs(self) -> int:
        return self.channels + 3 if self.downsamples else self.channels


CASES = (
    BlockCase("basic"),
    BlockCase("basic", stream="float32"),
    BlockCase("basic", downsamples=True),
    BlockCase("basic", downsamples=True, stream="float32"),
    BlockCase("bottleneck"),
    BlockCase("bottleneck", downsamples=True),
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def step_sizes(options: tuple[int, ...]) -> dict[int, float]:
    return {b: 0.02 * 2 ** (8 - b) for b in options if b != 32}


def make_conv(
    case: BlockCase,
    channels: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    options: tuple[int, ...] | None = None,
) -> BlockConv:
    widths = case.options if options is None else options
    weight = PackedConvWeight.from_float(
        torch.randn(outputs, channels, kernel, kernel),
        {b: torch.full((outputs,), 4.0 / 2**b) for b in widths if b != 32},
        widths,
    )
    scale = torch.tensor([*step_sizes(widths).values()])
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    zeros[: channels % 2] = 1
    affine = (len(widths), outputs)
    return BlockConv.create(
        weight, scale, zeros, mul=torch.rand(affine) * 0.2, add=torch.randn(affine) * 0.5,
        stride=stride, padding=kernel // 2,
    )  # fmt: skip


def make_arguments(case: BlockCase) -> dict[str, Any]:
    """What :func:`gated_block` takes but for the backend; its stream is to be cloned."""
    first, last, stride = case.channels, case.outputs, 2 if case.downsamples else 1
    if case.kind == "basic":
        branch = [make_conv(case, first, last, 3, stride), make_conv(case, last, last, 3)]
    else:
        branch = [
            make_conv(case, first, 5, 1),
            make_conv(case, 5, 5, 3, stride),
            make_conv(case, 5, last, 1),
        ]
    images = torch.rand(len(case.bits), first, *case.size) * 3
    arguments: dict[str, Any] = {
        "stream": images,
        "bits": torch.tensor(case.bits, dtype=torch.int32),
        "branch": branch,
        "gate": gate_weights(last),
        "choices": CHOICES,
        "state": torch.randn(2, len(case.bits), 10, dtype=torch.float64),
    }
    if case.stream == "uint8":
        arguments["stream"] = quantize_pack(images, 8, 0.013, backend="reference")
    if case.downsamples:
        arguments["shortcut"] = make_conv(case, first, last, 1, stride, (8,))
        if case.stream == "uint8":
            arguments["output_scale"] = torch.tensor([0.017])
            arguments["output_zero_point"] = torch.zeros(1, dtype=torch.int32)
    return arguments


def run(arguments: dict[str, Any], backend: str) -> BlockOutput:
    return gated_block(**{**arguments, "stream": arguments["stream"].clone()}, backend=backend)


def one_by_one(arguments: dict[str, Any], backend: str) -> BlockOutput:
    """The same from the functions that each do one step."""
    stream, bits, branch = (arguments[name] for name in ("stream", "bits", "branch"))
    stream = x = stream.clone()
    for i, (conv, following) in enumerate(pairwise(branch)):
        x = convolve(
            conv, x, bits, backend, as_codes=i > 0, activation="relu",
            output_scale=following.quantizer.scale,
            output_zero_point=following.quantizer.zero_point,
        )  # fmt: skip
    result: Any = stream
    last = branch[-1]
    if "shortcut" not in arguments:
        convolve(last, x, bits, backend, as_codes=True, residual=stream, activation="relu",
                 function=mixed_conv2d_)  # fmt: skip
    else:
        residual = convolve(arguments["shortcut"], stream, 8, backend)
        stored = {}
        if "output_scale" in arguments:
            stored = {
                "output_scale": arguments["output_scale"],
                "output_zero_point": arguments["output_zero_point"],
                "output_bits": 8,
            }
        result = convolve(
            last, x, bits, backend, as_codes=True, residual=residual, activation="relu", **stored
        )
        if not stored:
            result = torch.relu(result)
    step = rnn_gate(
        result, arguments["gate"], arguments["choices"], arguments["state"], backend=backend
    )
    return BlockOutput(result, step)


def convolve(
    conv: BlockConv,
    x: Any,
    bits: Any,
    backend: str,
    as_codes: bool = False,
    function: Any = mixed_conv2d,
    **epilogue: Any,
) -> Any:
    g = conv.geometry
    return function(
        x, conv.weight, bits,
        input_scale=None if as_codes else conv.quantizer.scale,
        input_zero_point=None if as_codes else conv.quantizer.zero_point,
        mul=conv.mul, add=conv.add, bias=conv.bias,
        stride=(g.stride_h, g.stride_w), padding=(g.pad_top, g.pad_left),
        backend=backend, **epilogue,
    )  # fmt: skip


def bits_of(stream: Tensor | PackedActivation) -> Tensor:
    return stream.data if isinstance(stream, PackedActivation) else as_bits(stream)


def assert_same_output(got: BlockOutput, expected: BlockOutput) -> None:
    assert type(got.stream) is type(expected.stream)
    if isinstance(got.stream, PackedActivation):
        assert isinstance(expected.stream, PackedActivation)
        assert torch.equal(got.stream.bits, expected.stream.bits)
        assert torch.equal(got.stream.scale, expected.stream.scale)
        assert got.stream.bit_options == expected.stream.bit_options
    assert got.stream.shape == expected.stream.shape
    assert torch.equal(bits_of(got.stream), bits_of(expected.stream))
    assert got.step is not None
    assert expected.step is not None
    assert_same_step(got.step, expected.step)


@every_backend
@every_case
def test_it_is_its_steps_and_the_references(case: BlockCase, backend: str) -> None:
    arguments = make_arguments(case)
    expected = one_by_one(arguments, "reference")
    got = run(arguments, backend)
    assert_same_output(got, expected)
    same = one_by_one(arguments, backend)
    assert_same_output(got, same)
    assert len(set(expected.step.bits.tolist())) > 1  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["reference", *OTHER_BACKENDS])
@pytest.mark.parametrize("downsamples", [False, True])
def test_samples_at_32_bits(downsamples: bool, backend: str) -> None:
    """Their sums, and so their codes, are the backend's own."""
    case = BlockCase("basic", downsamples, options=(2, 8, 32), bits=(32, 0, 2, 32, 8))
    arguments = make_arguments(case)
    assert_same_output(run(arguments, backend), one_by_one(arguments, backend))


@every_backend
@pytest.mark.parametrize("stream", ["uint8", "float32"])
def test_a_skipped_identity_block_touches_nothing(stream: str, backend: str) -> None:
    case = BlockCase("basic", stream=stream, bits=(0, 0, 0))
    arguments = make_arguments(case)
    if stream == "float32":
        arguments["stream"] = -arguments["stream"]
    found = run(arguments, backend).stream
    assert torch.equal(bits_of(found), bits_of(arguments["stream"]))


@every_backend
@pytest.mark.parametrize("rectifies", [False, True])
def test_a_skipped_shortcut_is_rectified_or_not(rectifies: bool, backend: str) -> None:
    arguments = make_arguments(BlockCase("basic", True, "float32", bits=(0, 8)))
    shortcut = convolve(arguments["shortcut"], arguments["stream"], 8, "reference")
    assert bool((shortcut[0] < 0).any())
    found = run({**arguments, "rectifies_skipped": rectifies}, backend).stream
    assert isinstance(found, Tensor)
    expected = torch.relu(shortcut[0]) if rectifies else shortcut[0]
    assert torch.equal(found[0], expected)
    assert bool((found[1] >= 0).all())


@every_backend
def test_the_next_block_reads_the_decision(backend: str) -> None:
    first, second = make_arguments(BlockCase("basic")), make_arguments(BlockCase("basic"))
    outputs = []
    for name in ("reference", backend):
        one = run(first, name)
        assert one.step is not None
        two = {**second, "stream": one.stream, "bits": one.step.bits, "state": one.step.state}
        outputs.append(run(two, name))
    assert_same_output(outputs[1], outputs[0])


@every_backend
def test_without_a_gate_there_is_no_decision(backend: str) -> None:
    arguments = make_arguments(BlockCase("basic"))
    expected = run(arguments, backend)
    found = run({**arguments, "gate": None, "choices": (), "state": None}, backend)
    assert found.step is None
    assert torch.equal(bits_of(found.stream), bits_of(expected.stream))


@every_backend
def test_an_identity_block_returns_the_stream_it_was_given(backend: str) -> None:
    arguments = make_arguments(BlockCase("basic"))
    assert gated_block(**arguments, backend=backend).stream is arguments["stream"]


@every_backend
def test_an_empty_batch(backend: str) -> None:
    for downsamples in (False, True):
        arguments = make_arguments(BlockCase("basic", downsamples, bits=()))
        found = run(arguments, backend)
        assert found.stream.shape[0] == 0
        assert found.step is not None
        assert found.step.logits.shape == (0, len(CHOICES))


# What torch makes of the op


def checked() -> list[Any]:
    """All cases for each backend; the packed basic blocks for Triton, where it is slow."""
    few = [CASES[0], CASES[2]]
    return [
        pytest.param(case, backend, id=f"{case}-{backend}")
        for backend in CPU_BACKENDS
        for case in (few if backend == "triton" else CASES)
    ]


@pytest.mark.parametrize(("case", "backend"), checked())
def test_opcheck(case: BlockCase, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_arguments(case)
    without_gate = {"gate": None, "choices": (), "state": None}
    for changes in ({}, without_gate)[: 2 if case.kind == "basic" else 1]:
        calls = calls_of(lambda c=changes: run({**arguments, **c}, backend), monkeypatch)
        ((op, args, kwargs),) = [c for c in calls if "gated_block" in str(c[0])]
        check_op(op, args, kwargs)


@every_backend
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("downsamples", [False, True])
def test_it_compiles_without_breaks(downsamples: bool, backend: str) -> None:
    arguments = make_arguments(BlockCase("basic", downsamples))
    expected = run(arguments, backend)
    fixed = {k: v for k, v in arguments.items() if k not in ("stream", "bits")}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(stream: PackedActivation, bits: Tensor) -> BlockOutput:
        return gated_block(stream, bits, **fixed, backend=backend)

    assert_same_output(block(arguments["stream"].clone(), arguments["bits"]), expected)


class _Recorded(TorchDispatchMode):
    """Keeps the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cuda" not in CPU_BACKENDS, reason="the CUDA kernels were not built")
@pytest.mark.parametrize("case", [c for c in CASES if c.stream == "uint8"], ids=str)
def test_on_cuda_it_is_its_kernels_and_allocations(
    case: BlockCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel of torch's, and nothing that a CUDA graph can't hold."""
    from dfs_kernels.backends import cuda

    arguments = make_arguments(case)
    ((op, _, kwargs),) = [
        c for c in calls_of(lambda: run(arguments, "cuda"), monkeypatch) if "gated" in str(c[0])
    ]
    body = ops.gated_block_op if case.downsamples else ops.gated_block_inplace_op
    # As on a GPU, where values are not looked at.
    monkeypatch.setattr(ops, "_may_read", lambda tensor: False)
    cuda._cuda.take_launches()
    names = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    tensors = [kwargs.pop(name) for name in names]
    with _Recorded() as recorded:
        body._init_fn(*tensors, **kwargs)
    launches = cuda._cuda.take_launches()
    assert launches == [launches[0]] * (len(launches) - 1) + ["rnn_gate"]
    assert len(launches) == len(arguments["branch"]) + case.downsamples + 1
    views = {"slice", "view", "detach", "select"}
    assert recorded.names <= views | {"empty", "new_empty"}, recorded.names


# Arguments


def changed(**changes: Any) -> dict[str, Any]:
    return {**make_arguments(BlockCase("basic")), **changes}


def test_bad_arguments_are_named() -> None:
    good = make_arguments(BlockCase("basic"))
    branch, other = good["branch"], BlockCase("basic", channels=7)
    narrow = make_conv(BlockCase("basic", options=(2, 8)), 6, 6, 3)
    wide = [make_conv(other, 7, 7, 3), make_conv(other, 7, 7, 3)]
    for changes, error, message in (
        ({"branch": branch[:1]}, ValueError, "branch must have two convolutions"),
        ({"branch": [branch[0], 3]}, TypeError, r"branch\[1\] must be a BlockConv"),
        ({"branch": [branch[0], narrow]}, ValueError, r"branch\[1\] must have the widths"),
        ({"branch": wide}, ValueError, r"branch\[0\] takes 7 channels"),
        ({"branch": [branch[0], make_conv(other, 6, 7, 3)]}, ValueError, "branch gives"),
        ({"shortcut": make_conv(other, 7, 6, 1)}, ValueError, "shortcut takes 7 channels"),
        ({"output_scale": 0.1}, ValueError, "output_scale and output_zero_point need a shortcut"),
        ({"gate": 3}, TypeError, "gate must be RNNGateWeights"),
        ({"gate": gate_weights(7)}, ValueError, "weights.embed_weight must have shape"),
        ({"state": 3}, TypeError, "state must be a tensor"),
        ({"choices": (4, 2)}, ValueError, "choices must be ascending"),
        ({"stream": torch.zeros(3)}, ValueError, "stream must be"),
        ({"stream": torch.zeros(5, 6, 5, 4).half()}, TypeError, "stream must be float32"),
        ({"stream": torch.zeros(5, 6, 5, 1).expand(5, 6, 5, 4)}, ValueError, "stream must not be"),
        ({"bits": torch.tensor((8, 0, 2, 4, 5))}, ValueError, r"bits\[4\] is 5"),
        ({"bits": torch.tensor((8, 0))}, ValueError, "bits must have shape"),
        ({"backend": "nothing"}, ValueError, "backend must be one of"),
    ):
        with pytest.raises(error, match=message):
            gated_block(**{**good, **changes})
    down = make_arguments(BlockCase("basic", downsamples=True))
    with pytest.raises(ValueError, match="output_zero_point needs output_scale"):
        gated_block(**{**down, "output_scale": None})
    with pytest.raises(ValueError, match=r"shortcut_bits\[0\] is 4"):
        gated_block(**{**down, "shortcut_bits": 4})
    with pytest.raises(ValueError, match="output_bits"):
        gated_block(**{**down, "output_bits": 3})


def test_a_stream_that_wants_a_gradient_is_refused() -> None:
    stream = torch.zeros(5, 6, 5, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="stream requires a gradient"):
        gated_block(**changed(stream=stream))
    with torch.no_grad():
        gated_block(**changed(stream=stream.detach()))


def test_bad_scales_are_refused_before_anything_is_written() -> None:
    arguments = make_arguments(BlockCase("basic"))
    before = arguments["stream"].clone()
    first, second = arguments["branch"]
    zero = replace(second.quantizer, scale=torch.zeros(3))
    arguments["branch"] = [first, replace(second, quantizer=zero)]
    with pytest.raises(ValueError, match="input_scale must lie in"):
        gated_block(**arguments, backend="reference")
    assert torch.equal(arguments["stream"].data, before.data)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.zeros(4, 3, 3, 3)}, TypeError, "weight must be a PackedConvWeight"),
        ({"input_scale": torch.zeros(2)}, ValueError, "input_scale must have shape"),
        ({"mul": torch.zeros(3, 5)}, ValueError, "mul must have shape"),
        ({"bias": torch.zeros(5)}, ValueError, "bias must have shape"),
        ({"bias": 3}, TypeError, "bias must be a tensor"),
        ({"groups": 0}, ValueError, "groups must be"),
        ({"padding": -1}, ValueError, "padding must be"),
    ],
)
def test_bad_convolutions_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    weight = PackedConvWeight.from_float(
        torch.zeros(4, 3, 3, 3), {b: torch.ones(4) for b in (2, 4, 8)}, (2, 4, 8)
    )
    with pytest.raises(error, match=message):
        BlockConv.create(**{"weight": weight, "input_scale": torch.ones(3), **arguments})
