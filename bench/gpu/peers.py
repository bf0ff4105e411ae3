"""cuDNN's convolutions through PyTorch, each followed by a ReLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.device import machine
from bench.gpu.prepared import GpuPrepared, copies_for, tf32
from bench.layers import Layer, layer_input, layer_weights
from bench.prepared import Prepared, Unavailable
from bench.rotation import Rotation

_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Of results of about unit variance: the rounding of factors (TF32) or results, and of the sum.
_TOLERANCES = {"float32": 1e-4, "tf32": 1e-2, "bf16": 2e-2, "fp16": 4e-3}


@dataclass(frozen=True)
class Peer:
    """One kind of cuDNN convolution.

    Attributes:
        precision: float32, tf32, bf16 or fp16, of inputs, weights and results alike.
        fused: one cuDNN call that adds a bias (zeros) and rectifies, where cuDNN has it; otherwise
            a convolution without bias and a ReLU in place, two kernels.
    """

    precision: str
    channels_last: bool
    fused: bool = False

    @property
    def name(self) -> str:
        suffix = ("_channels_last" if self.channels_last else "") + ("_fused" if self.fused else "")
        return f"cudnn_{self.precision}{suffix}"

    @property
    def label(self) -> str:
        form = "channels last" if self.channels_last else "contiguous"
        return f"cuDNN {self.precision}, {form}" + (", fused" if self.fused else "")

    def prepare(self, layer: Layer, batch: int) -> GpuPrepared:
        """Its tensors, and its algorithm chosen by cuDNN's own measurement.

        Raises:
            Unavailable: cuDNN has no fused form of it.
        """
        device, dtype = machine().device, _DTYPES[self.precision]
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        x = layer_input(layer, batch, device).to(dtype).contiguous(memory_format=form)
        weight = layer_weights(layer, device).weight.to(dtype).contiguous(memory_format=form)
        convolve = self._convolution(layer, weight)

        def run(x: Tensor) -> Any:
            with tf32(self.precision == "tf32"):
                return convolve(x)

        if self.fused:
            try:
                run(x)
            except RuntimeError as error:
                why = str(error).partition(". ")[0]
                raise Unavailable(f"cuDNN has no fused form here: {why}") from None
        touched = dtype.itemsize * batch * (layer.in_values + layer.out_values)
        copies = copies_for(batch, touched)
        call = Rotation(run, [x, *(x.clone() for _ in range(copies - 1))])

        def check() -> None:
            self._check(call(), layer, x, weight)

        return GpuPrepared(Prepared(call, check, copies))

    def _convolution(self, layer: Layer, weight: Tensor) -> Callable[[Tensor], Tensor]:
        stride, padding = [layer.stride] * 2, [layer.padding] * 2
        if not self.fused:
            return lambda x: F.conv2d(x, weight, None, stride, padding, 1, layer.groups).relu_()
        bias = torch.zeros(layer.out_channels, dtype=weight.dtype, device=weight.device)
        return lambda x: torch.cudnn_convolution_relu(
            x, weight, bias, stride, padding, [1, 1], layer.groups
        )

    def _check(self, got: Tensor, layer: Layer, x: Tensor, weight: Tensor) -> None:
        """Against float64, of the first and the last sample."""
        picked = sorted({0, len(x) - 1})
        expected = F.conv2d(
            x[picked].double(),
            weight.double(),
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
        ).relu()
        assert got.shape[0] == len(x)
        tolerance = _TOLERANCES[self.precision]
        torch.testing.assert_close(
            got[picked].double(), expected, rtol=tolerance, atol=tolerance, check_stride=False
        )


PEERS = (
    *(Peer(precision, channels_last) for precision in _DTYPES for channels_last in (False, True)),
    *(Peer(precision, channels_last=True, fused=True) for precision in ("bf16", "fp16")),
)
BF16_PEERS = tuple(peer for peer in PEERS if peer.precision == "bf16")
