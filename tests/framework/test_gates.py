from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import dfs_kernels
from dfs.nn.gate import straight_through
from dfs.nn.gates import FeedForwardGate, RNNGate, make_gate
from dfs.nn.stream import pooled_features
from dfs.train import Trainer
from dfs.train.stages import GateLearner
from dfs_kernels.reference import cheapest_argmax
from tests.framework.helpers import TINY, tiny_data


def test_equal_logits_go_to_the_cheapest_choice() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]])
    assert cheapest_argmax(logits).tolist() == [1, 0, 2]


def test_straight_through_gradient_by_hand() -> None:
    # softmax of (0, ln 3) is (1/4, 3/4), and d softmax_i / d logit_j = p_i * (i == j) - p_i * p_j.
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log().requires_grad_()
    choice, mask = straight_through(logits, None)
    assert choice.tolist() == [1]
    assert mask.detach().tolist() == [[0.0, 1.0]]
    (mask * torch.tensor([[5.0, 2.0]])).sum().backward()
    p = torch.tensor([0.25, 0.75])
    expected = p * (torch.tensor([5.0, 2.0]) - (p * torch.tensor([5.0, 2.0])).sum())
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0].float(), expected)


def test_cost_gradient_lowers_the_logit_of_the_dear_choice() -> None:
    logits = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    _, mask = straight_through(logits, None)
    (mask * torch.tensor([0.0, 0.1, 1.0])).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, 2] > 0).all()
    assert (logits.grad[:, 0] < 0).all()


def test_gumbel_choice_follows_the_softmax() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    choice, _ = straight_through(p.log().expand(20000, 3), 1.0)
    shares = torch.bincount(choice, minlength=3) / 20000
    torch.testing.assert_close(shares.double(), p, atol=0.02, rtol=0)


def test_gate_computes_the_lstm_of_torch_in_float64() -> None:
    torch.manual_seed(1)
    gate = RNNGate([6, 12], (0, 2, 8))
    cell = nn.LSTMCell(10, 10).double()
    cell.load_state_dict(gate.cell.state_dict())
    first, second = torch.randn(5, 6).double(), torch.randn(5, 12).double()
    one = gate(0, first, None)
    two = gate(1, second, one.state)
    embed = gate.embed.double()
    h, _ = cell(embed[1](second), cell(embed[0](first)))
    logits = nn.functional.linear(h, gate.proj.weight.double(), gate.proj.bias.double())
    assert two.logits.dtype == torch.float64
    torch.testing.assert_close(two.logits, logits, rtol=1e-12, atol=1e-12)


def test_batch_of_one_decides_as_in_a_larger_batch() -> None:
    torch.manual_seed(2)
    gate = RNNGate([4], (0, 4, 8))
    pooled = torch.randn(7, 4, dtype=torch.float64)
    together = gate(0, pooled, None)
    for i in range(7):
        alone = gate(0, pooled[i : i + 1], None)
        assert alone.bits.tolist() == [together.bits[i].item()]


def test_the_deployed_gate_decides_as_in_training() -> None:
    gate = RNNGate([6, 12], (0, 4, 8))
    features = [torch.randn(5, 6, 3, 4), torch.randn(5, 12, 2, 2)]
    state = deployed_state = None
    for index, x in enumerate(features):
        trained = gate(index, x.double().mean((2, 3)), state)
        deployed = gate.run(index, x, deployed_state)
        assert torch.equal(deployed.bits, trained.bits)
        assert torch.equal(deployed.mask, trained.mask)
        torch.testing.assert_close(deployed.logits, trained.logits, rtol=1e-11, atol=1e-12)
        state, deployed_state = trained.state, deployed.state


def test_decisions_are_the_same_every_time() -> None:
    torch.manual_seed(3)
    gate = RNNGate([4], (0, 4, 8))
    pooled = torch.randn(50, 4, dtype=torch.float64)
    assert torch.equal(gate(0, pooled, None).bits, gate(0, pooled, None).bits)


@pytest.mark.parametrize("target", [0.005, 0.02, 0.04])
def test_favoured_cost_is_the_expected_cost_at_the_start(target: float) -> None:
    gate = RNNGate([4], (0, 2, 4, 8))
    costs = torch.tensor([0.0, 1 / 256, 1 / 64, 1 / 16], dtype=torch.float64)
    gate.favour_cost(target, costs)
    p = torch.softmax(gate.proj.bias.detach().double(), 0)
    assert float((p * costs).sum()) == pytest.approx(target, rel=1e-4)


