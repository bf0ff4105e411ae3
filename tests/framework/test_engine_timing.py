"""Times of a frozen network beside other runtimes: what is called, counted and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dfs import Engine, cli, freeze
from dfs.data import load_dataset
from dfs.engine import EngineTime, EngineTimes, time_engine, timing
from dfs.engine.peers import PEERS, Call, Peer, PeerUnavailableError, StaticNetwork
from dfs.models import DynamicResNet, cifar_resnet
from dfs.report import engine_times_table, plot_engine_times
from tests.framework.helpers import run_dfs
from tests.framework.test_engine import SIZE, make_model


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_ROUNDS", 3)
    monkeypatch.setattr(timing, "_SECONDS", 0.01)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return freeze(make_model(8), SIZE)


@pytest.fixture(scope="module")
def engine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for scikit-learn's digits."""
    torch.manual_seed(1)
    preprocessing = load_dataset("digits").preprocessing
    path = tmp_path_factory.mktemp("engine") / "network.dfs"
    freeze(DynamicResNet(8, 10, 1).eval(), (12, 12), preprocessing).save(path)
    return path


def test_every_width_is_timed_at_every_batch_size(engine: Engine) -> None:
    threads = torch.get_num_threads()
    images = torch.randn(5, 3, *SIZE)
    found = time_engine(engine, images, (1, 3, 8), threads=1, peers=False)
    assert (found.threads, torch.get_num_threads()) == (1, threads)
    assert found.batches == [1, 3, 8]
    assert [(t.name, t.batch) for t in found.times] == [
        (name, batch) for batch in (1, 3, 8) for name in ("gates", "8", "4", "2", "0")
    ]
    assert all(0 < t.p50 <= t.p99 and t.calls >= 3 for t in found.times)
    rows = found.rows()
    assert rows["DFS, all 8 bits"][3].cost == (8 / 32) ** 2
    decided = rows["DFS, as its gates decide"]
    assert decided[1].cost == pytest.approx(float(engine(images).cost.mean()))
    assert not found.missing


def test_peers_are_timed_beside_it_or_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def works(network: StaticNetwork, images: torch.Tensor, threads: int) -> Call:
        seen.append((network.shape, len(images), threads))
        return lambda: network.model(images)

    def lacks(network: StaticNetwork, images: torch.Tensor, threads: int) -> Call:
        raise PeerUnavailableError("it is not there")

    several = Peer("several", "Several", works, many_only=True)
    monkeypatch.setattr(
        timing, "PEERS", (Peer("one", "One", works), Peer("none", "None", lacks), several)
    )
    found = time_engine(engine, batches=(1, 2), threads=2)
    assert found.missing == {"None": "it is not there"}
    peers = [(t.name, t.batch, t.cost) for t in found.times if t.name in ("one", "several")]
    assert peers == [("one", 1, None), ("one", 2, None), ("several", 2, None)]
    assert seen == [((3, *SIZE), 1, 2), ((3, *SIZE), 2, 2), ((3, *SIZE), 2, 2)]


