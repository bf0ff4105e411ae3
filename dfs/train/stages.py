"""The stages S0 to S5: what one step of each does, and when its result is good enough.

S0 float          full-precision network; a frozen copy teaches the others
S1 calibrate      steps by least squares, BatchNorm copied to every width and estimated again
S2 switch         one set of weights that works at every width
S3 gate           gates only, on images that the weights never saw
S4 joint          gates and weights, the cost brought to its target
S5 settle         gates frozen, weights adapt to the decisions, BatchNorm estimated again
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs.data import Images, ImageSet, training_batch
from dfs.models import DynamicResNet
from dfs.nn import LSQ, PerWidthBatchNorm2d, StreamQuantizer
from dfs.train.calibrate import (
    calibrate_gate_bias,
    calibrate_steps,
    estimate_every_width,
    reestimate_batchnorm,
    standardise_gates,
)
from dfs.train.controller import CostController
from dfs.train.evaluate import accuracy, mean_cost

if TYPE_CHECKING:
    from dfs.train.trainer import Trainer

_STEP_LR_RATIO = 0.1
_MOMENTUM = 0.9
_GATE_SEED_SHIFT = 17


class StageError(RuntimeError):
    """A stage ended without reaching what the next one needs."""


class Stage:
    """One stage of a run. Everything that changes from step to step is in its state dict."""

    name = ""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.config = trainer.config
        self.data = trainer.data
        self.model = trainer.model

    @staticmethod
    def prepare(trainer: Trainer) -> None:
        """Change the networks once, before the first step."""

    def steps(self) -> int:
        raise NotImplementedError

    def take(self, step: int) -> dict[str, float]:
        """Do step ``step``; returns what was measured."""
        raise NotImplementedError

    def finish(self) -> dict[str, float]:
        """Called after the last step; StageError if the result is not good enough."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def steps_per_epoch(self) -> int:
        count = len(self.data.train)
        return count // min(self.config.batch_size, count)

    def batch(self, step: int) -> ImageSet:
        """The training batch of a step of this stage."""
        seed = self.config.seed * 31 + self.trainer.stage_index
        return training_batch(self.data, self.data.train, self.config.batch_size, seed, step)

    def gate_batch(self, step: int) -> ImageSet:
        """A batch of the images that are kept for the gates."""
        seed = self.config.seed * 31 + self.trainer.stage_index + _GATE_SEED_SHIFT
        return training_batch(self.data, self.data.gate, self.config.batch_size, seed, step)


def cosine(step: int, total: int) -> float:
    """1 falling to 0 over ``total`` steps (Loshchilov and Hutter, ICLR 2017)."""
    return 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher/T) || softmax(logits/T)) (Hinton et al., 2015)."""
    return temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )


def diversity(gate_logits: Tensor) -> Tensor:
    """H(mean p) - mean H(p) over the batch, averaged over blocks; large when inputs decide.

    Args:
        gate_logits: (N, blocks, choices).
    """
    p = gate_logits.softmax(-1)

    def entropy(q: Tensor) -> Tensor:
        return -(q * q.clamp_min(1e-12).log()).sum(-1)

    return (entropy(p.mean(0)) - entropy(p).mean(0)).mean()


def weight_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters of everything but the gates: steps learn slowly, only convolutions decay."""
    gates = {id(p) for p in model.gate.parameters()} if isinstance(model, DynamicResNet) else set()
    steps, plain, decayed = [], [], []
    step_ids = {
        id(p)
        for m in model.modules()
        if isinstance(m, (LSQ, StreamQuantizer))
        for p in m.parameters(recurse=False)
    }
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in gates:
                continue
            if id(parameter) in step_ids:
                steps.append(parameter)
            elif isinstance(module, nn.Conv2d) and parameter.dim() == 4:
                decayed.append(parameter)
            else:
                plain.append(parameter)
    return [
        {"params": decayed, "lr": lr, "ratio": 1.0, "weight_decay": weight_decay},
        {"params": plain, "lr": lr, "ratio": 1.0, "weight_decay": 0.0},
        {"params": steps, "lr": lr, "ratio": _STEP_LR_RATIO, "weight_decay": 0.0},
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)


def freeze_batchnorm(model: nn.Module) -> None:
    """Normalize by the running statistics, which stay as they are."""
    for module in model.modules():
        if isinstance(module, PerWidthBatchNorm2d):
            module.eval()


