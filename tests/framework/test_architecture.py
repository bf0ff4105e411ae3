from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfs.models import DynamicResNet, PlainResNet, architecture_of, build_model
from dfs.models.architecture import Architecture
from dfs.models.torchvision_keys import from_torchvision
from dfs.nn import DFSConv2d
from dfs.nn.shapes import BlockShape, ConvShape, PoolShape
from tests.framework.helpers import small_basic, small_bottlenecks

CIFAR = (8, 20, 32, 38, 44, 56, 74, 110)
# Parameters of torchvision's networks, and their multiply-accumulates at 224x224.
IMAGENET = {
    18: (11_689_512, 1_814_073_344),
    34: (21_797_672, 3_663_761_408),
    50: (25_557_032, 4_089_184_256),
    101: (44_549_160, 7_801_405_440),
}


@pytest.mark.parametrize("depth", [*CIFAR, *IMAGENET])
def test_every_depth_builds_plain_and_dynamic_with_common_keys(depth: int) -> None:
    with torch.device("meta"):
        plain = build_model(f"resnet{depth}", choices=None)
        dynamic = build_model(f"resnet{depth}")
    on_path = [k for k, m in plain.named_modules() if isinstance(m, nn.Conv2d)]
    assert len([k for k in on_path if "shortcut" not in k]) == depth
    assert isinstance(dynamic, DynamicResNet)
    classes = 1000 if depth in IMAGENET else 10
    assert dynamic.num_classes == classes
    theirs = dynamic.state_dict()
    shared = {k: v for k, v in plain.state_dict().items() if ".bn" not in k and "bn_" not in k}
    assert len(shared) == len(on_path) + 1  # the classifier's bias
    for key, value in shared.items():
        assert theirs[key].shape == value.shape


@pytest.mark.parametrize("depth", IMAGENET)
def test_imagenet_networks_have_the_parameters_and_work_of_torchvision(depth: int) -> None:
    parameters, macs = IMAGENET[depth]
    with torch.device("meta"):
        plain, dynamic = (
            PlainResNet(architecture_of(f"resnet{depth}")),
            build_model(f"resnet{depth}"),
        )
    assert sum(p.numel() for p in plain.parameters()) == parameters
    assert isinstance(dynamic, DynamicResNet)
    assert dynamic.macs(224, 224).total == macs


def test_geometry_of_a_bottleneck_network() -> None:
    shape = architecture_of("resnet50")
    assert shape.pooled_size((224, 224)) == (56, 56)
    sizes = [size for _, size in shape.block_sizes((224, 224))]
    assert [sizes[i] for i in (0, 3, 4, 7, 8, 13, 14)] == [
        (56, 56), (56, 56), (28, 28), (28, 28), (14, 14), (14, 14), (7, 7),
    ]  # fmt: skip
    block = shape.blocks[3]
    assert [c.stride for c in block.convs] == [1, 2, 1]
    assert [c.kernel for c in block.convs] == [1, 3, 1]
    assert block.shortcut == ConvShape(256, 512, 1, 2)


def test_a_stream_ends_where_a_shortcut_convolves() -> None:
    assert architecture_of("resnet20").streams == (0,) * 3 + (1,) * 3 + (2,) * 3
    assert architecture_of("resnet18").streams == (0, 0, 1, 1, 2, 2, 3, 3)
    # The stem of a bottleneck network has a stream to itself.
    assert architecture_of("resnet50").streams == (1,) * 3 + (2,) * 4 + (3,) * 6 + (4,) * 3
    model = DynamicResNet(small_bottlenecks())
    assert len(model.streams) == 3
    for block, index in zip(model.blocks, (1, 1, 2), strict=True):
        assert block.stream is model.streams[index]


def test_depths_of_both_families_that_coincide_are_imagenets() -> None:
    assert architecture_of("resnet50").pool == PoolShape(3, 2, 1)
    assert architecture_of("resnet56").pool is None


