"""A residual network whose gate picks a bitwidth per image and block.

It shares the state-dict keys of everything that is not a BatchNorm, a quantizer or the gate with
its plain twin. Shortcuts are projections, the classifier is a 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfs.models.architecture import Architecture, as_architecture
from dfs.models.plain import PlainResNet, initialise, pool_float
from dfs.nn import replicas
from dfs.nn.block import ResidualBlock, make_conv, make_norm
from dfs.nn.conv import DFSConv2d
from dfs.nn.folded import FoldedConv, Stream, run_packed_stem
from dfs.nn.gate import GateDecision, State
from dfs.nn.gates import make_gate
from dfs.nn.layout import in_fast_layout
from dfs.nn.norm import PerWidthBatchNorm2d
from dfs.nn.quantizers import quantizer_class
from dfs.nn.semantics import Semantics
from dfs.nn.shapes import ConvShape
from dfs.nn.stream import StreamQuantizer, pooled_features, pooled_mean
from dfs_kernels.widths import KERNEL_WIDTHS, check_options

# What the authors of the paper trained (Shen et al., AAAI 2020, and their code), as options.
PAPER: dict[str, Any] = {
    "choices": (0, 8, 10, 12, 14, 16, 32),
    "stream": "float32",
    "gate": "rnn",
    "quantizer": "paper",
    "norm": "shared",
    "ungated_bits": 32,
    "skipping": "paper",
}

Policy = int | Tensor | None


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-accumulates of one image, by what decides their width.

    Attributes:
        gated: per gated block, those of its branch.
        shortcuts: per gated block, those of its shortcut, which are among the ungated too.
        ungated: stem, first block, shortcuts and classifier.
        gates: all gates together.
    """

    gated: tuple[int, ...]
    shortcuts: tuple[int, ...]
    ungated: int
    gates: int

    @property
    def total(self) -> int:
        """Of the full-precision network, which has no gates."""
        return sum(self.gated) + self.ungated


class DynamicOutput(NamedTuple):
    """Logits and everything decided on the way to them.

    Attributes:
        logits: float32 (N, classes).
        bits: int32 (N, gated blocks).
        mask: float32 (N, gated blocks, choices), one-hot; differentiable in training.
        gate_logits: float64 (N, gated blocks, choices), or None where no gate was asked.
    """

    logits: Tensor
    bits: Tensor
    mask: Tensor
    gate_logits: Tensor | None


