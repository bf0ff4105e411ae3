"""The recurrent gate as one op, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfs_kernels import (
    GateStep,
    PackedActivation,
    RNNGateWeights,
    functional,
    rnn_gate,
)
from tests.kernels.cases import CPU_BACKENDS
from tests.kernels.gate_cases import (
    CHOICES,
    TOLERANCE,
    assert_same_step,
    gate_weights,
    packed_features,
)

BACKENDS = CPU_BACKENDS
every_backend = pytest.mark.parametrize("backend", BACKENDS)
OTHER_BACKENDS = [name for name in BACKENDS if name != "reference"]


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
@pytest.mark.parametrize(
    ("channels", "height", "width", "options"),
    [
        (16, 8, 8, (8,)),
        (64, 3, 5, (8,)),
        (70, 5, 4, (8,)),
        (1, 1, 1, (8,)),
        (5, 3, 7, (2, 4, 8, 32)),
        (130, 2, 3, (2, 4)),
        (32, 20, 19, (4, 8)),
    ],
)
def test_matches_reference(
    backend: str, channels: int, height: int, width: int, options: tuple[int, ...]
) -> None:
    x = packed_features(7, channels, height, width, options)
    first, second = gate_weights(channels), gate_weights(channels)
    expected = rnn_gate(x, first, CHOICES, backend="reference")
    got = rnn_gate(x, first, CHOICES, backend=backend)
    assert_same_step(got, expected)
    again = rnn_gate(x, second, CHOICES, expected.state, backend="reference")
    assert_same_step(rnn_gate(x, second, CHOICES, expected.state, backend=backend), again)
    assert not torch.equal(again.logits, rnn_gate(x, second, CHOICES).logits)


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "strided"])
def test_float_features_match_reference(backend: str, form: str) -> None:
    x = torch.randn(3, 20, 5, 6)
    if form == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif form == "strided":
        x = torch.randn(3, 40, 5, 12)[:, ::2, :, ::2]
    weights = gate_weights(20)
    expected = rnn_gate(x, weights, CHOICES, backend="reference")
    assert_same_step(rnn_gate(x, weights, CHOICES, backend=backend), expected)


@every_backend
@pytest.mark.parametrize(
    ("hidden", "choices"), [(1, (0, 32)), (3, (2, 4, 8)), (17, (0, 2, 4, 8, 32))]
)
def test_any_size_of_gate(backend: str, hidden: int, choices: tuple[int, ...]) -> None:
    x = packed_features(4, 6, 4, 4)
    weights = gate_weights(6, len(choices), hidden)
    expected = _by_torch(x, weights, choices)
    assert_same_step(rnn_gate(x, weights, choices, backend=backend), expected)


def _by_torch(x: PackedActivation, weights: RNNGateWeights, choices: tuple[int, ...]) -> GateStep:
    """The same through PyTorch's own layers."""
    hidden = weights.hidden
    cell = nn.LSTMCell(hidden, hidden, dtype=torch.float64)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    cell.load_state_dict({name: getattr(weights, name) for name in names})
    codes = x.data.view(x.shape[0], -1, x.channels).double()
    pooled = (codes - x.zero_point.double()).mean(1) * x.scale.double()
    embedded = nn.functional.linear(
        pooled, weights.embed_weight.double(), weights.embed_bias.double()
    )
    output, memory = cell(embedded)
    logits = nn.functional.linear(output, weights.proj_weight.double(), weights.proj_bias.double())
    logits = (logits + weights.choice_bias).detach()
    widths = torch.tensor(choices, dtype=torch.int32)
    return GateStep(widths[logits.argmax(1)], logits, torch.stack((output, memory)).detach())


@every_backend
def test_ties_go_to_the_cheapest(backend: str) -> None:
    x = packed_features(2, 4, 3, 3)
    weights = gate_weights(4)
    flat = weights._replace(
        proj_weight=torch.zeros_like(weights.proj_weight),
        proj_bias=torch.tensor([0.0, 1.0, 1.0, 1.0]),
        choice_bias=torch.zeros(4, dtype=torch.float64),
    )
    assert rnn_gate(x, flat, CHOICES, backend=backend).bits.tolist() == [2, 2]


@every_backend
def test_a_sample_that_is_not_finite_takes_the_dearest_choice_alone(backend: str) -> None:
    x = torch.rand(3, 4, 3, 3)
    weights = gate_weights(4)
    clean = rnn_gate(x, weights, CHOICES, backend=backend)
    x[1, 2, 0, 1] = float("nan")
    step = rnn_gate(x, weights, CHOICES, backend=backend)
    assert int(step.bits[1]) == CHOICES[-1]
    assert bool(step.logits[1].isnan().all())
    for n in (0, 2):
        assert torch.equal(step.logits[n], clean.logits[n])
        assert step.bits[n] == clean.bits[n]


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    x = packed_features(6, 20, 4, 5)
    weights = gate_weights(20)
    together = rnn_gate(x, weights, CHOICES, backend=backend)
    for n in range(6):
        alone = PackedActivation(
            x.data[n : n + 1].contiguous(), x.bits[n : n + 1], x.scale, x.zero_point, (8,), 20, 4, 5
        )
        step = rnn_gate(alone, weights, CHOICES, backend=backend)
        assert torch.equal(step.logits[0], together.logits[n])
        assert torch.equal(step.state[:, 0], together.state[:, n])


