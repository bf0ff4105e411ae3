"""How a dynamic network computes, apart from its shape and its gate."""

from __future__ import annotations

from dataclasses import dataclass

from dfs.nn.quantizers import quantizer_class

STREAMS = ("uint8", "float32")
NORMS = ("per_width", "shared")
SKIPPING = ("default", "paper")
UNGATED_WIDTHS = (8, 32)


@dataclass(frozen=True)
class Semantics:
    """The options that a network's blocks share.

    Attributes:
        stream: "uint8" or "float32", how activations are kept between the blocks.
        quantizer: "lsq", "minmax" or "paper", of every convolution.
        norm: "per_width", or "shared": one BatchNorm for all widths, as the authors have it.
        ungated_bits: 8 or 32: the width of what no gate decides: stem, first block and classifier.
        skipping: what a down-sampling block does. "default": the shortcut runs at
            ``ungated_bits`` whatever the choice, and a skipped sample becomes ReLU(shortcut).
            "paper", as in the authors' code: the shortcut runs at the sample's own width, at 32
            bits for a skipped sample, which becomes the shortcut without a ReLU. Where gates learn
            (``gate_gradient``), every choice is computed for every sample and the mask adds them
            up.
    """

    stream: str = "uint8"
    quantizer: str = "lsq"
    norm: str = "per_width"
    ungated_bits: int = 8
    skipping: str = "default"

    def __post_init__(self) -> None:
        quantizer_class(self.quantizer)
        for name, allowed in (("stream", STREAMS), ("norm", NORMS), ("skipping", SKIPPING)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.ungated_bits not in UNGATED_WIDTHS:
            raise ValueError(
                f"ungated_bits must be one of {UNGATED_WIDTHS}, got {self.ungated_bits!r}"
            )
        if self.skipping == "paper" and self.stream != "float32":
            raise ValueError(
                "skipping 'paper' leaves negative values in the stream, which needs "
                f"stream 'float32', got {self.stream!r}"
            )

    @property
    def paper_skipping(self) -> bool:
        return self.skipping == "paper"
