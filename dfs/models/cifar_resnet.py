"""CIFAR ResNets of depth 6n + 2 (He et al., CVPR 2016, section 4.2), plain and dynamic.

Both kinds have projection shortcuts where the resolution changes and a 1x1 convolution as the
classifier, and share the state-dict keys of everything that is not a BatchNorm, a quantizer or the
gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfs.nn.block import ResidualBlock
from dfs.nn.conv import DFSConv2d
from dfs.nn.folded import FoldedConv, Stream
from dfs.nn.gates import GateDecision, RNNGate, State
from dfs.nn.norm import PerWidthBatchNorm2d
from dfs.nn.stream import StreamQuantizer, pooled_mean
from dfs_kernels.widths import check_options

WIDTHS = (16, 32, 64)
# Stem, first block, shortcuts and classifier are not gated; they run at this width.
UNGATED_BITS = 8

Policy = int | Tensor | None


def resnet_depth(name: str) -> int:
    """The depth in a name like "resnet20"; ValueError unless it is 6n + 2 with n >= 1."""
    digits = name.removeprefix("resnet")
    if not name.startswith("resnet") or not digits.isdecimal():
        raise ValueError(f"model must be named like 'resnet20', got {name!r}")
    depth = int(digits)
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"model depth must be 6n + 2 from 8 on, got {depth}")
    return depth


def build_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    choices: Sequence[int] | None = (0, 2, 4, 8),
    stream: str = "uint8",
) -> DynamicResNet | PlainResNet:
    """A network by name; ``choices`` of None gives the plain twin."""
    depth = resnet_depth(name)
    if choices is None:
        return PlainResNet(depth, num_classes, in_channels)
    return DynamicResNet(depth, num_classes, in_channels, choices, stream)


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-accumulates of one image, by what decides their width.

    Attributes:
        gated: per gated block, those of its two convolutions.
        ungated: stem, first block, shortcuts and classifier.
        gates: all gates together.
    """

    gated: tuple[int, ...]
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


def _stages(depth: int) -> list[tuple[int, int, int]]:
    """(in_channels, out_channels, stride) of every block."""
    per_stage = (depth - 2) // 6
    blocks = []
    channels = WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        for i in range(per_stage):
            blocks.append((channels, width, 2 if stage and not i else 1))
            channels = width
    return blocks


class _PlainBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsamples = stride != 1 or in_channels != out_channels
        if self.downsamples:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.bn_shortcut = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        carried = self.bn_shortcut(self.shortcut(x)) if self.downsamples else x
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(carried + self.bn2(self.conv2(hidden)))


