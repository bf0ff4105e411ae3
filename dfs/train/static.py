"""Networks that run at given widths, trained as long as the dynamic ones: what those must beat.

Their last stage has as many sample passes as S3 to S5 of a dynamic network, the same teacher and
the same loss, half cross-entropy and half distillation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dfs.data import DataSplits, ImageSet
from dfs.train.calibrate import reestimate_batchnorm
from dfs.train.config import TrainConfig
from dfs.train.evaluate import accuracy
from dfs.train.stages import (
    GateStage,
    JointStage,
    Measured,
    SettleStage,
    SwitchStage,
    WeightStage,
    decay,
    estimation_batches,
)

if TYPE_CHECKING:
    from dfs.train.trainer import Trainer

# Of a step of the switchable stage.
_SWITCH_PASSES = 3
# What decides how long a dynamic network is trained after it is switchable.
_DURATION = ("gate_epochs", "joint_epochs", "gate_every", "settle_fraction")


def dynamic_passes(config: TrainConfig, data: DataSplits) -> int:
    """Images that S3 to S5 put through the network forward and backward, on weights or gates."""
    weights = min(config.batch_size, len(data.train))
    gates = min(config.batch_size, len(data.gate))
    joint = JointStage.length(config, data)
    gate_steps = GateStage.length(config, data) + -(-joint // config.gate_every)
    return weights * (joint + SettleStage.length(config, data)) + gates * gate_steps


class StaticStage(WeightStage):
    """Weights alone, at the widths of ``static_widths`` in turn."""

    name = "S3 static"
    settings = ("static_widths", "joint_lr", *_DURATION)
    passes = 3.0

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.model, trainer.config.joint_lr)

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        size = min(config.batch_size, len(data.train))
        return max(1, round(dynamic_passes(config, data) / size))

    def take(self, step: int) -> Measured:
        config = self.config
        lr = config.joint_lr * decay(config, step, self.steps())
        width = config.static_widths[step % len(config.static_widths)]
        return {"loss": self.routed_step(step, lr, 0.0, width)}

    def finish(self) -> dict[str, float]:
        batches = estimation_batches(self)
        results = {}
        for width in self.config.static_widths:
            reestimate_batchnorm(self.model, batches, width)
            results[f"val_accuracy_{width}"] = accuracy(self.model, self.data.val, width)
        return results


class StaticFloatStage(WeightStage):
    """The float network goes on for the passes of S2 and of what follows it, taught by itself."""

    name = "S1 float"
    settings = (
        "teacher",
        "distill_temperature",
        "static_widths",
        "switch_epochs",
        "switch_lr",
        *_DURATION,
    )

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.plain, trainer.config.switch_lr)

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return _SWITCH_PASSES * SwitchStage.length(config, data) + StaticStage.length(config, data)

    def take(self, step: int) -> Measured:
        plain = self.trainer.plain.train()

        def loss_of(part: ImageSet) -> Tensor:
            return self.half_distilled(plain(part.images), self.taught(part), part.labels)

        lr = self.config.switch_lr * decay(self.config, step, self.steps())
        return {"loss": self.descend(self.batch(step), lr, loss_of)}

    def finish(self) -> dict[str, float]:
        return {"val_accuracy": accuracy(self.trainer.plain, self.data.val)}

    def state_dict(self) -> dict[str, Any]:
        # The teacher is the network as it was before this stage.
        return {**super().state_dict(), "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.teacher.load_state_dict(state["teacher"])