class _SeesCandidates(torch.autograd.Function):
    """The value stays that of the chosen widths; the mask sees what each would have given."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, mask: Tensor, *candidates: Tensor) -> Tensor:
        ctx.save_for_backward(*candidates)
        ctx.mask_dtype = mask.dtype
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        candidates = ctx.saved_tensors
        seen = [(grads[0] * candidate).flatten(1).sum(1) for candidate in candidates]
        return grads[0], torch.stack(seen, 1).to(ctx.mask_dtype), *(None for _ in candidates)


class DynamicResNet(nn.Module):
    """A residual network whose gate picks a bitwidth per image and block.

    In training mode it computes in float on quantized values; in evaluation mode it runs the folded
    and packed kernels that get deployed, unless it has widths or a quantizer that only simulate
    (see :attr:`packable`). Call :meth:`repack` after editing parameters in place.

    Args:
        architecture: or an int, the depth of a CIFAR ResNet.
        num_classes, in_channels: None keeps those of the architecture.
        choices: ascending widths out of 0, 1 to 16 and 32. 0, 2, 4, 8 and 32 run on the packed
            kernels.
        stream, quantizer, norm, ungated_bits, skipping: see :class:`dfs.nn.Semantics`.
        gate: "rnn", "feedforward" or "constant".
        gate_options: further arguments of the gate.
    """

    def __init__(
        self,
        architecture: Architecture | int,
        num_classes: int | None = None,
        in_channels: int | None = None,
        choices: Sequence[int] = (0, 2, 4, 8),
        stream: str = "uint8",
        *,
        gate: str = "rnn",
        gate_options: Mapping[str, Any] | None = None,
        quantizer: str = "lsq",
        norm: str = "per_width",
        ungated_bits: int = 8,
        skipping: str = "default",
    ) -> None:
        super().__init__()
        self.architecture = shape = as_architecture(architecture, num_classes, in_channels)
        self.semantics = semantics = Semantics(stream, quantizer, norm, ungated_bits, skipping)
        options = check_options([c for c in choices if c != 0], "choices")
        self.choices = tuple(choices)
        self._simulated = _what_simulates(self.choices, quantizer)
        self.streams = nn.ModuleList(
            StreamQuantizer(stream == "uint8") for _ in range(shape.streams[-1] + 1)
        )
        ungated = (ungated_bits,)
        self.stem = make_conv(shape.stem, ungated, semantics, input_signed=True)
        self.bn_stem = make_norm(shape.stem.out_channels, ungated, semantics, shape.norm_eps)
        self.blocks = nn.ModuleList(
            ResidualBlock(
                block, options if i else ungated, self._stream(index), semantics, shape.norm_eps
            )
            for i, (block, index) in enumerate(zip(shape.blocks, shape.streams, strict=True))
        )
        head = ConvShape(shape.out_channels, shape.num_classes, 1)
        # Skipping as in the paper may leave negative values.
        signed = semantics.paper_skipping
        self.classifier = make_conv(head, ungated, semantics, input_signed=signed, bias=True)
        seen = [block.in_channels for block in shape.blocks[1:]]
        self.gate = make_gate(gate, seen, self.choices, **(gate_options or {}))
        initialise(self)
        for module in self.modules():
            if isinstance(module, DFSConv2d):
                module.quantizer.reset_weight(module.weight)
        self._folded: FoldedConv | None = None

    @property
    def num_classes(self) -> int:
        return self.architecture.num_classes

    @property
    def in_channels(self) -> int:
        return self.architecture.in_channels

    @property
    def ungated_bits(self) -> int:
        """The width of the stem, the first block and the classifier."""
        return self.semantics.ungated_bits

    @property
    def packable(self) -> bool:
        """Whether evaluation runs packed; else it simulates in float, on the reference."""
        return self._simulated is None

    def check_packable(self) -> None:
        """Refuse, by name, what has no packed form and so can't be frozen.

        Raises:
            ValueError: naming the choices or the quantizer that only simulate.
        """
        if self._simulated is not None:
            raise ValueError(
                f"{self._simulated} only simulate in float and can't be packed or frozen"
            )

    @property
    def gated_blocks(self) -> int:
        return len(self.blocks) - 1

    def _stream(self, index: int) -> StreamQuantizer:
        stream = self.streams[index]
        assert isinstance(stream, StreamQuantizer)
        return stream

    def _block(self, index: int) -> ResidualBlock:
        block = self.blocks[index]
        assert isinstance(block, ResidualBlock)
        return block

    def forward(self, x: Tensor, policy: Policy = None) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, H, W); see :meth:`run`."""
        return self.run(x, policy).logits

    def run(
        self,
        x: Tensor,
        policy: Policy = None,
        *,
        temperature: float | None = None,
        explore: float = 0.0,
        gate_gradient: bool = False,
    ) -> DynamicOutput:
        """Classify images, deciding block by block.

        Args:
            policy: None asks the gate; an int out of the choices runs every gated block at that
                width; an integer tensor (N, gated blocks) gives every decision.
            temperature: of the gate's Gumbel noise while training; None is deterministic.
            explore: probability with which a decision is replaced by a random choice.
            gate_gradient: evaluate every choice of every block, so that the gate learns from what
                each would have given. Only in training mode.
        """
        if gate_gradient and not self.training:
            raise ValueError("gate_gradient needs training mode")
        self._check_policy(policy, x.shape[0])
        # The packed kernels are not differentiable from end to end.
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self._run(x, policy, temperature, explore, gate_gradient)

    def _run(
        self,
        x: Tensor,
        policy: Policy,
        temperature: float | None,
        explore: float,
        gate_gradient: bool,
    ) -> DynamicOutput:
        stream = self.start(x)
        state: State | None = None
        bits, masks, logits = [], [], []
        for index in range(self.gated_blocks):
            decision = self.decide(index, stream, state, policy, temperature, explore)
            state = decision.state
            stream = self.step(index, stream, decision, gate_gradient)
            bits.append(decision.bits)
            masks.append(decision.mask)
            logits.append(decision.logits)
        return DynamicOutput(
            self.classify(stream),
            torch.stack(bits, 1),
            torch.stack(masks, 1),
            torch.stack(logits, 1) if policy is None else None,
        )

    def _check_policy(self, policy: Policy, batch: int) -> None:
        if policy is None:
            return
        if not isinstance(policy, Tensor):
            if isinstance(policy, bool) or not isinstance(policy, int):
                raise TypeError(f"policy must be None, an int or a tensor, got {policy!r}")
            if policy not in self.choices:
                raise ValueError(f"policy must be one of {self.choices}, got {policy}")
            return
        if policy.is_floating_point() or policy.dtype == torch.bool:
            raise TypeError(f"policy must be an integer tensor, got {policy.dtype}")
        expected = (batch, self.gated_blocks)
        if tuple(policy.shape) != expected:
            raise ValueError(f"policy must have shape {expected}, got {tuple(policy.shape)}")
        if policy.device.type == "cpu":
            wrong = ~torch.isin(policy, self.gate.widths.to(policy))
            if bool(wrong.any()):
                sample, block = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"policy[{sample}, {block}] is {int(policy[sample, block])}, "
                    f"which is not one of {self.choices}"
                )

    def full_precision(self, x: Tensor) -> Tensor:
        """Logits of the float network, every BatchNorm at its widest option."""
        x = self.pool(torch.relu(self.bn_stem(in_fast_layout(self.stem(x)), None)))
        for block in self.blocks:
            x = block(x, None)
        return self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)

    def pool(self, x: Tensor) -> Tensor:
        """The max pool behind the stem, if there is one, of float values."""
        return pool_float(x, self.architecture)

    def start(self, x: Tensor) -> Stream:
        """Stem and first block, which are not gated: the stream that the first gate sees."""
        block, bits = self._block(0), self.ungated_bits
        if self._simulates():
            stem = torch.relu(self.bn_stem(self.stem(x, bits), bits))
            return block(self._stream(0)(self.pool(stem)), bits)
        pool = self.architecture.pool
        written = run_packed_stem(self.folded_stem(), x, bits, self._stream(0), pool)
        return block.run_packed(written, bits)

    def folded_stem(self) -> FoldedConv:
        """The stem with its BatchNorm, packed: made once and kept until :meth:`repack`."""
        if self._folded is None:
            self._folded = FoldedConv(self.stem, self.bn_stem)
        return self._folded

    def features(self, stream: Stream) -> Tensor:
        """What the gate sees of a stream, float64 (N, F)."""
        return pooled_features(stream, self.gate.deviation)

    def decide(
        self,
        index: int,
        stream: Stream,
        state: State | None,
        policy: Policy = None,
        temperature: float | None = None,
        explore: float = 0.0,
    ) -> GateDecision:
        """The widths of gated block ``index`` for the samples of ``stream``."""
        batch, device = stream.shape[0], stream.device
        decision: GateDecision
        if policy is None and not self.training:
            decision = self.gate.run(index, stream, state)
        elif policy is None:
            decision = self.gate(index, self.features(stream), state, temperature)
        else:
            if isinstance(policy, Tensor):
                bits = policy[:, index].to(torch.int32)
            else:
                bits = torch.full((batch,), policy, dtype=torch.int32, device=device)
            mask = (bits[:, None] == self.gate.widths).float()
            decision = GateDecision(bits, mask, mask.double(), None)
        if explore > 0:
            count = len(self.choices)
            drawn = replicas.randint(count, batch, device=device)
            taken = replicas.rand(batch, device=device) < explore
            mask = nn.functional.one_hot(drawn, count).to(decision.mask)
            decision = decision._replace(
                bits=torch.where(taken, self.gate.widths[drawn], decision.bits),
                mask=torch.where(taken[:, None], mask, decision.mask),
            )
        return decision

    def step(
        self, index: int, stream: Stream, decision: GateDecision, gate_gradient: bool = False
    ) -> Stream:
        """Gated block ``index`` at the decided widths."""
        block = self._block(index + 1)
        if not self._simulates():
            return block.run_packed(stream, decision.bits)
        assert isinstance(stream, Tensor)
        if gate_gradient and self.semantics.paper_skipping:
            return self._mixture(block, stream, decision.mask)
        result: Tensor = block(stream, decision.bits)
        if gate_gradient:
            candidates = block.candidates(stream, self.choices)
            result = _SeesCandidates.apply(result, decision.mask, *candidates)
        return result

    def classify(self, stream: Stream) -> Tensor:
        """Logits from the last stream."""
        pooled = pooled_mean(stream).float()[:, :, None, None]
        return self.classifier(pooled, self.ungated_bits).flatten(1)

    def _simulates(self) -> bool:
        return self.training or not self.packable

    def repack(self) -> None:
        """Forget every packed weight: call it after changing parameters in place."""
        self._folded = None
        for module in self.modules():
            if isinstance(module, (ResidualBlock, DFSConv2d)):
                module.repack()

    def train(self, mode: bool = True) -> DynamicResNet:
        self._folded = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> DynamicResNet:
        self._folded = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._folded = None
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def load_plain(self, plain: PlainResNet) -> None:
        """Take the weights of the plain twin, its BatchNorms copied to every width."""
        if plain.architecture != self.architecture:
            raise ValueError(
                f"plain must have this network's architecture, {self.architecture.name}, "
                f"got {plain.architecture.name}"
            )
        modules = dict(plain.named_modules())
        for name, target in self._twins():
            source = modules[name]
            if isinstance(target, DFSConv2d):
                target.load_state_dict(source.state_dict(), strict=True)
            else:
                target.copy_from(source)  # type: ignore[arg-type]
        self.repack()

    def _twins(self) -> list[tuple[str, DFSConv2d | PerWidthBatchNorm2d]]:
        return [
            (name, module)
            for name, module in self.named_modules()
            if isinstance(module, (DFSConv2d, PerWidthBatchNorm2d))
        ]

    def _mixture(self, block: ResidualBlock, stream: Tensor, mask: Tensor) -> Tensor:
        """Every choice for every sample, added up by the mask, as the authors of the paper train.

        Each choice's BatchNorm and ranges see the whole batch.
        """
        result = torch.zeros((), device=stream.device)
        for i, width in enumerate(self.choices):
            result = result + mask[:, i].view(-1, 1, 1, 1) * block(stream, width)
        return result

    def macs(self, height: int, width: int) -> LayerMacs:
        """Multiply-accumulates for one image of ``height`` x ``width``."""
        shape = self.architecture
        branches, shortcuts = [], []
        for block, size in shape.block_sizes((height, width)):
            branches.append(block.branch_macs(size))
            shortcuts.append(0 if block.shortcut is None else block.shortcut.macs(size))
        ungated = shape.stem.macs((height, width)) + branches[0] + sum(shortcuts)
        ungated += shape.out_channels * shape.num_classes
        gates = sum(self.gate.macs(i) for i in range(self.gated_blocks))
        return LayerMacs(tuple(branches[1:]), tuple(shortcuts[1:]), ungated, gates)


def _what_simulates(choices: Sequence[int], quantizer: str) -> str | None:
    """What has no packed form, or None if everything has."""
    if quantizer_class(quantizer).simulation_only:
        return f"the values of quantizer {quantizer!r}"
    odd = tuple(c for c in choices if c not in (0, *KERNEL_WIDTHS))
    return f"the choices {odd}" if odd else None
