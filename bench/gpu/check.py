"""Everything that needs an NVIDIA GPU, in one command: ``bench/gpu_check.sh [part ...]``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.commit import current_commit
from bench.gpu import results
from bench.gpu.processes import Job, Outcomes, Shards, run_all
from bench.verdicts import TOO_LATE

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / ".benchmarks" / "gpu-check"

_SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
_SANITIZER_EXIT = 86
_CALLS = [sys.executable, "-m", "tests.kernels.gpu_calls"]
_BENCH = (
    "bench/gpu/bench_gpu_bars.py",
    "bench/gpu/bench_gpu_network.py",
    "bench/gpu/bench_gpu_layers.py",
)
# Of a failed part's log, and of its failed tests, how much is printed.
_MOST_LINES, _MOST_COLUMNS = 12, 160
# Of a part's time, what compiling the benchmarks' kernels may take.
_WARM_UP_SHARE = 0.3
# What processes of the benchmarks need at their end to write what they have.
_RESERVE_SECONDS = 15.0
# How often benchmarks begin anew after one that ended its process.
_MOST_ATTEMPTS = 6
# What a dry run tries: something of each kind that does not take long.
_DRY_TESTS = "dry_run or ((training or packing or gate) and does_not_wait)"
_DRY_BENCHMARKS = (
    "network or (64x8x8-batch1024 and (roofline or buckets_mixed or triton_skipped or cudnn_bf16))"
)


class UserError(Exception):
    """One line for who called this."""


@dataclass(frozen=True)
class Result:
    """What a part came to.

    Attributes:
        status: "passed", "FAILED", "CUT OFF" or "absent".
        details: lines about what went wrong.
        content: for the results file.
    """

    status: str
    summary: str
    details: tuple[str, ...] = ()
    content: Mapping[str, Any] | None = None

    @property
    def is_good(self) -> bool:
        return self.status in ("passed", "absent")


@dataclass(frozen=True)
class Context:
    """What the parts share."""

    logs: Path
    keyword: str | None = None
    bench_keyword: str | None = None
    # What a part sets for those after it.
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self, **changes: str) -> dict[str, str]:
        """This process's, without what would change the tests, and with the repository's root."""
        dropped = (
            "TRITON_INTERPRET",
            "DFS_CUDA_EMULATOR",
            "DFS_GPU_REHEARSAL",
            "DFS_DEBUG",
            "DFS_TEST_TRITON",
        )
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        # Each of the test processes would start as many compilers as there are cores.
        fixed = {"PYTHONUNBUFFERED": "1", "COLUMNS": "300", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        return {**kept, **fixed, "PYTHONPATH": str(ROOT), **self.variables, **changes}

    def job(self, name: str, command: Sequence[str], **changes: str) -> Job:
        """One process, with a log of its own."""
        log = self.logs / f"{name}.log"
        log.unlink(missing_ok=True)
        return Job(command, log, self.environment(**changes), ROOT)

    def run(self, name: str, command: Sequence[str], deadline: float, **changes: str) -> Job:
        """One process to its end."""
        job = self.job(name, command, **changes)
        run_all([job], deadline)
        return job


Part = Callable[[Context, float], Result]


def build(context: Context, deadline: float) -> Result:
    """The native modules, in place, on all cores."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *_cuda_folders()])
    job = context.run("build", command, deadline, MAX_JOBS=str(_cores()), PATH=path)
    modules = sorted(path.name.partition(".")[0] for path in ROOT.glob("dfs_kernels/_*.so"))
    return _of_process(job, f"built {', '.join(modules) or 'nothing'}")


def test(context: Context, deadline: float) -> Result:
    """Every test marked gpu, in several processes."""
    tests, problem = _collect(context, [*gpu_test_files(), "-m", "gpu"], context.keyword, deadline)
    if problem is not None:
        return problem
    command = [*_pytest(), "-v", "--tb=short", "--disable-warnings", "-m", "gpu"]
    environment = context.environment(OMP_NUM_THREADS="1")
    shards = Shards(tests, _processes(), command, context.logs, environment, ROOT)
    return _of_tests(shards.run(deadline), tests)


