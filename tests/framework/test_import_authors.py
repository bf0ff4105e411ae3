from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfs.import_authors import OPTIONS, import_authors
from dfs.predict import Prediction, Predictor
from dfs.train.checkpoint import CheckpointError
from dfs.train.network import load_network
from tests.framework import data_files
from tests.framework.authors import authors_forward, authors_state
from tests.framework.helpers import run_dfs


def _save(path: Path, state: dict[str, Tensor], prefix: str = "module.") -> Path:
    named = {prefix + name: value for name, value in state.items()}
    content = {"iter": 70000, "arch": "cifar10_rnn_gate", "state_dict": named, "best_prec1": 92.5}
    torch.save(content, path)
    return path


def _images(count: int) -> Tensor:
    """Of all contrasts, so that decisions differ."""
    generator = torch.Generator().manual_seed(3)
    contrast = torch.linspace(0.1, 3.0, count).view(-1, 1, 1, 1)
    colour = torch.randn((count, 3, 1, 1), generator=generator)
    return contrast * torch.randn((count, 3, 32, 32), generator=generator) + colour


@pytest.mark.parametrize(
    ("per_group", "classes", "bits", "prefix"),
    [
        (1, 10, (8, 10, 12, 14, 16, 0), "module."),
        (2, 100, (8, 16, 0), ""),
        (3, 10, (8, 10, 12, 14, 16, 0), "module."),
        (1, 10, (2, 4, 6, 8, 10, 12, 14, 16, 0), ""),
    ],
)
def test_logits_and_decisions_are_the_authors(
    per_group: int, classes: int, bits: tuple[int, ...], prefix: str, tmp_path: Path
) -> None:
    state = authors_state(per_group, classes, len(bits) + 1, seed=3)
    found = import_authors(_save(tmp_path / "theirs.pth.tar", state, prefix), tmp_path / "ours.pt")
    assert (found.depth, found.classes) == (6 * per_group + 2, classes)
    assert found.choices == (0, *bits[:-1], 32) == OPTIONS[len(bits) + 1]
    # In float64: in float32 the order of a sum decides how a code on the edge is rounded.
    images = _images(12).double()
    exact = {k: v.double() for k, v in state.items()}
    logits, chosen = authors_forward(exact, per_group, images, bits)
    model = load_network(tmp_path / "ours.pt").model
    for part in (model.stem, model.bn_stem, model.blocks, model.classifier):
        part.double()
    out = model.run(images)
    decided = torch.tensor(found.choices, dtype=torch.int32)[chosen]
    assert torch.equal(out.bits, decided)
    assert len(torch.unique(decided, dim=0)) > 2
    assert (decided == 0).any()
    # The classifier's input is rounded to float32.
    torch.testing.assert_close(out.logits, logits, atol=1e-6, rtol=0)


def test_a_skipped_downsampling_block_is_its_shortcut_without_a_relu(tmp_path: Path) -> None:
    state = authors_state(1, 10, 4)
    state["control.proj.weight"].zero_()
    state["control.proj.bias"].copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    import_authors(_save(tmp_path / "theirs.pth.tar", state), tmp_path / "ours.pt")
    model = load_network(tmp_path / "ours.pt").model
    images = _images(4)
    assert (model.run(images).bits == 0).all()
    logits, _ = authors_forward(state, 1, images, (8, 16, 0))
    torch.testing.assert_close(model(images), logits, atol=1e-5, rtol=0)
    # Far below zero: a ReLU behind it would cut it off.
    state["group3_bn0.bias"] = state["group3_bn0.bias"] - 9
    moved, _ = authors_forward(state, 1, images, (8, 16, 0))
    expected = logits - 9 * state["fc.weight"].sum(1)
    torch.testing.assert_close(moved, expected, atol=1e-3, rtol=0)


def test_options_of_another_count_must_be_named(tmp_path: Path) -> None:
    source = _save(tmp_path / "theirs.pth.tar", authors_state(1, 10, 6))
    with pytest.raises(CheckpointError, match="has 6 outputs; say by --choices"):
        import_authors(source, tmp_path / "ours.pt")
    for wrong in ((0, 4, 8, 16, 32), (0, 4, 8, 16, 12, 32), (2, 4, 6, 8, 16, 32)):
        with pytest.raises(CheckpointError, match="6 ascending widths from 0 to 32"):
            import_authors(source, tmp_path / "ours.pt", wrong)
    assert not (tmp_path / "ours.pt").exists()
    found = import_authors(source, tmp_path / "ours.pt", (0, 4, 6, 8, 16, 32))
    assert found.choices == (0, 4, 6, 8, 16, 32)


