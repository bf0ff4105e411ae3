"""The table of which backend is faster, out of a GPU check's benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import check, results
from bench.gpu.backend_table import candidate
from bench.gpu.check import Context, Result
from dfs_kernels.backends import measured
from dfs_kernels.backends.measured import BackendTable

SOURCE = {"commit": "abc", "command": "bench/gpu_check.sh bench"}


def point(contestant: str, seconds: float, layer: str = "64x8x8", batch: int = 64) -> Any:
    return {"contestant": contestant, "seconds": seconds, "layer": layer, "batch": batch}


POINTS = [
    point("cuda_8", 2.0), point("triton_8", 4.0), point("triton_buckets_8", 1e-9),
    point("cuda_2", 1.0), point("triton_2", 1.0),
    point("cuda_4", 1e-9),  # on one of them only
    point("cuda_32", 1e-9), point("triton_32", 1.0),  # no integers
    point("cudnn_bf16", 1e-9), point("dfs_8", 1e-9, "elsewhere"),
    point("cuda_8", 8e-6, "32to64x16x16-1x1-s2", 1),
    point("triton_8", 5e-6, "32to64x16x16-1x1-s2", 1),
    point("cuda_8", 8e-6, "96x28x28-depthwise", 1),
]  # fmt: skip


def test_a_row_has_the_mean_over_what_both_were_timed_at() -> None:
    table = candidate(POINTS, "NVIDIA H1", SOURCE)
    assert table is not None
    assert table.device == "NVIDIA H1"
    assert table.source == SOURCE
    assert table.seconds.keys() == {"64x8x8>64x8x8/3x3", "32x16x16>64x8x8/1x1"}
    assert table.seconds["64x8x8>64x8x8/3x3"] == {64: {"cuda": 1.5, "triton": 2.5}}
    assert table.faster("64x8x8>64x8x8/3x3") == ((64, "cuda"),)
    assert table.faster("32x16x16>64x8x8/1x1") == ((1, "triton"),)
    assert table.faster("64x8x8>64x8x8/5x5") == ()


def test_a_candidate_is_in_the_table_where_it_was_timed_alike() -> None:
    name = measured.CANDIDATES[0]
    more = [point(f"{name}_8", 0.5)]
    table = candidate(POINTS + more, "H1", SOURCE)
    assert table is not None
    assert name not in table.seconds["64x8x8>64x8x8/3x3"][64]
    table = candidate([*POINTS, *more, point(f"{name}_2", 1.5)], "H1", SOURCE)
    assert table is not None
    assert table.seconds["64x8x8>64x8x8/3x3"][64][name] == 1.0
    assert table.faster("64x8x8>64x8x8/3x3") == ((64, name),)
    assert BackendTable.from_json(table.to_json()) == table


def test_without_both_backends_there_is_no_table() -> None:
    assert candidate([p for p in POINTS if "triton" in p["contestant"]], "H1", SOURCE) is None


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(check, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(measured, "TABLES", tmp_path / "tables")
    monkeypatch.setenv("DFS_COMMIT", "0123456789abcdef-dirty")
    monkeypatch.setattr(check, "missing_gpu", lambda: None)
    monkeypatch.setattr(results, "table", lambda content: "")
    return tmp_path


def run_check(
    monkeypatch: pytest.MonkeyPatch, status: str, *arguments: str, points: Any = POINTS
) -> None:
    def bench(context: Context, deadline: float) -> Result:
        gpu = {"name": "NVIDIA H1", "slug": "h1"}
        return Result(status, "", content={"gpu": gpu, "points": list(points), "bars": []})

    parts = dict.fromkeys(("bench", "dry"), (bench, 5.0))
    monkeypatch.setattr(check, "PARTS", parts)
    check.main([*arguments])


@pytest.mark.parametrize("status", ["passed", "CUT OFF"])
def test_a_check_writes_the_table_that_the_package_reads(
    status: str, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_check(monkeypatch, status, "bench", "--out", str(folders / "out"))
    path = folders / "tables" / "h1.json"
    table = BackendTable.from_json(json.loads(path.read_text()))
    expected = {"commit": "0123456789abcdef-dirty", "command": "bench/gpu_check.sh bench"}
    assert table.source == expected
    assert table == candidate(POINTS, "NVIDIA H1", expected)
    assert f"written: {path}" in capsys.readouterr().out
    assert (folders / "out" / "h1" / "backends" / "h1.json").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("status", "arguments", "points"),
    [
        ("FAILED", ("bench",), POINTS),
        ("passed", ("bench", "--bench-k", "64x8x8"), POINTS),
        ("passed", ("bench", "dry"), POINTS),
        ("passed", ("bench",), POINTS[:1]),
    ],
    ids=["a failure", "some benchmarks", "a dry run", "one backend"],
)
def test_what_tells_too_little_writes_no_table(
    status: str,
    arguments: tuple[str, ...],
    points: Any,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_check(monkeypatch, status, *arguments, points=points)
    assert not (folders / "tables").exists()
