"""A residual block whose two convolutions run at a width chosen per sample, or are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfs.nn.conv import DFSConv2d
from dfs.nn.folded import Bits, FoldedConv, Stream
from dfs.nn.norm import PerWidthBatchNorm2d
from dfs.nn.stream import StreamQuantizer

# The shortcut of a down-sampling block is not gated; it runs at this width.
SHORTCUT_BITS = 8


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an identity or a down-sampling shortcut.

    A skipped sample leaves the stream as it is, or, in a down-sampling block, as
    ReLU(BatchNorm(shortcut)), which is computed at 8 bits whatever the choice.

    Args:
        bit_options: ascending non-zero widths on offer, 32 among them or not.
        stream: the quantizer of the stream that the block writes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        bit_options: Sequence[int],
        stream: StreamQuantizer,
    ) -> None:
        super().__init__()
        self.bit_options = tuple(bit_options)
        integer = tuple(b for b in self.bit_options if b != 32) or (8,)
        self.conv1 = DFSConv2d(
            in_channels,
            out_channels,
            3,
            stride,
            1,
            bias=False,
            bit_options=integer,
            input_signed=False,
        )
        self.bn1 = PerWidthBatchNorm2d(out_channels, self.bit_options)
        self.conv2 = DFSConv2d(
            out_channels, out_channels, 3, 1, 1, bias=False, bit_options=integer, input_signed=False
        )
        self.bn2 = PerWidthBatchNorm2d(out_channels, self.bit_options)
        self.downsamples = stride != 1 or in_channels != out_channels
        if self.downsamples:
            self.shortcut = DFSConv2d(
                in_channels,
                out_channels,
                1,
                stride,
                bias=False,
                bit_options=(SHORTCUT_BITS,),
                input_signed=False,
            )
            self.bn_shortcut = PerWidthBatchNorm2d(out_channels, (SHORTCUT_BITS,))
        # Not a submodule here: several blocks share one stream, which the network owns.
        self._stream = (stream,)
        self._folded: dict[str, FoldedConv] | None = None

    @property
    def stream(self) -> StreamQuantizer:
        return self._stream[0]

    def forward(self, x: Tensor, bits: Bits | None) -> Tensor:
        """One block in float, as it is trained: (N, C, H, W) stream values in and out.

        Args:
            bits: an int, a tensor (N,), or None for the full-precision network.
        """
        hidden = torch.relu(self.bn1(self.conv1(x, bits), bits))
        return self.finish(x, self.bn2(self.conv2(hidden, bits), bits), bits is None)

    def finish(self, x: Tensor, y: Tensor, full_precision: bool) -> Tensor:
        """Add the branch ``y``, 0 for a skipped sample, to the stream ``x``."""
        result = torch.relu(self.carry(x, full_precision) + y)
        return result if full_precision else self.stream(result)

    def carry(self, x: Tensor, full_precision: bool = False) -> Tensor:
        """What the branch is added to: the stream, or its shortcut."""
        if not self.downsamples:
            return x
        bits = None if full_precision else SHORTCUT_BITS
        return self.bn_shortcut(self.shortcut(x, bits), bits)

    def run_packed(self, x: Stream, bits: Bits) -> Stream:
        """One block as it is deployed: folded and packed. An identity block updates x in place."""
        folded = self._fold()
        conv1, conv2 = folded["conv1"], folded["conv2"]
        hidden = conv1(
            x,
            bits,
            activation="relu",
            output_scale=conv2.input_scale,
            output_zero_point=conv2.input_zero_point,
        )
        if not self.downsamples:
            conv2.add_into(hidden, bits, x, as_codes=True)
            return x
        residual = folded["shortcut"](x, SHORTCUT_BITS)
        result = conv2(
            hidden,
            bits,
            as_codes=True,
            residual=residual,
            activation="relu",
            **self.stream.output_arguments(),
        )
        # A skipped sample gets no activation; codes with zero point 0 hold no negatives anyway.
        return torch.relu(result) if isinstance(result, Tensor) else result

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

    def _fold(self) -> dict[str, FoldedConv]:
        if self._folded is None:
            self._folded = {
                "conv1": FoldedConv(self.conv1, self.bn1),
                "conv2": FoldedConv(self.conv2, self.bn2),
            }
            if self.downsamples:
                self._folded["shortcut"] = FoldedConv(self.shortcut, self.bn_shortcut)
        return self._folded