@pytest.mark.parametrize("choices", [(8,), (8, 2), (2, 2)])
def test_bad_choices_are_refused(choices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="choices"):
        RNNGate([4], choices)


def test_a_target_out_of_reach_starts_inside_the_range_of_costs() -> None:
    costs = torch.tensor([0.0, 1 / 256, 1 / 64, 1 / 16], dtype=torch.float64)
    for target in (0.0, 0.0625, 1.0):
        gate = RNNGate([4], (0, 2, 4, 8))
        gate.favour_cost(target, costs)
        p = torch.softmax(gate.proj.bias.detach().double(), 0)
        assert 0 < float((p * costs).sum()) < 0.0625
        assert float(p.max()) < 0.97


def test_standardised_features_reach_the_gate_with_unit_spread() -> None:
    torch.manual_seed(0)
    gate = RNNGate([6], (0, 8))
    pooled = torch.randn(400, 6, dtype=torch.float64) * 0.01 + torch.arange(6) * 5.0
    before = gate.embed[0].weight.detach().clone()
    bias = gate.embed[0].bias.detach().clone()
    gate.standardise(0, pooled)
    expected = nn.functional.linear(
        (pooled - pooled.mean(0)) / pooled.std(0), before.double(), bias.double()
    )
    got = nn.functional.linear(pooled, gate.embed[0].weight.double(), gate.embed[0].bias.double())
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


KINDS = ("rnn", "feedforward", "constant")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "choices", [(0, 32), (2, 4, 8), (0, 8, 10, 12, 14, 16, 32), (0, 2, 4, 8, 32)]
)
def test_every_gate_takes_any_choices(kind: str, choices: tuple[int, ...]) -> None:
    gate = make_gate(kind, [6, 12], choices)
    state = None
    for index, channels in enumerate((6, 12)):
        decision = gate(index, torch.randn(5, channels, dtype=torch.float64), state)
        state = decision.state
        assert decision.bits.dtype == torch.int32
        assert set(decision.bits.tolist()) <= set(choices)
        assert decision.logits.shape == decision.mask.shape == (5, len(choices))
        assert torch.equal(decision.mask @ gate.widths.float(), decision.bits.float())


@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_decides_alone_as_in_a_batch_and_every_time(kind: str) -> None:
    gate = make_gate(kind, [6], (0, 4, 8))
    features = torch.randn(9, 6, 3, 5)
    together = gate.run(0, features, None)
    assert torch.equal(gate.run(0, features, None).bits, together.bits)
    for i in range(9):
        alone = gate.run(0, features[i : i + 1], None)
        assert alone.bits.tolist() == [int(together.bits[i])]


