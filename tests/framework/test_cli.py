from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dfs.cost import Latency
from dfs.data.cifar import CIFAR10_CLASSES
from dfs.latency import LatencyTable
from dfs.models import DynamicResNet
from tests.framework import data_files
from tests.framework.helpers import run_dfs

_SMALL = [
    *("--model", "resnet8", "--target", "0.03"),
    *("--set", "float_epochs=2", "--set", "switch_epochs=1", "--set", "gate_epochs=2"),
    *("--set", "joint_epochs=1", "--set", "batchnorm_images=256", "--set", "cost_tolerance=1.0"),
    # So short a training may end anywhere.
    *("--set", "exit_points="),
]


def _dfs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dfs.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fly"], "fly"),
        (["info", "--colour"], "--colour"),
        (["train"], "--out"),
        (["train", "--out", "{tmp}", "--preset", "imagenet"], "preset must be"),
        (["train", "--out", "{tmp}", "--model", "resnet9"], "model"),
        (["train", "--out", "{tmp}", "--target", "-1"], "target"),
        (["train", "--out", "{tmp}", "--target", "much"], "--target"),
        (["train", "--out", "{tmp}", "--choices", "0,17"], "choices"),
        (["train", "--out", "{tmp}", "--choices", "zero"], "--choices"),
        (["train", "--out", "{tmp}", "--set", "speed=9"], "speed=9"),
        (["train", "--out", "{tmp}", "--set", "batch_size=many"], "batch_size"),
        (["train", "--out", "{tmp}", "--set", "dataset=cats"], "dataset"),
        (["train", "--out", "{tmp}", "--set", "cost=joules"], "cost"),
        (["train", "--out", "{tmp}", "--set", "float_lr=nan"], "float_lr"),
        (["train", "--out", "{tmp}", "--resume"], "no such checkpoint"),
        (["train", "--out", "{tmp}", "--data", "{tmp}"], "holds neither class folders nor"),
        (["train", "--out", "{tmp}", "--data", "{tmp}/nowhere"], "no such folder"),
        (["train", "--out", "{tmp}", "--dataset", "cats"], "dataset must be one of digits"),
        (["train", "--out", "{tmp}", "--dataset", "cifar10"], "--data DIR"),
        (["train", "--out", "{tmp}", "--dataset", "auto"], "--dataset auto needs --data"),
        (["train", "--out", "{tmp}", "--dataset", "digits", "--data", "{tmp}"], "no data folder"),
        (["train", "--out", "{tmp}", "--set", "image_size=9"], "image_size is for class folders"),
        (["predict", "--checkpoint", "{tmp}", "a.png"], "no such checkpoint"),
        (["predict", "a.png"], "--checkpoint"),
        (["eval", "{tmp}"], "no such checkpoint"),
        (["eval", "{tmp}", "--split", "train"], "--split"),
        (["sweep", "--out", "{tmp}", "--methods", "dfs,magic"], "magic"),
        (["sweep", "--out", "{tmp}", "--targets", "0.5"], "0.000% to 6.250%"),
        (["sweep", "--out", "{tmp}", "--targets", "some"], "--targets"),
        (["sweep", "--out", "{tmp}", "--seeds", "1,1"], "seeds"),
        (["plot", "{tmp}"], "no such checkpoint"),
        (["report", "{tmp}"], "no such checkpoint"),
        (["train", "--out", "{tmp}", "--target", "0.5"], "0.000% to 6.250%"),
        (["train", "--out", "{tmp}", "--gate", "wooden"], "gate"),
        (["train", "--out", "{tmp}", "--latency-table", "{tmp}/none.json"], "none.json"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    code, out, error = run_dfs(filled, monkeypatch, capsys)
    assert code == 2
    assert named in error
    assert len(error.strip().splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    for command in ("train", "demo"):
        code, _, error = run_dfs([command, "--out", str(path)], monkeypatch, capsys)
        assert code == 2
        assert str(path) in error
        assert "Traceback" not in error
    assert path.read_text() == "kept"


def test_info_tells_the_backends_as_json() -> None:
    result = _dfs("info", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {"reference", "cpu"} <= set(found["available_backends"])
    assert found["backends"]["cpu"]["isa"] in found["backends"]["cpu"]["supported_isas"]


def test_info_is_readable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run_dfs(["info"], monkeypatch, capsys)
    assert code == 0, error
    assert "backend cpu" in out


def test_exit_points_are_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--out", str(tmp_path / "run"), "--set", "exit_points=4:x"]
    code, _, error = run_dfs(arguments, monkeypatch, capsys)
    assert code == 2
    assert "exit_points takes WIDTH:POINTS pairs" in error


@pytest.mark.slow
def test_a_run_on_the_users_files_trains_evaluates_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, run = tmp_path / "files", tmp_path / "run"
    data_files.write(files, data_files.cifar10_binary(8))
    names = ("batch_size=16", "float_epochs=1", "gate_epochs=1", "batchnorm_images=16")
    settings = [word for name in names for word in ("--set", name)]
    command = ["train", "--out", str(run), *_SMALL, *settings, "--data", str(files)]
    code, _, error = run_dfs(command, monkeypatch, capsys)
    assert code == 2
    assert "data_batch_1.bin: its md5 sum is" in error
    command += ["--allow-unverified-data", "cifar10", "--json"]
    code, out, error = run_dfs(command, monkeypatch, capsys)
    assert code == 0, error
    told = json.loads(out)
    assert told["config"]["dataset"] == "cifar10"
    assert told["config"]["data"] == str(files)
    assert len(told["data"]["unverified"]) == 6

    moved = files.rename(tmp_path / "moved")
    code, _, error = run_dfs(["eval", str(run)], monkeypatch, capsys)
    assert code == 2
    assert f"--data {files}: no such folder" in error
    code, out, error = run_dfs(["eval", str(run), "--data", str(moved)], monkeypatch, capsys)
    assert code == 0, error
    assert "8 test images; not as published: data_batch_1.bin" in " ".join(out.split())
    data_files.write(moved, {f"{name}.bin": b"" for name in data_files.CIFAR10_FILES})
    code, _, error = run_dfs(["eval", str(run), "--data", str(moved)], monkeypatch, capsys)
    assert code == 2
    assert "not whole records" in error

    Image.new("RGBA", (50, 40), "red").save(tmp_path / "red.png")
    command = ["predict", "--checkpoint", str(run), str(tmp_path / "red.png"), "--json"]
    code, out, error = run_dfs(command, monkeypatch, capsys)
    assert code == 0, error
    assert json.loads(out)["predictions"][0]["class_name"] in CIFAR10_CLASSES


@pytest.mark.slow
def test_train_stops_on_a_signal_resumes_and_evaluates(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dfs.cli", "train", "--out", str(run), *_SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 500):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "stopped" in error
    steps = len(metrics.read_text().splitlines())

    refused = _dfs("train", "--out", str(run), *_SMALL)
    assert refused.returncode == 2
    assert "already holds a run" in refused.stderr
    unfinished = _dfs("eval", str(run))
    assert unfinished.returncode == 2
    assert "not finished" in unfinished.stderr
    mixed = _dfs("train", "--out", str(run), "--resume", "--seed", "3")
    assert mixed.returncode == 2

    resumed = _dfs("train", "--out", str(run), "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    places = [(line["stage"], line["step"], line["final"]) for line in lines]
    assert len(places) == len(set(places)) > steps
    rows = json.loads(resumed.stdout)["rows"]
    assert len(rows) == 2
    assert rows[1]["paper_cost"] < 0.0625

    table = _dfs("eval", str(run), "--split", "val")
    assert table.returncode == 0, table.stderr
    assert "BitOPs" in table.stdout


def test_bench_writes_a_table_that_prices_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    arguments = ["bench", "--latency-table", str(path), "--model", "resnet8"]
    arguments += ["--image-size", "8", "--batch", "2", "--choices", "0,2,8"]
    code, out, _ = run_dfs([*arguments, "--json"], monkeypatch, capsys)
    assert code == 0
    assert json.loads(out) == json.loads(path.read_text())
    model = DynamicResNet(8, choices=(0, 2, 8))
    cost = Latency(model, (8, 8), LatencyTable.load(path))
    assert cost.full > 0
    code, out, _ = run_dfs(arguments, monkeypatch, capsys)
    assert code == 0
    assert "Milliseconds per image, batches of 2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet9"], "model depth must be"),
        (["--choices", "0,8,10"], "the choices (10,) only simulate"),
        (["--choices", "all"], "--choices must be widths"),
        (["--batch", "0"], "batch must be positive"),
        (["--gate", "oracle"], "gate must be one of"),
        (["--image-size", "0"], "image_size must be positive"),
    ],
)
def test_bench_names_what_is_wrong_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "table.json"
    code, _, err = run_dfs(
        ["bench", "--latency-table", str(path), "--model", "resnet8", *arguments],
        monkeypatch,
        capsys,
    )
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not path.exists()