class WeightStage(Stage):
    """A stage that trains weights by SGD, most of them taught by the float network.

    Args:
        network: whose parameters are trained; gates never are.
    """

    def __init__(self, trainer: Trainer, network: nn.Module, lr: float) -> None:
        super().__init__(trainer)
        groups = weight_groups(network, lr, self.config.weight_decay)
        self.optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM, nesterov=True)
        self.teacher = copy.deepcopy(trainer.plain).eval()
        set_trainable(self.teacher.parameters(), False)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor:
        """The teacher's logits."""
        logits: Tensor = self.teacher(images)
        return logits

    def half_distilled(self, logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """Half cross-entropy, half distillation."""
        distilled = distillation(logits, taught, self.config.distill_temperature)
        return 0.5 * F.cross_entropy(logits, labels) + 0.5 * distilled

    def routed_step(self, step: int, lr: float, explore: float) -> float:
        """One step on everything but the gates, at the gates' own decisions."""
        model = self.model.train()
        set_trainable(model.gate.parameters(), False)
        batch = self.batch(step)
        set_lr(self.optimizer, lr)
        logits = model.run(batch.images, explore=explore).logits
        loss = self.half_distilled(logits, self.taught(batch.images), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        set_trainable(model.gate.parameters(), True)
        return loss.item()


class GateLearner:
    """What teaches the gates in S3 and S4: their optimizer and the cost controller."""

    def __init__(self, trainer: Trainer, lr: float) -> None:
        config = trainer.config
        self.model = trainer.model
        self.cost = trainer.cost
        self.optimizer = torch.optim.Adam(self.model.gate.parameters(), lr)
        self.controller = CostController(config.target, config.lambda_start, config.lambda_rate)

    def step(
        self, batch: ImageSet, temperature: float, progress: float, diversity_weight: float
    ) -> dict[str, float]:
        """One step on the gates alone; the loss sees what every choice would have given."""
        model, controller = self.model.train(), self.controller
        freeze_batchnorm(model)
        others = [p for n, p in model.named_parameters() if not n.startswith("gate.")]
        set_trainable(others, False)
        out = model.run(batch.images, temperature=temperature, gate_gradient=True)
        assert out.gate_logits is not None
        spent = self.cost(out.mask).mean()
        loss = F.cross_entropy(out.logits, batch.labels)
        total = loss + controller.weight * spent / controller.target_at(progress)
        total = total - diversity_weight * diversity(out.gate_logits)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        set_trainable(others, True)
        controller.update(spent.item(), progress)
        return {"gate_loss": loss.item(), "cost": spent.item(), "lambda": controller.weight}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.controller.load_state_dict(state["controller"])


class FloatStage(WeightStage):
    """S0: the full-precision network."""

    name = "S0 float"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.plain, trainer.config.float_lr)

    def steps(self) -> int:
        return self.config.float_epochs * self.steps_per_epoch()

    def take(self, step: int) -> dict[str, float]:
        plain = self.trainer.plain.train()
        batch = self.batch(step)
        set_lr(self.optimizer, self.config.float_lr * cosine(step, self.steps()))
        loss = F.cross_entropy(plain(batch.images), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def finish(self) -> dict[str, float]:
        return {"val_accuracy": accuracy(self.trainer.plain, self.data.val)}


class CalibrateStage(Stage):
    """S1: from the float network to steps and statistics for every width. One step."""

    name = "S1 calibrate"

    def steps(self) -> int:
        return 1

    def take(self, step: int) -> dict[str, float]:
        config, model = self.config, self.model
        model.load_plain(self.trainer.plain)
        images = self.data.train.first(config.calibration_images)
        calibrate_steps(model, images, config.batch_size, config.seed)
        estimate_every_width(model, list(images.split(config.batch_size)))
        return {}

    def finish(self) -> dict[str, float]:
        return width_accuracies(self.model, self.data.val)


class SwitchStage(WeightStage):
    """S2: one set of weights for every width, taught by the float network.

    A step has three passes: everything at the widest integer width, half cross-entropy and half
    distillation; everything at the narrowest; and a width drawn per sample and block; the last two
    by distillation. The first fifth draws from the two widest widths only.
    """

    name = "S2 switch"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.model, trainer.config.switch_lr)

    def steps(self) -> int:
        return self.config.switch_epochs * self.steps_per_epoch()

    def take(self, step: int) -> dict[str, float]:
        config, model = self.config, self.model.train()
        batch = self.batch(step)
        set_lr(self.optimizer, config.switch_lr * cosine(step, self.steps()))
        taught = self.taught(batch.images)
        integer = [c for c in model.choices if c not in (0, 32)]
        warm = step < self.steps() / 5
        allowed = integer[-2:] if warm else list(model.choices)
        shape = (len(batch), model.gated_blocks)
        drawn = torch.tensor(allowed, dtype=torch.int32)[torch.randint(len(allowed), shape)]
        self.optimizer.zero_grad()
        wide = self.half_distilled(model(batch.images, integer[-1]), taught, batch.labels)
        wide.backward()
        for policy in (allowed[0] if warm else integer[0], drawn):
            logits = model(batch.images, policy)
            distillation(logits, taught, config.distill_temperature).backward()
        self.optimizer.step()
        return {"loss": wide.item()}

    def finish(self) -> dict[str, float]:
        estimate_every_width(self.model, estimation_batches(self))
        results = width_accuracies(self.model, self.data.val)
        full = self.trainer.results[FloatStage.name]["val_accuracy"]
        for width, points in self.config.exit_points:
            reached = results.get(f"val_accuracy_{width}")
            if reached is not None and reached < full - points / 100:
                raise StageError(
                    f"{self.name}: at {width} bits the validation accuracy is {reached:.2%}, more "
                    f"than {points} points below the float network's {full:.2%}"
                )
        return results


class GateStage(Stage):
    """S3: the gates alone, Gumbel temperature falling."""

    name = "S3 gate"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.learner = GateLearner(trainer, trainer.config.gate_lr)

    @staticmethod
    def prepare(trainer: Trainer) -> None:
        images = trainer.data.gate.first(trainer.config.calibration_images)
        standardise_gates(trainer.model, images)
        # Where the joint stage's target starts, too.
        trainer.model.gate.favour_cost(2 * trainer.config.target, trainer.cost.of_choices())

    def steps(self) -> int:
        count = len(self.data.gate)
        return self.config.gate_epochs * (count // min(self.config.batch_size, count))

    def take(self, step: int) -> dict[str, float]:
        config = self.config
        done = step / max(self.steps() - 1, 1)
        temperature = config.gumbel_start * (config.gumbel_end / config.gumbel_start) ** done
        return self.learner.step(self.gate_batch(step), temperature, 0.0, config.diversity)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)


class JointStage(WeightStage):
    """S4: weights on their images, gates on theirs, in turn; the cost comes down to the target."""

    name = "S4 joint"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.model, trainer.config.joint_lr)
        self.learner = GateLearner(trainer, trainer.config.joint_gate_lr)

    def steps(self) -> int:
        return self.config.joint_epochs * self.steps_per_epoch()

    def take(self, step: int) -> dict[str, float]:
        config = self.config
        progress = step / max(self.steps() - 1, 1)
        left = 1 - progress
        measured = {}
        if step % config.gate_every == 0:
            batch = self.gate_batch(step // config.gate_every)
            measured = self.learner.step(
                batch, config.gumbel_end, progress, config.diversity * left
            )
        # The last tenth of the joint training belongs to the settling stage's learning rate.
        lr = config.joint_lr * max(cosine(step, self.steps()), config.settle_fraction)
        measured["loss"] = self.routed_step(step, lr, config.explore * left)
        return measured

    def finish(self) -> dict[str, float]:
        return {"val_cost": tune_gate_bias(self)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.learner.load_state_dict(state["learner"])


class SettleStage(WeightStage):
    """S5: hard decisions of frozen gates; BatchNorm of what each block and width really sees."""

    name = "S5 settle"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.model, trainer.config.joint_lr)

    def steps(self) -> int:
        joint = self.config.joint_epochs * self.steps_per_epoch()
        return max(1, round(joint * self.config.settle_fraction))

    def take(self, step: int) -> dict[str, float]:
        config = self.config
        lr = config.joint_lr * config.settle_fraction * cosine(step, self.steps())
        return {"loss": self.routed_step(step, lr, 0.0)}

    def finish(self) -> dict[str, float]:
        config, model = self.config, self.model
        kept = reestimate_batchnorm(
            model, estimation_batches(self), None, config.batchnorm_min_routed
        )
        tune_gate_bias(self)
        reached = mean_cost(model, self.data.val, self.trainer.cost)
        results = {
            "val_accuracy": accuracy(model, self.data.val),
            "val_cost": reached,
            "batchnorm_kept": float(len(kept)),
        }
        if abs(reached / config.target - 1) > config.cost_tolerance:
            raise StageError(
                f"{self.name}: the validation cost is {reached:.3%}, more than "
                f"{config.cost_tolerance:.0%} off the target of {config.target:.3%}"
            )
        return results


STAGES: tuple[type[Stage], ...] = (
    FloatStage,
    CalibrateStage,
    SwitchStage,
    GateStage,
    JointStage,
    SettleStage,
)


def estimation_batches(stage: Stage) -> list[Tensor]:
    """Training images for BatchNorm statistics: augmented anew where the set is small."""
    config = stage.config
    seed = config.seed * 31 + stage.trainer.stage_index + 2 * _GATE_SEED_SHIFT
    size = min(config.batch_size, len(stage.data.train))
    count = -(-config.batchnorm_images // size)
    return [
        training_batch(stage.data, stage.data.train, size, seed, i).images for i in range(count)
    ]


def tune_gate_bias(stage: Stage) -> float:
    """Tilt the gate to the target on the validation images."""
    config = stage.config
    return calibrate_gate_bias(
        stage.model, stage.data.val, stage.trainer.cost, config.target, config.batch_size
    )


def width_accuracies(model: DynamicResNet, images: Images) -> dict[str, float]:
    """Validation accuracy with every gated block at one width."""
    return {
        f"val_accuracy_{width}": accuracy(model, images, width) for width in model.choices if width
    }
