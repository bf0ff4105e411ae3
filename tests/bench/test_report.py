"""The report of a small hand-made run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report


def layer(contestant: str, milliseconds: float, batch: int = 64, threads: int = 1) -> Any:
    return {
        "stats": {"median": milliseconds / 1e3},
        "extra_info": {
            "kind": "layer",
            "layer": "16x32x32",
            "batch": batch,
            "threads": threads,
            "contestant": contestant,
            "macs": batch * 10**6,
            "peak": 60e9 if "32" in contestant else 200e9,
            "peak_source": "library",
        },
    }


def bar(name: str, ratio: float, limit: float, **changes: Any) -> Any:
    info = {
        "kind": "bar",
        "bar": name,
        "label": f"bar {name}",
        "layer": "16x32x32",
        "batch": 64,
        "threads": 1,
        "ratio": ratio,
        "low": ratio,
        "high": ratio,
        "limit": limit,
        "held": ratio <= limit,
    }
    return {"stats": {"median": 1.0}, "extra_info": {**info, **changes}}


def run_file(path: Path, benchmarks: list[Any], **dfs: Any) -> Path:
    content = {
        "machine_info": {
            "dfs": {"cpu": "Some CPU", "backend": {"isa": "avx512_vbmi"}, "torch": "2.13.0", **dfs}
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": benchmarks,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return run_file(
        tmp_path / "zen4.json",
        [
            layer("dfs_8", 0.64),
            layer("dfs_4", 0.80),
            layer("torch_int8", 0.32),
            layer("torch_float32_channels_last", 1.28),
            layer("dfs_8", 0.01, batch=1),
            layer("dfs_8", 0.4, threads=2),
            bar("int8", 1.9, 1.0),
            bar("two_bits", 0.6, 0.62, low=0.55, high=0.65),
            bar("float32", 1.2, 1.05, held=True, fraction_of_peak=0.93),
        ],
    )


def row(text: str, *start: str) -> list[str]:
    """The cells of the first table row that begins so."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[: len(start)] == list(start):
            return cells
    raise AssertionError(f"no row {start} in\n{text}")


def section(text: str, start: str) -> str:
    return text[text.index(start) :]


def test_tables_show_times_rates_and_fractions_of_the_peak(results: Path) -> None:
    text = report.markdown(report.load(results))
    times = section(text, "Milliseconds a call")
    header = row(times, "layer", "batch")
    cells = row(times, "16x32x32", "64")
    shown = dict(zip(header, cells, strict=True))
    assert shown["DFS 8 bits"] == "0.640"
    assert shown["PyTorch int8"] == "0.320"
    rates = section(text, "GMAC/s, and the fraction")
    shown = dict(zip(row(rates, "layer"), row(rates, "16x32x32", "64"), strict=True))
    assert shown["DFS 8 bits"] == "100 (50 %)"
    assert shown["PyTorch float32, NHWC"] == "50 (83 %)"
    assert row(rates, "16x32x32", "1")[3] == "-"  # 4 bits were not timed at batch 1


def test_ratios_prefer_turns_to_separate_benchmarks(results: Path) -> None:
    text = section(report.markdown(report.load(results)), "Ratios of times")
    shown = dict(zip(row(text, "layer"), row(text, "16x32x32", "64"), strict=True))
    assert shown["DFS 8 bits / PyTorch int8"] == "1.90"
    assert shown["DFS 4 bits / DFS 8 bits"] == "~1.25"
    assert shown["DFS 8 bits / ORT int8"] == "-"


def test_bars_are_held_or_missed(results: Path) -> None:
    text = report.markdown(report.load(results))
    assert "2 of 3 bars held" in text
    assert row(text, "bar int8", "16x32x32", "64")[-1] == "**missed**"
    assert row(text, "bar two_bits", "16x32x32", "64")[-1] == "held (?)"
    assert row(text, "bar float32", "16x32x32", "64")[-1] == "held: 93 % of the peak"


def test_each_number_of_threads_has_its_section(results: Path) -> None:
    text = report.markdown(report.load(results))
    assert text.index("### 1 thread\n") < text.index("### 2 threads\n")
    assert row(section(text, "### 2 threads"), "16x32x32", "64")[2] == "0.400"


