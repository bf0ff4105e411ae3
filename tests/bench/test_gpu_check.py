"""The check of everything that needs a GPU: its arguments, its processes, its results and table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import check, results
from bench.gpu.check import Context, Result
from bench.gpu.processes import Job, Shards, read_outcomes, run_all

ROOT = Path(__file__).resolve().parents[2]


# Arguments


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "bench" / "gpu_check.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        cwd="/",
        capture_output=True,
        text=True,
    )


def test_a_part_that_does_not_exist_is_refused_with_those_that_do() -> None:
    done = gpu_check("build", "tests")
    assert done.returncode == 2
    expected = "part must be one of build, test, sanitize, tune, bench, dry, got 'tests'"
    assert done.stderr == f"bench/gpu_check.sh: {expected}\n"


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan", "soon"])
def test_seconds_must_be_a_positive_number(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["dry", f"--seconds={seconds}"]) == 2
    assert f"must be a positive number, got '{seconds}'" in capsys.readouterr().err


def test_all_parts_together_take_less_than_nine_minutes() -> None:
    assert sum(check.PARTS[name][1] for name in check.DEFAULT_PARTS) <= 540


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(check, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(check, "_gpu_facts", lambda: {"name": "NVIDIA H1", "slug": "h1"})
    monkeypatch.setenv("DFS_COMMIT", "0123456789abcdef")
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


def set_parts(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    made = {name: (part, 5.0) for name, part in parts.items()}
    monkeypatch.setattr(check, "PARTS", made)
    monkeypatch.setattr(check, "DEFAULT_PARTS", tuple(parts))


def fails(context: Context, deadline: float) -> Result:
    raise OSError("no space")


def passes(context: Context, deadline: float) -> Result:
    return Result("passed", "all is well")


def test_every_part_runs_whatever_became_of_the_others(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_parts(monkeypatch, first=fails, second=passes)
    assert check.main([]) == 1
    content = json.loads((folders / "results" / "h1" / "0123456789.json").read_text())
    assert content["parts"]["first"]["summary"] == "OSError: no space"
    assert content["parts"]["second"]["status"] == "passed"
    assert "GPU check of 0123456789 on NVIDIA H1" in capsys.readouterr().out


@pytest.mark.skipif(check.missing_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_the_parts_that_need_one_say_so(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_parts(monkeypatch, other=passes, **dict.fromkeys(check.NEED_GPU, passes))
    assert check.main([]) == 1
    content = json.loads((folders / "results" / "h1" / "0123456789.json").read_text())
    failed = {name for name, part in content["parts"].items() if part["status"] == "FAILED"}
    assert failed == set(check.NEED_GPU)
    assert content["parts"]["test"]["summary"] == "there is no CUDA device"


@pytest.mark.parametrize(
    ("status", "code"), [("passed", 0), ("absent", 0), ("FAILED", 1), ("CUT OFF", 1)]
)
def test_the_exit_status_tells_whether_a_part_failed(
    folders: Path, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    set_parts(monkeypatch, only=lambda context, deadline: Result(status, "so it is"))
    assert check.main(["only"]) == code


def test_a_part_gets_its_own_time_and_what_others_left(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def part(context: Context, deadline: float) -> Result:
        given.append(deadline - time.monotonic())
        return Result("passed", "")

    set_parts(monkeypatch, first=part, second=part)
    check.main([])
    check.main(["--seconds=100"])
    assert given == pytest.approx([5, 10, 100, 200], abs=1)


def test_results_are_written_to_out_too(
    folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_parts(monkeypatch, only=passes)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert check.main([]) == 0
    written = [tmp_path / folder / "h1" / "0123456789.json" for folder in ("results", "out")]
    assert written[0].read_text()
    assert json.loads(written[1].read_text())["parts"]["only"]["status"] == "passed"


# Processes and tests


def job(tmp_path: Path, code: str, name: str = "job") -> Job:
    return Job([sys.executable, "-c", code], tmp_path / f"{name}.log", dict(os.environ), ROOT)


def test_a_process_ends_at_its_deadline_and_keeps_what_it_said(tmp_path: Path) -> None:
    slow = job(tmp_path, "import time; print('begun', flush=True); time.sleep(60)", "slow")
    quick = job(tmp_path, "raise SystemExit(3)", "quick")
    start = time.monotonic()
    run_all([slow, quick], start + 2)
    assert time.monotonic() - start < 20
    assert (slow.cut_off, quick.cut_off, quick.returncode) == (True, False, 3)
    assert slow.log.read_text().startswith("begun")


VERBOSE = """\
collecting ... collected 6 items

