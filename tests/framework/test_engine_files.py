"""Engine files: what is damaged, foreign or does not fit is refused with a reason."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dfs import Engine, freeze, load_engine
from dfs.data import Preprocessing
from dfs.engine import file, graph
from dfs.engine.graph import EngineGraph
from dfs.predict import Predictor
from tests.framework.test_engine import SIZE, make_model


@pytest.fixture(scope="module")
def engine() -> Engine:
    return freeze(make_model(8), SIZE)


@pytest.fixture(scope="module")
def saved(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("engine") / "network.dfs"
    engine.save(path)
    return path.read_bytes()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.dfs does not exist"):
        load_engine(tmp_path / "nowhere.dfs")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.dfs"
    for content in (b"", b"not an engine", b"\x80\x04N.", bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not an engine file"):
            load_engine(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not an engine file: it has no 'dfs_engine'"):
        load_engine(path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(saved: bytes, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "network.dfs"
    path.write_bytes(saved[: int(len(saved) * kept)])
    with pytest.raises(ValueError, match="is not an engine file, or is damaged"):
        load_engine(path)


def test_flipped_bits_are_noticed(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "network.dfs"
    generator = random.Random(1)
    for _ in range(200):
        damaged = bytearray(saved)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|not an engine file|not a usable engine"):
            load_engine(path)


def test_nothing_is_lost_when_saving_fails(
    engine: Engine, saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "network.dfs"
    path.write_bytes(saved)

    def fail(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(file, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        engine.save(path)
    assert path.read_bytes() == saved
    assert [p.name for p in tmp_path.iterdir()] == ["network.dfs"]


Edit = Callable[[dict[str, Any]], None]


def _set(*path: Any, value: Any) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        place: Any = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("format", value="onnx"), "its format is 'onnx'"),
        (_set("version", value=2), "it is of version 2; this library reads version 1"),
        (_set("more", value=1), "graph must have exactly"),
        (_set("image_size", value=[12]), "image_size must be a pair"),
        (_set("image_size", value=[0, 12]), "image_size must be an integer from 1"),
        (_set("image_size", value=[1 << 20, 1 << 20]), "has too many pixels"),
        (_set("choices", value=[8, 2]), "choices"),
        (_set("choices", value=[0, 3]), "widths must be 0 or one of"),
        (_set("choices", value=[0, True]), "choices must be an integer"),
        (_set("stream", value="float16"), "stream must be one of"),
        (_set("gate", "kind", value="oracle"), "gate must be one of"),
        (_set("gate", "deviation", value=1), "gate.deviation must be true or false"),
        (_set("levels", value={"2": "odd"}), "levels"),
        (_set("levels", value={"2": "centred", "8": "twos"}), "levels must be of the widths"),
        (_set("image_size", value=[4096, 4096]), "makes a map of 16 x 4096 x 4096 values"),
        (_set("architecture", "stem", "stride", value=0), "stem.stride must be an integer"),
        (_set("architecture", "stem", "groups", value=2), "stem.groups must divide"),
        (_set("architecture", "blocks", value=[]), "blocks must be at least two"),
        (_set("architecture", "blocks", value={}), "blocks must be a list"),
        (_set("architecture", "num_classes", value=1 << 40), "num_classes must be an integer"),
    ],
)
def test_graphs_that_make_no_sense_are_refused(engine: Engine, edit: Edit, message: str) -> None:
    data = copy.deepcopy(engine.graph.to_json())
    assert EngineGraph.from_json(json.loads(json.dumps(data))) == engine.graph
    edit(data)
    with pytest.raises(ValueError, match=message):
        EngineGraph.from_json(data)


def test_a_network_of_endless_work_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    macs = make_model(8).macs(*SIZE).total
    assert engine.graph.macs() == macs
    monkeypatch.setattr(graph, "_MOST_MACS", macs - 1)
    with pytest.raises(ValueError, match=f"an image would take {macs} products, at most"):
        EngineGraph.from_json(engine.graph.to_json())


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name].clone())

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("stem.mul"), "tensor stem.mul is missing"),
        (_set("stem.extra", value=torch.zeros(1)), "tensor stem.extra belongs to nothing"),
        (_tensor("stem.mul", lambda v: v.half()), "tensor stem.mul must be torch.float32"),
        (_tensor("stem.mul", lambda v: v[:, 1:]), "tensor stem.mul must be torch.float32"),
        (_tensor("stem.codes", lambda v: v[1:]), "tensor stem.codes must be torch.uint8"),
        (_tensor("stem.add", lambda v: v.fill_(float("inf"))), "stem.add holds values"),
        (_tensor("stem.input_scale", lambda v: v.fill_(0)), "stem.input_scale must lie in"),
        (_tensor("stem.input_zero_point", lambda v: v.fill_(256)), "stem.input_zero_point is 256"),
        (_tensor("streams.0.scale", lambda v: v.fill_(-1)), "streams.0.scale must lie in"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    engine: Engine, edit: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    tensors = dict(engine._tensors)
    edit(tensors)
    path = tmp_path / "network.dfs"
    file.save_graph(path, engine.graph, {k: v.contiguous().clone() for k, v in tensors.items()}, {})
    with pytest.raises(ValueError, match=f"is not a usable engine.*{message}"):
        load_engine(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "a cost must hold finite numbers"),
        (float("inf"), "a cost must hold finite numbers"),
        (10**400, "a cost must hold numbers"),
        ("1", "a cost must hold numbers"),
    ],
)
@pytest.mark.parametrize("place", ["fixed", "table", "full"])
def test_costs_that_make_no_sense_are_refused(
    engine: Engine, place: str, value: Any, message: str, tmp_path: Path
) -> None:
    costs = copy.deepcopy(engine.extra["costs"])
    if place == "full" and value != value:
        message = "a cost needs a table of 2 x 4 and a positive full"
    if place == "table":
        costs["paper"]["table"][0][0] = value
    else:
        costs["paper"][place] = value
    path = tmp_path / "network.dfs"
    file.save_graph(path, engine.graph, engine._tensors, {"costs": costs})
    with pytest.raises(ValueError, match=f"is not a usable engine: {message}"):
        load_engine(path)


def test_predicting_needs_to_know_what_decisions_cost(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "network.dfs"
    pixels = Preprocessing(12, 12, (0.5,) * 3, (0.2,) * 3, tuple("abcdefg"))
    square = freeze(make_model(8), (12, 12), pixels)
    file.save_graph(
        path, square.graph, square._tensors, {"preprocessing": square.extra["preprocessing"]}
    )
    assert load_engine(path).costs == {}
    with pytest.raises(ValueError, match="doesn't say what decisions cost: 'paper' is missing"):
        Predictor.from_engine(path)


def test_what_travels_along_comes_back(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "network.dfs"
    Engine(engine.graph, engine._tensors, {"classes": ["a", "b"]}).save(path)
    assert load_engine(path).extra == {"classes": ["a", "b"]}
