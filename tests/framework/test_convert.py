from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfs
from dfs.models import DynamicResNet, PlainResNet
from tests.framework.helpers import small_basic, tiny_data
from tests.framework.structures import (
    CifarResNet,
    TimmResNet,
    TorchvisionBasic,
    TorchvisionBottleneck,
    TorchvisionResNet,
)


def _trained_looking(model: nn.Module) -> nn.Module:
    """BatchNorms that are not the identity, so that leaving one out would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.2, 0.4)
            module.running_mean = torch.rand_like(module.weight) - 0.5
            module.running_var = torch.rand_like(module.weight) + 0.5
    return model.eval()


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "torchvision basic": TorchvisionResNet,
    "torchvision bottleneck": lambda: TorchvisionResNet(TorchvisionBottleneck),
    "timm": TimmResNet,
    "cifar": CifarResNet,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_logits_stay_those_of_the_original(name: str) -> None:
    model = _trained_looking(STRUCTURES[name]())
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 32, 32)
    dynamic = dfs.make_dynamic(model, choices=(0, 2, 8, 32), ungated_bits=32, stream="float32")
    assert isinstance(dynamic, DynamicResNet)
    assert not dynamic.training
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(dynamic.full_precision(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dynamic(x, 32), expected, rtol=1e-4, atol=1e-4)
        assert dynamic.run(x).bits.shape == (4, dynamic.gated_blocks)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_structure_is_read_from_the_modules() -> None:
    shape = dfs.make_dynamic(TorchvisionResNet(TorchvisionBottleneck)).architecture
    assert [len(block.convs) for block in shape.blocks] == [3] * 4
    assert [block.convs[1].groups for block in shape.blocks] == [2] * 4
    assert [block.convs[1].stride for block in shape.blocks] == [1, 1, 2, 1]
    assert [block.shortcut is not None for block in shape.blocks] == [True, False, True, False]
    assert shape.num_classes == 5
    assert dfs.make_dynamic(CifarResNet()).architecture.pool is None


def test_mode_and_other_channels_are_kept() -> None:
    model = TorchvisionResNet(in_channels=1).train()
    dynamic = dfs.make_dynamic(model)
    assert dynamic.training
    assert all(module.training for module in model.modules())
    assert dynamic.in_channels == 1


def test_our_own_plain_networks_convert() -> None:
    plain = PlainResNet(small_basic())
    dynamic = dfs.make_dynamic(plain.eval(), (0, 8), gate="constant")
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(dynamic.full_precision(x), plain(x))


def test_other_eps_is_kept() -> None:
    model = _trained_looking(TorchvisionResNet())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    dynamic = dfs.make_dynamic(model)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(dynamic.full_precision(x), model(x), rtol=1e-4, atol=1e-5)


class _Forgetful(TorchvisionBasic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class _PreActivated(TorchvisionBasic):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.relu(x - 0.1))


@pytest.mark.parametrize("block", [_Forgetful, _PreActivated])
def test_a_forward_that_does_something_else_is_found_out(block: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="forward does something else"):
        dfs.make_dynamic(_trained_looking(TorchvisionResNet(block)))


def _with(change: Callable[[TorchvisionResNet], object]) -> TorchvisionResNet:
    model = TorchvisionResNet()
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m.layer1[1], "se", nn.Conv2d(8, 8, 1)),
            r"layer1\.1\.se \(Conv2d\) is not supported",
        ),
        (lambda m: setattr(m.layer2[0], "relu", nn.SiLU()), r"layer2\.0\.relu \(SiLU\)"),
        (
            lambda m: setattr(m.layer1[0], "conv2", nn.Conv2d(8, 8, 3, 1, 1)),
            r"layer1\.0\.conv2 \(Conv2d\) .* without a bias",
        ),
        (
            lambda m: setattr(m.layer1[0], "conv2", nn.Conv2d(8, 8, (3, 1), 1, bias=False)),
            "the same in both directions",
        ),
        (lambda m: setattr(m.layer1[0], "bn2", nn.GroupNorm(2, 8)), r"layer1\.0\.bn2 \(GroupNorm"),
        (lambda m: setattr(m.layer1[0].bn2, "eps", 0.5), r"layer1\.0\.bn2 .* eps differs"),
        (
            lambda m: m.layer2[0].downsample.insert(0, nn.AvgPool2d(2)),
            r"layer2\.0\.downsample\.0 \(AvgPool2d\)",
        ),
        (lambda m: setattr(m.maxpool, "ceil_mode", True), r"maxpool \(MaxPool2d\)"),
        (lambda m: setattr(m, "relu", nn.GELU()), r"relu \(GELU\) .* a residual block"),
        (
            lambda m: setattr(m, "conv1", nn.Sequential(m.conv1, nn.Conv2d(8, 8, 1))),
            r"conv1\.1 \(Conv2d\)",
        ),
        (lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)), r"avgpool \(AdaptiveMaxPool2d"),
        (lambda m: setattr(m, "fc", nn.Identity()), "it ends where a linear layer is expected"),
        (lambda m: setattr(m, "extra", nn.Linear(5, 5)), r"extra \(Linear\) .* nothing behind"),
    ],
)
def test_what_is_not_supported_is_named(
    change: Callable[[TorchvisionResNet], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dfs.make_dynamic(_with(change))


def test_networks_without_residual_blocks_are_refused() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    )
    with pytest.raises(ValueError, match=r"3 \(Flatten\) is not supported; expected a residual"):
        dfs.make_dynamic(plain)


# Calibration without training


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network trained on corners of 16x16 images to full accuracy."""
    torch.manual_seed(0)
    model = TorchvisionResNet(in_channels=1)
    model.conv1 = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
    data = tiny_data(16)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for step in range(40):
        rows = torch.arange(step * 16, step * 16 + 16) % 64
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.images[rows]), data.train.labels[rows]).backward()
        optimizer.step()
    return model.eval()