def _without(name: str) -> Any:
    return lambda state: state.pop(name)


def _with(name: str, value: Tensor) -> Any:
    return lambda state: state.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("conv1.weight"), "entry 'conv1.weight' is missing"),
        (_without("group2_gate0.1.bias"), "entry 'group2_gate0.1.bias' is missing"),
        (_without("control.proj.weight"), "'control.proj.weight' is missing; is it an RNN-gated"),
        (_without("group3_layer0.bn3.weight"), "entry 'group3_layer0.bn3.weight' is missing"),
        (_with("group1_layer0.conv3.weight", torch.ones(1)), "unknown entries 'group1_layer0.conv"),
        (_with("group2_layer1.conv1.weight", torch.ones(1)), r"groups have \[1, 2, 1\] blocks"),
        (_with("group2_ds0.weight", torch.ones(32, 16, 1, 1)), "'group2_ds0.weight' and"),
        (_with("fc.weight", torch.ones(12, 64)), "12 classes"),
        (_with("fc.weight", torch.ones(12)), "'fc.weight' has shape"),
        (_with("control.proj.weight", torch.ones(7, 20)), "20 hidden units"),
        (_with("conv1.weight", torch.ones(16, 3, 5, 5)), "stem.weight' has shape"),
        (_with("bn1.bias", torch.full((16,), torch.nan)), "not finite"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, message: str, tmp_path: Path) -> None:
    state = authors_state(1, 10, 7)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        import_authors(_save(tmp_path / "theirs.pth.tar", state), tmp_path / "ours.pt")
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize("content", [b"", b"hello", [1, 2], {"state_dict": {}}, {"a": 1}])
def test_what_is_no_checkpoint_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"theirs.pth.tar: (damaged|holds no|entry)"):
        import_authors(path, tmp_path / "ours.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        import_authors(tmp_path / "nowhere", tmp_path / "ours.pt")


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_a_checkpoint_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.pth.tar"
    torch.save({"state_dict": authors_state(1, 10, 7), "arch": _Runs()}, path)
    capsys.readouterr()
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        import_authors(path, tmp_path / "ours.pt")
    assert "ran" not in capsys.readouterr().out


def test_an_imported_network_is_evaluated_and_predicts_with_its_own_normalization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = authors_state(1, 10, 7)
    source, out = _save(tmp_path / "theirs.pth.tar", state), tmp_path / "ours.pt"
    command = ["import-authors", str(source), "--out", str(out)]
    code, printed, error = run_dfs(command, monkeypatch, capsys)
    assert (code, error) == (0, "")
    assert "ResNet-8 for cifar10, choices 0/8/10/12/14/16/32" in printed
    code, _, error = run_dfs(command, monkeypatch, capsys)
    assert code == 2
    assert "is there already" in error

    code, _, error = run_dfs(["eval", str(out)], monkeypatch, capsys)
    assert code == 2
    assert "--data DIR" in error
    data_files.write(tmp_path, data_files.cifar10_binary())
    command = ["eval", str(out), "--data", str(tmp_path), "--allow-unverified-data", "cifar10"]
    code, printed, error = run_dfs([*command, "--json"], monkeypatch, capsys)
    assert code == 0, error
    pixels, labels = data_files.drawn(20, 3, 32, 10, seed=5)
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    images = (torch.from_numpy(pixels) / 255 - mean) / std
    logits, _ = authors_forward(state, 1, images, (8, 10, 12, 14, 16, 0))
    told = json.loads(printed)["rows"][0]
    assert told["accuracy"] == float((logits.argmax(1) == torch.from_numpy(labels)).double().mean())

    from PIL import Image

    path = tmp_path / "a.png"
    Image.fromarray(pixels[3].transpose(1, 2, 0)).save(path)
    (found,) = Predictor.from_checkpoint(out).predict([path])
    assert isinstance(found, Prediction)
    assert found.label == int(logits[3].argmax())
    assert found.confidence == pytest.approx(float(logits[3].softmax(0).max()), abs=1e-3)
