"""The stages S0 to S5: what one step of each does, and when its result is good enough.

S0 float          full-precision network; a frozen copy teaches the others
S1 calibrate      steps by least squares, BatchNorm copied to every width and estimated again
S2 switch         one set of weights that works at every width
S3 gate           gates only, on images that the weights never saw
S4 joint          gates and weights, the cost brought to its target
S5 settle         gates frozen, weights adapt to the decisions, BatchNorm estimated again

Losses, with CE the cross-entropy, KD the distillation from the float network at temperature T,
T^2 KL(softmax(teacher/T) || softmax(logits/T)), C the mean cost of the batch's decisions:

S0          CE
S2          (CE + KD)/2 at the widest width + KD at the narrowest + KD at widths drawn at random
S3, gates   CE + lambda C / target - diversity (H(mean p) - mean H(p))
S4          weights (CE + KD)/2, gates as in S3; lambda follows the cost (:mod:`.controller`)
S5          (CE + KD)/2
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs.data import DataSplits, Images, ImageSet, training_batch
from dfs.models import DynamicResNet, Policy
from dfs.nn import LSQ, ConstantGate, PerWidthBatchNorm2d, StreamQuantizer, replicas
from dfs.train.calibrate import (
    CostTilt,
    calibrate_gate_bias,
    calibrate_steps,
    estimate_every_width,
    reestimate_batchnorm,
    standardise_gates,
)
from dfs.train.config import TrainConfig
from dfs.train.controller import CostController
from dfs.train.distributed import average_gradients, own_part
from dfs.train.evaluate import accuracy, mean_cost
from dfs.train.oracle import uniform_oracle

if TYPE_CHECKING:
    from dfs.train.trainer import Trainer

_STEP_LR_RATIO = 0.1
_MOMENTUM = 0.9
_GATE_SEED_SHIFT = 17


ORACLE = "oracle"
Measured = dict[str, float | Tensor]

# What every stage depends on.
_COMMON = (
    *("dataset", "image_size", "train_images"),
    *("model", "seed", "batch_size", "micro_batches"),
)
_SCHEDULE = ("schedule", "milestones", "schedule_gamma", "weight_decay")
_TAUGHT = (*_SCHEDULE, "teacher", "distill_temperature")
_BATCHNORM = ("batchnorm_images",)
_DYNAMIC = ("choices", "stream", "semantics")
_GATED = (
    *("gate", "target", "cost", "latency_table", "diversity", "common_gradient"),
    *("lambda_start", "lambda_rate"),
)


class StageError(RuntimeError):
    """A stage ended without reaching what the next one needs."""


class Stage:
    """One stage of a run. Everything that changes from step to step is in its state dict.

    Attributes:
        settings: the names of the settings that its result depends on, beside those of the stages
            before it.
        sharded: whether several processes each take a part of the batches; else each does all.
        passes: how long a step takes, in passes of the float network forward and backward; a
            guess, for the plan of a run that has not come this far.
    """

    name = ""
    settings: ClassVar[tuple[str, ...]] = ()
    sharded = True
    passes = 1.0

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.config = trainer.config
        self.data = trainer.data
        self.model = trainer.model

    @staticmethod
    def prepare(trainer: Trainer) -> None:
        """Change the networks once, before the first step."""

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        """How many steps it has."""
        raise NotImplementedError

    def steps(self) -> int:
        return self.length(self.config, self.data)

    def take(self, step: int) -> Measured:
        """Do step ``step``; returns what was measured.

        Values that are still being computed stay 0-dimensional tensors: a GPU is not waited for.
        """
        raise NotImplementedError

    def finish(self) -> dict[str, float]:
        """Called after the last step; StageError if the result is not good enough."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def batch(self, step: int) -> ImageSet:
        """This process's part of the training batch of a step of this stage."""
        seed = self.config.seed * 31 + self.trainer.stage_index
        size = self.config.batch_size
        return own_part(training_batch(self.data, self.data.train, size, seed, step))

    def gate_batch(self, step: int) -> ImageSet:
        """The same of the images that are kept for the gates."""
        seed = self.config.seed * 31 + self.trainer.stage_index + _GATE_SEED_SHIFT
        size = self.config.batch_size
        return own_part(training_batch(self.data, self.data.gate, size, seed, step))


