"""What a training run is told, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dfs.cost import FULL_BITS
from dfs.nn.gates import GATES

_LOWEST = {
    "batch_size": 2,
    "seed": 0,
    "image_size": 0,
    "train_images": 0,
    "float_epochs": 1,
    "switch_epochs": 1,
    "gate_epochs": 1,
    "joint_epochs": 1,
    "gate_every": 1,
    "calibration_images": 1,
    "batchnorm_images": 2,
    "batchnorm_min_routed": 2,
    "micro_batches": 1,
    "weight_decay": 0,
    "beta": 0,
    "diversity": 0,
    "lambda_start": 0,
    "lambda_rate": 0,
    "steering": 0,
}
_POSITIVE = (
    "float_lr",
    "switch_lr",
    "gate_lr",
    "joint_lr",
    "joint_gate_lr",
    "distill_temperature",
    "schedule_gamma",
    "gumbel_start",
    "gumbel_end",
    "cost_tolerance",
)
_SHARES = ("explore", "settle_fraction", "common_gradient")
# Of which the gates get at least two.
_FEWEST_IMAGES = 20
# What a setting may be, where it is one of a few names.
_NAMES = {
    "stream": ("uint8", "float32"),
    "semantics": ("default", "paper"),
    "gate": tuple(GATES),
    "cost": ("paper", "bitops", "latency"),
    "recipe": ("dfs", "paper", "static"),
    "schedule": ("cosine", "step"),
    "float_precision": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Epochs, learning rates and losses are those of the stage's letter.

    Attributes:
        dataset: name of the data set.
        data: folder of its files; empty for a set that needs none.
        image_size: side of the network's input for class folders; 0 is their default.
        train_images: train on so many only, to try something out: a tenth of them is for the gates.
            0 takes all.
        allow_unverified: data sets or files that may differ from their published checksums.
        model: name such as "resnet20".
        choices: ascending widths the gate picks from.
        stream: "uint8" or "float32".
        semantics: "default", or "paper": quantizer, BatchNorm and skipping of the paper's authors.
        target: the cost to train to, as a fraction of the full-precision network.
        gate: "rnn", "feedforward" or "constant".
        cost: what the target is a fraction of: "paper", "bitops" or "latency".
        latency_table: file that ``dfs bench --latency-table`` wrote; for the cost "latency".
        seed: decides initialization, data order, augmentation and every random draw.
        micro_batches: parts that a batch is worked through in, their gradients added up. It takes
            so much less memory; BatchNorm sees a part at a time.
        recipe: which stages there are (:mod:`dfs.train.recipes`): "dfs", "paper" for the authors'
            three, "static" for a network that runs at given widths.
        static_widths: of recipe "static", one width, or several that one set of weights is to
            serve. 32 alone trains the float network.
        teacher: folder of the run whose float network teaches; empty for the run's own.
        schedule: how learning rates fall within a stage: "cosine" to 0, or in a "step" by
            ``schedule_gamma`` at each of ``milestones``, which are shares of the stage.
        float_precision: "bfloat16" runs the float stage under autocast.
        beta: of the paper's loss: cross-entropy + sign * beta * summed cost.
        exit_points: how many points of validation accuracy each width may lose to full precision
            before the gates are trained.
        common_gradient: share kept of the gradient that a batch's images have in common, for gates
            that look at the input (:attr:`dfs.nn.gate.Gate.common_gradient`).
        steering: how fast the gate's logits are tilted towards the target in joint training.
        gate_every: joint steps on the weights for one step on the gates.
        batchnorm_images: training images from which BatchNorm statistics are estimated.
        batchnorm_min_routed: a block and width with fewer samples keeps its statistics.
        cost_tolerance: by how much of the target the final validation cost may miss it.
    """

    dataset: str = "digits"
    data: str = ""
    image_size: int = 0
    train_images: int = 0
    allow_unverified: tuple[str, ...] = ()
    model: str = "resnet14"
    choices: tuple[int, ...] = (0, 2, 4, 8)
    stream: str = "uint8"
    semantics: str = "default"
    gate: str = "rnn"
    target: float = 0.04
    cost: str = "paper"
    latency_table: str = ""
    seed: int = 0
    batch_size: int = 64
    micro_batches: int = 1
    recipe: str = "dfs"
    static_widths: tuple[int, ...] = ()
    teacher: str = ""
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    schedule_gamma: float = 0.1

    float_epochs: int = 30
    float_lr: float = 0.1
    float_precision: str = "float32"
    weight_decay: float = 2e-4

    calibration_images: int = 1024

    switch_epochs: int = 15
    switch_lr: float = 0.02
    distill_temperature: float = 4.0
    exit_points: tuple[tuple[int, float], ...] = ((2, 4.0), (4, 1.0), (8, 0.3))

    gate_epochs: int = 4
    gate_lr: float = 1e-3
    gumbel_start: float = 5.0
    gumbel_end: float = 1.0

    joint_epochs: int = 5
    joint_lr: float = 0.005
    joint_gate_lr: float = 1e-3
    explore: float = 0.3
    diversity: float = 0.1
    common_gradient: float = 0.1
    gate_every: int = 2
    beta: float = 1e-5
    lambda_start: float = 0.1
    lambda_rate: float = 0.01
    steering: float = 0.2

    settle_fraction: float = 0.1
    batchnorm_images: int = 8192
    batchnorm_min_routed: int = 256
    cost_tolerance: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            wrong = kind == "int" and not isinstance(value, int)
            wrong |= kind == "float" and not isinstance(value, (int, float))
            wrong |= kind == "str" and not isinstance(value, str)
            if wrong or isinstance(value, bool):
                raise ValueError(f"{field.name} must be of type {kind}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite, got {value}")
        if not 0 < self.target <= 1:
            raise ValueError(f"target must be a fraction in (0, 1], got {self.target}")
        for name, lowest in _LOWEST.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name, allowed in _NAMES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.seed >= 1 << 31:
            raise ValueError(f"seed must be below 2^31, got {self.seed}")
        if 0 < self.train_images < _FEWEST_IMAGES:
            raise ValueError(
                f"train_images must be 0, for all, or at least {_FEWEST_IMAGES}, "
                f"got {self.train_images}"
            )
        if not any(self.choices):
            raise ValueError(f"choices must hold a width besides 0, got {self.choices}")
        self._check_milestones()
        self._check_recipe()

    def _check_milestones(self) -> None:
        shares = self.milestones
        if not all(isinstance(s, float) and 0 < s < 1 for s in shares) or list(shares) != sorted(
            shares
        ):
            raise ValueError(f"milestones must be ascending shares between 0 and 1, got {shares}")

    def _check_recipe(self) -> None:
        if (self.recipe == "static") != bool(self.static_widths):
            raise ValueError(
                f"static_widths go with recipe 'static', got {self.static_widths} "
                f"with recipe {self.recipe!r}"
            )
        offered = {*self.choices, FULL_BITS} if len(self.static_widths) == 1 else {*self.choices}
        if not set(self.static_widths) <= offered - {0}:
            raise ValueError(
                f"static_widths must be among the choices {self.choices}, or 32 alone, "
                f"got {self.static_widths}"
            )
        if (self.cost == "latency") != bool(self.latency_table):
            raise ValueError(
                f"latency_table goes with cost 'latency', got {self.latency_table!r} "
                f"with cost {self.cost!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild a config; ValueError names an entry that is unknown or missing."""
        known = {f.name for f in fields(TrainConfig)}
        if not isinstance(values, Mapping) or set(values) != known:
            odd = set(values) ^ known if isinstance(values, Mapping) else {values}
            raise ValueError(f"config: unknown or missing entries {sorted(map(str, odd))}")
        return settings_from(values)

    def with_target(self, target: float) -> TrainConfig:
        return replace(self, target=target)


def settings_from(values: Mapping[str, Any]) -> TrainConfig:
    """A config of some settings, the others as they are by default; lists become tuples.

    Raises:
        ValueError: naming a setting that is unknown or out of range.
    """
    unknown = sorted(set(values) - {f.name for f in fields(TrainConfig)})
    if unknown:
        raise ValueError(f"unknown settings {unknown}")
    return TrainConfig(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