tests/a.py::test_one[(8, 0)-x y] PASSED                     [ 20%]
tests/a.py::test_two FAILED                                 [ 40%]
tests/a.py::test_three SKIPPED (there is one GPU)           [ 60%]
tests/a.py::test_four PASSED                                [ 70%]
tests/a.py::test_four ERROR                                 [ 70%]
tests/a.py::test_five """


def test_outcomes_are_read_from_what_pytest_printed_so_far() -> None:
    found = read_outcomes(VERBOSE)
    assert found.results == {
        "tests/a.py::test_one[(8, 0)-x y]": "PASSED",
        "tests/a.py::test_two": "FAILED",
        "tests/a.py::test_three": "SKIPPED",
        "tests/a.py::test_four": "ERROR",
        "tests/a.py::test_five": "DIED",
    }
    assert found.failed == [f"tests/a.py::test_{n}" for n in ("two", "four", "five")]
    assert found.skips == ["there is one GPU"]
    summary = "=== short test summary info ===\nFAILED tests/a.py::test_two - assert 1 == 2\n"
    assert read_outcomes(summary).reasons == {"tests/a.py::test_two": "assert 1 == 2"}


DYING = """
import os
import pytest

@pytest.mark.parametrize("n", range(7))
def test_it(n):
    if n == 2:
        os._exit(139)
    assert n != 5, "five is bad"
"""


def shards(folder: Path, text: str, count: int) -> tuple[Shards, str]:
    (folder / "test_dying.py").write_text(text)
    name = "test_dying.py::test_it"
    tests = [f"{name}[{n}]" for n in range(7)]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir=."]
    return Shards(tests, count, command, folder / "logs", dict(os.environ), folder), name


def test_tests_after_one_that_kills_its_process_run_in_another(tmp_path: Path) -> None:
    made, name = shards(tmp_path, DYING, 2)
    found = made.run(time.monotonic() + 60)
    assert found.results == {
        f"{name}[{n}]": {2: "DIED", 5: "FAILED"}.get(n, "PASSED") for n in range(7)
    }
    result = check._of_tests(found, made.tests)
    assert (result.status, result.summary) == ("FAILED", "5 passed, 2 failed, 0 skipped")
    assert any("its process ended in it" in line for line in result.details)
    assert any("five is bad" in line for line in result.details)


def test_tests_that_do_not_get_their_turn_are_no_success(tmp_path: Path) -> None:
    slow = "import time, pytest\n@pytest.mark.parametrize('n', range(7))\ndef test_it(n):\n"
    made, name = shards(tmp_path, slow + "    time.sleep(0 if n < 2 else 60)\n", 1)
    found = made.run(time.monotonic() + 6)
    result = check._of_tests(found, made.tests)
    assert result.status == "CUT OFF"
    assert set(found.results) == {f"{name}[0]", f"{name}[1]"}
    assert found.interrupted == [f"{name}[2]"]
    assert result.details == (f"{name}[2] was running",)
    assert "5 without a result" in result.summary


def test_it_is_told_why_tests_were_skipped() -> None:
    lines = [f"a.py::test_{n} SKIPPED (there is one GPU)\n" for n in range(3)]
    found = read_outcomes("".join(lines))
    result = check._of_tests(found, list(found.results))
    assert (result.status, result.details) == ("passed", ("3 skipped: there is one GPU",))


def test_processes_that_cannot_run_tests_are_not_started_again(tmp_path: Path) -> None:
    made, _ = shards(tmp_path, "raise ImportError('not here')\n", 2)
    found = made.run(time.monotonic() + 60)
    assert found.results == {}
    assert check._of_tests(found, made.tests).status == "FAILED"


def test_a_sanitizers_report_is_cut_down_to_its_beginning_and_its_summary() -> None:
    noise = "\n".join(f"=========     at kernel+{n}" for n in range(100))
    text = f"python output\n========= COMPUTE-SANITIZER\n{noise}\n========= ERROR SUMMARY: 3 errors"
    lines = check.sanitizer_lines(text)
    assert lines[0] == "========= COMPUTE-SANITIZER"
    assert lines[-1] == "========= ERROR SUMMARY: 3 errors"
    assert len(lines) < 12
    assert check.sanitizer_lines("it crashed") == ["it crashed"]


def test_tuning_measures_alone_and_serves_the_parts_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Several processes compile first; what they measured meanwhile is not what is kept."""
    runs = []

    def check_benchmarks(
        context: Context, tests: list[str], deadline: float, *options: str, **changes: str
    ) -> None:
        runs.append((options, changes["DFS_CACHE_DIR"]))

    def run(self: Context, name: str, command: list[str], deadline: float, **changes: str) -> Job:
        runs.append((tuple(command[-2:]), changes["DFS_CACHE_DIR"]))
        folder = Path(changes["DFS_CACHE_DIR"])
        folder.mkdir()
        (folder / "h1.json").write_text("{}")
        made = job(tmp_path, "", name)
        made.log.write_text("bench/a.py::test_b PASSED\n")
        return made

    monkeypatch.setattr(check, "_collect_ours", lambda *_: (["bench/a.py::test_b"], None))
    monkeypatch.setattr(check, "_check_benchmarks", check_benchmarks)
    monkeypatch.setattr(Context, "run", run)
    context = Context(tmp_path)
    result = check.tune(context, time.monotonic() + 5)
    tuned = str(tmp_path / "tuned")
    assert result.is_good
    assert result.summary == f"h1.json in {tuned}; 1 passed, 0 failed, 0 skipped"
    trial = str(tmp_path / "tuning-trial")
    assert runs == [
        (("--autotune",), trial),
        (("--autotune", "bench/a.py::test_b"), tuned),
    ]
    assert context.environment()["DFS_CACHE_DIR"] == tuned


