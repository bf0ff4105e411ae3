"""What ``dfs sweep``, ``plot`` and ``report`` print and leave, and how runs are stopped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.framework.helpers import run_dfs

pytest.importorskip("sklearn")

_TINY = [
    *("--preset", "digits", "--model", "resnet8"),
    *("--set", "batch_size=128", "--set", "float_epochs=1", "--set", "switch_epochs=1"),
    *("--set", "gate_epochs=1", "--set", "joint_epochs=1", "--set", "batchnorm_images=256"),
    *("--set", "exit_points=", "--set", "cost_tolerance=10", "--set", "calibration_images=64"),
]


class _Resources(HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe")


def _check_page(path: Path, *texts: str) -> None:
    page = path.read_text(encoding="utf-8")
    resources = _Resources()
    resources.feed(page)
    assert resources.found
    assert all(r.startswith("data:image/png;base64,") for r in resources.found)
    assert not re.search(r"url\(|@import", page)
    for text in texts:
        assert text in page


def test_a_run_is_plotted_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    code, _, error = run_dfs(["train", "--out", str(folder), *_TINY], monkeypatch, capsys)
    assert code == 0, error
    code, out, error = run_dfs(["plot", str(folder)], monkeypatch, capsys)
    assert code == 0, error
    assert [Path(line).name for line in out.split()] == ["decisions.png", "sheet.png"]
    assert all(Path(line).read_bytes().startswith(b"\x89PNG") for line in out.split())
    code, out, error = run_dfs(["report", str(folder)], monkeypatch, capsys)
    assert code == 0, error
    texts = ("Decisions", "given each other", "uniform width", "config.toml")
    _check_page(Path(out.strip()), *texts)


def test_a_sweep_goes_on_and_leaves_tables_plots_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", "--out", str(out), *_TINY]
    command += ["--methods", "dfs,static8,cascade", "--targets", "0.03"]
    code, _, error = run_dfs([*command, "--max-minutes", "0"], monkeypatch, capsys)
    assert code == 3
    assert "the same command goes on" in error
    code, printed, error = run_dfs([*command, "--json"], monkeypatch, capsys)
    assert code == 0, error
    found = json.loads(printed)
    rows = found["rows"]
    assert [row["method"] for row in rows] == ["dfs", "static8", "cascade"]
    assert "accuracy" in error
    assert (out / "table.md").read_text().count("\n") == 5
    assert len((out / "table.csv").read_text().splitlines()) == 4
    code, printed, error = run_dfs(["plot", str(out)], monkeypatch, capsys)
    assert code == 0, error
    assert [Path(p).name for p in printed.split()] == [
        "accuracy-paper_cost.png",
        "accuracy-bitops.png",
        "accuracy-engine_1.png",
        "accuracy-engine_64.png",
        "decisions.png",
    ]
    texts = ("static, 8 bits", "Accuracy over", "Decisions", "The cheapest and the dearest images")
    assert found["report"] == str(out / "report.html")
    _check_page(out / "report.html", *texts)
    (out / "report.html").unlink()
    code, printed, error = run_dfs(["report", str(out)], monkeypatch, capsys)
    assert code == 0, error
    _check_page(Path(printed.strip()), *texts)


def test_a_log_file_shows_steps_time_left_and_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "--out", str(tmp_path), *_TINY, "--methods", "dfs", "--targets", "0.03"]
    code, _, error = run_dfs(command, monkeypatch, capsys)
    assert code == 0, error
    assert "Time ahead" in error
    assert re.search(r"together +│ +│ about \d", error)
    (line,) = re.findall(r".*S4 joint.*", error)[-1:]
    assert re.match(r"\d\d:\d\d:\d\d  1/1 DFS, 3.00%, seed 0: S4 joint  8/8  \d+ s to go", line)
    assert "  cost 0." in line


def test_a_sweep_without_a_folder_takes_one_named_after_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sweep", *_TINY, "--methods", "static8", "--max-minutes", "0"]
    code, _, error = run_dfs(command, monkeypatch, capsys)
    assert code == 3, error
    assert (tmp_path / "sweeps" / "digits-digits" / "table.json").exists()


def test_time_runs_out_with_a_checkpoint_and_contradictions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--out", str(tmp_path / "run")]
    code, _, error = run_dfs([*run, *_TINY, "--max-minutes", "0"], monkeypatch, capsys)
    assert code == 3
    assert "saved in S0 float, step 1;" in error
    again = [*run, "--resume", "--max-minutes", "0"]
    code, _, error = run_dfs([*again, "--target", "0.02"], monkeypatch, capsys)
    assert code == 2
    assert "target=0.02, but the run has 0.04" in error
    code, _, error = run_dfs([*again, "--dataset", "mnist"], monkeypatch, capsys)
    assert code == 2
    assert "dataset=mnist, but the run has digits" in error
    code, _, error = run_dfs([*again, "--set", "seed=4", "--gate", "constant"], monkeypatch, capsys)
    assert code == 2
    assert "gate=constant, but the run has rnn" in error
    assert "seed=4, but the run has 0" in error
    code, _, error = run_dfs([*again, "--target", "0.04"], monkeypatch, capsys)
    assert code == 3
    assert "saved in S0 float, step 2;" in error


def test_latency_targets_need_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "--out", str(tmp_path), *_TINY, "--latency-targets", "0.2"]
    code, _, error = run_dfs(command, monkeypatch, capsys)
    assert code == 2
    assert "latency_targets need a latency_table" in error
    code, _, error = run_dfs([*command[:-1], "fast"], monkeypatch, capsys)
    assert code == 2
    assert "--latency-targets must be numbers" in error


def test_the_time_ahead_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # So many epochs that no machine is done in the time.
    run = ["train", "--out", str(tmp_path / "run"), *_TINY, "--set", "float_epochs=9999"]
    code, _, error = run_dfs([*run, "--max-minutes", "0.2"], monkeypatch, capsys)
    assert code == 3
    assert "Time ahead" in error
    assert "S4 joint" in error
    assert "to go" in error