@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_prefers_the_cheapest_among_equals(kind: str) -> None:
    gate = make_gate(kind, [6], (2, 4, 8))
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        assert gate.run(0, torch.rand(3, 6, 2, 2), None).bits.tolist() == [2, 2, 2]
        gate.choice_bias[1] = 1e-9
        assert gate.run(0, torch.rand(3, 6, 2, 2), None).bits.tolist() == [4, 4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_starts_at_the_favoured_cost(kind: str) -> None:
    gate = make_gate(kind, [6, 6], (0, 2, 4, 8))
    costs = torch.tensor([0.0, 1 / 256, 1 / 64, 1 / 16], dtype=torch.float64)
    gate.favour_cost(0.02, costs)
    weights = [p for n, p in gate.named_parameters() if n.startswith("proj") and p.dim() == 2]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    for index in range(2):
        decision = gate(index, torch.randn(4, 6, dtype=torch.float64), None)
        cost = (decision.logits.softmax(-1) * costs).sum(-1)
        torch.testing.assert_close(cost, torch.full_like(cost, 0.02), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_learns_through_the_mask(kind: str) -> None:
    gate = make_gate(kind, [6], (0, 4, 8))
    decision = gate(0, torch.randn(16, 6, dtype=torch.float64), None, temperature=1.0)
    (decision.mask * torch.tensor([0.0, 0.25, 1.0])).sum().backward()
    name = {"rnn": "proj.bias", "feedforward": "proj.0.bias", "constant": "logits"}[kind]
    gradient = dict(gate.named_parameters())[name].grad
    assert gradient is not None
    assert float(gradient.flatten()[-1]) > 0 > float(gradient.flatten()[0])


def test_gumbel_noise_differs_between_samples_of_a_constant_gate() -> None:
    gate = make_gate("constant", [6], (0, 4, 8))
    pooled = torch.randn(300, 6, dtype=torch.float64)
    assert set(gate(0, pooled, None, temperature=1.0).bits.tolist()) == {0, 4, 8}
    assert set(gate(0, pooled, None).bits.tolist()) == {0}


def test_macs_by_hand() -> None:
    assert make_gate("rnn", [16], (0, 8)).macs(0) == 16 * 10 + 4 * 20 * 10 + 10 * 2
    assert make_gate("feedforward", [16], (0, 2, 8), hidden=5).macs(0) == 16 * 5 + 5 * 3
    assert make_gate("feedforward", [16], (0, 8), hidden=5, deviation=True).macs(0) == 32 * 5 + 10
    assert make_gate("constant", [16], (0, 8)).macs(0) == 0


def test_feed_forward_gate_is_a_small_network_in_float64() -> None:
    gate = FeedForwardGate([6], (0, 2, 8), hidden=4)
    pooled = torch.randn(5, 6, dtype=torch.float64)
    network = nn.Sequential(gate.embed[0], nn.ReLU(), gate.proj[0]).double()
    expected = network(pooled)
    assert torch.equal(gate.float()(0, pooled, None).logits, expected)


def test_features_of_a_packed_stream_come_from_exact_sums() -> None:
    codes = torch.randint(256, (3, 5, 4, 6))
    scale = torch.tensor(0.037)
    packed = dfs_kernels.quantize_pack(codes.float() * scale, 8, {8: scale})
    features = pooled_features(packed, deviation=True)
    values = codes.double() * scale.double()
    assert features.shape == (3, 10)
    torch.testing.assert_close(features[:, :5], values.mean((2, 3)), rtol=1e-14, atol=0)
    deviation = values.var((2, 3), correction=0).sqrt()
    torch.testing.assert_close(features[:, 5:], deviation, rtol=1e-8, atol=0)
    from_float = pooled_features(values.float(), deviation=True)
    torch.testing.assert_close(features, from_float, rtol=1e-6, atol=1e-6)


def test_the_deviation_of_a_channel_that_does_not_vary_has_a_gradient() -> None:
    stream = torch.ones(2, 3, 4, 4, requires_grad=True)
    pooled_features(stream, deviation=True).sum().backward()
    assert stream.grad is not None
    assert torch.isfinite(stream.grad).all()


def test_unknown_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="gate must be one of"):
        make_gate("oracle", [6], (0, 8))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_gradient_that_images_have_in_common_is_reduced(share: float) -> None:
    torch.manual_seed(0)
    gates = [FeedForwardGate([4], (0, 2, 8)) for _ in range(2)]
    gates[1].load_state_dict(gates[0].state_dict())
    gates[0].common_gradient = share
    pooled = torch.randn(6, 4, dtype=torch.float64)
    weight = torch.randn(6, 3) + torch.tensor([3.0, 0.0, -3.0])
    grads = []
    for gate in gates:
        logits = pooled.new_zeros(6, 3).requires_grad_()
        gate._score = lambda index, x, state, logits=logits: (logits * 1, None)  # type: ignore[method-assign,assignment]
        (gate(0, pooled, None).mask * weight).sum().backward()
        grads.append(logits.grad)
    reduced, plain = grads
    assert plain is not None
    assert reduced is not None
    torch.testing.assert_close(reduced, plain - (1 - share) * plain.mean(0))
    assert plain.mean(0).abs().max() > 0.1


def test_gates_that_look_learn_from_the_differences_and_constant_ones_from_all() -> None:
    data = tiny_data()
    for kind, expected in (("rnn", TINY.common_gradient), ("constant", 1.0)):
        trainer = Trainer(replace(TINY, gate=kind), None, data)
        GateLearner(trainer, 1e-2)
        assert trainer.model.gate.common_gradient == expected
