from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import commit
from bench.commit import current_commit


def test_the_commit_is_what_the_variable_says() -> None:
    assert current_commit({"DFS_COMMIT": "abc"}) == {"id": "abc", "dirty": False}
    assert current_commit({"DFS_COMMIT": "abc-dirty"}) == {"id": "abc", "dirty": True}


def test_without_a_repository_the_commit_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(commit, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert current_commit({}) == {"id": "unknown", "dirty": None}


def test_a_repository_tells_its_commit_and_whether_it_was_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(commit, "_ROOT", tmp_path)
    assert current_commit({}) == {"id": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "run.json").write_text("{}")
    assert current_commit({})["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert current_commit({})["dirty"] is True
