from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfs_kernels
from dfs.models import DynamicResNet, PlainResNet, build_model, resnet_depth
from dfs.nn import DFSConv2d, PerWidthBatchNorm2d, ResidualBlock
from dfs.nn.stream import pooled_mean
from dfs_kernels import PackedActivation
from tests.framework.helpers import settled_model


def _decisions(count: int, blocks: int, choices: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(len(choices), (count, blocks), generator=generator)
    return torch.tensor(choices, dtype=torch.int32)[index]


@pytest.mark.parametrize("name", ["resnet", "resnet9", "vgg16", "resnet2", "resnet-8", "resnet8x"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model"):
        resnet_depth(name)


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet32"])
def test_depth_counts_the_weighted_layers(name: str) -> None:
    model = build_model(name, choices=None)
    on_path = [k for k, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert len([k for k in on_path if "shortcut" not in k]) == resnet_depth(name)


def test_full_precision_pass_is_the_plain_twin() -> None:
    torch.manual_seed(0)
    plain = PlainResNet(14)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            module.running_mean = torch.randn_like(module.weight)
    dynamic = DynamicResNet(14)
    dynamic.load_plain(plain)
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(dynamic.eval().full_precision(x), plain.eval()(x))


@pytest.mark.parametrize("stream", ["uint8", "float32"])
@pytest.mark.parametrize("choices", [(0, 2, 4, 8), (0, 8), (2, 4)])
def test_packed_network_is_the_same_bits_on_every_backend(
    stream: str, choices: tuple[int, ...]
) -> None:
    model = settled_model(choices=choices, stream=stream)
    x = torch.randn(6, 3, 12, 12)
    for policy in (None, _decisions(6, model.gated_blocks, choices)):
        with torch.no_grad():
            with dfs_kernels.use_backend("reference"):
                expected = model.run(x, policy)
            for backend in dfs_kernels.available_backends():
                with dfs_kernels.use_backend(backend):
                    got = model.run(x, policy)
                assert torch.equal(got.bits, expected.bits)
                assert torch.equal(got.logits, expected.logits)


def test_an_image_is_classified_alike_in_every_batch() -> None:
    model = settled_model(choices=(0, 2, 4, 8, 32))
    x = torch.randn(6, 3, 12, 12)
    bits = _decisions(6, model.gated_blocks, (0, 2, 4, 8, 32))
    with torch.no_grad():
        together = model(x, bits)
        for i in range(6):
            assert torch.equal(model(x[i : i + 1], bits[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("policy", [0, 2, 4, 8, None])
def test_packed_network_follows_the_trained_one(policy: int | None) -> None:
    """Training computes in float on quantized values; deployment rounds a little differently."""
    model = settled_model()
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        packed = model.run(x, policy)
        model.train()
        for module in model.modules():
            if isinstance(module, PerWidthBatchNorm2d):
                module.eval()
        trained = model.run(x, packed.bits)
    scale = packed.logits.abs().max()
    assert (trained.logits - packed.logits).abs().max() < 0.02 * scale


def test_skipped_identity_block_leaves_the_stream_untouched() -> None:
    model = settled_model()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        stream = model.start(x)
        assert isinstance(stream, PackedActivation)
        before = stream.data.clone()
        block = model.blocks[1]
        assert isinstance(block, ResidualBlock)
        assert not block.downsamples
        after = block.run_packed(stream, torch.tensor([0, 8, 0, 2], dtype=torch.int32))
    assert isinstance(after, PackedActivation)
    assert after.data.data_ptr() == stream.data.data_ptr()
    assert torch.equal(after.data[[0, 2]], before[[0, 2]])
    assert not torch.equal(after.data[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("stream", ["uint8", "float32"])
def test_skipped_downsampling_block_is_its_rectified_shortcut(stream: str) -> None:
    model = settled_model(stream=stream)
    block = next(b for b in model.blocks if isinstance(b, ResidualBlock) and b.downsamples)
    x = torch.rand(3, 16, 8, 8)
    source = block.stream(x) if stream == "float32" else None
    with torch.no_grad():
        if source is None:
            scale = model.streams[0].scale()
            packed = dfs_kernels.quantize_pack(x, 8, {8: scale})
            source = dfs_kernels.unpack_dequantize(packed)
            result = block.run_packed(packed, 0)
            assert isinstance(result, PackedActivation)
            values = dfs_kernels.unpack_dequantize(result)
        else:
            result = block.run_packed(source, 0)
            assert isinstance(result, Tensor)
            values = result
        expected = torch.relu(block.carry(source))
        if stream == "uint8":
            expected = block.stream(expected)
        step = float(block.stream.scale())
    assert (values >= 0).all()
    assert values.abs().sum() > 0
    torch.testing.assert_close(values, expected, atol=1.01 * step, rtol=1e-5)


def test_pooling_sums_a_packed_stream_exactly() -> None:
    codes = torch.randint(256, (3, 5, 4, 4))
    values = codes.float() * 0.037
    packed = dfs_kernels.quantize_pack(values, 8, {8: 0.037})
    expected = codes.double().sum((2, 3)) * (torch.tensor(0.037).double() / 16)
    assert torch.equal(pooled_mean(packed), expected)


def test_gate_gradient_is_what_each_choice_would_have_given() -> None:
    torch.manual_seed(0)
    model = settled_model(depth=8)
    model.train()
    for module in model.modules():
        if isinstance(module, PerWidthBatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, 8, 8)
    out = model.run(x, gate_gradient=True)
    plain = model.run(x, out.bits)
    assert torch.equal(out.logits, plain.logits)
    # The last block's mask sees the loss through the pooled features only, so it can be redone.
    out.mask.retain_grad()
    stream = model.start(x)
    decision = model.decide(0, stream, None, out.bits)
    stream = model.step(0, stream, decision)
    last = model.blocks[2]
    target = last(stream, out.bits[:, 1]).detach().requires_grad_()
    model.classify(target).sum().backward()
    assert target.grad is not None
    with torch.no_grad():
        wanted = torch.stack(
            [(target.grad * last(stream, width)).sum((1, 2, 3)) for width in model.choices], 1
        )
    decision = model.decide(1, stream, None, out.bits)
    mask = decision.mask.clone().requires_grad_()
    model.classify(model.step(1, stream, decision._replace(mask=mask), True)).sum().backward()
    assert mask.grad is not None
    torch.testing.assert_close(mask.grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stream", ["uint8", "float32"])
def test_candidates_are_the_block_at_every_width(stream: str) -> None:
    model = settled_model(choices=(0, 2, 8, 32), stream=stream).train()
    shapes = set()
    for block in model.blocks[1:]:
        assert isinstance(block, ResidualBlock)
        given = block.stream(torch.randn(3, block.shape.in_channels, 6, 5).relu())
        got = block.candidates(given, model.choices)
        assert all(m.training for m in block.modules())
        for norm in block.modules():
            if isinstance(norm, PerWidthBatchNorm2d):
                norm.eval()
        with torch.no_grad():
            for width, candidate in zip(model.choices, got, strict=True):
                assert torch.equal(candidate, block(given, width)), width
        shapes.add(block.downsamples)
    assert shapes == {False, True}


def test_a_mixed_batch_is_the_parts_at_their_widths() -> None:
    """Values and gradients, whatever the order of the samples; by the same running statistics."""
    model = settled_model(choices=(0, 2, 8, 32), stream="float32").train()
    # Fewer samples than BatchNorm takes statistics of.
    bits = torch.tensor([8, 0, 2, 32, 0, 2, 8], dtype=torch.int32)
    for block in model.blocks[1:]:
        assert isinstance(block, ResidualBlock)
        x = torch.randn(len(bits), block.shape.in_channels, 6, 5).relu().requires_grad_()
        y = block(x, bits)
        weight = torch.randn_like(y)
        (grad,) = torch.autograd.grad((y * weight).sum(), x)
        for width in model.choices:
            rows = (bits == width).nonzero().squeeze(1)
            part = x.detach()[rows].requires_grad_()
            expected = block(part, width)
            (own,) = torch.autograd.grad((expected * weight[rows]).sum(), part)
            assert torch.equal(y[rows], expected), width
            assert torch.equal(grad[rows], own), width


def test_gate_gradient_needs_training_mode() -> None:
    with pytest.raises(ValueError, match="gate_gradient"):
        settled_model(depth=8).run(torch.randn(1, 3, 8, 8), gate_gradient=True)


def test_batch_of_one_works_in_both_modes() -> None:
    model = settled_model(depth=8)
    x = torch.randn(1, 3, 8, 8)
    assert model(x).shape == (1, 10)
    assert model.train()(x).shape == (1, 10)


def test_exploring_draws_every_choice() -> None:
    model = settled_model(depth=8).train()
    torch.manual_seed(0)
    out = model.run(torch.randn(64, 3, 8, 8), 8, explore=1.0)
    for block in range(model.gated_blocks):
        assert set(out.bits[:, block].tolist()) == {0, 2, 4, 8}


def test_repack_is_needed_and_enough_after_an_edit_in_place() -> None:
    model = settled_model(depth=8)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(x, 8)
        for module in model.modules():
            if isinstance(module, DFSConv2d):
                module.weight.mul_(-1)
        assert torch.equal(model(x, 8), before)
        model.repack()
        assert not torch.equal(model(x, 8), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": (0, 17)}, "choices"),
        ({"choices": (8, 4)}, "ascending"),
        ({"stream": "int4"}, "stream"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicResNet(8, **arguments)  # type: ignore[arg-type]


def test_loading_through_a_wrapper_forgets_what_was_folded() -> None:
    model, other = settled_model(seed=0, depth=8), settled_model(seed=1, depth=8)
    x = torch.randn(2, 3, 8, 8)
    wrapper = nn.Sequential(model)
    before = wrapper(x)
    wrapper.load_state_dict(nn.Sequential(other).state_dict())
    assert not torch.equal(wrapper(x), before)
    assert torch.equal(wrapper(x), other(x))


def test_converting_forgets_what_was_folded() -> None:
    model = settled_model(depth=8)
    x = torch.randn(2, 3, 8, 8)
    model(x, 8)
    model.to(torch.bfloat16).to(torch.float32)
    converted = model(x, 8)
    model.repack()
    assert torch.equal(model(x, 8), converted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (32, ValueError, "policy must be one of"),
        (True, TypeError, "policy must be None"),
        (torch.zeros(2, 2), TypeError, "integer"),
        (torch.zeros(2, 3, dtype=torch.int32), ValueError, "shape"),
        (torch.tensor([[8, 8], [8, 3]]), ValueError, r"policy\[1, 1\] is 3"),
    ],
)
def test_a_policy_the_network_does_not_have_is_refused(
    training: bool, policy: Any, error: type[Exception], message: str
) -> None:
    model = settled_model(depth=8).train(training)
    with pytest.raises(error, match=message):
        model(torch.randn(2, 3, 8, 8), policy)


@pytest.mark.parametrize("stream", ["uint8", "float32"])
def test_evaluation_takes_inputs_that_require_gradients(stream: str) -> None:
    model = settled_model(depth=8, stream=stream)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x.clone().requires_grad_()), model(x))
