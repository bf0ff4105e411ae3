from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dfs.data import (
    Augmentation,
    DataError,
    DataSplits,
    Images,
    ImageSet,
    Preprocessing,
    load_dataset,
    training_batch,
)
from dfs.data.augment import middle_cut, random_cut
from dfs.data.preprocessing import channel_statistics
from dfs.data.raw import hold_out, share_with_gates
from dfs.data.stream import StreamedImages
from dfs.train import Trainer
from tests.framework import data_files
from tests.framework.helpers import TINY

PARTS = ("train", "gate", "val", "test")


@pytest.fixture
def small(tmp_path: Path) -> DataSplits:
    data_files.write(tmp_path, data_files.cifar10_binary())
    return load_dataset("cifar10", 0, tmp_path, waived=["cifar10"])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return data_files.class_folders(tmp_path / "pets", {"ant": 24, "bee": 25, "cow": 26})


def _fingerprints(images: Images) -> set[bytes]:
    whole = torch.cat([batch.images for batch in images.batches(7)])
    return {image.numpy().tobytes() for image in whole}


# Splits


def test_splits_share_no_image(small: DataSplits) -> None:
    parts = [_fingerprints(getattr(small, name)) for name in PARTS]
    assert [len(part) for part in parts] == [81, 9, 10, 20]
    assert len(set.union(*parts)) == 120


def test_only_what_gates_learn_from_depends_on_the_seed(small: DataSplits, tmp_path: Path) -> None:
    other = load_dataset("cifar10", 1, tmp_path, waived=["cifar10"])
    for name in ("val", "test"):
        assert torch.equal(getattr(small, name).images, getattr(other, name).images)
    assert not torch.equal(small.gate.first(9), other.gate.first(9))
    learned = _fingerprints(small.train) | _fingerprints(small.gate)
    assert learned == _fingerprints(other.train) | _fingerprints(other.gate)


def test_validation_is_a_tenth_and_at_most_5000() -> None:
    for count, held in ((100, 10), (1000, 100), (50000, 5000), (1281167, 5000)):
        learned, validation = hold_out(count)
        assert len(validation) == held
        if count < 2000:
            assert sorted(torch.cat([learned, validation]).tolist()) == list(range(count))
    with pytest.raises(DataError, match="9 training images are too few"):
        hold_out(9)
    with pytest.raises(DataError, match="too few to share"):
        share_with_gates(torch.arange(9), 0)


def test_images_are_normalized_by_their_training_images(small: DataSplits) -> None:
    assert isinstance(small.train, ImageSet)
    assert small.train.images.dtype == torch.uint8
    learned = torch.cat([small.train.first(1000), small.gate.first(1000)]).double()
    torch.testing.assert_close(learned.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    deviation = learned.var((0, 2, 3), correction=0).sqrt()
    torch.testing.assert_close(deviation, torch.ones(3).double(), atol=1e-5, rtol=0)


def test_channel_statistics_are_those_of_the_pixels() -> None:
    pixels = torch.from_numpy(data_files.drawn(9, 3, 5, 1)[0])
    mean, std = channel_statistics(pixels)
    values = pixels.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(values.var((0, 2, 3), correction=0).sqrt().tolist(), abs=1e-12)
    flat = channel_statistics(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8))
    assert flat == ((7 / 255,), (1 / 255,))


