"""One mixed-bitwidth convolution as the backends see it: checked, nothing optional left open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import PackedActivation, Quantizer, WeightLayout


@dataclass(frozen=True, eq=False)
class ConvWeight:
    """The weight of a call, float or packed.

    Attributes:
        data: float (O, C/groups, KH, KW), or the uint8 buffer of a packed weight.
        shape: (O, C/groups, KH, KW).
        options: the widths on offer, ascending.
        centred: per option, whether level(q) = 2q + 1 with half the step.
        scale: float32 (len(options), O), or None when 32 is the only option.
        tiles: the backend's private copy of a packed weight, or None.
    """

    data: Tensor
    shape: tuple[int, int, int, int]
    options: tuple[int, ...]
    centred: tuple[bool, ...]
    scale: Tensor | None
    tiles: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        return not self.data.is_floating_point()

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout(self.shape, self.options)

    def step(self, bits: int) -> Tensor:
        if self.scale is None:
            raise ValueError(f"weight_scale is needed at {bits} bits")
        return self.scale[self.options.index(bits)]


@dataclass(frozen=True, eq=False)
class ConvCall:
    """Arguments of a mixed convolution.

    Attributes:
        input: float (N, C, H, W), or packed.
        bits: int32 (N,).
        input_quantizer: widths equal to the weight's; None for a packed input whose codes are used
            as they are (or when 32 is the only option).
        bias: float32 (O,). mul, add: float32 (len(options), O). Each may be None.
        residual: float (N, O, OH, OW), or packed, or None.
    """

    input: Tensor | PackedActivation
    weight: ConvWeight
    bits: Tensor
    geometry: ConvGeometry
    input_quantizer: Quantizer | None = None
    bias: Tensor | None = None
    mul: Tensor | None = None
    add: Tensor | None = None
    residual: Tensor | PackedActivation | None = None
    relu: bool = False

    @property
    def batch(self) -> int:
        return int(self.bits.shape[0])


@dataclass(frozen=True)
class GradientsWanted:
    """Which gradients a backward call has to give."""

    input: bool
    weight: bool
    input_scale: bool
    weight_scale: bool
    mul: bool
    add: bool


@dataclass(eq=False)
class ConvGradients:
    """Gradients of a mixed convolution; those that were not wanted are None."""

    input: Tensor | None = None
    weight: Tensor | None = None
    input_scale: Tensor | None = None
    weight_scale: Tensor | None = None
    mul: Tensor | None = None
    add: Tensor | None = None

    @classmethod
    def empty(cls, call: ConvCall, wanted: GradientsWanted) -> ConvGradients:
        """Contiguous float32 tensors for those that are wanted."""
        weight = call.weight
        shapes = gradient_shapes(call.input.shape, weight.shape, len(weight.options))
        return cls(
            **{
                name: torch.empty(shape, dtype=torch.float32, device=call.bits.device)
                for name, shape in shapes.items()
                if getattr(wanted, name)
            }
        )


def gradient_shapes(
    input_shape: Sequence[int], weight_shape: Sequence[int], count: int
) -> dict[str, tuple[int, ...]]:
    """Of all gradients, by name; ``count`` widths are on offer."""
    per_channel = (count, weight_shape[0])
    return {
        "input": tuple(input_shape),
        "weight": tuple(weight_shape),
        "input_scale": (count,),
        "weight_scale": per_channel,
        "mul": per_channel,
        "add": per_channel,
    }


def check_bits(bits: Tensor, options: Sequence[int], name: str = "bits") -> None:
    """Refuse a width that is not an option, naming the sample. Reads the values."""
    allowed = {0, *options}
    for index, value in enumerate(bits.tolist()):
        if value not in allowed:
            raise ValueError(f"{name}[{index}] is {value}; it must be 0 or one of {tuple(options)}")
