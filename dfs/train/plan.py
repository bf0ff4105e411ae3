"""How long a run has still to go, from how long its steps have taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dfs.data import DataSplits
from dfs.train.config import TrainConfig
from dfs.train.recipes import stages_of

# Steps of a stage before its own times are believed.
_FEWEST = 3


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes:
        seconds: of all its steps; None before any step was measured.
        measured: whether from its own steps, not guessed from those of others.
    """

    name: str
    steps: int
    epochs: float
    seconds: float | None
    measured: bool


class TimePlan:
    """The stages of a run and their durations, measured as it goes.

    A stage that has not begun is guessed at from the others, by the passes that its steps take.
    What lies between the stages, such as validation, is not in it.

    Args:
        stage, step: where the run begins.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: DataSplits,
        stage: int = 0,
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = stages_of(config)
        self._lengths = [s.length(config, data) for s in self._stages]
        self._per_epoch = max(1, len(data.train) // min(config.batch_size, len(data.train)))
        self._place = (stage, step)
        self._clock = clock
        self._last: float | None = None
        self._seconds = [0.0] * len(self._stages)
        self._counted = [0] * len(self._stages)

    def observe(self, name: str, step: int) -> None:
        """Step ``step`` (from 1) of a stage is done."""
        now = self._clock()
        index = next(i for i, s in enumerate(self._stages) if s.name == name)
        # The first step of a stage comes after what prepared it.
        if self._last is not None and index == self._place[0]:
            self._seconds[index] += now - self._last
            self._counted[index] += 1
        self._last, self._place = now, (index, step)

    def remaining(self) -> float | None:
        """Seconds to go; None while nothing is known."""
        stage, step = self._place
        left = [0] * stage + [self._lengths[stage] - step, *self._lengths[stage + 1 :]]
        seconds = [self._step_seconds(i) for i in range(len(left))]
        if None in seconds:
            return None
        return sum(n * s for n, s in zip(left, seconds, strict=True) if s is not None)

    def stages(self) -> list[StagePlan]:
        """What each stage takes, the past ones included."""
        plans = []
        for i, (stage, length) in enumerate(zip(self._stages, self._lengths, strict=True)):
            each = self._step_seconds(i)
            seconds = None if each is None else length * each
            measured = self._counted[i] >= _FEWEST
            plans.append(StagePlan(stage.name, length, length / self._per_epoch, seconds, measured))
        return plans

    def _step_seconds(self, index: int) -> float | None:
        if self._counted[index] >= _FEWEST:
            return self._seconds[index] / self._counted[index]
        known = [i for i, count in enumerate(self._counted) if count >= _FEWEST]
        if not known:
            return None
        # The latest is the most alike.
        last = known[-1]
        per_pass = self._seconds[last] / self._counted[last] / self._stages[last].passes
        return per_pass * self._stages[index].passes
