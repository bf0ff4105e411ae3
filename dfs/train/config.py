"""What a training run is told, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Epochs, learning rates and losses are those of the stage's letter.

    Attributes:
        dataset: name of the data set.
        model: name such as "resnet20".
        choices: ascending widths the gate picks from.
        stream: "uint8" or "float32".
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
    model: str = "resnet14"
    choices: tuple[int, ...] = (0, 2, 4, 8)
    stream: str = "uint8"
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
        if not 0 < self.target <= 1:
            raise ValueError(f"target must be a fraction in (0, 1], got {self.target}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, got {self.batch_size}")
        if max((c for c in self.choices if c != 32), default=0) == 0:
            raise ValueError(f"choices must hold an integer width, got {self.choices}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild a config; ValueError names an unknown entry."""
        known = {f.name for f in fields(TrainConfig)}
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"config: unknown entries {sorted(unknown)}")
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
