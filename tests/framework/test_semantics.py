"""What a dynamic network does on other shapes than CIFAR's, and as the authors' code does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dfs_kernels
from dfs.models import PAPER, Architecture, DynamicResNet, build_model
from dfs.nn import PerWidthBatchNorm2d, ResidualBlock, Semantics
from dfs.nn.shapes import PoolShape
from dfs.nn.stream import max_pool_codes
from dfs_kernels import PackedActivation
from tests.framework.helpers import settle, settled_model, small_basic, small_bottlenecks

SHAPES = (small_basic, small_bottlenecks, lambda: small_bottlenecks(groups=2))


def _settled(make: Callable[[], Architecture], **options: Any) -> DynamicResNet:
    torch.manual_seed(0)
    return settle(DynamicResNet(make(), **options))


def _decisions(model: DynamicResNet, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(len(model.choices), (count, model.gated_blocks), generator=generator)
    return torch.tensor(model.choices, dtype=torch.int32)[index]


def _freeze_norms(model: DynamicResNet) -> DynamicResNet:
    model.train()
    for module in model.modules():
        if isinstance(module, PerWidthBatchNorm2d):
            module.eval()
    return model


def _block(model: DynamicResNet, index: int) -> ResidualBlock:
    block = model.blocks[index]
    assert isinstance(block, ResidualBlock)
    return block


# Other shapes


@pytest.mark.parametrize("make", SHAPES)
@pytest.mark.parametrize(
    ("stream", "gate"), [("uint8", "rnn"), ("uint8", "feedforward"), ("float32", "rnn")]
)
def test_packed_network_is_the_same_bits_on_the_reference_and_the_cpu(
    make: Callable[[], Architecture], stream: str, gate: str
) -> None:
    model = _settled(make, choices=(0, 2, 4, 8), stream=stream, gate=gate)
    x = torch.randn(5, 3, 37, 30)
    for policy in (None, _decisions(model, 5)):
        with dfs_kernels.use_backend("reference"):
            expected = model.run(x, policy)
        with dfs_kernels.use_backend("cpu"):
            got = model.run(x, policy)
        assert torch.equal(got.bits, expected.bits)
        assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("make", SHAPES)
@pytest.mark.parametrize("policy", [0, 2, 8, 32])
def test_packed_network_follows_the_trained_one(
    make: Callable[[], Architecture], policy: int
) -> None:
    model = _settled(make, choices=(0, 2, 4, 8, 32))
    x = torch.randn(8, 3, 32, 32)
    packed = model(x, policy)
    trained = _freeze_norms(model)(x, policy)
    assert (trained - packed).abs().max() < 0.03 * packed.abs().max()


def test_an_image_is_classified_alike_in_every_batch() -> None:
    model = _settled(small_bottlenecks, choices=(0, 2, 4, 8, 32))
    x, bits = torch.randn(5, 3, 32, 32), _decisions(model, 5)
    together = model(x, bits)
    for i in range(5):
        assert torch.equal(model(x[i : i + 1], bits[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("stream", ["uint8", "float32"])
@pytest.mark.parametrize("choices", [(0, 32), (8, 32), (0, 2)])
def test_any_choices_run_packed(choices: tuple[int, ...], stream: str) -> None:
    model = _settled(small_basic, choices=choices, stream=stream)
    x = torch.randn(4, 3, 32, 32)
    for policy in choices:
        expected = _freeze_norms(model)(x, policy)
        got = model.eval()(x, policy)
        assert (got - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("pool", [PoolShape(3, 2, 1), PoolShape(2, 2, 0), PoolShape(3, 1, 1)])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (3, 5)])
def test_max_pooling_codes_is_exact(pool: PoolShape, size: tuple[int, int]) -> None:
    values = torch.randint(256, (3, 5, *size)).float() * 0.037
    values[0, 0] = 255 * 0.037
    values[1, 0] = 0
    packed = dfs_kernels.quantize_pack(values, 8, {8: 0.037})
    pooled = max_pool_codes(packed, pool)
    expected = F.max_pool2d(
        dfs_kernels.unpack_dequantize(packed), pool.kernel, pool.stride, pool.padding
    )
    assert pooled.shape == expected.shape
    assert torch.equal(dfs_kernels.unpack_dequantize(pooled), expected)


def test_skipped_bottlenecks_leave_the_stream_untouched() -> None:
    model = _settled(small_bottlenecks)
    stream = model.start(torch.randn(4, 3, 32, 32))
    assert isinstance(stream, PackedActivation)
    before = stream.data.clone()
    after = _block(model, 1).run_packed(stream, torch.tensor([0, 8, 0, 2], dtype=torch.int32))
    assert isinstance(after, PackedActivation)
    assert after.data.data_ptr() == stream.data.data_ptr()
    assert torch.equal(after.data[[0, 2]], before[[0, 2]])
    assert not torch.equal(after.data[[1, 3]], before[[1, 3]])


# Widths and quantizers that only simulate


@pytest.mark.filterwarnings("ignore:mixed_conv2d. the 'cpu' backend:RuntimeWarning")
def test_widths_without_kernels_simulate_in_evaluation() -> None:
    model = settled_model(depth=8, choices=(0, 4, 10, 32))
    assert not model.packable
    x = torch.randn(4, 3, 8, 8)
    decisions = torch.tensor([[10, 4], [0, 32], [32, 0], [4, 10]])
    simulated = model(x, decisions)
    assert torch.equal(simulated, model(x, decisions))
    trained = _freeze_norms(model)(x, decisions)
    torch.testing.assert_close(simulated, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x, 10), model(x, 4), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"choices": (0, 8, 10, 12)}, r"choices \(10, 12\)"), ({"quantizer": "paper"}, "'paper'")],
)
def test_what_only_simulates_is_named_when_packing_is_asked_for(
    options: dict[str, Any], name: str
) -> None:
    model = settled_model(depth=8, **options)
    with pytest.raises(ValueError, match=name):
        model.check_packable()
    assert settled_model(depth=8).packable
    settled_model(depth=8).check_packable()


# As in the authors' code


@pytest.fixture(scope="module")
def paper() -> DynamicResNet:
    torch.manual_seed(3)
    model = build_model("resnet8", **PAPER)
    assert isinstance(model, DynamicResNet)
    settle(model).train()
    for _ in range(3):  # the ranges of the inputs
        model(torch.randn(16, 3, 8, 8), torch.full((16, 2), 8))
    return model.eval()


def test_paper_model_is_what_the_authors_trained(paper: DynamicResNet) -> None:
    assert paper.choices == (0, 8, 10, 12, 14, 16, 32)
    assert not paper.packable
    assert not any(stream.enabled for stream in paper.streams)
    assert all(b.bit_options == paper.choices[1:] for b in list(paper.blocks)[1:])
    assert _block(paper, 0).bit_options == (32,)
    assert {len(m.entries) for m in paper.modules() if isinstance(m, PerWidthBatchNorm2d)} == {1}
    x = torch.randn(5, 3, 8, 8)
    stem = torch.relu(paper.bn_stem(paper.stem(x), None))
    torch.testing.assert_close(paper.start(x), _block(paper, 0)(stem, None))
    assert set(paper.run(x).bits.flatten().tolist()) <= set(paper.choices)


def test_paper_skips_a_downsampling_block_without_a_relu(paper: DynamicResNet) -> None:
    block = _block(paper, 1)
    x = torch.rand(3, 16, 8, 8)
    shortcut = block.bn_shortcut(block.shortcut(x), None)
    assert (shortcut < 0).any()
    torch.testing.assert_close(block(x, 0), shortcut)
    mixed = block(x, torch.tensor([0, 8, 32]))
    torch.testing.assert_close(mixed[0], shortcut[0])
    # Else the shortcut runs at the sample's own width.
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x, 8), 8)), 8), 8)
    own = block.bn_shortcut(block.shortcut(x, 8), 8)
    torch.testing.assert_close(mixed[1], torch.relu(own + branch)[1])
    torch.testing.assert_close(mixed[2], block(x, None)[2])
    assert not torch.allclose(own, shortcut, atol=1e-5)


def test_paper_skips_an_identity_block_with_negative_values_untouched() -> None:
    model = settled_model(depth=14, **PAPER)
    block = _block(model, 3)
    assert not block.downsamples
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(x, 0), x)
    mixed = block(x, torch.tensor([0, 32]))
    assert torch.equal(mixed[0], x[0])
    assert (mixed[1] >= 0).all()


def test_paper_trains_on_the_sum_of_all_choices(paper: DynamicResNet) -> None:
    """The value is the chosen candidate's; the mask's gradient is every candidate."""
    _freeze_norms(paper)
    block = _block(paper, 1)
    x = torch.rand(4, 16, 8, 8)
    bits = torch.tensor([0, 8, 32, 12], dtype=torch.int32)
    decision = paper.decide(0, x, None, torch.stack([bits, bits], 1))
    mask = decision.mask.clone().requires_grad_()
    result = paper.step(0, x, decision._replace(mask=mask), gate_gradient=True)
    assert isinstance(result, Tensor)
    candidates = torch.stack([block(x, width) for width in paper.choices], 1)
    chosen = candidates[range(4), [paper.choices.index(b) for b in bits.tolist()]]
    torch.testing.assert_close(result, chosen)
    weight = torch.randn_like(result)
    (result * weight).sum().backward()
    assert mask.grad is not None
    expected = (candidates * weight[:, None]).flatten(2).sum(2)
    torch.testing.assert_close(mask.grad, expected, rtol=1e-4, atol=1e-4)
    assert block.conv1.weight.grad is not None
    paper.eval()


def test_paper_normalizes_every_choice_over_the_whole_batch(paper: DynamicResNet) -> None:
    state = {k: v.clone() for k, v in paper.state_dict().items()}
    paper.train()
    x = torch.rand(9, 16, 8, 8)
    decision = paper.decide(0, x, None, torch.full((9, 2), 8))
    got = paper.step(0, x, decision, gate_gradient=True)
    paper.load_state_dict(state)
    paper.train()
    seen = [_block(paper, 1)(x, width) for width in paper.choices]
    torch.testing.assert_close(got, seen[paper.choices.index(8)])
    paper.load_state_dict(state)
    paper.eval()


def test_paper_skipping_runs_packed_at_the_widths_of_the_kernels() -> None:
    model = settled_model(choices=(0, 4, 8, 32), stream="float32", skipping="paper")
    x, decisions = torch.randn(6, 3, 8, 8), _decisions(model, 6)
    packed = model(x, decisions)
    with dfs_kernels.use_backend("reference"):
        torch.testing.assert_close(model(x, decisions), packed, rtol=1e-4, atol=1e-4)
    stream = torch.randn(4, 16, 8, 8)
    block = next(b for b in model.blocks if isinstance(b, ResidualBlock) and b.downsamples)
    skipped = block.run_packed(stream, torch.tensor([0, 8, 0, 4], dtype=torch.int32))
    assert isinstance(skipped, Tensor)
    expected = block.bn_shortcut(block.shortcut(stream), None)
    torch.testing.assert_close(skipped[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
    assert (skipped[[0, 2]] < 0).any()
    assert (skipped[[1, 3]] >= 0).all()
    trained = _freeze_norms(model)(x, decisions)
    assert (trained - packed).abs().max() < 0.03 * packed.abs().max()


@pytest.mark.parametrize("stream", ["uint8", "float32"])
def test_what_no_gate_decides_can_run_at_32_bits(stream: str) -> None:
    model = settled_model(depth=8, choices=(8, 32), stream=stream, ungated_bits=32)
    x = torch.randn(4, 3, 8, 8)
    full = model.full_precision(x)
    tolerance = 1e-4 if stream == "float32" else 0.03
    assert (model(x, 32) - full).abs().max() < tolerance * full.abs().max()
    assert (settled_model(depth=8, choices=(8, 32))(x, 32) - full).abs().max() > 1e-4


# BatchNorm and arguments


def test_a_shared_norm_sees_the_samples_of_all_widths() -> None:
    shared = PerWidthBatchNorm2d(3, (2, 8), shared=True)
    plain = torch.nn.BatchNorm2d(3)
    x = torch.randn(20, 3, 4, 4) + 2
    bits = torch.tensor([2, 8] * 8 + [0] * 4)
    got = shared(x, bits)
    torch.testing.assert_close(got[:16], plain(x[:16]))
    assert torch.equal(got[16:], x[16:])
    torch.testing.assert_close(shared.running_var[0], plain.running_var)
    mul, add = shared.folded()
    assert mul.shape == add.shape == (2, 3)
    assert torch.equal(mul[0], mul[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": "int4"}, "stream must be one of"),
        ({"quantizer": "ternary"}, "quantizer must be one of"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"skipping": "never"}, "skipping must be one of"),
        ({"ungated_bits": 4}, "ungated_bits must be one of"),
        ({"skipping": "paper"}, "needs stream 'float32'"),
    ],
)
def test_unknown_semantics_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Semantics(**options)


def test_options_of_the_gate_are_handed_on() -> None:
    model = build_model(
        "resnet8", gate="feedforward", gate_options={"hidden": 3, "deviation": True}
    )
    assert isinstance(model, DynamicResNet)
    assert model.gate.deviation
    assert model.features(torch.rand(2, 16, 4, 4)).shape == (2, 32)
    assert model.eval().run(torch.randn(2, 3, 8, 8)).bits.shape == (2, 2)
    with pytest.raises(TypeError, match="deviation"):
        build_model("resnet8", gate="rnn", gate_options={"deviation": True})