def test_eight_bits_after_calibration_are_close_without_training(trained: nn.Module) -> None:
    data = tiny_data(16)
    dynamic = dfs.make_dynamic(trained, (0, 2, 4, 8, 32))
    dfs.calibrate(dynamic, data.train.images, batch_size=32)
    assert not dynamic.training
    with torch.no_grad():
        expected = trained(data.test.images)
        assert (expected.argmax(1) == data.test.labels).float().mean() > 0.9
        for policy, tolerance in ((32, 0.05), (8, 0.05), (4, 0.3)):
            got = dynamic(data.test.images, policy)
            error = (got - expected).square().mean().sqrt() / expected.std()
            assert error < tolerance, policy
            assert (got.argmax(1) == expected.argmax(1)).float().mean() > 0.9


def test_calibration_matters(trained: nn.Module) -> None:
    data = tiny_data(16)
    dynamic = dfs.make_dynamic(trained, (0, 4, 8))
    with torch.no_grad():
        expected = trained(data.test.images)
        before = (dynamic(data.test.images, 8) - expected).square().mean()
        dfs.calibrate(dynamic, data.train.images, batch_size=32)
        after = (dynamic(data.test.images, 8) - expected).square().mean()
    assert after < 0.2 * before


@pytest.mark.parametrize(
    "options", [{"quantizer": "minmax"}, {**dfs.PAPER, "choices": (0, 8, 10, 32)}]
)
def test_quantizers_without_steps_observe_their_ranges(
    trained: nn.Module, options: dict[str, Any]
) -> None:
    data = tiny_data(16)
    dynamic = dfs.make_dynamic(trained, **options)
    dfs.calibrate(dynamic, data.train.images, batch_size=32)
    with torch.no_grad():
        expected = trained(data.test.images)
        error = (dynamic(data.test.images, 8) - expected).square().mean().sqrt()
    assert error < 0.1 * expected.std()


def test_calibration_needs_images_that_fit() -> None:
    dynamic = dfs.build_model("resnet8")
    assert isinstance(dynamic, DynamicResNet)
    for images in (torch.randn(4, 1, 8, 8), torch.randn(3, 8, 8), torch.randn(1, 3, 8, 8)):
        with pytest.raises(ValueError, match="images must be"):
            dfs.calibrate(dynamic, images)
    with pytest.raises(ValueError, match="batch_size"):
        dfs.calibrate(dynamic, torch.randn(4, 3, 8, 8), batch_size=1)