@every_backend
def test_an_empty_batch(backend: str) -> None:
    x = packed_features(2, 4, 3, 3)
    none = PackedActivation(x.data[:0], x.bits[:0], x.scale, x.zero_point, (8,), 4, 3, 3)
    step = rnn_gate(none, gate_weights(4), CHOICES, backend=backend)
    assert step.bits.shape == (0,)
    assert step.logits.shape == (0, 4)
    assert step.state.shape == (2, 0, 10)


@every_backend
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck(
    backend: str, packed: bool, with_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x: Any = packed_features(2, 5, 3, 4) if packed else torch.randn(2, 5, 3, 4)
    calls = []

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return torch.ops.dfs.rnn_gate(*args, **kwargs)

    class Ops:
        rnn_gate = staticmethod(record)

    class Torch:
        ops = type("ops", (), {"dfs": Ops})

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(functional, "torch", Torch())
    state = torch.randn(2, 2, 10, dtype=torch.float64) if with_state else None
    rnn_gate(x, gate_weights(5), CHOICES, state, backend=backend)
    ((args, kwargs),) = calls
    results = torch.library.opcheck(torch.ops.dfs.rnn_gate.default, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}, results


@every_backend
def test_compiles_whole(backend: str, compiler: None) -> None:
    x, weights = packed_features(3, 6, 4, 4), gate_weights(6)

    def two_steps(data: Tensor) -> Tensor:
        features = PackedActivation(data, x.bits, x.scale, x.zero_point, (8,), 6, 4, 4)
        step = rnn_gate(features, weights, CHOICES, backend=backend)
        return rnn_gate(features, weights, CHOICES, step.state, backend=backend).logits

    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.data), two_steps(x.data), **TOLERANCE)


@pytest.mark.parametrize("name", RNNGateWeights._fields)
def test_wrong_weights_are_named(name: str) -> None:
    x, weights = packed_features(2, 4, 3, 3), gate_weights(4)
    value = getattr(weights, name)
    shorter = value[:, :-1] if value.dim() == 2 else value[:-1]
    for wrong, error in (
        (shorter, ValueError),
        (value.half(), TypeError),
        (value.tolist(), TypeError),
        (value.to("meta"), ValueError),
    ):
        with pytest.raises(error, match=f"weights.{name} "):
            rnn_gate(x, weights._replace(**{name: wrong}), CHOICES)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"choices": (2, 0, 4, 8)}, ValueError, "choices must be ascending"),
        ({"choices": (0, 2, 4, 33)}, ValueError, "choices must be widths from 0 to 32"),
        ({"choices": (0, 2, 4, 8.0)}, TypeError, "choices must hold ints"),
        ({"choices": ()}, ValueError, "choices must be ascending"),
        ({"choices": (0, 2)}, ValueError, "weights.proj_weight must have shape"),
        ({"state": torch.zeros(2, 3, 10, dtype=torch.float64)}, ValueError, "state must be"),
        ({"state": torch.zeros(2, 2, 10)}, ValueError, "state must be float64"),
        ({"state": 3}, TypeError, "state must be a tensor"),
        ({"weights": (1, 2)}, TypeError, "weights must be RNNGateWeights"),
        ({"input": torch.zeros(2, 4, 3)}, ValueError, "input must be"),
        ({"input": torch.zeros(2, 4, 3, 3, dtype=torch.int32)}, TypeError, "input must be"),
        ({"input": torch.zeros(2, 4, 0, 3)}, ValueError, "input must not be empty"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "input": packed_features(2, 4, 3, 3),
        "weights": gate_weights(4),
        "choices": CHOICES,
        "state": None,
        **changed,
    }
    with pytest.raises(error, match=message):
        rnn_gate(**arguments)


def test_a_stored_width_that_is_no_option_is_refused() -> None:
    x = packed_features(2, 4, 3, 3, (2, 8))
    x.bits[1] = 4
    with pytest.raises(ValueError, match=r"input.bits\[1\] is 4"):
        rnn_gate(x, gate_weights(4), CHOICES)


def test_direct_calls_equal_the_op() -> None:
    """The compiled kernel answers alike with and without the dispatcher."""
    x, weights = packed_features(4, 6, 3, 3), gate_weights(6)
    direct = rnn_gate(x, weights, CHOICES, backend="cpu")
    with torch.autograd.profiler.profile() as profile:
        op = rnn_gate(x, weights, CHOICES, backend="cpu")
    assert "dfs::rnn_gate" in {event.name for event in profile.function_events}
    for got, expected in zip(direct, op, strict=True):
        assert torch.equal(got, expected)
