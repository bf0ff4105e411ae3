"""Processes with a deadline, alone or several at a time, and tests shared out among them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# What a process that is told to stop gets to say what it has.
_GRACE_SECONDS = 8.0
_POLL_SECONDS = 0.05
# A line of pytest's verbose output: a test, and its outcome unless the process died in it.
_TEST = re.compile(
    r"^(?P<id>\S+\.py::.*?)"
    r"(?: (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b(?: \((?P<why>.*)\))?.*)?$"
)
_REASON = re.compile(r"^(?:FAILED|ERROR) (?P<id>\S+\.py::.*?) - (?P<why>.*)$")
# The same test fails twice in its process, and that is enough.
_MOST_RESTARTS = 20


@dataclass
class Job:
    """One process, its output in a file.

    Attributes:
        returncode: None until it has ended. cut_off: whether the deadline ended it.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    cwd: Path
    returncode: int | None = None
    cut_off: bool = False
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                cwd=self.cwd,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Whether it has ended."""
        assert self._process is not None
        self.returncode = self._process.poll()
        return self.returncode is not None

    def end(self) -> None:
        """End it at once, with all that it started."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self.returncode = self._process.wait()

    def signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def run_all(
    jobs: Sequence[Job], deadline: float, next_job: Callable[[Job], Job | None] | None = None
) -> None:
    """Run jobs at the same time until ``deadline``, a value of time.monotonic().

    Args:
        next_job: what to run in a job's place when it has ended by itself; None for nothing.
    """
    running: list[Job] = []
    try:
        for job in jobs:
            job.start()
            running.append(job)
        while running and time.monotonic() < deadline:
            for job in [job for job in running if job.poll()]:
                running.remove(job)
                follower = None if next_job is None else next_job(job)
                if follower is not None:
                    follower.start()
                    running.append(follower)
            time.sleep(_POLL_SECONDS)
    finally:
        _stop([job for job in running if not job.poll()])


def _stop(jobs: Sequence[Job]) -> None:
    """Interrupt them all, and end those that this does not stop."""
    for job in jobs:
        job.cut_off = True
        job.signal(signal.SIGINT)
    end = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < end and not all(job.poll() for job in jobs):
        time.sleep(_POLL_SECONDS)
    for job in jobs:
        job.end()


@dataclass
class Outcomes:
    """What became of some tests.

    Attributes:
        results: by test, "PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL" or "XPASS"; "DIED" if its
            process ended in it.
        reasons: by failed test, one line.
        interrupted: tests that were running at the deadline; they have no result.
        skips: why tests were skipped, a reason for each.
    """

    results: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    interrupted: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)

    def count(self, *outcomes: str) -> int:
        return sum(result in outcomes for result in self.results.values())

    @property
    def failed(self) -> list[str]:
        bad = ("FAILED", "ERROR", "DIED", "XPASS")
        return [test for test, result in self.results.items() if result in bad]

    def add(self, job: Job) -> None:
        """What the log of a pytest process that has ended tells."""
        found = read_outcomes(_text(job.log))
        for test, result in found.results.items():
            if result == "DIED" and job.cut_off:
                self.interrupted.append(test)
            else:
                self.results[test] = result
        self.reasons.update(found.reasons)
        self.skips += found.skips


def read_outcomes(text: str) -> Outcomes:
    """What ``pytest -v`` printed, also if it never came to an end."""
    found = Outcomes()
    for line in text.splitlines():
        reason = _REASON.match(line)
        if reason is not None:
            found.reasons.setdefault(reason["id"], reason["why"])
            continue
        test = _TEST.match(line)
        if test is not None:
            # A test that passes, and whose teardown fails, has two lines.
            name, outcome = test["id"].rstrip(), test["outcome"] or "DIED"
            if outcome != "DIED" or name not in found.results:
                found.results[name] = outcome
            if outcome == "SKIPPED":
                found.skips.append(test["why"] or "no reason given")
    return found


class Shards:
    """Tests shared out among pytest processes on one GPU.

    A process that dies, or whose CUDA context a test broke, is replaced by one that goes on with
    the tests after it.
    """

    def __init__(
        self,
        tests: Sequence[str],
        count: int,
        command: Sequence[str],
        logs: Path,
        environment: Mapping[str, str],
        cwd: Path,
    ) -> None:
        self.tests = list(tests)
        self._command, self._environment, self._cwd = list(command), environment, cwd
        self._restarts = 0
        self._shares: list[tuple[Job, list[str]]] = []
        self._first = [
            self._job(logs / f"shard{i}.log", self.tests[i::count])
            for i in range(min(count, len(self.tests)))
        ]

    def run(self, deadline: float) -> Outcomes:
        """All tests, until the deadline; those without a result did not get their turn."""
        run_all(self._first, deadline, self._continuation)
        found = Outcomes()
        for job, _ in self._shares:
            found.add(job)
        return found

    def _job(self, log: Path, tests: list[str]) -> Job:
        log.unlink(missing_ok=True)
        job = Job([*self._command, *tests], log, self._environment, self._cwd)
        self._shares.append((job, tests))
        return job

    def _continuation(self, ended: Job) -> Job | None:
        (tests,) = (tests for job, tests in self._shares if job is ended)
        done = read_outcomes(_text(ended.log)).results
        rest = [test for test in tests if test not in done]
        # Without any result pytest itself could not run, and would not the next time.
        if not rest or not done or self._restarts == _MOST_RESTARTS:
            return None
        self._restarts += 1
        return self._job(ended.log.with_name(f"{ended.log.stem}-{self._restarts}.log"), rest)


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""