def sanitize(context: Context, deadline: float) -> Result:
    """One call of each kernel under each tool of compute-sanitizer, at the same time."""
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(_tool_folders()))
    if tool is None:
        return Result("absent", "compute-sanitizer was not found: nothing was checked with it")
    # By themselves first: that fills the cache of compiled kernels, and has to pass.
    count = _processes()
    plain = [context.job(f"sanitize-none{i}", [*_CALLS, str(i), str(count)]) for i in range(count)]
    run_all(plain, deadline)
    for job in plain:
        if job.returncode != 0:
            return _of_process(job, "the calls fail without a sanitizer too")
    jobs = {}
    for name in _SANITIZERS:
        options = ["--tool", name, "--error-exitcode", str(_SANITIZER_EXIT), "--print-limit", "20"]
        # Memory that PyTorch keeps for later would hide accesses outside of it.
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        jobs[name] = context.job(f"sanitize-{name}", [tool, *options, *_CALLS], **caching)
    run_all(list(jobs.values()), deadline)
    return _of_sanitizers(jobs)


def tune(context: Context, deadline: float) -> Result:
    """Triton's launch configurations, measured; the benchmarks after it take them."""
    tests, problem = _collect_ours(context, deadline)
    if problem is not None:
        return problem
    # Several processes at a time compile all configurations. What they measure is thrown away.
    trial, folder = context.logs / "tuning-trial", context.logs / "tuned"
    for earlier in (trial, folder):
        shutil.rmtree(earlier, ignore_errors=True)
    half = (time.monotonic() + deadline) / 2
    _check_benchmarks(context, tests, half, "--autotune", DFS_CACHE_DIR=str(trial))
    command = [*_checking_benchmarks(), "--autotune", *tests]
    job = context.run("tune", command, deadline, DFS_CACHE_DIR=str(folder))
    context.variables["DFS_CACHE_DIR"] = str(folder)
    outcomes = Outcomes()
    outcomes.add(job)
    result = _of_tests(outcomes, tests)
    written = ", ".join(path.name for path in sorted(folder.glob("*.json"))) or "nothing"
    return replace(result, summary=f"{written} in {folder}; {result.summary}")


def bench(context: Context, deadline: float) -> Result:
    """The kernels of the benchmarks compiled by several processes, then all of them timed."""
    # There may be none among those that are asked for; any problem shows below again.
    tests, _ = _collect_ours(context, deadline)
    now = time.monotonic()
    _check_benchmarks(context, tests, now + _WARM_UP_SHARE * (deadline - now))
    return _timed(context, deadline)


def _collect_ours(context: Context, deadline: float) -> tuple[list[str], Result | None]:
    """The benchmarks of our own kernels, for what only they need."""
    keyword = context.bench_keyword
    wanted = "not cudnn_" if keyword is None else f"({keyword}) and not cudnn_"
    return _collect(context, list(_BENCH), wanted, deadline)


def _checking_benchmarks() -> list[str]:
    """Each benchmark's results are checked, and nothing is timed."""
    return [*_pytest(), "-v", "--tb=short", "--disable-warnings", "--benchmark-disable"]


def _check_benchmarks(
    context: Context, tests: Sequence[str], deadline: float, *options: str, **changes: str
) -> None:
    """Compile what they need, in several processes; whatever fails will fail again later."""
    environment = context.environment(OMP_NUM_THREADS="1", **changes)
    command = [*_checking_benchmarks(), *options]
    Shards(tests, _processes(), command, context.logs / "warm-up", environment, ROOT).run(deadline)


def _timed(context: Context, deadline: float, **changes: str) -> Result:
    # With the same changes, on which it depends which backends there are.
    tests, problem = _collect(context, list(_BENCH), context.bench_keyword, deadline, **changes)
    if problem is not None:
        return problem
    found, runs, rest = Outcomes(), [], tests
    for attempt in range(_MOST_ATTEMPTS):
        job, file = _run_benchmarks(context, rest, attempt, deadline, **changes)
        found.add(job)
        if file.exists():
            runs.append(json.loads(file.read_text()))
        # One that breaks the CUDA context, or dies, should not cost those after it.
        undone = [test for test in tests if test not in found.results]
        if not undone or job.cut_off or len(undone) == len(rest):
            break
        rest = undone
    result = _of_tests(found, tests)
    content = results.of_benchmarks(runs)
    held = sum(bar["held"] for bar in content["bars"])
    summary = f"{result.summary}; {held} of {len(content['bars'])} bars held"
    late = any(reason.startswith(TOO_LATE) for reason in found.skips)
    status = "CUT OFF" if late and result.is_good else result.status
    details = result.details if found.results else _tail(job.log)
    return Result(status, summary, details, content)


