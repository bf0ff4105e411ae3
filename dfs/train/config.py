"""What a training run is told, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

_LOWEST = {
    "batch_size": 2,
    "seed": 0,
    "image_size": 0,
    "float_epochs": 1,
    "switch_epochs": 1,
    "gate_epochs": 1,
    "joint_epochs": 1,
    "gate_every": 1,
    "calibration_images": 1,
    "batchnorm_images": 2,
    "batchnorm_min_routed": 2,
    "weight_decay": 0,
    "diversity": 0,
    "lambda_start": 0,
    "lambda_rate": 0,
}
_POSITIVE = (
    "float_lr",
    "switch_lr",
    "gate_lr",
    "joint_lr",
    "joint_gate_lr",
    "distill_temperature",
    "gumbel_start",
    "gumbel_end",
    "cost_tolerance",
)
_SHARES = ("explore", "settle_fraction")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Epochs, learning rates and losses are those of the stage's letter.

    Attributes:
        dataset: name of the data set.
        data: folder of its files; empty for a set that needs none.
        image_size: side of the network's input for class folders; 0 is their default.
        allow_unverified: data sets or files that may differ from their published checksums.
        model: name such as "resnet20".
        choices: ascending widths the gate picks from.
        stream: "uint8" or "float32".
        semantics: "default", or "paper": quantizer, BatchNorm and skipping of the paper's authors.
        target: the cost to train to, as a fraction of the full-precision network.
        cost: "paper" or "bitops".
        seed: decides initialization, data order, augmentation and every random draw.
        exit_points: how many points of validation accuracy each width may lose to full precision
            before the gates are trained.
        gate_every: joint steps on the weights for one step on the gates.
        batchnorm_images: training images from which BatchNorm statistics are estimated.
        batchnorm_min_routed: a block and width with fewer samples keeps its statistics.
        cost_tolerance: by how much of the target the final validation cost may miss it.
    """

    dataset: str = "digits"
    data: str = ""
    image_size: int = 0
    allow_unverified: tuple[str, ...] = ()
    model: str = "resnet14"
    choices: tuple[int, ...] = (0, 2, 4, 8)
    stream: str = "uint8"
    semantics: str = "default"
    target: float = 0.04
    cost: str = "paper"
    seed: int = 0
    batch_size: int = 64

    float_epochs: int = 30
    float_lr: float = 0.1
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
    gate_every: int = 2
    lambda_start: float = 0.1
    lambda_rate: float = 0.01

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
        if self.semantics not in ("default", "paper"):
            raise ValueError(f"semantics must be 'default' or 'paper', got {self.semantics!r}")
        if self.cost not in ("paper", "bitops"):
            raise ValueError(f"cost must be 'paper' or 'bitops', got {self.cost!r}")
        if self.seed >= 1 << 31:
            raise ValueError(f"seed must be below 2^31, got {self.seed}")
        if max((c for c in self.choices if c != 32), default=0) == 0:
            raise ValueError(f"choices must hold an integer width, got {self.choices}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild a config; ValueError names an entry that is unknown or missing."""
        known = {f.name for f in fields(TrainConfig)}
        if not isinstance(values, Mapping) or set(values) != known:
            odd = set(values) ^ known if isinstance(values, Mapping) else {values}
            raise ValueError(f"config: unknown or missing entries {sorted(map(str, odd))}")
        plain = {k: _tuples(v) for k, v in values.items()}
        return TrainConfig(**plain)

    def with_target(self, target: float) -> TrainConfig:
        return replace(self, target=target)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


# The digits have 180 validation images, so one of them is 0.56 points, and 17 training batches an
# epoch, so gates get more epochs and a larger step than on a full-size data set.
PRESETS: dict[str, TrainConfig] = {
    "digits": TrainConfig(
        float_epochs=12,
        switch_epochs=8,
        exit_points=((2, 4.0), (4, 1.7), (8, 1.2)),
        gate_epochs=80,
        gate_lr=3e-2,
        joint_epochs=4,
        joint_gate_lr=5e-3,
        gate_every=2,
        diversity=1.0,
        lambda_rate=0.03,
        batchnorm_images=2048,
    ),
}