def test_the_test_images_are_neither_shuffled_nor_changed(small: DataSplits) -> None:
    pixels, labels = data_files.drawn(20, 3, 32, 10, seed=5)
    assert isinstance(small.test, ImageSet)
    assert np.array_equal(small.test.images.numpy(), pixels)
    assert np.array_equal(small.test.labels.numpy(), labels)
    batches = list(small.test.batches(8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert all(batch.images.dtype == torch.float32 for batch in batches)


# Augmentation


def _places(border: str) -> Tensor:
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[..., 4, 3] = 200
    augmentation = Augmentation(shift=2, flip=True, border=border)
    images = augmentation.apply(image.expand(4000, 1, 9, 9), torch.Generator().manual_seed(1))
    assert images.dtype == torch.uint8
    assert (images.flatten(1).sum(1) == 200).all()
    return images.flatten(1).long().argmax(1)


@pytest.mark.parametrize("border", ["constant", "replicate"])
def test_every_translation_and_mirroring_is_equally_frequent(border: str) -> None:
    places = _places(border)
    rows, columns = places // 9, places % 9
    assert torch.bincount(rows, minlength=9)[2:7].tolist() == pytest.approx([800] * 5, rel=0.15)
    assert int((rows < 2).sum() + (rows > 6).sum()) == 0
    # Columns 1 to 5, and their mirror images 7 to 3.
    expected = [0, 400, 400, 800, 800, 800, 400, 400, 0]
    found = torch.bincount(columns, minlength=9).tolist()
    assert found == pytest.approx(expected, rel=0.2, abs=1)


def test_a_translation_brings_in_black_or_the_border() -> None:
    image = torch.full((500, 2, 6, 6), 9.0)
    generator = torch.Generator().manual_seed(0)
    assert (Augmentation(3, True, "replicate").apply(image, generator) == 9).all()
    blackened = Augmentation(3, False, "constant").apply(image, generator)
    # What is left of an image is a rectangle that no side lost more than 3 pixels of.
    kept = (blackened == 9).sum((1, 2, 3)) / 2
    assert set(kept.tolist()) == {float(a * b) for a in range(3, 7) for b in range(3, 7)}
    assert set(blackened.unique().tolist()) == {0.0, 9.0}


def test_what_is_drawn_depends_on_the_generator_alone() -> None:
    images = torch.from_numpy(data_files.drawn(30, 3, 8, 10)[0])
    augmentation = Augmentation(2, True, "constant")
    first, again, other = (
        augmentation.apply(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Pixels are moved before they are normalized or after: it is the same.
    moved = augmentation.apply(images.float() / 255, torch.Generator().manual_seed(3))
    assert torch.equal(moved, first.float() / 255)


def test_no_augmentation_changes_nothing() -> None:
    images = torch.from_numpy(data_files.drawn(5, 3, 8, 10)[0])
    assert torch.equal(Augmentation(0, False).apply(images, torch.Generator()), images)
    with pytest.raises(ValueError, match="border"):
        Augmentation(1, True, "reflect")


def test_a_random_cut_lies_inside_and_has_the_areas_asked_for() -> None:
    generator = torch.Generator().manual_seed(5)
    boxes = torch.tensor([random_cut(300, 200, generator) for _ in range(3000)]).double()
    left, upper, right, lower = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert (right <= 300).all()
    assert (lower <= 200).all()
    width, height = right - left, lower - upper
    area, ratio = width * height / 60000, width / height
    assert float(area.min()) >= 0.08
    assert float(area.max()) <= 1
    assert float(ratio.min()) + 1e-6 >= 3 / 4
    assert float(ratio.max()) <= 4 / 3 + 1e-6
    # Up to half of this picture every shape fits, so there both are uniform.
    fits = area < 0.5
    assert float((area[fits] < 0.29).double().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(ratio[fits].log().mean()) == pytest.approx(0, abs=0.02)
    assert float(((left + right) / 2).mean()) == pytest.approx(150, abs=3)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000)])
def test_a_cut_of_a_strip_falls_back_to_its_middle(width: int, height: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, upper, right, lower = random_cut(width, height, generator)
    assert (right - left) / (lower - upper) == pytest.approx(4 / 3 if width > height else 3 / 4)
    assert ((left + right) / 2, (upper + lower) / 2) == (width / 2, height / 2)


def test_the_middle_cut_is_the_middle_of_the_shorter_side() -> None:
    assert middle_cut(640, 480, 256, 224) == (110.0, 30.0, 530.0, 450.0)
    assert middle_cut(32, 32, 32, 32) == (0, 0, 32, 32)


# Class folders


def test_a_single_level_of_class_folders_is_split(folders: Path) -> None:
    data = load_dataset("folder", 0, folders, 16)
    assert data.preprocessing is not None
    assert data.preprocessing.class_names == ("ant", "bee", "cow")
    assert (data.classes, data.channels, data.image_size) == (3, 3, (16, 16))
    # A fifth of each class for testing, a tenth of the rest for validation and for gates.
    assert [len(getattr(data, name)) for name in PARTS] == [50, 5, 6, 14]
    assert torch.bincount(data.test.labels).tolist() == [4, 5, 5]
    again = load_dataset("folder", 1, folders, 16)
    assert torch.equal(again.test.labels, data.test.labels)
    assert torch.equal(again.val.first(6), data.val.first(6))
    files = [set(map(str, _files(getattr(data, n)))) for n in ("train", "gate", "test")]
    assert len(set.union(*files)) == 69


def _files(images: Images) -> list[Path]:
    assert isinstance(images, StreamedImages)
    return [images._files[i] for i in range(len(images))]


def test_the_folders_say_what_is_for_testing(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("val", 1)):
        data_files.class_folders(tmp_path / name, {"ant": 30, "bee": 31}, seed)
    data = load_dataset("folder", 0, tmp_path, 16)
    assert [len(getattr(data, name)) for name in PARTS] == [50, 5, 6, 61]
    assert all((tmp_path / "val") in path.parents for path in _files(data.test))
    data_files.class_folders(tmp_path / "test", {"ant": 3, "bee": 4}, 2)
    data = load_dataset("folder", 0, tmp_path, 16)
    assert [len(getattr(data, name)) for name in PARTS] == [55, 6, 61, 7]


def test_batches_of_class_folders_depend_on_seed_and_step_alone(folders: Path) -> None:
    def batch(data: DataSplits, seed: int, step: int, workers: int) -> ImageSet:
        assert isinstance(data.train, StreamedImages)
        data.train.workers = workers
        return training_batch(data, data.train, 16, seed, step)

    data = load_dataset("folder", 0, folders, 16)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    straight = [batch(data, 0, step, 2) for step in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    resumed = load_dataset("folder", 0, folders, 16)
    for step in (3, 4, 1):
        again = batch(resumed, 0, step, 0)
        assert torch.equal(again.images, straight[step].images)
        assert torch.equal(again.labels, straight[step].labels)
    assert not torch.equal(batch(resumed, 1, 0, 0).images, straight[0].images)
    # Brightness tells the class: images and labels belong together.
    for one in straight:
        level = one.images.mean((1, 2, 3))
        assert (level[:, None] - level[None])[one.labels[:, None] > one.labels[None]].min() > 0
    assert data.train._ahead is not None  # type: ignore[attr-defined]


def test_an_epoch_of_class_folders_shows_every_picture_once(folders: Path) -> None:
    data = load_dataset("folder", 0, folders, 8)
    assert isinstance(data.train, StreamedImages)
    data.train.workers = 0
    labels = [training_batch(data, data.train, 10, 0, step).labels for step in range(5)]
    assert sorted(torch.cat(labels).tolist()) == sorted(data.train.labels.tolist())


def test_evaluation_sees_the_middle_of_every_picture(folders: Path) -> None:
    data = load_dataset("folder", 0, folders, 16)
    assert isinstance(data.test, StreamedImages)
    data.test.workers = 1
    whole = torch.cat([batch.images for batch in data.test.batches(4)])
    assert whole.shape == (14, 3, 16, 16)
    assert torch.equal(data.test.first(9), whole[:9])
    assert torch.equal(next(data.test.in_memory().batches(14)).images, whole)
    with Image.open(_files(data.test)[3]) as picture:
        scaled = 16 * (256 / 224)
        box = middle_cut(*picture.size, round(scaled), 16)
        cut = picture.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR, box=box)
    assert data.preprocessing is not None
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None]
    assert torch.equal(data.preprocessing.normalize(pixels)[0], whole[3])


def test_splits_move_to_a_device_and_stay_the_same(small: DataSplits, folders: Path) -> None:
    for data in (small, load_dataset("folder", 0, folders, 16)):
        moved = data.to(torch.device("cpu"))
        for name in ("train", "test"):
            before, after = getattr(data, name), getattr(moved, name)
            assert type(before) is type(after)
            assert torch.equal(before.first(5), after.first(5))
            assert torch.equal(before.labels, after.labels)
        assert moved.record() == data.record()


def test_images_are_prepared_as_another_network_takes_them(small: DataSplits) -> None:
    own = small.preprocessing
    assert own is not None
    other = replace(own, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
    prepared = small.prepared(other)
    assert isinstance(small.test, ImageSet)
    assert torch.equal(prepared.test.first(20), other.normalize(small.test.images))
    assert prepared.preprocessing == other
    with pytest.raises(ValueError, match="other classes"):
        small.prepared(replace(own, class_names=own.class_names[::-1]))
    with pytest.raises(ValueError, match="3 channels of 28 pixels"):
        small.prepared(replace(own, size=28))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_wherever_it_is_met(workers: int, folders: Path) -> None:
    data = load_dataset("folder", 0, folders, 16)
    for images in (data.train, data.test):
        assert isinstance(images, StreamedImages)
        images.workers = workers
        path = _files(images)[2]
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(DataError, match=rf"{path.name}: .*(unreadable|not a picture)") as told:
            list(images.batches(4))
        assert "Traceback" not in str(told.value)
    with pytest.raises(DataError, match=r"unreadable|not a picture"):
        # The whole epoch in one batch.
        training_batch(data, data.train, 50, 0, 0)


def test_layouts_that_can_not_be_used_are_refused(tmp_path: Path, folders: Path) -> None:
    with pytest.raises(DataError, match="holds no class folders; looked for"):
        load_dataset("folder", 0, tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_dataset("folder", 0, tmp_path / "nowhere")
    (folders / "dog").mkdir()
    with pytest.raises(DataError, match=r"pets/dog: a class folder without a picture"):
        load_dataset("folder", 0, folders)
    split = tmp_path / "split"
    data_files.class_folders(split / "train", {"ant": 12, "bee": 12})
    with pytest.raises(DataError, match="train needs val or test beside it"):
        load_dataset("folder", 0, split)
    data_files.class_folders(split / "test", {"ant": 2, "bat": 2})
    with pytest.raises(DataError, match="'bat' is in only one of them"):
        load_dataset("folder", 0, split)


# The record that travels with a network


def test_preprocessing_survives_a_checkpoint() -> None:
    record = Preprocessing(32, 36, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), ("cat", "dog"))
    assert Preprocessing.from_dict(record.to_dict()) == record
    assert (record.channels, record.classes) == (3, 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 0},
        {"size": 40},
        {"size": "32"},
        {"mean": (0.1, 0.2)},
        {"mean": ("a",)},
        {"mean": None},
        {"std": (0.5, 0.0, 0.5)},
        {"std": (0.5, float("nan"), 0.5)},
        {"class_names": ()},
        {"class_names": (1, 2)},
        {"colour": "blue"},
    ],
)
def test_a_record_that_makes_no_sense_is_refused(changed: dict[str, object]) -> None:
    record = Preprocessing(32, 36, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), ("cat", "dog"))
    with pytest.raises(ValueError, match="preprocessing"):
        Preprocessing.from_dict({**record.to_dict(), **changed})
    with pytest.raises(ValueError, match="preprocessing"):
        Preprocessing.from_dict(["size"])


def test_uint8_images_can_not_go_unnormalized() -> None:
    with pytest.raises(ValueError, match="need a preprocessing"):
        ImageSet(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))


# Training


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_a_resumed_run_sees_the_batches_that_it_would_have_seen(
    name: str, small: DataSplits, folders: Path, tmp_path: Path
) -> None:
    data = small if name == "cifar10" else load_dataset("folder", 0, folders, 12)
    straight = Trainer(TINY, None, data)
    assert straight.run(until=1)
    resumed = Trainer(TINY, tmp_path / "run", data)
    while not resumed.run(until=1, max_steps=3):
        resumed = Trainer.load(tmp_path / "run", data)
    for key, value in straight.plain.state_dict().items():
        assert torch.equal(value, resumed.plain.state_dict()[key]), key
