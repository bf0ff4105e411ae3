"""Where the steps and zero points of a convolution's weights and inputs come from.

A quantizer gives, per width, an input step and zero point and a weight step per output channel; the
rounding itself is the kernels'. All but the paper's are symmetric in the weights; the paper's has
float offsets, which no kernel takes, and computes in float itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfs.nn.fake_quant import affine_fake_quantize
from dfs_kernels.widths import MAX_SCALE, activation_max, default_levels

_MIN_STEP = 1e-8
# Mean magnitude of a unit normal, and of one behind a ReLU: what steps assume before any data.
_MEAN_ABS_NORMAL = 0.7979
_MEAN_RELU_NORMAL = 0.3989


class Quantizer(nn.Module):
    """Base of the quantizers.

    Args:
        bit_options: ascending integer widths.
        out_channels: O of the weight.
        input_signed: whether the input takes negative values; its zero point is then 2^(b-1).
    """

    # Whether it quantizes in float only, by quantize_input and quantize_weight.
    simulation_only = False

    def __init__(self, bit_options: Sequence[int], out_channels: int, input_signed: bool) -> None:
        super().__init__()
        self.bit_options = tuple(bit_options)
        self.out_channels = out_channels
        self.input_signed = input_signed

    def input_scale(self) -> Tensor:
        """float32 (len(bit_options),)."""
        raise NotImplementedError

    def input_zero_point(self) -> Tensor:
        """int32 (len(bit_options),)."""
        raise NotImplementedError

    def weight_scale(self, weight: Tensor) -> Tensor:
        """float32 (len(bit_options), O)."""
        raise NotImplementedError

    def observe(self, x: Tensor) -> None:
        """See a training batch, before it is quantized."""

    def reset_weight(self, weight: Tensor) -> None:
        """Start over from a new weight."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The state dict of a plain nn.Conv2d knows nothing of quantizers; it must load strictly.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LSQ(Quantizer):
    """Learned steps (Esser et al., ICLR 2020), one per width, and per output channel for weights.

    Weight steps start at 2 * mean|w| / sqrt(2^(b-1)); input steps from the first training batch in
    the same way, and before that from a guess that the input has unit variance.
    """

    initialised: Tensor
    zero_point: Tensor

    def __init__(self, bit_options: Sequence[int], out_channels: int, input_signed: bool) -> None:
        super().__init__(bit_options, out_channels, input_signed)
        guess = _MEAN_ABS_NORMAL if input_signed else _MEAN_RELU_NORMAL
        self.input_step = nn.Parameter(self._steps_for(torch.tensor(guess)))
        self.weight_step = nn.Parameter(torch.ones(len(self.bit_options), out_channels))
        zeros = [1 << (b - 1) if input_signed else 0 for b in self.bit_options]
        self.register_buffer("zero_point", torch.tensor(zeros, dtype=torch.int32))
        self.register_buffer("initialised", torch.tensor(False))
        self._ready = False

    def _steps_for(self, mean_magnitude: Tensor) -> Tensor:
        steps = []
        for bits in self.bit_options:
            largest = 1 << (bits - 1) if self.input_signed else activation_max(bits)
            steps.append((2 * mean_magnitude / largest**0.5).clamp_min(_MIN_STEP))
        return torch.stack(steps)

    def input_scale(self) -> Tensor:
        return self.input_step.abs().clamp_min(_MIN_STEP)

    def input_zero_point(self) -> Tensor:
        return self.zero_point

    def weight_scale(self, weight: Tensor) -> Tensor:
        return self.weight_step.abs().clamp_min(_MIN_STEP)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        if self._ready or x.numel() == 0:
            return
        # Decided without looking at the value, which would synchronise and break a compiled graph.
        steps = self._steps_for(x.detach().double().abs().mean()).to(self.input_step)
        # A batch that is not finite says nothing of the ones to come.
        usable = (steps <= MAX_SCALE).all()
        take = usable & ~self.initialised
        self.input_step.copy_(torch.where(take, steps, self.input_step))
        self.initialised.logical_or_(usable)
        self._ready = not torch.compiler.is_compiling() and bool(self.initialised)

    @torch.no_grad()
    def reset_weight(self, weight: Tensor) -> None:
        magnitude = weight.detach().float().abs().flatten(1).mean(1)
        for i, bits in enumerate(self.bit_options):
            step = 2 * magnitude / (1 << (bits - 1)) ** 0.5
            self.weight_step[i].copy_(step.clamp_min(_MIN_STEP))

    @torch.no_grad()
    def set_input_step(self, index: int, step: float) -> None:
        """Fix the input step of one width; the first batch no longer changes it."""
        self.input_step[index] = max(step, _MIN_STEP)
        self.initialised.fill_(True)
        self._ready = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._ready = False
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MinMax(Quantizer):
    """Observed ranges: steps span the running minimum and maximum, with zero in the range.

    Zero points are integers, so that 0 is exact; weights are symmetric, by their largest magnitude
    per output channel. Nothing is learned.

    Args:
        momentum: weight of a new batch in the running range.
    """

    low: Tensor
    high: Tensor
    observed: Tensor

    def __init__(
        self,
        bit_options: Sequence[int],
        out_channels: int,
        input_signed: bool,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(bit_options, out_channels, input_signed)
        self.momentum = momentum
        self.register_buffer("low", torch.tensor(-3.0 if input_signed else 0.0))
        self.register_buffer("high", torch.tensor(3.0))
        self.register_buffer("observed", torch.tensor(False))

    def input_scale(self) -> Tensor:
        span = (self.high - self.low).clamp_min(_MIN_STEP)
        return torch.stack([span / activation_max(b) for b in self.bit_options])

    def input_zero_point(self) -> Tensor:
        zeros = torch.round(-self.low / self.input_scale())
        limits = torch.tensor([activation_max(b) for b in self.bit_options], device=zeros.device)
        return torch.minimum(zeros.clamp_min(0), limits).to(torch.int32)

    def weight_scale(self, weight: Tensor) -> Tensor:
        largest = weight.detach().float().abs().flatten(1).amax(1)
        steps = []
        for bits in self.bit_options:
            reach = (1 << (bits - 1)) - (0.5 if default_levels(bits) == "centred" else 1.0)
            steps.append((largest / reach).clamp_min(_MIN_STEP))
        return torch.stack(steps)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        values = x.detach().float()
        low, high = values.amin().clamp_max(0), values.amax().clamp_min(0)
        usable = high - low <= MAX_SCALE
        rate = torch.where(self.observed, self.momentum, 1.0)
        self.low.copy_(torch.where(usable, self.low.lerp(low, rate), self.low))
        self.high.copy_(torch.where(usable, self.high.lerp(high, rate), self.high))
        self.observed.logical_or_(usable)


class PaperMinMax(Quantizer):
    """The quantizer of the paper's authors (Shen et al., AAAI 2020; github.com/Torment123/DFS).

    Per tensor, affine, with an offset in float: b bits are the 2^b values evenly spaced from the
    least to the greatest. For weights these are their own; for inputs the batch means of every
    sample's, in training those of the batch itself, in evaluation a running average in which the
    old value counts ``momentum``, as their code has it. One range serves all widths. Gradients pass
    straight through, unmasked.

    Simulates in float: nothing of it can be packed.

    Args:
        stochastic: add noise from [-1/2, 1/2) to the input codes before rounding, in training and
            evaluation alike. The authors' code does, by an argument that ends up in another's
            place.
    """

    simulation_only = True
    running_min: Tensor
    running_max: Tensor

    def __init__(
        self,
        bit_options: Sequence[int],
        out_channels: int,
        input_signed: bool,
        momentum: float = 0.1,
        stochastic: bool = False,
    ) -> None:
        super().__init__(bit_options, out_channels, input_signed)
        self.momentum = momentum
        self.stochastic = stochastic
        self.register_buffer("running_min", torch.zeros(1))
        self.register_buffer("running_max", torch.zeros(1))

    def quantize_input(self, x: Tensor, bits: int) -> Tensor:
        """(N, C, H, W) at ``bits`` bits; in training it moves the running range."""
        if self.training:
            low, high = self._range_of(x)
            self._move(low, high)
        else:
            low, high = self.running_min[0], self.running_max[0]
        noise = torch.rand_like(x) - 0.5 if self.stochastic else None
        return affine_fake_quantize(x, low, high, bits, noise)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        if x.numel():
            self._move(*self._range_of(x))

    @staticmethod
    def _range_of(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.detach().flatten(1)
        return rows.amin(1).mean(), rows.amax(1).mean()

    def _move(self, low: Tensor, high: Tensor) -> None:
        for running, seen in ((self.running_min, low), (self.running_max, high)):
            running.mul_(self.momentum).add_(seen * (1 - self.momentum))

    def quantize_weight(self, weight: Tensor, bits: int) -> Tensor:
        """(O, C/groups, KH, KW) at ``bits`` bits."""
        values = weight.detach()
        return affine_fake_quantize(weight, values.amin(), values.amax(), bits)

    def input_scale(self) -> Tensor:
        raise ValueError(self._NO_STEPS)

    def input_zero_point(self) -> Tensor:
        raise ValueError(self._NO_STEPS)

    def weight_scale(self, weight: Tensor) -> Tensor:
        raise ValueError(self._NO_STEPS)

    _NO_STEPS = "quantizer 'paper' has float offsets: it simulates in float and can't be packed"


_KINDS: dict[str, type[Quantizer]] = {"lsq": LSQ, "minmax": MinMax, "paper": PaperMinMax}


def quantizer_class(kind: str) -> type[Quantizer]:
    """The class behind a name: "lsq", "minmax" or "paper"."""
    if kind not in _KINDS:
        raise ValueError(f"quantizer must be one of {tuple(_KINDS)}, got {kind!r}")
    return _KINDS[kind]


def make_quantizer(
    kind: str, bit_options: Sequence[int], out_channels: int, input_signed: bool
) -> Quantizer:
    """A quantizer by name, see :func:`quantizer_class`."""
    return quantizer_class(kind)(bit_options, out_channels, input_signed)
