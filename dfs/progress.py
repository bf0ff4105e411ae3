"""Progress bars of a command that trains, the time it has left, and the wish to stop it."""

from __future__ import annotations

import math
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
from dfs.train.sweep import SweepPlan, SweepProgress

# Where bars can't be redrawn, as in a log file: seconds between lines.
_LINE_SECONDS = 20.0


class RunControl:
    """What a trainer tells of its steps and asks after them.

    On a terminal there are bars; elsewhere, such as in a log file, a line now and then.

    Args:
        bars: shown while it is entered.
        max_minutes: stop after so long; None for no limit.
    """

    def __init__(self, bars: Progress, max_minutes: float | None = None) -> None:
        self._bars = bars
        self._task: Any = None
        self._stage = ""
        self._measured: dict[str, float] = {}
        self._line_at = -math.inf
        self._stop = False
        self._plan: TimePlan | None = None
        self._plan_shown = False
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def follow(self, plan: TimePlan) -> None:
        """Show from now on how long a run has to go."""
        self._plan, self._plan_shown = plan, False

    def progress(self, stage: str, step: int, total: int, measured: dict[str, float]) -> None:
        """A step is done: :data:`dfs.train.trainer.Progress`."""
        if stage != self._stage or step == 1:
            self._begin(stage, total)
        left = "" if self._plan is None else self._left(stage, step)
        self._show(step, total, left, measured)

    def _left(self, stage: str, step: int) -> str:
        plan = self._plan
        assert plan is not None
        plan.observe(stage, step)
        seconds = plan.remaining()
        if seconds is None:
            return ""
        if not self._plan_shown:
            self._show_plan(plan_table(plan))
        return f"{format_duration(seconds)} to go"

    def sweep_progress(self, at: SweepProgress) -> None:
        """The same of a sweep, which knows itself how long it has to go."""
        label = f"{at.done + 1}/{at.entries} {at.label}: {at.stage}"
        if label != self._stage:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._begin(label, at.steps)
        if at.plan is not None and not self._plan_shown:
            self._show_plan(sweep_plan_table(at.plan))
        left = "" if at.seconds_left is None else f"{format_duration(at.seconds_left)} to go"
        self._show(at.step, at.steps, left, at.measured)

    def _show_plan(self, table: Table) -> None:
        self._plan_shown = True
        self._bars.console.print(table)
        # In a log, the time left comes with the next step.
        self._line_at = -math.inf

    def _begin(self, label: str, steps: int) -> None:
        self._stage, self._measured = label, {}
        self._task = self._bars.add_task(label, total=steps, shown="")

    def _show(self, step: int, steps: int, left: str, measured: dict[str, float]) -> None:
        """Steps done, time left, and the latest of everything measured: not every step has all."""
        self._measured |= measured
        shown = "  ".join([left, *(f"{k} {v:.3g}" for k, v in self._measured.items())]).strip()
        self._bars.update(self._task, completed=step, shown=shown)
        if self._bars.console.is_terminal:
            return
        now = time.monotonic()
        if step == steps or now >= self._line_at + _LINE_SECONDS:
            self._line_at = now
            clock = time.strftime("%H:%M:%S")
            self.say(f"{clock}  {self._stage}  {step}/{steps}  {shown}")

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._bars.console.print(text, soft_wrap=True, highlight=False)

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
    console = Console(stderr=True, quiet=replicas.rank() > 0)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[shown]}"),
        console=console,
        # Elsewhere the lines tell it all; the bars would come once, in the end.
        disable=not console.is_terminal,
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


def format_duration(seconds: float) -> str:
    """Such as "45 s", "12 min", "3.4 h" or "2.5 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def plan_table(plan: TimePlan) -> Table:
    """The stages of a run and how long each is likely to take."""
    table = _table("Time ahead, from the first steps", "stage", "steps", "epochs", "time")
    total = 0.0
    for stage in plan.stages():
        total += stage.seconds or 0.0
        time_ahead = "" if stage.seconds is None else format_duration(stage.seconds)
        guess = "" if stage.measured else "about "
        table.add_row(stage.name, str(stage.steps), f"{stage.epochs:.1f}", guess + time_ahead)
    table.add_row("together", "", "", f"about {format_duration(total)}")
    return table


def sweep_plan_table(plan: SweepPlan) -> Table:
    """The networks that a sweep still has to train and how long each is likely to take."""
    table = _table("Time ahead, from the first steps", "to be trained", "steps", "time")
    for name, steps, seconds in plan.rows:
        table.add_row(name, str(steps), f"about {format_duration(seconds)}")
    together = sum(seconds for _, _, seconds in plan.rows)
    table.add_row("together", "", f"about {format_duration(together)}")
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