BENCHMARKS = ("bench/a.py::test_b", "bench/a.py::test_c")


def fake_benchmarks(monkeypatch: pytest.MonkeyPatch, folder: Path, logs: list[str]) -> list[str]:
    """Runs of benchmarks that print ``logs`` and write RUN; gives the tests that each was given."""
    asked = []

    def run(self: Context, name: str, command: list[str], deadline: float, **changes: str) -> Job:
        asked.append(" ".join(word for word in command if "::" in word))
        made = job(folder, "", name)
        made.log.write_text(logs[len(asked) - 1])
        (folder / f"{name}.json").write_text(json.dumps(RUN))
        return made

    monkeypatch.setattr(check, "_collect", lambda *_: (list(BENCHMARKS), None))
    monkeypatch.setattr(Context, "run", run)
    return asked


@pytest.mark.parametrize(
    ("skipped", "status"), [("cuDNN has no fused form", "passed"), ("too late: over", "CUT OFF")]
)
def test_benchmarks_that_did_not_get_their_turn_are_no_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, skipped: str, status: str
) -> None:
    log = f"{BENCHMARKS[0]} PASSED\n{BENCHMARKS[1]} SKIPPED ({skipped})\n"
    fake_benchmarks(monkeypatch, tmp_path, [log])
    result = check._timed(Context(tmp_path), time.monotonic() + 100)
    assert (result.status, result.details) == (status, (f"1 skipped: {skipped}",))
    assert result.summary == "1 passed, 0 failed, 1 skipped; 1 of 1 bars held"
    assert result.content is not None
    assert result.content["gpu"]["slug"] == "h1"


def test_benchmarks_after_one_that_ends_its_process_are_run_in_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logs = [f"{BENCHMARKS[0]} FAILED\n", f"{BENCHMARKS[1]} PASSED\n"]
    asked = fake_benchmarks(monkeypatch, tmp_path, logs)
    result = check._timed(Context(tmp_path), time.monotonic() + 100)
    assert asked == [" ".join(BENCHMARKS), BENCHMARKS[1]]
    assert result.status == "FAILED"
    assert result.content is not None
    assert len(result.content["bars"]) == 2


def test_benchmarks_that_give_no_result_are_not_run_forever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = fake_benchmarks(monkeypatch, tmp_path, ["cannot import\n"])
    result = check._timed(Context(tmp_path), time.monotonic() + 100)
    assert len(asked) == 1
    assert (result.status, result.details) == ("FAILED", ("cannot import",))


def pytest_run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "DFS_GPU_REHEARSAL"}
    command = [sys.executable, "-m", "pytest", *arguments, "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    return done.stdout


def test_no_benchmark_begins_after_the_seconds_it_is_given() -> None:
    printed = pytest_run("bench/gpu/bench_gpu_bars.py", "-k", "two_bits", "--seconds=1e-9")
    assert "too late: the 1e-09 s were over" in printed


@pytest.mark.skipif(check.missing_gpu() is None, reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        ("tests/kernels/test_gpu_exactness.py", "-m", "gpu", "-k", "dry_run"),
        ("bench/gpu", "--benchmark-only", "-k", "two_bits"),
    ],
)
def test_without_a_gpu_what_needs_one_is_skipped(arguments: tuple[str, ...]) -> None:
    printed = pytest_run(*arguments)
    assert "there is no CUDA device" in printed
    # One for each backend, and nothing but that.
    assert re.search(r"=+ \d+ skipped, \d+ deselected in [^,]*=+$", printed.strip()), printed
    assert "passed" not in printed


