from __future__ import annotations

import pytest
import torch
from torch import nn

from dfs.cost import BitOps, PaperCost, make_cost
from dfs.models import DynamicResNet, PlainResNet


def _one_hot(model: DynamicResNet, bits: list[list[int]]) -> torch.Tensor:
    chosen = torch.tensor(bits)[..., None] == torch.tensor(model.choices)
    assert chosen.any(-1).all()
    return chosen.float()


def test_paper_cost_by_hand() -> None:
    model = DynamicResNet(8, choices=(0, 2, 4, 8, 32))
    mask = _one_hot(model, [[0, 0], [8, 8], [32, 0], [4, 2]])
    expected = [0, 0.0625, 0.5, ((4 / 32) ** 2 + (2 / 32) ** 2) / 2]
    assert PaperCost(model)(mask).tolist() == pytest.approx(expected)


def test_macs_are_those_that_the_layers_do() -> None:
    plain, dynamic = PlainResNet(14, 10, 3), DynamicResNet(14, 10, 3)
    counted: dict[str, int] = {}

    def count(name: str) -> object:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            assert isinstance(module, nn.Conv2d)
            counted[name] = module.weight[0].numel() * output[0].numel()

        return hook

    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count(name))  # type: ignore[arg-type]
    plain(torch.randn(1, 3, 18, 14))
    macs = dynamic.macs(18, 14)
    assert macs.total == sum(counted.values())
    for i, gated in enumerate(macs.gated):
        assert gated == counted[f"blocks.{i + 1}.conv1"] + counted[f"blocks.{i + 1}.conv2"]


def test_bitops_of_uniform_widths() -> None:
    model = DynamicResNet(14, choices=(0, 8, 32))
    macs = model.macs(16, 16)
    cost = BitOps(model, (16, 16))
    for i, width in enumerate(model.choices):
        mask = torch.zeros(1, model.gated_blocks, 3)
        mask[..., i] = 1
        work = macs.ungated * 64 + macs.gates * 1024 + sum(macs.gated) * width**2
        assert float(cost(mask)) == pytest.approx(work / (1024 * macs.total), rel=1e-6)
        assert float(cost.of_choices()[i]) == pytest.approx(float(cost(mask)), rel=1e-6)


def test_cost_is_differentiable_and_dearer_choices_have_larger_gradients() -> None:
    model = DynamicResNet(8)
    mask = torch.full((2, 2, 4), 0.25, requires_grad=True)
    for cost in (PaperCost(model), BitOps(model, (8, 8))):
        (gradient,) = torch.autograd.grad(cost(mask).sum(), mask)
        assert (gradient.diff(dim=-1) > 0).all()


def test_unknown_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="cost must be"):
        make_cost("joules", DynamicResNet(8), (8, 8))
