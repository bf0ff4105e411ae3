"""The stages of the paper's authors (Shen et al., AAAI 2020; github.com/Torment123/DFS).

P0 float            the backbone at full precision: cross-entropy
P1 full execution   gates alone, backbone frozen, until they choose the dearest option throughout
P2 joint            gates and weights

P1 and P2 minimize cross-entropy + sign * beta * summed cost. The sum goes over the batch's samples
and gated blocks, each costing (bits/32)^2, and sign is 1 where the batch's mean cost is above the
target, else -1. P1 is the same with a target of 100 %, so that the sign is always -1. Decisions are
the argmax with the gradient of the softmax; every choice is computed for every sample and the mask
adds them up, BatchNorm in training throughout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs.data import DataSplits, ImageSet
from dfs.nn import replicas
from dfs.train.calibrate import calibrate_steps, estimate_every_width
from dfs.train.config import TrainConfig
from dfs.train.distributed import average_gradients
from dfs.train.evaluate import mean_cost
from dfs.train.oracle import uniform_oracle
from dfs.train.stages import (
    ORACLE,
    Measured,
    Stage,
    accumulate,
    decay,
    results_at_target,
    set_trainable,
    steps_per_epoch,
)

_MOMENTUM = 0.9
_RULE = ("gate", "choices", "stream", "semantics", "cost", "latency_table", "beta")


class RuleStage(Stage):
    """A stage that minimizes the paper's loss by SGD with momentum.

    Args:
        parameters: what it trains.
    """

    passes = 8.0

    def __init__(self, trainer: Any, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(trainer)
        self.lr = lr
        self.cost = trainer.cost
        self.optimizer = torch.optim.SGD(
            list(parameters), lr, momentum=_MOMENTUM, weight_decay=self.config.weight_decay
        )

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])

    def rule_step(self, step: int, target: float) -> Measured:
        """One step of the loss; above ``target`` it pushes the cost down, else up."""
        config, model = self.config, self.model.train()
        batch = self.batch(step)
        measured = torch.zeros(2, dtype=torch.float64, device=batch.images.device)

        def loss_of(part: ImageSet) -> Tensor:
            out = model.run(part.images, gate_gradient=True)
            spent = self.cost(out.mask)
            mean = replicas.total(spent.detach().sum()) / (len(part) * _processes())
            sign = torch.where(mean > target, 1, -1)
            cross_entropy = F.cross_entropy(out.logits, part.labels)
            found = torch.stack([cross_entropy.detach(), mean])
            measured.add_(found * (len(part) / len(batch)))
            # The sum over the batch; accumulation weighs the parts by their share of it.
            summed = spent.mean() * len(batch) * _processes() * model.gated_blocks
            return cross_entropy + sign * config.beta * summed

        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * decay(config, step, self.steps())
        self.optimizer.zero_grad()
        accumulate(batch, config.micro_batches, loss_of)
        average_gradients(self.optimizer)
        self.optimizer.step()
        return dict(zip(("loss", "cost"), measured, strict=True))


def _processes() -> int:
    return replicas.count() if replicas.active() else 1


class FullExecutionStage(RuleStage):
    """P1: gates learn to choose the dearest option, so that joint training starts from there."""

    name = "P1 full execution"
    settings = (*_RULE, "gate_epochs", "gate_lr", "calibration_images")

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer, trainer.model.gate.parameters(), trainer.config.gate_lr)

    @staticmethod
    def prepare(trainer: Any) -> None:
        config, model = trainer.config, trainer.model
        model.load_plain(trainer.plain)
        images = trainer.data.train.first(config.calibration_images)
        calibrate_steps(model, images, config.batch_size, config.seed)
        estimate_every_width(model, list(images.split(config.batch_size)))

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return config.gate_epochs * steps_per_epoch(data.train, config)

    def take(self, step: int) -> Measured:
        others = [p for n, p in self.model.named_parameters() if not n.startswith("gate.")]
        set_trainable(others, False)
        measured = self.rule_step(step, 1.0)
        set_trainable(others, True)
        return measured

    def finish(self) -> dict[str, float]:
        return {"val_cost": mean_cost(self.model, self.data.val, self.cost)}


class PaperJointStage(RuleStage):
    """P2: gates and weights together, the cost pushed towards the target from above."""

    name = "P2 joint"
    settings = ("target", "joint_epochs", "joint_lr", "cost_tolerance")

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer, trainer.model.parameters(), trainer.config.joint_lr)

    @staticmethod
    def prepare(trainer: Any) -> None:
        trainer.results[ORACLE] = uniform_oracle(
            trainer.model, trainer.plain, trainer.data.val, trainer.cost
        )

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return config.joint_epochs * steps_per_epoch(data.train, config)

    def take(self, step: int) -> Measured:
        return self.rule_step(step, self.config.target)

    def finish(self) -> dict[str, float]:
        return results_at_target(self)
