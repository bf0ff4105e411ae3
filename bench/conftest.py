"""Settings that all benchmarks share, and the summary of the bars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import machine
from dfs_kernels import backend_info, warmup

# Before the benchmarks add to it themselves.
_LOAD_AT_START = machine.load()
VERDICTS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[VERDICTS] = []


@pytest.fixture(autouse=True, scope="session")
def warm_process() -> None:
    warmup()
    # glibc maps large blocks afresh, page fault by page fault, until it has seen one freed. This
    # makes it take all results of any contestant from memory that it keeps.
    torch.empty(31 << 20, dtype=torch.uint8).fill_(1)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """PyTorch's number of threads for one benchmark, and with it everybody's."""
    wanted: int = request.param
    if wanted > machine.cpu_count():
        pytest.skip(f"{wanted} threads need as many processors, here are {machine.cpu_count()}")
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


@pytest.fixture
def verdicts(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Where a bar's outcome goes to be printed at the end."""
    return request.config.stash[VERDICTS]


# pytest-benchmark's own hook; optional, since the plugin need not be installed to collect.
@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    # Results are shared: the processor matters, the machine's name and its system do not.
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info["dfs"] = {
        "cpu": machine.cpu_model(),
        "cpus": machine.cpu_count(),
        "last_level_cache": machine.last_level_cache(),
        "missing_flags": list(machine.missing_flags()),
        "backend": backend_info()["cpu"],
        "torch": torch.__version__,
        "load": _LOAD_AT_START,
        "is_busy": machine.is_busy(_LOAD_AT_START),
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    output_json["commit_info"].pop("project", None)  # the name of a folder
    for benchmark in output_json["benchmarks"]:
        # Objects that JSON has no form for; extra_info says the same.
        benchmark["params"] = {}
        # Every round's time: too much to keep under version control.
        benchmark["stats"].pop("data", None)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    verdicts = config.stash[VERDICTS]
    if not verdicts:
        return
    terminalreporter.section("bars")
    if machine.is_busy(_LOAD_AT_START):
        terminalreporter.write_line(
            f"The machine was busy at the start (load {_LOAD_AT_START:.1f}): do not trust these."
        )
    missing = machine.missing_flags()
    if missing:
        terminalreporter.write_line(f"They assume {' and '.join(missing)}, which are missing here.")
    for v in verdicts:
        clear = v["high"] <= v["limit"] or v["low"] > v["limit"]
        word = ("held  " if v["held"] else "MISSED") + (" " if clear else "?")
        line = (
            f"{word} {v['ratio']:7.3f} <= {v['limit']:<5g} [{v['low']:.3f} to {v['high']:.3f}]  "
            f"{v['label']}, {v['layer']} batch {v['batch']}, threads {v['threads']}"
        )
        if "fraction_of_peak" in v:
            line += f", {100 * v['fraction_of_peak']:.0f} % of the peak"
        terminalreporter.write_line(line, green=v["held"], red=not v["held"])
    held = sum(v["held"] for v in verdicts)
    terminalreporter.write_line(f"{held} of {len(verdicts)} held")