class PlainResNet(nn.Module):
    """The static full-precision twin: (N, in_channels, H, W) -> logits (N, num_classes)."""

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.depth = depth
        self.stem = nn.Conv2d(in_channels, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn_stem = nn.BatchNorm2d(WIDTHS[0])
        self.blocks = nn.ModuleList(_PlainBlock(*shape) for shape in _stages(depth))
        self.classifier = nn.Conv2d(WIDTHS[-1], num_classes, 1)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn_stem(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)


class DynamicResNet(nn.Module):
    """A CIFAR ResNet whose gate picks a bitwidth per image and block.

    In training mode it computes in float on quantized values; in evaluation mode it runs the folded
    and packed kernels that get deployed. Call :meth:`repack` after editing parameters in place.

    Args:
        depth: 6n + 2, from 8.
        choices: ascending widths out of 0, 2, 4, 8 and 32.
        stream: "uint8" or "float32", how activations are kept between the blocks.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        choices: Sequence[int] = (0, 2, 4, 8),
        stream: str = "uint8",
    ) -> None:
        super().__init__()
        resnet_depth(f"resnet{depth}")
        if num_classes < 1 or in_channels < 1:
            raise ValueError(
                f"num_classes and in_channels must be positive, got {num_classes}, {in_channels}"
            )
        if stream not in ("uint8", "float32"):
            raise ValueError(f"stream must be 'uint8' or 'float32', got {stream!r}")
        options = check_options([c for c in choices if c != 0], "choices")
        if any(c not in (2, 4, 8, 32) for c in options):
            raise ValueError(f"choices must be out of 0, 2, 4, 8 and 32, got {tuple(choices)}")
        self.depth = depth
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.choices = tuple(choices)
        self.streams = nn.ModuleList(StreamQuantizer(stream == "uint8") for _ in WIDTHS)
        ungated = (UNGATED_BITS,)
        self.stem = DFSConv2d(in_channels, WIDTHS[0], 3, 1, 1, bias=False, bit_options=ungated)
        self.bn_stem = PerWidthBatchNorm2d(WIDTHS[0], ungated)
        shapes = _stages(depth)
        self.blocks = nn.ModuleList(
            ResidualBlock(*shape, options if i else ungated, self._stream_of(shape[1]))
            for i, shape in enumerate(shapes)
        )
        self.classifier = DFSConv2d(
            WIDTHS[-1], num_classes, 1, bit_options=ungated, input_signed=False
        )
        self.gate = RNNGate([shape[0] for shape in shapes[1:]], self.choices)
        _initialise(self)
        for module in self.modules():
            if isinstance(module, DFSConv2d):
                module.quantizer.reset_weight(module.weight)
        self._folded: FoldedConv | None = None

    @property
    def gated_blocks(self) -> int:
        return len(self.blocks) - 1

    def _stream_of(self, channels: int) -> StreamQuantizer:
        stream = self.streams[WIDTHS.index(channels)]
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
        x = torch.relu(self.bn_stem(self.stem(x), None))
        for block in self.blocks:
            x = block(x, None)
        return self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)

    def start(self, x: Tensor) -> Stream:
        """Stem and first block, which are not gated: the stream that the first gate sees."""
        block, target = self._block(0), self._stream_of(WIDTHS[0])
        if self.training:
            stem = torch.relu(self.bn_stem(self.stem(x, UNGATED_BITS), UNGATED_BITS))
            return block(target(stem), UNGATED_BITS)
        if self._folded is None:
            self._folded = FoldedConv(self.stem, self.bn_stem)
        written = self._folded(x, UNGATED_BITS, activation="relu", **target.output_arguments())
        return block.run_packed(written, UNGATED_BITS)

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
            decision = self.gate(index, pooled_mean(stream), state, temperature)
        else:
            if isinstance(policy, Tensor):
                bits = policy[:, index].to(torch.int32)
            else:
                bits = torch.full((batch,), policy, dtype=torch.int32, device=device)
            mask = (bits[:, None] == self.gate.widths).float()
            decision = GateDecision(bits, mask, mask.double(), None)
        if explore > 0:
            count = len(self.choices)
            drawn = torch.randint(count, (batch,), device=device)
            taken = torch.rand(batch, device=device) < explore
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
        if not self.training:
            return block.run_packed(stream, decision.bits)
        assert isinstance(stream, Tensor)
        result: Tensor = block(stream, decision.bits)
        if gate_gradient:
            # The value stays that of the chosen widths; the mask sees what each would have given.
            with torch.no_grad():
                candidates = [self._candidate(block, stream, width) for width in self.choices]
            shift = decision.mask - decision.mask.detach()
            for i, candidate in enumerate(candidates):
                result = result + shift[:, i].view(-1, 1, 1, 1) * candidate
        return result

    def classify(self, stream: Stream) -> Tensor:
        """Logits from the last stream."""
        pooled = pooled_mean(stream).float()[:, :, None, None]
        return self.classifier(pooled, UNGATED_BITS).flatten(1)

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
        if plain.depth != self.depth:
            raise ValueError(f"plain has depth {plain.depth}, this network {self.depth}")
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

    def _candidate(self, block: ResidualBlock, stream: Tensor, width: int) -> Tensor:
        """What a block gives at one width for every sample, by its running statistics."""
        norms = [m for m in block.modules() if isinstance(m, PerWidthBatchNorm2d)]
        modes = [norm.training for norm in norms]
        for norm in norms:
            norm.training = False
        result: Tensor = block(stream, width)
        for norm, mode in zip(norms, modes, strict=True):
            norm.training = mode
        return result

    def macs(self, height: int, width: int) -> LayerMacs:
        """Multiply-accumulates for one image of ``height`` x ``width``."""
        ungated = self.in_channels * WIDTHS[0] * 9 * height * width
        gated = []
        for i, (c_in, c_out, stride) in enumerate(_stages(self.depth)):
            height, width = -(-height // stride), -(-width // stride)
            branch = (c_in + c_out) * c_out * 9 * height * width
            if stride != 1 or c_in != c_out:
                ungated += c_in * c_out * height * width
            if i:
                gated.append(branch)
            else:
                ungated += branch
        ungated += WIDTHS[-1] * self.num_classes
        gates = sum(self.gate.macs(i) for i in range(self.gated_blocks))
        return LayerMacs(tuple(gated), ungated, gates)


def _initialise(model: nn.Module) -> None:
    """Kaiming-normal convolutions (He et al., ICCV 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
