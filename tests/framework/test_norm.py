from __future__ import annotations

import pytest
import torch
from torch import nn

from dfs.nn import PerWidthBatchNorm2d


def _plain(norm: PerWidthBatchNorm2d, index: int) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.channels)
    with torch.no_grad():
        plain.weight.copy_(norm.weight[index])
        plain.bias.copy_(norm.bias[index])
    return plain


def test_each_width_is_the_batchnorm_of_its_own_samples() -> None:
    torch.manual_seed(0)
    norm = PerWidthBatchNorm2d(3, (2, 8), min_samples=2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(7, 3, 4, 4)
    bits = torch.tensor([2, 0, 8, 2, 8, 2, 0])
    result = norm(x, bits)
    for index, width in enumerate((2, 8)):
        plain = _plain(norm, index)
        rows = bits == width
        torch.testing.assert_close(result[rows], plain(x[rows]))
        assert plain.running_mean is not None
        assert plain.running_var is not None
        torch.testing.assert_close(norm.running_mean[index], plain.running_mean)
        torch.testing.assert_close(norm.running_var[index], plain.running_var)
    assert torch.equal(result[bits == 0], x[bits == 0])


def test_too_few_samples_use_and_keep_the_running_statistics() -> None:
    torch.manual_seed(0)
    norm = PerWidthBatchNorm2d(3, (2, 8), min_samples=4)
    x = torch.randn(6, 3, 4, 4) + 5
    bits = torch.tensor([2, 8, 8, 8, 8, 8])
    result = norm(x, bits)
    torch.testing.assert_close(result[:1], x[:1] / (1 + norm.eps) ** 0.5)
    assert torch.equal(norm.running_mean[0], torch.zeros(3))
    assert (norm.running_mean[1] > 0.3).all()


def test_folded_affine_is_the_evaluation() -> None:
    torch.manual_seed(0)
    norm = PerWidthBatchNorm2d(5, (2, 4, 8))
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    norm.eval()
    mul, add = norm.folded()
    x = torch.randn(2, 5, 3, 3)
    for index, width in enumerate((2, 4, 8)):
        folded = x * mul[index].view(1, -1, 1, 1) + add[index].view(1, -1, 1, 1)
        torch.testing.assert_close(norm(x, width), folded)


def test_copy_from_gives_every_width_the_plain_one() -> None:
    plain = nn.BatchNorm2d(4)
    nn.init.normal_(plain.weight)
    plain.running_mean = torch.randn(4)
    norm = PerWidthBatchNorm2d(4, (2, 8))
    norm.copy_from(plain)
    x = torch.randn(3, 4, 2, 2)
    for width in (2, 8):
        torch.testing.assert_close(norm.eval()(x, width), plain.eval()(x))


def test_gradient_reaches_input_and_own_parameters_only() -> None:
    norm = PerWidthBatchNorm2d(3, (2, 8), min_samples=2)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    bits = torch.tensor([8, 8, 8, 0])
    (norm(x, bits) * torch.randn(4, 3, 2, 2)).sum().backward()
    assert norm.weight.grad is not None
    assert x.grad is not None
    assert norm.weight.grad[0].abs().sum() == 0
    assert norm.weight.grad[1].abs().sum() > 0
    assert x.grad[0].abs().sum() > 0


def test_widths_must_ascend() -> None:
    with pytest.raises(ValueError, match="ascending"):
        PerWidthBatchNorm2d(3, (8, 2))