def _run_benchmarks(
    context: Context, tests: Sequence[str], attempt: int, deadline: float, **changes: str
) -> tuple[Job, Path]:
    """Time benchmarks in one process, which writes a file unless it dies."""
    file = context.logs / f"bench{attempt}.json"
    file.unlink(missing_ok=True)
    seconds = max(1.0, deadline - time.monotonic() - _RESERVE_SECONDS)
    command = [*_pytest(), *tests, "-v", "--tb=short", "--disable-warnings", "--benchmark-only"]
    command += [f"--seconds={seconds:.0f}", f"--benchmark-json={file}"]
    return context.run(f"bench{attempt}", command, deadline, **changes), file


def dry(context: Context, deadline: float) -> Result:
    """What needs no GPU: tests and benchmarks are collected, and tried out in the interpreter."""
    tests, problem = _collect(context, [*gpu_test_files(), "-m", "gpu"], None, deadline)
    if problem is not None:
        return problem
    rehearsal = {"DFS_GPU_REHEARSAL": "1", "TRITON_INTERPRET": "1"}
    command = [*_pytest(), *gpu_test_files(), "-m", "gpu", "-k", _DRY_TESTS, "-v", "--tb=short"]
    tried = context.run("dry-tests", command, deadline, **rehearsal)
    outcomes = Outcomes()
    outcomes.add(tried)
    if tried.returncode != 0:
        return _of_tests(outcomes, list(outcomes.results))
    calls = context.run("dry-calls", [*_CALLS, "0", "4"], deadline, **rehearsal)
    if calls.returncode != 0:
        return _of_process(calls, "the calls for the sanitizer fail")
    few = replace(context, bench_keyword=context.bench_keyword or _DRY_BENCHMARKS)
    timed = _timed(few, deadline, **rehearsal)
    if not timed.is_good:
        return timed
    summary = f"{len(tests)} gpu tests collected, {outcomes.count('PASSED')} tried; {timed.summary}"
    return Result("passed", summary, content=timed.content)


