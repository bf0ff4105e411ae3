"""What a training step costs: joint training beside plain steps of the same network.

Joint training evaluates every width on offer for the gate's gradient. It is held to five times a
plain step: one on the weights, at decisions given beforehand, of the same quantized network. The
float network's step is shown beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.interleaved import interleave, per_round, spread
from dfs.data import DataSplits, ImageSet
from dfs.train import Trainer
from dfs.train.presets import load_preset
from dfs.train.stages import FloatStage, JointStage, Measured, Stage

pytest.importorskip("pytest_benchmark")

LIMIT = 5.0
_BATCH = 64
_ROUNDS = 7
# Steps to run before and while it is timed, without the cost reaching its target.
_EPOCHS = 1000


def _images(size: int, channels: int) -> DataSplits:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * _BATCH, channels, size, size, generator=generator)
    subset = ImageSet(images, torch.randint(10, (len(images),), generator=generator))
    return DataSplits("random", 10, subset, subset, subset, subset, shift=0, flip=False)


def _trainer(model: str, size: int, channels: int, choices: tuple[int, ...]) -> Trainer:
    config = replace(
        load_preset("default"),
        model=model,
        choices=choices,
        batch_size=_BATCH,
        joint_epochs=_EPOCHS,
        float_epochs=_EPOCHS,
    )
    return Trainer(config, None, _images(size, channels))


def _steps(stage: Stage, count: int) -> Callable[[], None]:
    """So many steps of a stage, going on where the last call stopped."""
    steps = itertools.count()

    def call() -> None:
        for _ in range(count):
            stage.take(next(steps))

    return call


class _GivenDecisions(JointStage):
    """Joint training's step on the weights, at random decisions instead of the gates'."""

    def take(self, step: int) -> Measured:
        model = self.model
        drawn = torch.randint(len(model.choices), (_BATCH, model.gated_blocks))
        policy = torch.tensor(model.choices, dtype=torch.int32)[drawn]
        return {"loss": self.routed_step(step, self.config.joint_lr, 0.0, policy)}


@pytest.mark.parametrize(
    ("model", "size", "channels", "choices"),
    [
        ("resnet14", 12, 1, (0, 2, 4, 8)),
        ("resnet20", 32, 3, (0, 2, 4, 8)),
        ("resnet20", 32, 3, (0, 2, 4, 8, 32)),
    ],
    ids=["resnet14-12x12", "resnet20-32x32", "resnet20-32x32-with-32-bits"],
)
@pytest.mark.parametrize("threads", [1, 2], ids=["1thread", "2threads"], indirect=True)
def test_joint_step(
    benchmark: Any,
    verdicts: list[dict[str, Any]],
    threads: int,
    model: str,
    size: int,
    channels: int,
    choices: tuple[int, ...],
) -> None:
    benchmark.group = f"training, threads {threads}"
    trainers = [_trainer(model, size, channels, choices) for _ in range(3)]
    # A step on the gates comes with every other step on the weights.
    period = trainers[0].config.gate_every
    calls = [
        _steps(JointStage(trainers[0]), period),
        _steps(_GivenDecisions(trainers[1]), period),
        _steps(FloatStage(trainers[2]), period),
    ]

    def measure() -> list[list[float]]:
        return interleave(calls, threads=threads, rounds=_ROUNDS)

    times = benchmark.pedantic(measure, rounds=1, iterations=1)
    ratio = spread(per_round(times, lambda t: t[0] / t[1]))
    to_float = spread(per_round(times, lambda t: t[0] / t[2]))
    info = {
        "kind": "bar",
        "bar": "joint_step",
        "label": f"joint step / plain step (float network: {to_float.median:.1f})",
        "layer": f"{model} {channels}x{size}x{size}, {len(choices)} choices",
        "batch": _BATCH,
        "threads": threads,
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "limit": LIMIT,
        "held": ratio.median <= LIMIT,
        "to_float": to_float.median,
        "seconds": spread(times[0]).median / period,
    }
    benchmark.extra_info.update(info)
    verdicts.append(info)
