"""A whole ResNet on a GPU: frozen, at forced and decided widths, beside its static twin in bf16.

Weights are random, since times do not depend on what they say (:mod:`bench.engine_contestants`).
Nothing goes round several buffers: at a batch of 1024 the activations are larger than any cache,
and one image stays in the cache in use too.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench.bars import Bar, Verdict
from bench.engine_contestants import (
    IMAGE_SIZE,
    dynamic_network,
    engine,
    images,
    spread_policy,
    static_network,
)
from bench.gpu.device import is_rehearsal, machine
from bench.interleaved import ROUNDS, per_round, spread, take_turns
from dfs import Engine, freeze
from dfs.models.plain import PlainBlock

DEPTH = 74
BATCHES = (1, 64, 1024)
# Evenly spread over 0/2/4/8, the gates' time with it, and the static network in a CUDA graph.
SPREAD = Bar("network_spread", "network, 0/2/4/8 spread evenly / static bf16 in a CUDA graph")
_SPREAD_BATCH, _SPREAD_LIMIT = 1024, 0.5
# In a rehearsal.
_SMALL_DEPTH, _SMALL_BATCH, _FEW_ROUNDS = 8, 3, 2
# A turn lasts at least as long.
_TURN_SECONDS = 5e-3
# Samples whose results are compared with those of the CPU.
_CHECKED = 2
# Of the largest logit, after so many layers of eight bits of precision each.
_BF16_TOLERANCE = 0.1


@dataclass(frozen=True)
class NetworkContestant:
    """One way to classify a batch.

    Attributes:
        prepare: from depth and batch to a call whose result was checked.
        is_recorded: whether the call is to be recorded; ours replays recordings by itself.
    """

    name: str
    label: str
    prepare: Callable[[int, int], Callable[[], Any]]
    is_recorded: bool = False

    def turn(self, depth: int, batch: int) -> Callable[[], float]:
        """Gives the seconds of a call."""
        gpu, call = machine(), self.prepare(depth, batch)
        run = gpu.record(call, 1) if self.is_recorded else _without_result(call)
        run()
        repeats = 1 if is_rehearsal() else max(1, round(_TURN_SECONDS / gpu.seconds(run, 1)))
        return lambda: gpu.seconds(run, repeats) / repeats


@dataclass(frozen=True)
class NetworkTimes:
    """Seconds of a call in each round, by contestant; all took turns."""

    batch: int
    rounds: dict[str, list[float]]

    def points(self) -> list[dict[str, Any]]:
        """For the results file."""
        found = []
        for name, seconds in self.rounds.items():
            median = spread(seconds)
            found.append(
                {
                    "contestant": name,
                    "label": CONTESTANTS[name].label,
                    "network": f"ResNet-{DEPTH}",
                    "batch": self.batch,
                    "seconds": median.median,
                    "low": median.low,
                    "high": median.high,
                }
            )
        return found

    def verdict(self) -> Verdict | None:
        """On the bar, at the batch that it was set for."""
        if self.batch != _SPREAD_BATCH:
            return None
        names = ("engine_spread", "engine_gates", "engine_8", "static_graph")
        times = [self.rounds[name] for name in names]
        # Forced decisions spread evenly, and what gates that always choose 8 bits add to it.
        ratio = spread(per_round(times, lambda t: (t[0] + max(t[1] - t[2], 0.0)) / t[3]))
        seconds = [spread(t).median for t in times]
        return Verdict(ratio, _SPREAD_LIMIT, ratio.median <= _SPREAD_LIMIT, {"seconds": seconds})


def time_networks(batch: int) -> Callable[[], NetworkTimes]:
    """Check every contestant at a batch size; what is returned times them in turns."""
    depth, size = (_SMALL_DEPTH, min(batch, _SMALL_BATCH)) if is_rehearsal() else (DEPTH, batch)
    turns = {name: one.turn(depth, size) for name, one in CONTESTANTS.items()}

    def measure() -> NetworkTimes:
        rounds = take_turns(list(turns.values()), _FEW_ROUNDS if is_rehearsal() else ROUNDS)
        return NetworkTimes(batch, dict(zip(turns, rounds, strict=True)))

    return measure


def bar_info(batch: int, verdict: Verdict) -> dict[str, Any]:
    """The bar's outcome for the results file."""
    return {
        "bar": SPREAD.name,
        "label": SPREAD.label,
        "layer": f"ResNet-{DEPTH}",
        "batch": batch,
        "implementation": "engine",
        "ratio": verdict.ratio.median,
        "low": verdict.ratio.low,
        "high": verdict.ratio.high,
        "limit": verdict.limit,
        "at_least": False,
        "held": verdict.held,
        **verdict.details,
    }


