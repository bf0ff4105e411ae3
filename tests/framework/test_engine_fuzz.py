"""The campaign with damaged engine files, at a size for every day; a long one is a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("dfs_kernels._cpu")
pytest.importorskip("resource", reason="needs limits of memory")

from tests.framework import engine_fuzz


def test_damaged_files_are_refused_or_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    status = engine_fuzz.main(["--files", "300", "--seed", "4", "--out", str(path)])
    assert status == 0, capsys.readouterr().err
    record = json.loads(path.read_text())
    by_damage = record["outcomes"]
    assert {damage: sum(counts.values()) for damage, counts in by_damage.items()} == {
        "bytes": 150,
        "content, checksum made right": 150,
    }
    # Some of what says something else is as good as before.
    assert by_damage["content, checksum made right"]["works"] > 5
    assert sum(record["reasons"].values()) > 200


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("surprise"), "load_engine raised TypeError: surprise"),
        (MemoryError(), "load_engine raised MemoryError"),
        (ValueError("no file's name"), "unclear: no file's name"),
    ],
)
def test_only_the_promised_error_counts_as_a_refusal(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_engine(path: Path) -> None:
        raise error

    monkeypatch.setattr("dfs.load_engine", load_engine)
    outcome, found = engine_fuzz.try_file(tmp_path / "network.dfs")
    assert (outcome, found.strip(": ")) == ("failed", reason)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("import os; os.abort()", "status -6"),
        ("bytearray(3 << 30)", "load_engine raised MemoryError"),
    ],
)
def test_what_kills_a_child_is_told_of_its_file(
    fault: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child imports this first, and goes wrong at its second file."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, sys\n"
        "if 'tests.framework.engine_fuzz' in ' '.join(sys.orig_argv):\n"
        "    import dfs\n"
        "    load, calls = dfs.load_engine, itertools.count()\n"
        "    def load_engine(path):\n"
        f"        if next(calls) == 1: {fault}\n"
        "        return load(path)\n"
        "    dfs.load_engine = load_engine\n"
    )
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    tally = engine_fuzz.run_campaign(4, 0, 2)
    assert [number for number, _ in tally.failures] == [1]
    assert reason in tally.failures[0][1]