@pytest.mark.parametrize("make", [small_basic, small_bottlenecks])
def test_full_precision_pass_is_the_plain_twin(make: object) -> None:
    torch.manual_seed(0)
    shape = make()  # type: ignore[operator]
    plain = PlainResNet(shape)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            module.running_mean = torch.randn_like(module.weight)
    dynamic = DynamicResNet(shape)
    dynamic.load_plain(plain)
    x = torch.randn(3, 3, 33, 29)
    assert torch.equal(dynamic.eval().full_precision(x), plain.eval()(x))
    assert torch.equal(dynamic.pool(torch.ones(1, 8, 9, 9)), torch.ones(1, 8, 5, 5))


def test_the_plain_twin_of_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="plain must have this network's architecture"):
        DynamicResNet(small_basic()).load_plain(PlainResNet(small_bottlenecks()))
    with pytest.raises(ValueError, match="architecture"):
        DynamicResNet(8).load_plain(PlainResNet(14))


def test_macs_are_those_that_the_layers_do() -> None:
    shape = small_bottlenecks(groups=2)
    counted: dict[str, int] = {}
    plain = PlainResNet(shape)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d):

            def count(layer: nn.Module, args: object, out: Tensor, name: str = name) -> None:
                assert isinstance(layer, nn.Conv2d)
                counted[name] = layer.weight[0].numel() * out[0].numel()

            module.register_forward_hook(count)
    plain(torch.randn(1, 3, 37, 30))
    macs = DynamicResNet(shape).macs(37, 30)
    assert macs.total == sum(counted.values())
    for i, (gated, shortcut) in enumerate(zip(macs.gated, macs.shortcuts, strict=True), 1):
        assert gated == sum(counted[f"blocks.{i}.conv{k}"] for k in (1, 2, 3))
        assert shortcut == counted.get(f"blocks.{i}.shortcut", 0)


def test_architectures_that_do_not_fit_together_are_refused() -> None:
    stem = ConvShape(3, 8, 3, 1, 1)
    first, other = (BlockShape((ConvShape(c, c, 1),) * 2) for c in (8, 9))
    with pytest.raises(ValueError, match="blocks must be at least two"):
        Architecture(stem, None, (first,), 10)
    with pytest.raises(ValueError, match=r"blocks\[1\] takes 9 channels, but is given 8"):
        Architecture(stem, None, (first, other), 10)
    with pytest.raises(ValueError, match="convs must be at least two"):
        BlockShape((ConvShape(8, 8, 1),))
    with pytest.raises(ValueError, match="must be positive"):
        architecture_of("resnet8").with_task(0, None)


def test_torchvision_keys() -> None:
    value = torch.zeros(7, 5)
    keys = {
        "conv1.weight": "stem.weight",
        "bn1.running_mean": "bn_stem.running_mean",
        "layer1.0.conv1.weight": "blocks.0.conv1.weight",
        "layer1.1.bn3.num_batches_tracked": "blocks.1.bn3.num_batches_tracked",
        "layer2.0.downsample.0.weight": "blocks.2.shortcut.weight",
        "layer2.0.downsample.1.bias": "blocks.2.bn_shortcut.bias",
        "layer10.0.conv2.weight": "blocks.3.conv2.weight",
        "fc.weight": "classifier.weight",
        "fc.bias": "classifier.bias",
    }
    mapped = from_torchvision(dict.fromkeys(keys, value))
    assert list(mapped) == list(keys.values())
    assert mapped["classifier.weight"].shape == (7, 5, 1, 1)
    assert mapped["classifier.bias"].shape == (7, 5)
    for key in ("layer1.0.se.fc1.weight", "features.0.weight", "layer1.0.downsample.2.weight"):
        with pytest.raises(ValueError, match=key):
            from_torchvision({key: value})


def test_bottlenecks_of_a_dynamic_network_are_named_as_in_the_plain_one() -> None:
    block = DynamicResNet(small_bottlenecks()).blocks[0]
    names = [n for n, m in block.named_modules() if isinstance(m, DFSConv2d)]
    assert names == ["conv1", "conv2", "conv3", "shortcut"]
