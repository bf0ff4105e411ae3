from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfs.cost import BitOps, PaperCost
from dfs.data import Preprocessing
from dfs.data.picture import PictureError, network_pixels, read_picture
from dfs.predict import Prediction, Predictor
from dfs.train import TrainConfig
from dfs.train.checkpoint import CheckpointError, save_checkpoint
from dfs.train.network import load_network
from tests.framework.helpers import run_dfs, settled_model

NAMES = tuple(f"class {i}" for i in range(10))
RECORD = Preprocessing(16, 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), NAMES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose decisions differ between pictures."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    model = settled_model(depth=14)
    torch.nn.init.normal_(model.gate.proj.weight, std=8.0)
    config = TrainConfig(model="resnet14", dataset="cifar10")
    content = {
        "config": config.to_dict(),
        "model": model.state_dict(),
        "data": {"name": "cifar10", "preprocessing": RECORD.to_dict(), "files": []},
    }
    save_checkpoint(path, content)
    return path


def _picture(folder: Path, name: str = "a.png", side: int = 16, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


# What is said of a picture


def test_predictions_are_what_the_network_says(checkpoint: Path, tmp_path: Path) -> None:
    paths = [_picture(tmp_path, f"{i}.png", seed=i) for i in range(6)]
    model = load_network(checkpoint).model
    images = torch.stack([network_pixels(path, RECORD) for path in paths])
    out = model.run(RECORD.normalize(images))
    confidence, labels = out.logits.double().softmax(1).max(1)
    paper, bitops = PaperCost(model)(out.mask), BitOps(model, (16, 16))(out.mask)
    found = list(Predictor.from_checkpoint(checkpoint).predict(paths))
    assert len({tuple(row) for row in out.bits.tolist()}) > 1
    for i, one in enumerate(found):
        assert isinstance(one, Prediction)
        assert (one.path, one.label) == (str(paths[i]), int(labels[i]))
        assert one.class_name == NAMES[one.label]
        assert one.confidence == pytest.approx(float(confidence[i]))
        assert list(one.bits) == out.bits[i].tolist()
        assert one.costs["paper_cost"] == pytest.approx(float(paper[i]))
        assert one.costs["bitops"] == pytest.approx(float(bitops[i]))
        assert one.milliseconds > 0


def test_a_picture_of_the_networks_size_is_taken_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "same.png")
    found = network_pixels(tmp_path / "same.png", RECORD)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)
    values = RECORD.normalize(found[None])[0, 1].double()
    expected = (torch.from_numpy(pixels[..., 1]).double() / 255 - 0.5) / 0.3
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_a_larger_picture_is_scaled_and_its_middle_taken(tmp_path: Path) -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = (10, 20, 30)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = network_pixels(tmp_path / "wide.png", RECORD)
    assert found.shape == (3, 16, 16)
    # The scaling's filter reaches a pixel over the edge of the cut.
    assert (found[:, :, 1:-1] == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()


def test_scanned_digits_come_back_from_pictures_as_they_were_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    from dfs.data import load_dataset

    data = load_dataset("digits")
    record = data.preprocessing
    assert record is not None
    assert record.class_names == tuple("0123456789")
    parts = (data.train, data.gate, data.val, data.test)
    known = torch.cat([part.first(2000) for part in parts])
    for i, scan in enumerate(load_digits().images[:20]):
        pixels = np.round(scan * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        image = record.normalize(network_pixels(tmp_path / f"{i}.png", record)[None])
        # Its scan among all of them; one level in 255 is 0.01 here.
        distances = (known - image).abs().amax((1, 2, 3))
        assert float(distances.sort().values[0]) < 0.02


# Pictures of all kinds


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "gif", "tif", "ppm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_common_formats_are_read(suffix: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (7, 5), (200, 100, 50)).save(path)
    picture = read_picture(path, channels)
    assert (picture.size, picture.mode) == ((7, 5), "RGB" if channels == 3 else "L")
    # 0.299 R + 0.587 G + 0.114 B
    expected = (200, 100, 50) if channels == 3 else (124,)
    found = np.array(picture)[2, 3].reshape(-1)
    assert np.abs(found.astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
        ("LA", (50, 0), (255, 255, 255)),
        ("I;16", 0x8040, (128, 128, 128)),
        ("I", 0xFFFF, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_opaque_colour(
    mode: str, colour: object, expected: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / ("a.tif" if mode == "I" else "a.png")
    Image.new(mode, (4, 4), colour).save(path)  # type: ignore[arg-type]
    assert np.array(read_picture(path, 3))[1, 2].tolist() == list(expected)


def test_a_palette_with_transparency_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 1), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    found = np.array(read_picture(tmp_path / "a.png", 3))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [40, 50, 60]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_the_cameras_orientation_is_honoured(suffix: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 4), "black")
    picture.paste("white", (0, 0, 8, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture.save(tmp_path / f"a.{suffix}", exif=exif)
    found = np.array(read_picture(tmp_path / f"a.{suffix}", 1))
    assert found.shape == (8, 4)
    assert found[:, 3].min() > 200
    assert found[:, 0].max() < 55


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not a picture of a known format"),
        (b"hello", "not a picture of a known format"),
        (b"\xff\xd8\xff\xe0", "not a picture|unreadable"),
        ("cut", "unreadable"),
    ],
)
def test_what_is_no_picture_is_named(
    content: bytes | str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.png"
    if content == "cut":
        whole = _picture(tmp_path, "x.png", 64).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(PictureError, match=rf"x.png: ({message})"):
        read_picture(path, 3)


def test_other_things_that_are_no_picture(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="is a folder"):
        read_picture(tmp_path, 3)
    Image.new("F", (3, 3), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match="floating-point pixels"):
        read_picture(tmp_path / "a.tif", 3)


# The command


def test_the_command_names_what_it_can_not_read_and_does_the_others(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad = _picture(tmp_path, "good.png"), tmp_path / "bad.png"
    bad.write_bytes(b"hello")
    arguments = ["--checkpoint", str(checkpoint), str(bad), str(good), str(tmp_path / "none.png")]
    code, out, error = run_dfs(["predict", *arguments, "--json"], monkeypatch, capsys)
    assert code == 2
    found = json.loads(out)
    assert [one["path"] for one in found["predictions"]] == [str(good)]
    assert found["predictions"][0]["class_name"] in NAMES
    assert len(found["predictions"][0]["bits"]) == 5
    assert set(found["predictions"][0]["costs"]) == {"paper_cost", "bitops"}
    assert [str(bad) in one for one in found["unreadable"]] == [True, False]
    lines = error.strip().splitlines()
    assert [str(bad) in lines[0], "none.png: no such file" in lines[1]] == [True, True]
    code, out, _ = run_dfs(["predict", *arguments], monkeypatch, capsys)
    assert code == 2
    assert "good.png" in out
    arguments = ["predict", "--checkpoint", str(checkpoint.parent), str(good)]
    code, out, error = run_dfs(arguments, monkeypatch, capsys)
    assert (code, error) == (0, "")
    assert "confidence" in out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stage": 2}, "the run is not finished"),
        ({"data": {"preprocessing": None}}, "was trained on tensors"),
        ({"data": {"preprocessing": {"size": 3}}}, "preprocessing must have the entries"),
        ({"data": {}}, "entry 'preprocessing' is missing"),
        ({"data": None}, "NoneType"),
        ({"model": {}}, "is missing; was it another architecture"),
    ],
)
def test_a_checkpoint_that_can_not_be_used_is_refused(
    changed: dict[str, object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    save_checkpoint(tmp_path / "changed.pt", {**content, **changed})
    with pytest.raises(CheckpointError, match=message):
        load_network(tmp_path / "changed.pt")


def test_a_checkpoint_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run_dfs(
        ["predict", "--checkpoint", str(tmp_path), "a.png"], monkeypatch, capsys
    )
    assert (code, out) == (2, "")
    assert error == f"dfs: {tmp_path / 'checkpoint.pt'}: no such checkpoint\n"