def test_machine_and_commit_are_named(results: Path) -> None:
    text = report.markdown(report.load(results))
    assert text.startswith("## zen4\n")
    assert "Some CPU" in text
    assert "avx512_vbmi" in text
    assert "commit 0123456789," in text


def test_what_spoils_a_run_is_said(tmp_path: Path) -> None:
    path = run_file(
        tmp_path / "a.json",
        [bar("int8", 1, 1)],
        missing_flags=["x"],
        is_quiet=False,
        busy_share=0.6,
    )
    text = report.markdown(report.load(path))
    assert "The bars assume x" in text
    assert "Others took 60 %" in text


def test_command_prints_and_writes(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    tables, picture = tmp_path / "out.md", tmp_path / "out.png"
    code = report.main([str(results), "--markdown", str(tables), "--plot", str(picture)])
    assert code == 0
    assert capsys.readouterr().out == tables.read_text() == report.markdown(report.load(results))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"zen4.json", "out.md", "out.png"}


def test_files_are_reported_one_by_one(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run_file(tmp_path / "other.json", [layer("dfs_8", 1.0)])
    assert report.main([str(results), str(other)]) == 0
    text = capsys.readouterr().out
    assert text.index("## zen4") < text.index("## other")


def test_without_a_file_the_newest_result_is_read(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older = json.loads(results.read_text()) | {"datetime": "2001-01-01T00:00:00"}
    (results.parent / "older.json").write_text(json.dumps(older))
    (results.parent / "exactness.json").write_text('{"cases": 1}')
    newest = json.loads(results.read_text()) | {"datetime": "2002-01-01T00:00:00"}
    results.write_text(json.dumps(newest))
    monkeypatch.setattr(report, "RESULTS", results.parent)
    assert report.main([]) == 0
    text = capsys.readouterr().out
    assert "## zen4" in text
    assert "## older" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "is not JSON"),
        ("\0\x80", "is not JSON"),
        ("[]", "not what --benchmark-json wrote"),
        ('{"benchmarks": 3}', "not what --benchmark-json wrote"),
        ('{"benchmarks": []}', "holds no benchmarks of layers, networks or bars"),
        ('{"benchmarks": [{"extra_info": {}}]}', "holds no benchmarks of layers, networks or bars"),
        ('{"benchmarks": [{"stats": {}}]}', "not understood"),
        ('{"benchmarks": [{"extra_info": {"kind": "bar"}}]}', "not understood"),
        ('{"benchmarks": ["x"]}', "not understood"),
    ],
)
def test_bad_input_gives_one_line_and_2(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content.encode("latin1"))
    assert report.main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert "run.json" in captured.err


@pytest.mark.parametrize("arguments", [["--nonsense"], ["a.json", "b.json", "--plot", "c.png"], []])
def test_bad_arguments_give_one_line_and_2(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_plot_of_bars_only_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = run_file(tmp_path / "a.json", [bar("int8", 0.9, 1.0)])
    assert report.main([str(path), "--plot", str(tmp_path / "a.png")]) == 2
    assert "bars only" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_networks_are_shown_in_milliseconds_per_image(tmp_path: Path) -> None:
    def network(contestant: str, milliseconds: float, batch: int) -> Any:
        info = {
            "kind": "network",
            "contestant": contestant,
            "label": contestant.upper(),
            "network": "ResNet-38",
            "batch": batch,
            "threads": 2,
            "seconds": milliseconds / 1e3,
        }
        return {"stats": {"median": 1.0}, "extra_info": info}

    path = run_file(
        tmp_path / "run.json",
        [network("dfs_8", 0.5, 1), network("dfs_8", 6.4, 64), network("peer", 2.0, 1)],
    )
    text = report.markdown(report.load(path))
    header = row(text, "", "ResNet-38, batch 1, 2 threads")
    assert header[2] == "ResNet-38, batch 64, 2 threads"
    assert row(text, "DFS_8") == ["DFS_8", "0.500", "0.100"]
    assert row(text, "PEER") == ["PEER", "2.00", "-"]
