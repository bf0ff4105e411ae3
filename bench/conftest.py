"""Settings that all benchmarks share, and the summary of the bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import machine
from bench.verdicts import TOO_LATE, verdict_line
from dfs_kernels import backend_info, warmup

START: pytest.StashKey[float] = pytest.StashKey()
VERDICTS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
# Of the processors' time, what others took before and after the benchmarks.
BUSY_SHARES: pytest.StashKey[list[float]] = pytest.StashKey()
_QUIET = 0.1
# Until PyTorch's threads have stopped spinning.
_OWN_THREADS_SECONDS = 0.05


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds",
        type=float,
        metavar="N",
        help="begin no benchmark after so long: the rest are skipped",
    )
    parser.addoption(
        "--autotune",
        action="store_true",
        help="measure Triton's launch configurations first, as dfs_kernels.warmup does",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[START] = time.monotonic()
    config.stash[VERDICTS] = []
    config.stash[BUSY_SHARES] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("seconds")
    if seconds is not None and time.monotonic() - item.config.stash[START] > seconds:
        pytest.skip(f"{TOO_LATE}: the {seconds:g} s were over")


@pytest.fixture(autouse=True, scope="session")
def quiet_and_warm(request: pytest.FixtureRequest) -> Iterator[None]:
    busy_shares = request.config.stash[BUSY_SHARES]
    busy_shares.append(machine.busy_share())
    warmup()
    # glibc maps large blocks afresh, page fault by page fault, until it has seen one freed. This
    # makes it take all results of any contestant from memory that it keeps.
    torch.empty(31 << 20, dtype=torch.uint8).fill_(1)
    yield
    time.sleep(_OWN_THREADS_SECONDS)
    busy_shares.append(machine.busy_share())


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
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    output_json["commit_info"].pop("project", None)  # the name of a folder
    busy = _busy_share(config)
    output_json["machine_info"]["dfs"].update(busy_share=busy, is_quiet=busy <= _QUIET)
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
    busy = _busy_share(config)
    on_cpu = any("threads" in v for v in verdicts)
    if on_cpu and busy > _QUIET:
        terminalreporter.write_line(
            f"Others took {100 * busy:.0f} % of the processors' time: do not trust these."
        )
    missing = machine.missing_flags()
    if on_cpu and missing:
        terminalreporter.write_line(f"They assume {' and '.join(missing)}, which are missing here.")
    for v in verdicts:
        terminalreporter.write_line(verdict_line(v), green=v["held"], red=not v["held"])
    held = sum(v["held"] for v in verdicts)
    terminalreporter.write_line(f"{held} of {len(verdicts)} held")


def _busy_share(config: pytest.Config) -> float:
    shares: list[float] = config.stash[BUSY_SHARES]
    return max(shares, default=0.0)
