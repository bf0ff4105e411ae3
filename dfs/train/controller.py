"""The Lagrangian controller that holds training at a cost target."""

from __future__ import annotations

from typing import Any

_LAMBDA_MAX = 5.0
_EMA_DECAY = 0.9


class CostController:
    """Weighs the cost in the loss: loss += weight * C / T.

    weight <- clip(weight + rate * (C_ema / T - 1), 0, 5). The target T falls geometrically from
    twice the final one over the first half of the stage.

    Args:
        target: the final target, as a fraction of full precision.
    """

    def __init__(self, target: float, weight: float, rate: float = 0.01) -> None:
        self.target = target
        self.rate = rate
        self.weight = weight
        self.average: float | None = None

    def target_at(self, progress: float) -> float:
        """T at ``progress`` in [0, 1] of the stage."""
        return self.target * 2.0 ** max(0.0, 1.0 - 2.0 * progress)

    def update(self, cost: float, progress: float) -> None:
        """See the mean cost of a batch."""
        self.average = (
            cost if self.average is None else _EMA_DECAY * self.average + (1 - _EMA_DECAY) * cost
        )
        change = self.rate * (self.average / self.target_at(progress) - 1)
        self.weight = min(max(self.weight + change, 0.0), _LAMBDA_MAX)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.average = state["weight"], state["average"]
