"""What is estimated from data rather than learned: steps, BatchNorm statistics, the gate's bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfs.cost import Cost
from dfs.data import Images
from dfs.models import DynamicResNet, Policy
from dfs.nn import ConstantGate, DFSConv2d, PerWidthBatchNorm2d, ResidualBlock
from dfs.nn.gate import State
from dfs.nn.quantizers import LSQ, Quantizer
from dfs.nn.stream import STREAM_BITS
from dfs_kernels import reference
from dfs_kernels.widths import activation_max, default_levels

_CLIP_RATIOS = torch.linspace(0.02, 1.0, 50)
_SAMPLED_VALUES = 1 << 15
# Without training, BatchNorm statistics are kept from this width on.
_KEPT_FROM = 8
# Choices up to so many times as dear as the target are what a gate is tilted among.
_NEAR = 10


def best_input_step(values: Tensor, bits: int, zero_point: int) -> float:
    """The step with the least squared error over clip ratios of the largest magnitude.

    Args:
        values: float32 (n,).
    """
    reach = max(activation_max(bits) - zero_point, zero_point)
    largest = float(values.abs().max())
    if largest == 0:
        return 0.0
    zero = torch.tensor(zero_point, dtype=torch.int32)
    best = (float("inf"), 0.0)
    for ratio in _CLIP_RATIOS.tolist():
        step = torch.tensor(largest * ratio / reach)
        codes = reference.quantize_activation(values, bits, step, zero)
        error = reference.dequantize_activation(codes, step, zero) - values
        best = min(best, (float(error.double().square().sum()), float(step)))
    return best[1]


def best_weight_steps(weight: Tensor, bits: int) -> Tensor:
    """Per output channel, the step with the least squared error over clip ratios, (O,)."""
    rows = weight.detach().flatten(1)
    centred = default_levels(bits) == "centred"
    reach = (1 << (bits - 1)) - (0.5 if centred else 0.0)
    largest = rows.abs().amax(1).clamp_min(1e-8)
    best_error = torch.full_like(largest, torch.inf)
    best_step = largest / reach
    for ratio in _CLIP_RATIOS.tolist():
        step = largest * ratio / reach
        codes = reference.quantize_weight(rows, bits, step, centred)
        levels = reference.weight_levels(codes, centred).double()
        error = (reference.dequantize_weight(levels, step, centred) - rows).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error.float(), best_error)
        best_step = torch.where(better, step, best_step)
    return best_step


@torch.no_grad()
def calibrate_steps(model: DynamicResNet, images: Tensor, batch_size: int, seed: int) -> None:
    """Set every step by least squared error, from the full-precision network's activations.

    Quantizers without learned steps observe their ranges instead.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: dict[nn.Module, list[Tensor]] = {}

    def sample(key: nn.Module, values: Tensor) -> None:
        flat = values.detach().flatten()
        picked = torch.randint(flat.numel(), (_SAMPLED_VALUES // 4,), generator=generator)
        # Drawn and worked on at the host, so that every device finds the same steps.
        seen.setdefault(key, []).append(flat[picked.to(flat.device)].cpu())

    def watch_conv(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, DFSConv2d)
        sample(module, args[0])
        if not isinstance(module.quantizer, LSQ):
            module.quantizer.observe(args[0])

    def watch_block(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, ResidualBlock)
        sample(module.stream, output)

    def watch_stem(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sample(model.streams[0], model.pool(torch.relu(output)))

    hooks = [model.bn_stem.register_forward_hook(watch_stem)]
    hooks += [
        m.register_forward_pre_hook(watch_conv) for m in model.modules() if isinstance(m, DFSConv2d)
    ]
    hooks += [
        m.register_forward_hook(watch_block)
        for m in model.modules()
        if isinstance(m, ResidualBlock)
    ]
    model.eval()
    for start in range(0, len(images), batch_size):
        model.full_precision(images[start : start + batch_size])
    for hook in hooks:
        hook.remove()
    for stream in model.streams:
        values = torch.cat(seen[stream])
        stream.set_step(best_input_step(values, STREAM_BITS, 0))  # type: ignore[operator]
    for module in model.modules():
        if not isinstance(module, DFSConv2d) or not isinstance(module.quantizer, LSQ):
            continue
        values = torch.cat(seen[module])
        quantizer = module.quantizer
        for i, bits in enumerate(module.bit_options):
            zero_point = int(quantizer.zero_point[i])
            quantizer.set_input_step(i, best_input_step(values, bits, zero_point))
            quantizer.weight_step[i] = best_weight_steps(module.weight, bits)
    model.repack()


class _Moments:
    """Mean and unbiased variance per channel, in float64, of samples that come in batches."""

    def __init__(self) -> None:
        self.samples = 0
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        values = x.double()
        self.samples += x.shape[0]
        self.count += x.numel() // x.shape[1]
        self.total = self.total + values.sum((0, 2, 3))
        self.squares = self.squares + values.square().sum((0, 2, 3))

    def mean_and_var(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self.total) / self.count
        centred = torch.as_tensor(self.squares) - self.count * mean.square()
        return mean, (centred / max(self.count - 1, 1)).clamp_min(0)


@torch.no_grad()
def calibrate(model: DynamicResNet, images: Tensor, batch_size: int = 64, seed: int = 0) -> None:
    """Fit a network with trained weights to its widths, without training.

    Steps by least squared error over clip ratios. BatchNorm statistics of the widths below 8 bits
    are estimated from what they really see; those above follow the full-precision network closely
    enough to keep its statistics, which more images went into. A few hundred images do; 4 bits and
    less want training besides.

    Args:
        images: float (N, C, H, W), normalized as in training.
        seed: decides which activations are looked at.
    """
    if images.dim() != 4 or images.shape[1] != model.in_channels or len(images) < 2:
        raise ValueError(
            f"images must be (N, {model.in_channels}, H, W) with N >= 2, got {tuple(images.shape)}"
        )
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    was_training = model.training
    calibrate_steps(model, images, batch_size, seed)
    batches = list(images.split(batch_size))
    for width in model.choices:
        if 0 < width < _KEPT_FROM:
            reestimate_batchnorm(model, batches, width, keep_from=_KEPT_FROM)
    model.train(was_training)


def estimate_every_width(model: DynamicResNet, batches: list[Tensor]) -> None:
    """BatchNorm statistics of the network run at each width throughout."""
    for width in model.choices:
        if width:
            reestimate_batchnorm(model, batches, width)


@dataclass(frozen=True)
class KeptStatistics:
    """A BatchNorm entry that saw too few samples to be estimated again."""

    block: int
    width: int
    samples: int


@torch.no_grad()
def reestimate_batchnorm(
    model: DynamicResNet,
    batches: Sequence[Tensor],
    policy: Policy = None,
    min_samples: int = 256,
    keep_from: int | None = None,
) -> list[KeptStatistics]:
    """Estimate BatchNorm statistics again, block by block, each from what it will really see.

    Args:
        batches: training images, as many as are to be used.
        policy: None routes as the gate decides; an int runs every gated block at that width.
        min_samples: a gated (block, width) with fewer routed samples keeps what it had.
        keep_from: widths from here on keep what they had, and are not listed.

    Returns:
        The entries kept. Widths that no sample was routed to are among them.
    """
    was_training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, (PerWidthBatchNorm2d, Quantizer)):
            module.eval()
    kept: list[KeptStatistics] = []
    ungated = model.ungated_bits
    uniform = [torch.full((len(b),), ungated, dtype=torch.int32, device=b.device) for b in batches]
    stems = [model.stem(b, ungated) for b in batches]
    _set_statistics(model.bn_stem, stems, uniform, 0, keep_from)
    target = model.streams[0]
    streams = [target(model.pool(torch.relu(model.bn_stem(s, ungated)))) for s in stems]
    streams = _through_block(model, 0, streams, uniform, 0, keep_from, kept)
    states: list[State | None] = [None] * len(batches)
    for index in range(model.gated_blocks):
        bits = []
        for i, stream in enumerate(streams):
            decision = model.decide(index, stream, states[i], policy)
            states[i] = decision.state
            bits.append(decision.bits)
        needed = min_samples if policy is None else 0
        streams = _through_block(model, index + 1, streams, bits, needed, keep_from, kept)
    model.train(was_training)
    return [k for k in kept if policy is None or k.width == policy]


def _through_block(
    model: DynamicResNet,
    index: int,
    streams: list[Tensor],
    bits: list[Tensor],
    min_samples: int,
    keep_from: int | None,
    kept: list[KeptStatistics],
) -> list[Tensor]:
    block = model.blocks[index]
    assert isinstance(block, ResidualBlock)
    if block.downsamples:
        widths = [torch.zeros_like(b) + block.shortcut_bits(b) for b in bits]
        shortcuts = [block.shortcut(s, w) for s, w in zip(streams, widths, strict=True)]
        _set_statistics(block.bn_shortcut, shortcuts, widths, 0, keep_from)
    hidden, counts = streams, dict[int, int]()
    for i, (conv, norm) in enumerate(block.layers()):
        inputs = [torch.relu(h) if i else h for h in hidden]
        sums = [conv(h, b) for h, b in zip(inputs, bits, strict=True)]
        counts = _set_statistics(norm, sums, bits, min_samples, keep_from)
        hidden = [norm(y, b) for y, b in zip(sums, bits, strict=True)]
    for width, count in counts.items():
        if count < max(min_samples, 1):
            kept.append(KeptStatistics(index, width, count))
    return [block.finish(s, y, b) for s, y, b in zip(streams, hidden, bits, strict=True)]


def _set_statistics(
    norm: PerWidthBatchNorm2d,
    outputs: list[Tensor],
    bits: list[Tensor],
    min_samples: int,
    keep_from: int | None,
) -> dict[int, int]:
    """Set what has enough samples; returns the sample count of every width below ``keep_from``."""
    counts = {}
    for i, widths in enumerate(norm.entries):
        if keep_from is not None and widths[-1] >= keep_from:
            continue
        moments = _Moments()
        for y, b in zip(outputs, bits, strict=True):
            rows = norm.rows_of(i, b)
            if rows.numel():
                moments.add(y[rows])
        counts.update(dict.fromkeys(widths, moments.samples))
        # Statistics of one sample would only describe that sample.
        if moments.samples >= max(min_samples, 2):
            mean, var = moments.mean_and_var()
            norm.running_mean[i] = mean
            norm.running_var[i] = var
    return counts


@torch.no_grad()
def standardise_gates(model: DynamicResNet, images: Tensor) -> None:
    """Fit the gates' linear maps to the features that random decisions give, in evaluation mode."""
    model.eval()
    stream = model.start(images)
    for index in range(model.gated_blocks):
        model.gate.standardise(index, model.features(stream))
        drawn = model.decide(index, stream, None, model.choices[-1], explore=1.0)
        stream = model.step(index, stream, drawn)


class CostTilt:
    """Biases of the choices' logits that move what gates spend, by one number.

    A positive tilt takes from every choice in proportion to its cost, as in minimizing loss +
    weight * cost: a skip, which saves next to nothing over 2 bits, is hardly made likelier by what
    brings down 8 bits. A negative one adds by the root of the cost, which is the bits, so that
    skips become 2 bits before everything becomes the dearest; what costs far more than the target
    gains no more than the choices near it.

    Args:
        target: the cost that decides what is near: up to ``_NEAR`` times as dear throughout.
    """

    def __init__(self, cost: Cost, target: float) -> None:
        per_choice = cost.of_choices()
        above = per_choice - per_choice.min()
        near = above * (per_choice <= _NEAR * target)
        dearest = near.max() if bool(near.any()) else above[above > 0].min()
        self._down = above / dearest
        self._up = self._down.sqrt().clamp_max(1)
        # Both directions are 1 there.
        self._unit = int((above == dearest).nonzero()[0])

    def bias(self, tilt: float) -> Tensor:
        """The biases, float64 (choices,)."""
        return -tilt * (self._down if tilt > 0 else self._up)

    def of(self, biases: Sequence[float]) -> float:
        """The tilt that gave these biases."""
        return -biases[self._unit]


@torch.no_grad()
def calibrate_gate_bias(
    model: DynamicResNet, images: Images, cost: Cost, target: float, batch_size: int
) -> float:
    """Tilt the gate's logits by cost until its hard decisions cost ``target`` on ``images``.

    The bias of a choice grows with its cost, so the order of what the gate prefers among
    inputs stays. Gates that decide the same for every image have few costs to choose from; they
    are held within the target.

    Returns:
        The mean cost reached.
    """
    model.eval()
    tilts = CostTilt(cost, target)
    constant = isinstance(model.gate, ConstantGate)

    def measure(tilt: float) -> float:
        model.gate.choice_bias.copy_(tilts.bias(tilt))
        total = 0.0
        for batch in images.batches(batch_size):
            out = model.run(batch.images)
            total += float(cost(out.mask).double().sum())
        return total / len(images)

    low, high = -1.0, 1.0
    while measure(low) < target and low > -1e4:
        low *= 4
    while measure(high) > target and high < 1e4:
        high *= 4
    # Where nothing else will do, everything at the cheapest.
    best = (math.inf, high, 0.0)
    for _ in range(24):
        middle = (low + high) / 2
        reached = measure(middle)
        beyond = constant and reached > target
        best = min(best, (math.inf if beyond else abs(reached - target), middle, reached))
        if reached > target:
            low = middle
        else:
            high = middle
    return measure(best[1])
