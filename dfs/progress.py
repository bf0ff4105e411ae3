"""Progress bars of a command that trains, the time it has left, and the wish to stop it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dfs.nn import replicas
from dfs.train.plan import TimePlan
from dfs.train.sweep import SweepProgress


class RunControl:
    """What a trainer tells of its steps and asks after them.

    Args:
        bars: shown while it is entered.
        max_minutes: stop after so long; None for no limit.
    """

    def __init__(self, bars: Progress, max_minutes: float | None = None) -> None:
        self._bars = bars
        self._task: Any = None
        self._stage = ""
        self._stop = False
        self._plan: TimePlan | None = None
        self._plan_shown = False
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def follow(self, plan: TimePlan) -> None:
        """Show from now on how long a run has to go."""
        self._plan, self._plan_shown = plan, False

    def progress(self, stage: str, step: int, total: int, measured: dict[str, float]) -> None:
        """A step is done: :data:`dfs.train.trainer.Progress`."""
        shown = "  ".join(f"{k} {v:.3g}" for k, v in measured.items())
        if self._plan is not None:
            shown = f"{self._left(stage, step)}  {shown}"
        if stage != self._stage or step == 1:
            self._stage = stage
            self._task = self._bars.add_task(stage, total=total, shown="")
        self._bars.update(self._task, completed=step, shown=shown)

    def _left(self, stage: str, step: int) -> str:
        plan = self._plan
        assert plan is not None
        plan.observe(stage, step)
        seconds = plan.remaining()
        if seconds is None:
            return ""
        if not self._plan_shown:
            self._plan_shown = True
            self._bars.console.print(plan_table(plan))
        return f"{format_minutes(seconds)} to go"

    def sweep_progress(self, at: SweepProgress) -> None:
        """The same of a sweep, which knows itself how long it has to go."""
        left = "" if at.seconds_left is None else f"{format_minutes(at.seconds_left)} to go  "
        shown = "  ".join(f"{k} {v:.3g}" for k, v in at.measured.items())
        label = f"{at.done + 1}/{at.entries} {at.label}: {at.stage}"
        if label != self._stage:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._stage = label
            self._task = self._bars.add_task(label, total=at.steps, shown="")
        self._bars.update(self._task, completed=at.step, shown=left + shown)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._bars.console.print(text, soft_wrap=True)

    def stopping(self) -> bool:
        """Whether the run is to save and end."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._stop or late

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """A signal: stop after this step, or at once if it is the second."""
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self._bars.console.print("stopping after this step; once more to stop at once")


@contextmanager
def run_control(max_minutes: float | None = None) -> Iterator[RunControl]:
    """Bars on standard error, and signals that stop the run cleanly."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[shown]}"),
        console=Console(stderr=True, quiet=replicas.rank() > 0),
    )
    control = RunControl(bars, max_minutes)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, control.request_stop)
    try:
        with bars:
            yield control
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def format_minutes(seconds: float) -> str:
    """Such as "45 s", "12 min" or "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_table(plan: TimePlan) -> Table:
    """The stages of a run and how long each is likely to take."""
    table = Table(title="Time ahead, from the first steps", title_justify="left")
    table.add_column("stage")
    for column in ("steps", "epochs", "minutes"):
        table.add_column(column, justify="right")
    for stage in plan.stages():
        minutes = "" if stage.minutes is None else f"{stage.minutes:.1f}"
        guess = "" if stage.measured else "about "
        table.add_row(stage.name, str(stage.steps), f"{stage.epochs:.1f}", guess + minutes)
    return table