def _without_result(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        call()

    return run


@cache
def _frozen(depth: int, favoured: int | None) -> Engine:
    return freeze(dynamic_network(depth, favoured), IMAGE_SIZE).to(machine().device)


def _ours(policy: int | str | None, favoured: int | None = None) -> Any:
    def prepare(depth: int, batch: int) -> Callable[[], Any]:
        frozen = _frozen(depth, favoured)
        inputs = images(batch)
        given: Any = policy
        if policy == "spread":
            given = spread_policy(batch, frozen.gated_blocks)
        _check_ours(frozen, depth, favoured, inputs, given)
        on_device = inputs.to(frozen.device)
        if isinstance(given, Tensor):
            given = given.to(frozen.device)
        return lambda: frozen(on_device, given)

    return prepare


def _check_ours(
    frozen: Engine, depth: int, favoured: int | None, inputs: Tensor, policy: Any
) -> None:
    """A few samples of the batch: the very bits that they get on a CPU."""
    found = frozen(inputs.to(frozen.device), policy)
    few = policy[:_CHECKED] if isinstance(policy, Tensor) else policy
    expected = engine(depth, favoured)(inputs[:_CHECKED], few)
    assert torch.equal(found.bits[:_CHECKED].cpu(), expected.bits)
    assert torch.equal(found.logits[:_CHECKED].cpu(), expected.logits)


def _static(compiled: bool) -> Callable[[int, int], Callable[[], Any]]:
    def prepare(depth: int, batch: int) -> Callable[[], Any]:
        device, network = machine().device, static_network(depth)
        model = _folded(network.model).to(device, torch.bfloat16)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = images(batch)
        x = inputs.to(device, torch.bfloat16).contiguous(memory_format=torch.channels_last)
        if compiled:
            _compile_blocks(model)

        def call() -> Tensor:
            with torch.no_grad():
                logits: Tensor = model(x)
            return logits

        with torch.no_grad():
            expected = network.model(inputs[:_CHECKED])
        distance = (call()[:_CHECKED].cpu().float() - expected).abs().max()
        assert distance < _BF16_TOLERANCE * expected.abs().max()
        return call

    return prepare


def _folded(network: nn.Module) -> nn.Module:
    """With every BatchNorm in the convolution before it, as who deploys it would have it."""
    model = deepcopy(network)
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            conv = name.replace("bn_", "") if name.startswith("bn_") else name.replace("bn", "conv")
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), norm))
            setattr(module, name, nn.Identity())
    return model


def _compile_blocks(model: nn.Module) -> None:
    """Block by block: blocks of a kind share their code, which takes seconds, not a minute."""
    torch._dynamo.reset()
    # In a rehearsal there is nothing to gain from a compiler.
    backend = "eager" if is_rehearsal() else "inductor"
    for module in model.modules():
        if isinstance(module, PlainBlock):
            module.compile(dynamic=False, backend=backend)


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        NetworkContestant("engine_8", "engine, all 8 bits", _ours(8)),
        NetworkContestant("engine_2", "engine, all 2 bits", _ours(2)),
        NetworkContestant("engine_0", "engine, all skipped", _ours(0)),
        NetworkContestant("engine_spread", "engine, 0/2/4/8 spread evenly", _ours("spread")),
        NetworkContestant("engine_gates", "engine, gates that choose 8 bits", _ours(None, 8)),
        NetworkContestant("static_graph", "static bf16, CUDA graph", _static(False), True),
        NetworkContestant(
            "static_compiled", "static bf16, torch.compile, CUDA graph", _static(True), True
        ),
    )
}
