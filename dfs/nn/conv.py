"""A convolution that takes a bitwidth per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs.nn.quantizers import PaperMinMax, make_quantizer
from dfs_kernels import PackedActivation, PackedConvWeight, mixed_conv2d
from dfs_kernels.arguments import widths_of
from dfs_kernels.call import check_bits
from dfs_kernels.widths import KERNEL_WIDTHS, check_options


class DFSConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose forward takes the bits to spend on each sample.

    It keeps a float weight and takes every argument of :class:`torch.nn.Conv2d`; state dicts of
    that class load strictly. ``forward(x)`` is that convolution, exactly.

    In training mode weights are quantized on the fly and everything gets gradients (learned step
    size quantization, Esser et al., ICLR 2020). In evaluation mode the weight is packed once;
    call :meth:`repack` after editing parameters in place. Learned input steps come from the first
    batch in training mode that is given ``bits``; until then they assume inputs of unit variance.

    Args:
        bit_options: ascending integer widths besides 0 and 32, which are always accepted. 2, 4
            and 8 run on the compiled kernels, others in 1 to 16 on the reference.
        quantizer: "lsq" (learned steps), "minmax" (observed ranges), or "paper" (that of the
            paper's authors, which only simulates).
        input_signed: whether inputs take negative values; False suits inputs behind a ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bit_options: Sequence[int] = (2, 4, 8),
        quantizer: str = "lsq",
        input_signed: bool = True,
    ) -> None:
        options = check_options(bit_options)
        if 32 in options:
            raise ValueError(f"bit_options lists integer widths; 32 is always accepted: {options}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.bit_options = options
        self.quantizer = make_quantizer(quantizer, options, out_channels, input_signed)
        self.quantizer.to(self.weight.device)
        self.quantizer.reset_weight(self.weight)
        self._packed: PackedConvWeight | None = None
        self._packed_from: tuple[Tensor | None, ...] = ()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        bit_options: Sequence[int] = (2, 4, 8),
        quantizer: str = "lsq",
        input_signed: bool = True,
    ) -> DFSConv2d:
        """A copy of ``conv`` that takes bits: same geometry, parameters and mode."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        made = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            bit_options=bit_options,
            quantizer=quantizer,
            input_signed=input_signed,
        )
        made.load_state_dict(conv.state_dict(), strict=True)
        return made.train(conv.training)

    def forward(self, x: Tensor, bits: int | Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Convolve, each sample at its own width.

        Args:
            x: floating (N, C, H, W).
            bits: None for ``nn.Conv2d``; or an int or an integer tensor (N,) of 0, 32 and
                ``bit_options``. A sample at 0 bits gives zeros.

        Returns:
            (N, O, OH, OW), float32 unless ``bits`` is None.
        """
        if bits is None:
            return super().forward(x)
        if isinstance(self.quantizer, PaperMinMax):
            return self._simulate(x, bits)
        if self.training and self.quantizer.training:
            self.quantizer.observe(x)
        padding: Sequence[int] = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            x = F.pad(x, padding, mode=self.padding_mode)
            padding = (0, 0, 0, 0)
        weight: Tensor | PackedConvWeight = self.weight
        weight_scale = None
        # Packing looks at values, which a compiler can't trace: that call quantizes on the fly.
        untraceable = self._packed is None and torch.compiler.is_compiling()
        if self.training or untraceable or not self._packable():
            weight_scale = self.quantizer.weight_scale(self.weight)
        else:
            weight = self.packed()
        result = mixed_conv2d(
            x,
            weight,
            bits,
            self.quantizer.input_scale(),
            self.quantizer.input_zero_point(),
            weight_scale=weight_scale,
            bias=self.bias,
            stride=self.stride,  # type: ignore[arg-type]
            padding=tuple(padding),
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            bit_options=(*self.bit_options, 32) if weight_scale is not None else None,
        )
        assert not isinstance(result, PackedActivation)
        return result

    def _simulate(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Each width's samples as a batch of their own, in float on quantized values."""
        options = (*self.bit_options, 32)
        x = x.to(self.weight.dtype)
        if isinstance(bits, int) and bits in options and len(x):
            return self._simulate_at(x, bits)
        widths = widths_of(bits, x.shape[0], x.device)
        check_bits(widths, options)
        empty = super().forward(x[:0])
        result = empty.new_zeros(x.shape[0], *empty.shape[1:])
        for width in options:
            rows = (widths == width).nonzero().squeeze(1)
            if not rows.numel():
                continue
            y = self._simulate_at(x[rows], width)
            result = y if len(rows) == len(x) else result.index_copy(0, rows, y)
        return result

    def _simulate_at(self, x: Tensor, width: int) -> Tensor:
        if width == 32:
            return super().forward(x)
        assert isinstance(self.quantizer, PaperMinMax)
        weight = self.quantizer.quantize_weight(self.weight, width)
        return self._conv_forward(self.quantizer.quantize_input(x, width), weight, self.bias)

    def packed(self) -> PackedConvWeight:
        """The bit-packed weight, made on first use and kept until :meth:`repack`.

        Made again too if other tensors took the parameters' places, as in
        :func:`torch.func.functional_call`.
        """
        packed = self._packed
        if packed is not None and torch.compiler.is_compiling():
            return packed
        sources = (self.weight, *self.quantizer._parameters.values())
        if packed is None or any(
            a is not b for a, b in zip(sources, self._packed_from, strict=True)
        ):
            packed = PackedConvWeight.from_float(
                self.weight,
                self.quantizer.weight_scale(self.weight),
                (*self.bit_options, 32),
            )
            self._packed, self._packed_from = packed, sources
        return packed

    def repack(self) -> None:
        """Forget the packed weight: call it after changing parameters in place."""
        self._packed, self._packed_from = None, ()

    def train(self, mode: bool = True) -> DFSConv2d:
        self.repack()
        super().train(mode)
        if not mode and self._packable() and not self.weight.is_meta:
            if bool(torch.isfinite(self.weight).all()):
                self.packed()
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bit_options={self.bit_options}"

    def _packable(self) -> bool:
        return not self.quantizer.simulation_only and all(
            bits in KERNEL_WIDTHS for bits in self.bit_options
        )

    def _apply(self, *args: Any, **kwargs: Any) -> DFSConv2d:
        self.repack()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.repack()
        if not any(key.startswith(f"{prefix}quantizer.") for key in state_dict):
            self.quantizer.reset_weight(self.weight)