def accumulate(batch: ImageSet, parts: int, *losses: Callable[[ImageSet], Tensor]) -> list[Tensor]:
    """Back-propagate losses part by part; the means over the batch are what they amount to."""
    totals = [batch.images.new_zeros(()) for _ in losses]
    for index in torch.arange(len(batch), device=batch.images.device).chunk(parts):
        share = len(index) / len(batch)
        part = batch if parts == 1 else batch.take(index)
        for total, loss_of in zip(totals, losses, strict=True):
            loss = loss_of(part) * share
            loss.backward()
            total += loss.detach()
    return totals


def steps_per_epoch(images: Images, config: TrainConfig) -> int:
    """Full batches in a pass over a set."""
    return len(images) // min(config.batch_size, len(images))


def decay(config: TrainConfig, step: int, total: int) -> float:
    """What the learning rate of a step is multiplied by, of ``total`` steps."""
    if config.schedule == "cosine":
        return cosine(step, total)
    passed = sum(step >= round(share * total) for share in config.milestones)
    return config.schedule_gamma**passed


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

    return (entropy(replicas.batch_mean(p)) - entropy(p).mean(0)).mean()


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
        self.teacher = copy.deepcopy(trainer.teacher or trainer.plain).eval()
        set_trainable(self.teacher.parameters(), False)
        self._taught: tuple[ImageSet, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def taught(self, part: ImageSet) -> Tensor:
        """The teacher's logits, kept until it is asked for another part: losses share them."""
        if self._taught is None or self._taught[0] is not part:
            self._taught = (part, self.teacher(part.images))
        return self._taught[1]

    def half_distilled(self, logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """Half cross-entropy, half distillation."""
        distilled = distillation(logits, taught, self.config.distill_temperature)
        return 0.5 * F.cross_entropy(logits, labels) + 0.5 * distilled

    def routed_step(self, step: int, lr: float, explore: float, policy: Policy = None) -> Tensor:
        """One step on everything but the gates, at the gates' own decisions or at a policy."""
        model = self.model.train()
        set_trainable(model.gate.parameters(), False)

        def loss_of(part: ImageSet) -> Tensor:
            logits = model.run(part.images, policy, explore=explore).logits
            return self.half_distilled(logits, self.taught(part), part.labels)

        loss = self.descend(self.batch(step), lr, loss_of)
        set_trainable(model.gate.parameters(), True)
        return loss

    def descend(self, batch: ImageSet, lr: float, *losses: Callable[[ImageSet], Tensor]) -> Tensor:
        """One step of the optimizer on the sum of losses; returns the first."""
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad()
        values = accumulate(batch, self.config.micro_batches, *losses)
        average_gradients(self.optimizer)
        self.optimizer.step()
        return values[0]


class GateLearner:
    """What teaches the gates in S3 and S4: their optimizer and the cost controller."""

    def __init__(self, trainer: Trainer, lr: float) -> None:
        config = trainer.config
        self.model = trainer.model
        self.cost = trainer.cost
        self.micro_batches = config.micro_batches
        if not isinstance(self.model.gate, ConstantGate):
            self.model.gate.common_gradient = config.common_gradient
        self.tilts = CostTilt(self.cost, config.target)
        self.optimizer = torch.optim.Adam(self.model.gate.parameters(), lr)
        self.controller = CostController(config.target, config.lambda_start, config.lambda_rate)

    def step(
        self,
        batch: ImageSet,
        temperature: float,
        progress: float,
        diversity_weight: float,
        steering: float = 0.0,
    ) -> Measured:
        """One step on the gates alone; the loss sees what every choice would have given.

        Args:
            steering: tilt the logits by cost as well, by this share of their deviation for a cost
                that is off the target by all of it. The weight of the cost alone is slow to turn
                gates that are sure, and the weights would be trained for decisions that are not
                those in the end.
        """
        model, controller = self.model.train(), self.controller
        freeze_batchnorm(model)
        others = [p for n, p in model.named_parameters() if not n.startswith("gate.")]
        set_trainable(others, False)
        measured = torch.zeros(3, dtype=torch.float64, device=batch.images.device)

        def loss_of(part: ImageSet) -> Tensor:
            out = model.run(part.images, temperature=temperature, gate_gradient=True)
            assert out.gate_logits is not None
            spent = self.cost(out.mask).mean()
            loss = F.cross_entropy(out.logits, part.labels)
            share = len(part) / len(batch)
            deviation = out.gate_logits.detach().std(-1).mean()
            measured.add_(torch.stack([loss.detach(), spent.detach(), deviation]) * share)
            total = loss + controller.weight * spent / controller.target_at(progress)
            return total - diversity_weight * diversity(out.gate_logits)

        self.optimizer.zero_grad()
        accumulate(batch, self.micro_batches, loss_of)
        average_gradients(self.optimizer)
        self.optimizer.step()
        set_trainable(others, True)
        bias = model.gate.choice_bias
        means = replicas.total(measured) / replicas.count()
        # The controller's decision is the host's: the one time that a step waits for a GPU.
        loss, spent, deviation, *biases = torch.cat([means, bias]).tolist()
        off = max(-1.0, min(1.0, spent / controller.target_at(progress) - 1))
        bias.copy_(self.tilts.bias(self.tilts.of(biases) + steering * deviation * off))
        controller.update(spent, progress)
        return {"gate_loss": loss, "cost": spent, "lambda": controller.weight}

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
    settings = (*_COMMON, *_SCHEDULE, "float_epochs", "float_lr", "float_precision")

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.plain, trainer.config.float_lr)

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return config.float_epochs * steps_per_epoch(data.train, config)

    def take(self, step: int) -> Measured:
        config, plain = self.config, self.trainer.plain.train()

        def loss_of(part: ImageSet) -> Tensor:
            with float_precision(config, part.images.device):
                logits = plain(part.images)
            return F.cross_entropy(logits.float(), part.labels)

        lr = config.float_lr * decay(config, step, self.steps())
        return {"loss": self.descend(self.batch(step), lr, loss_of)}

    def finish(self) -> dict[str, float]:
        return {"val_accuracy": accuracy(self.trainer.plain, self.data.val)}


def float_precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    """What the float network is computed in; its weights and their gradients stay float32."""
    enabled = config.float_precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class CalibrateStage(Stage):
    """S1: from the float network to steps and statistics for every width. One step."""

    name = "S1 calibrate"
    settings = (*_DYNAMIC, "calibration_images")
    sharded = False
    passes = 20.0

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return 1

    def take(self, step: int) -> Measured:
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
    by distillation. The first fifth draws from the two widest widths only. Where 32 bits are the
    only width, they stand for the widest and the narrowest.
    """

    name = "S2 switch"
    settings = (*_TAUGHT, *_BATCHNORM, "switch_epochs", "switch_lr", "exit_points")
    passes = 8.0

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.model, trainer.config.switch_lr)

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return config.switch_epochs * steps_per_epoch(data.train, config)

    def take(self, step: int) -> Measured:
        config, model = self.config, self.model.train()
        integer = [c for c in model.choices if c not in (0, 32)] or [32]
        warm = step < self.steps() / 5
        allowed = integer[-2:] if warm else list(model.choices)
        narrow = allowed[0] if warm else integer[0]

        def wide_loss(part: ImageSet) -> Tensor:
            logits = model(part.images, integer[-1])
            return self.half_distilled(logits, self.taught(part), part.labels)

        def narrow_loss(part: ImageSet) -> Tensor:
            return self.distilled(part, narrow)

        def drawn_loss(part: ImageSet) -> Tensor:
            device = part.images.device
            drawn = replicas.randint(len(allowed), len(part), model.gated_blocks, device=device)
            widths = torch.tensor(allowed, dtype=torch.int32).to(device, non_blocking=True)
            return self.distilled(part, widths[drawn])

        lr = config.switch_lr * decay(config, step, self.steps())
        return {"loss": self.descend(self.batch(step), lr, wide_loss, narrow_loss, drawn_loss)}

    def distilled(self, part: ImageSet, policy: Policy) -> Tensor:
        """The distillation alone."""
        logits = self.model(part.images, policy)
        return distillation(logits, self.taught(part), self.config.distill_temperature)

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
    settings = (*_GATED, "gate_epochs", "gate_lr", "gumbel_start", "gumbel_end")
    passes = 6.0

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.learner = GateLearner(trainer, trainer.config.gate_lr)

    @staticmethod
    def prepare(trainer: Trainer) -> None:
        trainer.results[ORACLE] = uniform_oracle(
            trainer.model, trainer.teacher or trainer.plain, trainer.data.val, trainer.cost
        )
        images = trainer.data.gate.first(trainer.config.calibration_images)
        standardise_gates(trainer.model, images)
        # Where the joint stage's target starts, too.
        trainer.model.gate.favour_cost(2 * trainer.config.target, trainer.cost.of_choices())

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return config.gate_epochs * steps_per_epoch(data.gate, config)

    def take(self, step: int) -> Measured:
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
    settings = (
        "joint_epochs",
        "joint_lr",
        "joint_gate_lr",
        "explore",
        "gate_every",
        "steering",
        "settle_fraction",
    )
    passes = 6.0

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.model, trainer.config.joint_lr)
        self.learner = GateLearner(trainer, trainer.config.joint_gate_lr)

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return config.joint_epochs * steps_per_epoch(data.train, config)

    def take(self, step: int) -> Measured:
        config = self.config
        progress = step / max(self.steps() - 1, 1)
        left = 1 - progress
        measured: Measured = {}
        if step % config.gate_every == 0:
            batch = self.gate_batch(step // config.gate_every)
            measured = self.learner.step(
                batch, config.gumbel_end, progress, config.diversity * left, config.steering
            )
        # The last tenth of the joint training belongs to the settling stage's learning rate.
        lr = config.joint_lr * max(decay(config, step, self.steps()), config.settle_fraction)
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
    settings = ("settle_fraction", "batchnorm_min_routed", "cost_tolerance")
    passes = 3.0

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.model, trainer.config.joint_lr)

    @classmethod
    def length(cls, config: TrainConfig, data: DataSplits) -> int:
        return max(1, round(JointStage.length(config, data) * config.settle_fraction))

    def take(self, step: int) -> Measured:
        config = self.config
        lr = config.joint_lr * config.settle_fraction * decay(config, step, self.steps())
        return {"loss": self.routed_step(step, lr, 0.0)}

    def finish(self) -> dict[str, float]:
        config, model = self.config, self.model
        kept = reestimate_batchnorm(
            model, estimation_batches(self), None, config.batchnorm_min_routed
        )
        tune_gate_bias(self)
        return {**results_at_target(self), "batchnorm_kept": float(len(kept))}


def results_at_target(stage: Stage) -> dict[str, float]:
    """Validation accuracy and cost of the gate's decisions; StageError if the target is missed."""
    config, model = stage.config, stage.model
    reached = mean_cost(model, stage.data.val, stage.trainer.cost)
    off = reached / config.target - 1
    # One decision for all images comes to few costs: it is to stay within the target.
    off = max(off, 0.0) if isinstance(model.gate, ConstantGate) else abs(off)
    if off > config.cost_tolerance:
        raise StageError(
            f"{stage.name}: the validation cost is {reached:.3%}, more than "
            f"{config.cost_tolerance:.0%} off the target of {config.target:.3%}"
        )
    return {"val_accuracy": accuracy(model, stage.data.val), "val_cost": reached}


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
