"""Whole networks to time: ours frozen, at forced and decided widths, and the static peers.

All are CIFAR ResNets with random weights. Ours have calibrated steps, so that weights fill the
range of their width as trained ones do: times without VNNI depend on it. Our gates are random too,
scaled so that they use every width; what gates decide after training is another matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from bench.interleaved import interleave
from bench.prepared import Unavailable
from dfs import Engine, calibrate, freeze
from dfs.engine.peers import PEERS, Peer, PeerUnavailableError, StaticNetwork
from dfs.models import DynamicResNet, cifar_resnet
from dfs_kernels import use_backend

IMAGE_SIZE = (32, 32)
CHOICES = (0, 2, 4, 8)
# Of a batch of one: each call takes the next image and the next decisions.
_VARIANTS = 16
# Of random gates' weights, so that their logits are apart.
_GATE_GAIN = 30.0
# Makes a gate choose one width whatever it sees.
_FAVOUR = 1e6
_CALIBRATION_IMAGES = 64
_ROUNDS = {1: 25, 64: 9}
# Long beside a call at batch 1, whose weights the turns of others drove out of the cache.
TURN_SECONDS = 20e-3
_FLOAT_TOLERANCE, _INT8_TOLERANCE = 1e-3, 0.2


@dataclass(frozen=True)
class Contestant:
    """One way to classify a batch.

    Attributes:
        prepare: from depth, batch and threads to a checked call; raises :class:`Unavailable`.
    """

    name: str
    label: str
    prepare: Callable[[int, int, int], Callable[[], Any]]
    many_only: bool = False


@dataclass(frozen=True)
class Measured:
    """What a comparison gave.

    Attributes:
        times: seconds per call of each contestant in each round.
        missing: why a contestant could not run.
    """

    times: dict[str, list[float]]
    missing: dict[str, str]


@cache
def dynamic_network(depth: int, favoured: int | None = None) -> DynamicResNet:
    """In evaluation mode; with ``favoured`` all its gates choose that width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DynamicResNet(depth, 10, 3, CHOICES)
        for name, parameter in model.named_parameters():
            if name.startswith(("gate.embed", "gate.proj")) and name.endswith("weight"):
                parameter.data *= _GATE_GAIN
    calibrate(model, images(_CALIBRATION_IMAGES))
    if favoured is not None:
        model.gate.choice_bias[CHOICES.index(favoured)] += _FAVOUR
    return model.eval()


@cache
def engine(depth: int, favoured: int | None = None) -> Engine:
    return freeze(dynamic_network(depth, favoured), IMAGE_SIZE)


@cache
def static_network(depth: int) -> StaticNetwork:
    return StaticNetwork(cifar_resnet(depth), IMAGE_SIZE)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def spread_policy(samples: int, blocks: int) -> Tensor:
    """Decisions (samples, blocks) that use every width alike, in every sample in another order."""
    generator = torch.Generator().manual_seed(2)
    widths = torch.tensor(CHOICES, dtype=torch.int32).repeat(blocks // len(CHOICES) + 1)
    rows = []
    for n in range(samples):
        # What is over when the blocks don't divide goes to another width in each sample.
        row = widths.roll(n)[:blocks]
        rows.append(row[torch.randperm(blocks, generator=generator)])
    return torch.stack(rows)


def _ours(policy: int | str | None) -> Callable[[int, int, int], Callable[[], Any]]:
    def prepare(depth: int, batch: int, threads: int) -> Callable[[], Any]:
        run = engine(depth)
        variants = _VARIANTS if batch == 1 else 1
        every = images(variants * batch)
        spread = spread_policy(len(every), run.gated_blocks)
        batches = every.split(batch)
        policies: Sequence[Any] = spread.split(batch) if policy == "spread" else [policy] * variants
        _check_ours(depth, batches[0][:1], _first(policies[0]))
        turns = cycle(zip(batches, policies, strict=True))
        return lambda: run(*next(turns))

    return prepare


def _first(policy: Any) -> Any:
    return policy[:1] if isinstance(policy, Tensor) else policy


@torch.no_grad()
def _check_ours(depth: int, image: Tensor, policy: Any) -> None:
    """The very bits of the eager network on the reference."""
    found = engine(depth)(image, policy)
    with use_backend("reference"):
        expected = dynamic_network(depth).run(image, policy)
    assert torch.equal(found.bits, expected.bits)
    assert torch.equal(found.logits, expected.logits)


def _theirs(peer: Peer) -> Callable[[int, int, int], Callable[[], Any]]:
    def prepare(depth: int, batch: int, threads: int) -> Callable[[], Any]:
        network, x = static_network(depth), images(batch)
        try:
            call = peer.prepare(network, x, threads)
        except PeerUnavailableError as reason:
            raise Unavailable(str(reason)) from None
        with torch.inference_mode():
            expected = network.model(x)
        distance = (torch.as_tensor(call()) - expected).abs().max() / expected.abs().max()
        assert distance < (_INT8_TOLERANCE if "int8" in peer.name else _FLOAT_TOLERANCE)
        return call

    return prepare


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("dfs_8", "DFS, all 8 bits", _ours(8)),
        Contestant("dfs_4", "DFS, all 4 bits", _ours(4)),
        Contestant("dfs_2", "DFS, all 2 bits", _ours(2)),
        Contestant("dfs_0", "DFS, all skipped", _ours(0)),
        Contestant("dfs_spread", "DFS, 0/2/4/8 spread evenly", _ours("spread")),
        Contestant("dfs_gates", "DFS, as random gates decide", _ours(None)),
        *(Contestant(p.name, p.label, _theirs(p), p.many_only) for p in PEERS),
    )
}


@cache
def measure(depth: int, batch: int, threads: int) -> Measured:
    """Check every contestant, then time all of them in turns."""
    calls, missing = {}, {}
    for name, contestant in CONTESTANTS.items():
        if contestant.many_only and (batch == 1 or threads == 1):
            missing[name] = "it is of use for several images on several threads only"
            continue
        try:
            calls[name] = contestant.prepare(depth, batch, threads)
        except Unavailable as reason:
            missing[name] = str(reason)
    times = interleave(
        list(calls.values()), threads=threads, rounds=_ROUNDS[batch], turn_seconds=TURN_SECONDS
    )
    return Measured(dict(zip(calls, times, strict=True)), missing)
