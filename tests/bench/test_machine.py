"""What is said of the processor."""

from __future__ import annotations

import pytest

from bench import machine


def test_what_others_take_is_all_that_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    # User, nice, system, idle, waiting, two kinds of interrupts, stolen.
    times = iter([[100, 0, 50, 1000, 10, 0, 0, 5], [120, 0, 60, 1050, 20, 0, 0, 15]])
    monkeypatch.setattr(machine, "_processor_times", lambda: next(times))
    assert machine.busy_share(0.0) == pytest.approx(40 / 100)


def test_a_system_that_does_not_tell_counts_as_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_processor_times", list)
    assert machine.busy_share(0.0) == 0.0


def test_facts_of_this_machine_are_plausible() -> None:
    assert machine.cpu_count() >= 1
    assert machine.cpu_model()
    assert machine.last_level_cache() >= 1 << 18
    assert 0 <= machine.busy_share(0.05) <= 1