@pytest.mark.parametrize(
    "peer", [p for p in PEERS if p.name != "torch_compile"], ids=lambda p: p.name
)
def test_peers_compute_the_static_network(peer: Peer) -> None:
    network = StaticNetwork(cifar_resnet(8), (16, 16))
    images = network.images(5)
    try:
        logits = torch.as_tensor(peer.prepare(network, images, 2)())
    except PeerUnavailableError as reason:
        pytest.skip(str(reason))
    with torch.no_grad():
        expected = network.model(images)
    tolerance = 0.1 if "int8" in peer.name else 1e-4
    torch.testing.assert_close(
        logits, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    network = StaticNetwork(cifar_resnet(8), (16, 16))
    for peer in PEERS[2:]:
        with pytest.raises(PeerUnavailableError, match=r"is missing; pip install -e '\.\[peers\]'"):
            peer.prepare(network, network.images(1), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": ()}, "batches must be positive"),
        ({"batches": (1, 0)}, "batches must be positive"),
        ({"threads": 0}, "threads must be positive"),
        ({"images": torch.zeros(0, 3, *SIZE)}, "images must not be empty"),
        ({"images": torch.zeros(1, 1, *SIZE)}, "images must be"),
    ],
)
def test_wrong_arguments_are_named(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_engine(engine, peers=False, **arguments)


def test_table_and_plot(tmp_path: Path) -> None:
    times = (
        EngineTime("gates", "DFS, as its gates decide", 1, 0.5, 0.75, 10, 0.02),
        EngineTime("gates", "DFS, as its gates decide", 64, 0.25, 0.3, 10, 0.02),
        EngineTime("peer", "Peer", 1, 2.0, 2.5, 10),
    )
    found = EngineTimes(times, 2, {}, {})
    table = engine_times_table(found, "network")
    assert table.title == "network: ms per image, p50 / p99, 2 threads"
    cells = [list(column.cells) for column in table.columns]
    assert cells == [
        ["DFS, as its gates decide", "Peer"],
        ["2.00", ""],
        ["0.500 / 0.750", "2.000 / 2.500"],
        ["0.250 / 0.300", ""],
    ]
    plot_engine_times(tmp_path / "times.png", found, "network")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_times_a_file_on_real_images(
    engine_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plot = tmp_path / "times.png"
    arguments = ["bench", "--engine", str(engine_file), "--no-peers", "--batches", "1,4"]
    arguments += ["--dataset", "digits", "--threads", "1"]
    code, out, _ = run_dfs([*arguments, "--plot", str(plot), "--json"], monkeypatch, capsys)
    assert code == 0
    found = json.loads(out)
    assert {(t["name"], t["batch"]) for t in found["times"]} >= {("gates", 1), ("8", 4)}
    assert (found["engine"], found["threads"]) == (str(engine_file), 1)
    assert plot.exists()
    code, out, _ = run_dfs(arguments, monkeypatch, capsys)
    assert code == 0
    assert "DFS, as its gates decide" in out
    assert "batch 4" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --latency-table or --engine, one of them"),
        (["--engine", "nowhere.dfs"], "nowhere.dfs does not exist"),
        (["--engine", "FILE", "--batches", "1,x"], "--batches must be numbers"),
        (["--engine", "FILE", "--batches", "0"], "batches must be positive"),
        (["--engine", "FILE", "--latency-table", "x"], "one of them"),
    ],
)
def test_the_command_names_what_is_wrong_in_one_line(
    arguments: list[str],
    message: str,
    engine_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(engine_file) if a == "FILE" else a for a in arguments]
    code, _, err = run_dfs(["bench", *given], monkeypatch, capsys)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_on_a_gpu_a_call_is_waited_for_and_peers_are_left_out(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that runs on the CPU, but says that it doesn't."""
    gpu = torch.device("cuda", 0)
    calls, waited = [], []
    run = Engine.__call__

    def counted(self: Engine, *arguments: Any) -> Any:
        calls.append(arguments)
        return run(self, *arguments)

    monkeypatch.setattr(Engine, "__call__", counted)
    monkeypatch.setattr(Engine, "device", gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    found = time_engine(engine, torch.randn(2, 3, *SIZE), (2,))
    # The call that tells the cost is not timed.
    assert waited == [gpu] * (len(calls) - 1)
    assert len(found.times) == 1 + len(engine.choices)
    assert found.missing == {peer.label: "it is timed on the CPU only" for peer in PEERS}
    assert found.to_dict()["device"] == "a GPU at cuda:0"
    assert "a GPU at cuda:0" in str(engine_times_table(found, "title").title)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["engine", "latency table", "freeze"])
def test_without_a_gpu_its_device_is_a_mistake(
    command: str,
    engine_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = {
        "engine": ["bench", "--engine", str(engine_file)],
        "latency table": ["bench", "--latency-table", str(out)],
        "freeze": ["freeze", str(engine_file), "--out", str(out), "--calibrate-budget"],
    }[command]
    code, _, errors = run_dfs([*arguments, "--device", "cuda"], monkeypatch, capsys)
    assert (code, errors) == (2, "dfs: device: there is no cuda:0, PyTorch sees 0 GPUs\n")
    code, _, errors = run_dfs([*arguments, "--device", "tpu"], monkeypatch, capsys)
    assert (code, errors.count("\n"), "tpu" in errors) == (2, 1, True)
    assert not out.exists()


def test_a_latency_table_is_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "choose_device", lambda name: torch.device("cuda", 0))
    arguments = ["bench", "--latency-table", str(tmp_path / "table.json"), "--device", "cuda"]
    code, _, errors = run_dfs(arguments, monkeypatch, capsys)
    assert (code, errors.startswith("dfs: --device")) == (2, True)
