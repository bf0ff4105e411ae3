from __future__ import annotations

import pytest
import torch
from torch import nn

from dfs.nn.gates import RNNGate, cheapest_argmax, straight_through


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
