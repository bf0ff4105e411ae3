"""A residual block whose convolutions run at a width chosen per sample, or are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dfs.nn.conv import DFSConv2d
from dfs.nn.folded import Bits, FoldedConv, Stream
from dfs.nn.norm import PerWidthBatchNorm2d
from dfs.nn.sample_order import SampleOrder
from dfs.nn.semantics import Semantics
from dfs.nn.shapes import BlockShape, ConvShape
from dfs.nn.stream import StreamQuantizer

# A convolution holds an integer width even where none is on offer.
_SPARE_WIDTH = 8


def make_conv(
    shape: ConvShape,
    widths: Sequence[int],
    semantics: Semantics,
    *,
    input_signed: bool,
    bias: bool = False,
) -> DFSConv2d:
    """The convolution of a shape for widths that may have 32 among them."""
    return DFSConv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel,
        shape.stride,
        shape.padding,
        shape.dilation,
        shape.groups,
        bias,
        bit_options=tuple(b for b in widths if b != 32) or (_SPARE_WIDTH,),
        quantizer=semantics.quantizer,
        input_signed=input_signed,
    )


def make_norm(
    channels: int, widths: Sequence[int], semantics: Semantics, eps: float
) -> PerWidthBatchNorm2d:
    """The BatchNorm behind a convolution."""
    return PerWidthBatchNorm2d(channels, widths, eps, shared=semantics.norm == "shared")


class ResidualBlock(nn.Module):
    """A branch of convolutions around an identity or a down-sampling shortcut.

    A skipped sample leaves the stream as it is, or, in a down-sampling block, as the shortcut: see
    :class:`Semantics`. The layers are conv1, bn1, conv2, bn2 and so on, shortcut and bn_shortcut.

    Args:
        bit_options: ascending non-zero widths on offer, 32 among them or not.
        stream: the quantizer of the stream that the block writes.
        eps: of the BatchNorms.
    """

    def __init__(
        self,
        shape: BlockShape,
        bit_options: Sequence[int],
        stream: StreamQuantizer,
        semantics: Semantics,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.bit_options = tuple(bit_options)
        self.semantics = semantics
        # Only a shortcut without a ReLU puts negative values into the stream.
        signed = semantics.paper_skipping
        self.branch_length = len(shape.convs)
        for i, conv in enumerate(shape.convs, 1):
            made = make_conv(conv, self.bit_options, semantics, input_signed=signed and i == 1)
            setattr(self, f"conv{i}", made)
            norm = make_norm(conv.out_channels, self.bit_options, semantics, eps)
            setattr(self, f"bn{i}", norm)
        self.downsamples = shape.shortcut is not None
        if shape.shortcut is not None:
            widths: tuple[int, ...] = (semantics.ungated_bits,)
            if semantics.paper_skipping:
                widths = tuple(sorted({*self.bit_options, 32}))
            self.shortcut = make_conv(shape.shortcut, widths, semantics, input_signed=signed)
            self.bn_shortcut = make_norm(shape.out_channels, widths, semantics, eps)
        # Not a submodule here: several blocks share one stream, which the network owns.
        self._stream = (stream,)
        self._folded: dict[str, FoldedConv] | None = None

    @property
    def stream(self) -> StreamQuantizer:
        return self._stream[0]

    def layers(self) -> list[tuple[DFSConv2d, PerWidthBatchNorm2d]]:
        """The branch: every convolution with its BatchNorm."""
        numbers = range(1, self.branch_length + 1)
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in numbers]

    def forward(self, x: Tensor, bits: Bits | None) -> Tensor:
        """One block in float, as it is trained: (N, C, H, W) stream values in and out.

        Args:
            bits: an int, a tensor (N,), or None for the full-precision network.
        """
        return self.finish(x, self.branch(x, bits), bits)

    def branch(self, x: Tensor, bits: Bits | None) -> Tensor:
        """The branch in float, 0 for a skipped sample."""
        order = None
        if isinstance(bits, Tensor) and bits.device.type == "cpu":
            # Once here instead of in every BatchNorm. A GPU would be waited for.
            order = SampleOrder.of(bits)
            x, bits = order.sort(x), order.sort(bits)
        hidden = x
        for i, (conv, norm) in enumerate(self.layers()):
            hidden = norm(conv(torch.relu(hidden) if i else hidden, bits), bits)
        return hidden if order is None else order.restore(hidden)

    @torch.no_grad()
    def candidates(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """What the block gives at each width, by running statistics; skipping as in ``default``.

        Args:
            x: the stream (N, C, H, W), as the stream's quantizer leaves it.
        """
        norms = [m for m in self.modules() if isinstance(m, PerWidthBatchNorm2d)]
        modes = [norm.training for norm in norms]
        for norm in norms:
            norm.training = False
        carried = self.carry(x)
        results = []
        for width in widths:
            if width == 0 and not self.downsamples:
                # Quantizing again changes nothing.
                results.append(x)
                continue
            y = self.branch(x, width) if width else x.new_zeros(())
            results.append(self._combine(carried, y, width))
        for norm, mode in zip(norms, modes, strict=True):
            norm.training = mode
        return results

    def finish(self, x: Tensor, y: Tensor, bits: Bits | None) -> Tensor:
        """Add the branch ``y``, 0 for a skipped sample, to the stream ``x``."""
        return self._combine(self.carry(x, bits), y, bits)

    def _combine(self, carried: Tensor, y: Tensor, bits: Bits | None) -> Tensor:
        result = (carried + y).relu_()
        if bits is None:
            return result
        if self.semantics.paper_skipping:
            skipped = bits == 0
            if isinstance(skipped, Tensor):
                result = torch.where(skipped.view(-1, 1, 1, 1), carried, result)
            elif skipped:
                result = carried
        return self.stream(result)

    def carry(self, x: Tensor, bits: Bits | None = 0) -> Tensor:
        """What the branch is added to: the stream, or its shortcut."""
        if not self.downsamples:
            return x
        widths = None if bits is None else self.shortcut_bits(bits)
        return self.bn_shortcut(self.shortcut(x, widths), widths)

    def shortcut_bits(self, bits: Bits) -> Bits:
        """The width of the shortcut where the branch runs at ``bits``."""
        if not self.semantics.paper_skipping:
            return self.semantics.ungated_bits
        if isinstance(bits, Tensor):
            return torch.where(bits == 0, 32, bits)
        return bits or 32

    def run_packed(self, x: Stream, bits: Bits) -> Stream:
        """One block as it is deployed: folded and packed. An identity block updates x in place."""
        folded = self.folded()
        convs = [folded[f"conv{i}"] for i in range(1, self.branch_length + 1)]
        hidden = x
        for i, (conv, following) in enumerate(pairwise(convs)):
            hidden = conv(
                hidden,
                bits,
                as_codes=i > 0,
                activation="relu",
                output_scale=following.input_scale,
                output_zero_point=following.input_zero_point,
            )
        if not self.downsamples:
            convs[-1].add_into(hidden, bits, x, as_codes=True)
            return x
        residual = folded["shortcut"](x, self.shortcut_bits(bits))
        result = convs[-1](
            hidden,
            bits,
            as_codes=True,
            residual=residual,
            activation="relu",
            **self.stream.output_arguments(),
        )
        if isinstance(result, Tensor) and not self.semantics.paper_skipping:
            # The kernels leave a skipped sample without an activation. Codes with zero point 0
            # hold no negatives anyway.
            return torch.relu(result)
        return result

    def folded(self) -> dict[str, FoldedConv]:
        """Every convolution with its BatchNorm, packed: made once and kept until :meth:`repack`.

        Raises:
            ValueError: naming the widths or the quantizer that have no packed form.
        """
        if self._folded is None:
            made = {f"conv{i}": FoldedConv(*pair) for i, pair in enumerate(self.layers(), 1)}
            if self.downsamples:
                made["shortcut"] = FoldedConv(self.shortcut, self.bn_shortcut)
            self._folded = made
        return self._folded

    def repack(self) -> None:
        """Forget the packed weights: call it after changing parameters in place."""
        self._folded = None

    def train(self, mode: bool = True) -> ResidualBlock:
        self.repack()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> ResidualBlock:
        self.repack()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.repack()
        super()._load_from_state_dict(*args, **kwargs)
