from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import accuracy
from dfs.report import summarise, write_tables
from dfs.train.config import TrainConfig
from dfs.train.presets import load_preset
from tests.framework.helpers import sweep_result

_ARGUMENTS = {"targets": [0.02], "seeds": [0], "methods": ["dfs"], "latency_targets": []}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a finished sweep of two seeds."""
    folder = tmp_path / "sweep"
    (folder / "results").mkdir(parents=True)
    (folder / "plots").mkdir()
    (folder / "plots" / "accuracy-bitops.png").write_bytes(b"picture")
    times = [f"2000-01-01T00:00:0{second}Z" for second in (0, 1)]
    results = [sweep_result(0, 0.9, time=times[0]), sweep_result(1, 0.94, time=times[1])]
    for key, result in zip("ba", results, strict=True):
        (folder / "results" / f"{key}.json").write_text(json.dumps(result))
    base = TrainConfig(data="/somebody/data", dataset="cifar10", float_epochs=7).to_dict()
    about = {"arguments": _ARGUMENTS, "base": base, "comparisons": []}
    write_tables(folder, summarise(results), about)
    took = {"a": {"engine_1": 0.2}, "b": {"engine_1": 0.3}}
    engines = {"threads": 1, "machine": {"isa": "scalar"}, "milliseconds": took}
    (folder / "engines.json").write_text(json.dumps(engines))
    return folder


def test_a_sweeps_figures_are_kept_with_what_remakes_them(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFS_COMMIT", "abc")
    folder = accuracy.keep(sweep, "digits", tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy-bitops.png",
        "config.toml",
        "results.json",
        "table.md",
    ]
    kept = json.loads((folder / "results.json").read_text())
    assert kept["commit"] == {"id": "abc", "dirty": False}
    assert kept["arguments"] == _ARGUMENTS
    assert kept["engines"] == {"threads": 1, "machine": {"isa": "scalar"}}
    assert [(r["seed"], r["accuracy"], r["engine_1"]) for r in kept["results"]] == [
        (0, 0.9, 0.3),
        (1, 0.94, 0.2),
    ]
    assert (folder / "table.md").read_text() == (sweep / "table.md").read_text()
    # As dfs sweep --preset reads it; whose folder the data was in is nobody's business.
    settings = load_preset(str(folder / "config.toml"))
    assert (settings.dataset, settings.float_epochs, settings.data) == ("cifar10", 7, "")
    assert "/somebody" not in "".join(p.read_text() for p in folder.glob("*.[jt]*"))


def test_what_is_not_finished_is_refused(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "results" / "c.json").write_text(json.dumps(sweep_result(2, 0.9, time="")))
    assert accuracy.main([str(sweep), "--name", "x"]) == 2
    assert "not finished" in capsys.readouterr().err
    (sweep / "engines.json").unlink()
    assert accuracy.main([str(sweep), "--name", "x"]) == 2
    assert "not finished" in capsys.readouterr().err
    assert accuracy.main([str(tmp_path / "none"), "--name", "x"]) == 2
    assert "no table of a sweep" in capsys.readouterr().err