# In the order in which they run, each with its seconds: under nine minutes together.
PARTS: dict[str, tuple[Part, float]] = {
    "build": (build, 100),
    "test": (test, 130),
    "sanitize": (sanitize, 70),
    "tune": (tune, 240),
    "bench": (bench, 240),
    "dry": (dry, 300),
}
DEFAULT_PARTS = ("build", "test", "sanitize", "bench")
NEED_GPU = ("test", "sanitize", "tune", "bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts, write what they came to, print a table. 1 if one failed, 2 for a mistake."""
    try:
        options = _parser().parse_args(arguments)
        _check_parts(options.parts)
    except UserError as error:
        print(f"bench/gpu_check.sh: {error}", file=sys.stderr)
        return 2
    names = options.parts or list(DEFAULT_PARTS)
    out = Path(options.out).resolve() if options.out else None
    logs = LOGS if out is None else out / "logs"
    context = Context(logs, options.keyword, options.bench_keyword)
    found = run_parts({name: PARTS[name] for name in names}, context, options.seconds)
    content = to_content({name: result for name, (result, _) in found.items()})
    content["parts"] = {
        name: {
            "status": result.status,
            "seconds": round(seconds, 1),
            "summary": result.summary,
            "details": list(result.details),
        }
        for name, (result, seconds) in found.items()
    }
    # What was not measured on a GPU has no place among the results.
    kept = "dry" not in names and bool(content["gpu"])
    folders = [*([results.RESULTS] if kept else []), *([out] if out else [])]
    paths = [results.write(content, folder) for folder in folders]
    if kept and options.bench_keyword is None:
        paths += _write_backend_table(content, names, out)
    print(results.table(content))
    print(*(f"written: {path}" for path in paths), f"logs: {logs}", sep="\n")
    return 0 if all(result.is_good for result, _ in found.values()) else 1


def _write_backend_table(
    content: Mapping[str, Any], names: Sequence[str], out: Path | None
) -> list[Path]:
    """Which backend is faster on this GPU, where the package looks for it: to be committed."""
    status = content["parts"].get("bench", {}).get("status")
    if status not in ("passed", "CUT OFF"):
        return []
    # Not before it is needed, see missing_gpu().
    from bench.gpu import backend_table
    from dfs_kernels.backends import measured

    commit, gpu = content["commit"], content["gpu"]
    source = {
        "commit": commit["id"] + ("-dirty" if commit["dirty"] else ""),
        "command": " ".join(["bench/gpu_check.sh", *names]),
    }
    table = backend_table.candidate(content.get("points", ()), gpu["name"], source)
    if table is None:
        return []
    own = measured.table_path(gpu["name"])
    targets = [own, *([] if out is None else [out / gpu["slug"] / "backends" / own.name])]
    return [backend_table.write(table, target) for target in targets]


def run_parts(
    parts: Mapping[str, tuple[Part, float]], context: Context, seconds: float | None = None
) -> dict[str, tuple[Result, float]]:
    """Every part, whatever became of those before it, with the seconds it took.

    A part may use what those before it have left of their time.

    Args:
        seconds: for each part, in place of its own.
    """
    found = {}
    deadline = time.monotonic()
    for name, (part, own) in parts.items():
        start = time.monotonic()
        deadline += own if seconds is None else seconds
        print(f"{name} ...", flush=True)
        try:
            reason = missing_gpu() if name in NEED_GPU else None
            result = part(context, deadline) if reason is None else Result("FAILED", reason)
        except Exception as error:  # the parts after it have to run
            result = Result("FAILED", f"{type(error).__name__}: {error}")
        found[name] = (result, time.monotonic() - start)
        print(f"{name}: {result.status}, {result.summary}", flush=True)
    return found


def to_content(found: Mapping[str, Result]) -> dict[str, Any]:
    """The results file's content but for the parts: of the benchmarks if they ran."""
    content: dict[str, Any] = {"gpu": {}, "commit": current_commit()}
    for result in found.values():
        content.update(result.content or {})
    if not content["gpu"]:
        content["gpu"] = _gpu_facts()
    return content


def missing_gpu() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    # Not before it is needed: a wrong call should not have to wait for PyTorch.
    from bench.gpu.device import missing_reason

    return missing_reason()


def _gpu_facts() -> dict[str, Any]:
    """Of this GPU, where no benchmark has told; nothing if PyTorch finds none."""
    try:
        from bench.gpu.device import facts

        return facts() if missing_gpu() is None else {}
    except Exception as error:  # a results file without them is better than none
        print(f"nothing is known of the GPU: {error}", file=sys.stderr)
        return {}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bench/gpu_check.sh",
        description="Build, test, sanitize and benchmark what needs an NVIDIA GPU. "
        f"Parts: {', '.join(PARTS)}; by default {', '.join(DEFAULT_PARTS)}.",
        epilog="A missed bar fails nothing. DFS_COMMIT names the commit where there is no "
        "repository. Exit status: 0, 1 if a part failed or was cut off, 2 for a wrong call.",
    )
    parser.add_argument("parts", nargs="*", metavar="part")
    parser.add_argument(
        "--out",
        default=os.environ.get("OUT") or None,
        metavar="FOLDER",
        help="write the results there as well, and the logs (by default the variable OUT)",
    )
    parser.add_argument("--seconds", type=_seconds, metavar="N", help="for each part")
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="only these tests")
    parser.add_argument(
        "--bench-k", dest="bench_keyword", metavar="EXPRESSION", help="only these benchmarks"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _check_parts(parts: Sequence[str]) -> None:
    for part in parts:
        if part not in PARTS:
            raise UserError(f"part must be one of {', '.join(PARTS)}, got {part!r}")


def gpu_test_files() -> list[str]:
    """Those with tests that need a GPU: the others may need packages that its machine lacks."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "pytest.mark.gpu" in f.read_text()]


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def _collect(
    context: Context,
    arguments: Sequence[str],
    keyword: str | None,
    deadline: float,
    **changes: str,
) -> tuple[list[str], Result | None]:
    """The names of tests, or why they can't be had."""
    command = [*_pytest(), *arguments, "--collect-only", "-q", "--disable-warnings"]
    if keyword is not None:
        command += ["-k", keyword]
    job = context.run("collect", command, deadline, **changes)
    tests = [line for line in job.log.read_text(errors="replace").splitlines() if ".py::" in line]
    if job.returncode != 0 or not tests:
        return [], _of_process(job, "no tests were found", good=False)
    return tests, None


def _of_process(job: Job, summary: str, good: bool = True) -> Result:
    if job.cut_off:
        return Result("CUT OFF", summary, _tail(job.log))
    if job.returncode != 0 or not good:
        return Result("FAILED", f"{summary}; exit status {job.returncode}", _tail(job.log))
    return Result("passed", summary)


def _of_tests(outcomes: Outcomes, tests: Sequence[str]) -> Result:
    """FAILED if a test did, CUT OFF if one did not get its turn."""
    missing = [test for test in tests if test not in outcomes.results]
    passed, skipped = outcomes.count("PASSED", "XFAIL"), outcomes.count("SKIPPED")
    failed = outcomes.failed
    summary = f"{passed} passed, {len(failed)} failed, {skipped} skipped"
    if missing:
        summary += f", {len(missing)} without a result"
    details = [f"{test} - {_why(outcomes, test)}" for test in failed[:_MOST_LINES]]
    if len(failed) > _MOST_LINES:
        details.append(f"and {len(failed) - _MOST_LINES} more")
    if failed or not outcomes.results:
        return Result("FAILED", summary, tuple(details))
    details = [f"{test} was running" for test in outcomes.interrupted[:_MOST_LINES]]
    # Reasons have to be seen: what was skipped was not checked.
    details += [f"{count} skipped: {why}" for why, count in Counter(outcomes.skips).most_common()]
    return Result("CUT OFF" if missing else "passed", summary, tuple(details))


def _why(outcomes: Outcomes, test: str) -> str:
    died = outcomes.results[test] == "DIED"
    why = outcomes.reasons.get(test, "its process ended in it" if died else "see the log")
    return why[:_MOST_COLUMNS]


def _of_sanitizers(jobs: Mapping[str, Job]) -> Result:
    words, details = [], []
    for name, job in jobs.items():
        if job.returncode == 0:
            words.append(f"{name} clean")
            continue
        words.append(f"{name} {'cut off' if job.cut_off else 'FOUND ERRORS or failed'}")
        details += [
            f"{name}: {line}" for line in sanitizer_lines(job.log.read_text(errors="replace"))
        ]
    failed = any(job.returncode != 0 and not job.cut_off for job in jobs.values())
    cut_off = any(job.cut_off for job in jobs.values())
    status = "FAILED" if failed else "CUT OFF" if cut_off else "passed"
    return Result(status, ", ".join(words), tuple(details))


def sanitizer_lines(text: str) -> list[str]:
    """The first lines of a sanitizer's report, and its summary."""
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    telling = [line for line in lines if re.search(r"[A-Za-z]", line)]
    summaries = [line for line in telling if "SUMMARY" in line]
    return [*telling[: _MOST_LINES // 2], *summaries] or list(_tail_of(text))


def _tail(log: Path) -> tuple[str, ...]:
    return _tail_of(log.read_text(errors="replace")) if log.exists() else ()


def _tail_of(text: str) -> tuple[str, ...]:
    return tuple(line[:_MOST_COLUMNS] for line in text.rstrip().splitlines()[-_MOST_LINES:])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes() -> int:
    """Test processes: two cores are left to those that compile or compute with threads."""
    return max(1, _cores() - 2)


def _cuda_folders() -> list[str]:
    """Where CUDA's tools are when they are not on PATH."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [Path(home, "bin") for home in homes if home]
    found += [Path("/usr/local/cuda/bin"), *sorted(Path("/usr/local").glob("cuda-*/bin"))]
    return [str(path) for path in found]


def _tool_folders() -> list[str]:
    inner = [str(Path(folder).parent / "compute-sanitizer") for folder in _cuda_folders()]
    return [os.environ.get("PATH", ""), *_cuda_folders(), *inner]


if __name__ == "__main__":
    sys.exit(main())