def test_files_with_gpu_tests_are_found() -> None:
    assert "tests/kernels/test_gpu_exactness.py" in check.gpu_test_files()
    assert "tests/framework/test_cli.py" not in check.gpu_test_files()


# Results


def point(contestant: str, seconds: float, **changes: Any) -> dict[str, Any]:
    info = {
        "kind": "gpu_layer", "contestant": contestant, "label": contestant, "layer": "16x32x32",
        "family": "square", "batch": 1024, "seconds": seconds, "low": seconds, "high": seconds,
        "copies": 7,
    }  # fmt: skip
    return {"extra_info": {**info, **changes}}


RUN = {
    "machine_info": {
        "gpu": {"name": "NVIDIA H1", "slug": "h1", "peaks": {"copy": 3e12, "int8": 1.5e15}}
    },
    "benchmarks": [
        point("triton_8", 20e-6, bytes=1, operations=2, roofline_fraction=0.71),
        point("cudnn_bf16", 50e-6),
        point("cudnn_bf16_channels_last", 40e-6),
        {
            "extra_info": {
                "kind": "gpu_bar", "bar": "cudnn", "label": "8 bits / the best of cuDNN in bf16",
                "layer": "16x32x32", "batch": 1024, "implementation": "triton", "ratio": 0.5,
                "low": 0.4, "high": 0.55, "limit": 0.6, "at_least": False, "held": True,
            }
        },
        {"extra_info": {"kind": "layer"}},
    ],
}  # fmt: skip


def test_results_are_written_and_merged_part_by_part(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        **results.of_benchmarks([RUN]),
        "commit": {"id": "0123456789abcdef", "dirty": True},
        "parts": {"bench": {"status": "passed", "seconds": 9.0, "summary": "fine"}},
    }
    path = results.write(content, tmp_path)
    assert path == tmp_path / "h1" / "0123456789-dirty.json"
    test = {"status": "FAILED", "seconds": 1.0, "summary": "1 failed"}
    only_gpu = {"name": "NVIDIA H1", "slug": "h1"}
    again = {"gpu": only_gpu, "commit": content["commit"], "parts": {"test": test}}
    assert results.write(again, tmp_path) == path
    merged = json.loads(path.read_text())
    assert merged["parts"].keys() == {"bench", "test"}
    assert merged["gpu"]["peaks"]["copy"] == 3e12
    assert [p["contestant"] for p in merged["points"]] == [
        "triton_8", "cudnn_bf16", "cudnn_bf16_channels_last",
    ]  # fmt: skip
    assert merged["bars"][0]["ratio"] == 0.5
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_table_tells_parts_fractions_and_bars() -> None:
    content = {
        **results.of_benchmarks([RUN]),
        "commit": {"id": "0123456789abcdef", "dirty": True},
        "parts": {
            "test": {
                "status": "FAILED", "seconds": 61.4, "summary": "1 failed", "details": ["x - bad"],
            }
        },
    }  # fmt: skip
    lines = results.table(content).splitlines()
    assert lines[0] == "GPU check of 0123456789 with uncommitted changes on NVIDIA H1"
    assert lines[1] == "test      FAILED     61 s  1 failed"
    assert lines[2] == "    x - bad"
    assert "measured: copies 3000 GB/s, int8 products 1500 TOPS" in lines
    (row,) = (line for line in lines if line.startswith("16x32x32 batch 1024"))
    assert row.endswith("triton_8 20.0 (71 %), cudnn_bf16_channels_last 40.0")
    assert any(line.startswith("held      0.500 <= 0.6") for line in lines)
    assert lines[-1] == "1 of 1 bars held"


def test_without_a_gpu_or_benchmarks_there_is_a_table_too() -> None:
    table = results.table({"gpu": {}, "commit": {"id": "unknown", "dirty": None}})
    assert table == "GPU check of unknown on an unknown GPU"


# All of it that runs without a GPU


@pytest.mark.slow
def test_a_dry_run_tries_what_a_gpu_would_run(tmp_path: Path) -> None:
    done = gpu_check("dry", OUT=str(tmp_path), DFS_COMMIT="abc")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "rehearsal" / "abc.json").read_text())
    assert content["parts"]["dry"]["status"] == "passed"
    assert [bar["bar"] for bar in content["bars"]] == ["roofline", "network_spread"]
    assert {point["batch"] for point in content["networks"]} == {1, 64, 1024}
    assert {p["contestant"] for p in content["points"]} == {
        "triton_skipped",
        "triton_buckets_mixed",
        "cudnn_bf16",
        "cudnn_bf16_channels_last",
    }
    assert (tmp_path / "logs" / "bench0.log").exists()
