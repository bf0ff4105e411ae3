from __future__ import annotations

import hashlib
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfs.data import DataError, cifar, idx, load, load_dataset, recognise
from dfs.data.files import Checksums, Layout
from dfs.data.raw import RawSet
from dfs.data.unpickle import load_plain
from tests.framework import data_files

WAIVED = ("cifar10", "cifar100", "svhn", "mnist", "fashion-mnist")


def _read(name: str, root: Path) -> RawSet:
    return load._SMALL[name].read(root, Checksums(name, WAIVED))


def _expect(raw: RawSet, train: list[tuple[np.ndarray, np.ndarray]], test: Any) -> None:
    pixels, labels = (np.concatenate(part) for part in zip(*train, strict=True))
    assert np.array_equal(raw.train.pixels.numpy(), pixels)
    assert np.array_equal(raw.train.labels.numpy(), labels)
    assert np.array_equal(raw.test.pixels.numpy(), test[0])
    assert np.array_equal(raw.test.labels.numpy(), test[1])
    assert raw.train.pixels.dtype == torch.uint8
    assert raw.train.labels.dtype == torch.int64


# What the formats hold


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("cifar-10-batches-bin", data_files.cifar10_binary()),
        ("cifar-10-batches-py", data_files.cifar10_python()),
        ("cifar-10-batches-py", data_files.cifar10_python(protocol=4)),
        ("cifar-10-batches-py", data_files.cifar10_python2()),
        ("", data_files.cifar10_binary()),
    ],
)
def test_cifar10_is_read_as_written(folder: str, files: dict[str, bytes], tmp_path: Path) -> None:
    data_files.write(tmp_path / folder, files)
    parts = [data_files.drawn(20, 3, 32, 10, seed=i) for i in range(6)]
    raw = _read("cifar10", tmp_path)
    _expect(raw, parts[:5], parts[5])
    assert raw.class_names[:2] == ("airplane", "automobile")
    assert len(raw.class_names) == 10


@pytest.mark.parametrize("python", [False, True])
def test_cifar100_takes_the_fine_labels(python: bool, tmp_path: Path) -> None:
    data_files.write(tmp_path, data_files.cifar100(python))
    parts = [data_files.drawn(200, 3, 32, 100, seed=i) for i in range(2)]
    raw = _read("cifar100", tmp_path)
    _expect(raw, parts[:1], parts[1])
    assert len(set(raw.class_names)) == 100
    assert list(raw.class_names) == sorted(raw.class_names)


def test_an_archive_is_read_where_it_lies(tmp_path: Path) -> None:
    files = data_files.cifar10_python2()
    path = tmp_path / "cifar-10-python.tar.gz"
    data_files.write_archive(path, "cifar-10-batches-py", files)
    parts = [data_files.drawn(20, 3, 32, 10, seed=i) for i in range(6)]
    _expect(_read("cifar10", tmp_path), parts[:5], parts[5])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz: not a complete tar archive"):
        _read("cifar10", tmp_path)
    fewer = {k: v for k, v in files.items() if k != "test_batch"}
    data_files.write_archive(path, "cifar-10-batches-py", fewer)
    with pytest.raises(DataError, match="holds no file test_batch"):
        _read("cifar10", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "")])
def test_idx_files_are_read_as_written(
    name: str, folder: str, packed: bool, tmp_path: Path
) -> None:
    root = tmp_path / folder / "raw" if folder else tmp_path
    data_files.write(root, data_files.mnist(packed))
    train, test = data_files.drawn(60, 1, 28, 10, 60), data_files.drawn(20, 1, 28, 10, 20)
    _expect(_read(name, tmp_path), [train], test)


def test_svhn_calls_its_ten_zero(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    data_files.write(tmp_path, data_files.svhn())
    train, test = data_files.drawn(60, 3, 32, 10, 60), data_files.drawn(20, 3, 32, 10, 20)
    _expect(_read("svhn", tmp_path), [train], test)


def test_svhn_says_that_it_needs_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.write(tmp_path, {"train_32x32.mat": b"", "test_32x32.mat": b""})
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"scipy reads; .*\[data\] extra"):
        _read("svhn", tmp_path)


# Checksums


def _published(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


def test_a_file_that_is_not_the_published_one_is_refused_with_both_sums(tmp_path: Path) -> None:
    files = data_files.write(tmp_path, data_files.cifar10_binary())
    with pytest.raises(DataError) as refused:
        load_dataset("cifar10", 0, files)
    found = _published(data_files.cifar10_binary())["data_batch_1.bin"]
    expected = "5dd7e06a14cb22eb9f671a540d1b7c25"
    for part in (str(tmp_path / "data_batch_1.bin"), found, expected, "--allow-unverified-data"):
        assert part in str(refused.value)


def test_originals_pass_and_a_changed_byte_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = data_files.cifar10_binary()
    layout = Layout("cifar-10-batches-bin", "", _published(files))
    monkeypatch.setattr(cifar, "CIFAR10_LAYOUTS", (layout,))
    data_files.write(tmp_path, files)
    record = load_dataset("cifar10", 0, tmp_path).record()
    assert record["unverified"] == []
    assert {f["file"]: f["md5"] for f in record["files"]} == _published(files)
    changed = bytearray(files["data_batch_3.bin"])
    changed[-1] ^= 1
    (tmp_path / "data_batch_3.bin").write_bytes(changed)
    with pytest.raises(DataError, match=r"data_batch_3.bin: its md5 sum"):
        load_dataset("cifar10", 0, tmp_path)
    waived = load_dataset("cifar10", 0, tmp_path, waived=["data_batch_3.bin"])
    assert waived.record()["unverified"] == ["data_batch_3.bin"]


def test_a_waiver_names_a_set_or_a_file_and_covers_no_other(tmp_path: Path) -> None:
    data_files.write(tmp_path, data_files.cifar10_binary())
    with pytest.raises(DataError, match=r"data_batch_2.bin: its md5 sum"):
        load_dataset("cifar10", 0, tmp_path, waived=["data_batch_1.bin", "cifar100"])
    record = load_dataset("cifar10", 0, tmp_path, waived=["cifar10"]).record()
    assert record["unverified"] == [f"{name}.bin" for name in data_files.CIFAR10_FILES]


def test_every_original_file_has_a_published_checksum() -> None:
    layouts = [layout for small in load._SMALL.values() for layout in small.layouts]
    sums = [md5 for layout in layouts for md5 in layout.md5.values()]
    assert len(sums) == len(set(sums)) == 34
    assert all(len(md5) == 32 and set(md5) <= set("0123456789abcdef") for md5 in sums)


# Damaged files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are not whole records of 3073"),
        (bytes(3073 * 2 - 1), "6145 bytes are not whole records"),
        (bytes([10]) + bytes(3072), "label 10 is none of 0 to 9"),
    ],
)
def test_damaged_binary_batches_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    data_files.write(tmp_path, {**data_files.cifar10_binary(), "data_batch_4.bin": content})
    with pytest.raises(DataError, match=rf"data_batch_4.bin: {message}"):
        _read("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"PK\3\4 something else", "not an idx file"),
        (struct.pack(">HBBI", 0, 13, 1, 0), "idx type 0x0d"),
        (struct.pack(">HBBI", 0, 8, 3, 5), "end within the header"),
        (data_files.idx(np.zeros((5, 28, 28)))[:-1], r"has 3936; cut short"),
        (data_files.idx(np.zeros((5, 28, 28))) + b"x", r"has 3936"),
        (struct.pack(">HBBIII", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "cut short"),
        (data_files.idx(np.zeros(60)), "must hold images"),
        (data_files.idx(np.zeros((59, 28, 28))), "59 images, 60 labels"),
    ],
)
def test_damaged_idx_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    name = "train-images-idx3-ubyte"
    data_files.write(tmp_path, {**data_files.mnist(False), name: content})
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        _read("mnist", tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 2000, -9])
def test_a_cut_gzip_file_is_refused(keep: int, tmp_path: Path) -> None:
    files = data_files.mnist(True)
    name = "train-images-idx3-ubyte.gz"
    data_files.write(tmp_path, {**files, name: files[name][:keep]})
    with pytest.raises(DataError, match=rf"{name}: not "):
        _read("mnist", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "foreign", "short"])
def test_damaged_matlab_files_are_refused(damage: str, tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    files = data_files.svhn()
    path = data_files.write(tmp_path, files) / "train_32x32.mat"
    if damage == "cut":
        path.write_bytes(files[path.name][:1000])
    elif damage == "foreign":
        scipy_io.savemat(path, {"X": np.zeros((28, 28, 3, 5), np.uint8), "y": np.zeros((5, 1))})
    else:
        scipy_io.savemat(path, {"X": np.zeros((32, 32, 3, 5), np.uint8), "y": np.zeros((4, 1))})
    with pytest.raises(DataError, match=r"train_32x32.mat: (not a readable|must hold X|5 images)"):
        _read("svhn", tmp_path)


def test_a_missing_file_says_what_belongs_together(tmp_path: Path) -> None:
    data_files.write(tmp_path, data_files.mnist(True))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz: missing; .* beside train-im"):
        _read("mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "fashion-mnist"])
def test_an_empty_folder_says_what_was_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        load_dataset(name, 0, tmp_path)
    for layout in load._SMALL[name].layouts:
        for part in (str(tmp_path), layout.folder, next(iter(layout.md5))):
            assert part in str(refused.value)
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(name, 0, tmp_path / "nowhere")


# Pickles


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._made = (function, arguments)

    def __reduce__(self) -> Any:
        return self._made


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_runs_no_code(protocol: int, tmp_path: Path) -> None:
    import os

    path = tmp_path / "ran"
    hostile = {"data": _Calls(os.mkdir, str(path)), "labels": []}
    with pytest.raises(pickle.UnpicklingError, match="mkdir, which is not data"):
        load_plain(pickle.dumps(hostile, protocol))
    assert not path.exists()


@pytest.mark.parametrize(
    "value",
    [
        _Calls(eval, "1"),
        _Calls(getattr, "x", "y"),
        np.array([object()]),
        np.zeros(3),
        np.float64(1),
        {1, 2},
        (1, 2),
        _Calls(np.ndarray, (2,)),
    ],
)
def test_a_pickle_of_anything_but_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(pickle.UnpicklingError):
        load_plain(pickle.dumps({"data": value}, 2))


def test_a_pickled_array_must_have_its_bytes() -> None:
    whole = pickle.dumps({"data": np.zeros((4, 6), np.uint8)}, 2)
    assert load_plain(whole)["data"].shape == (4, 6)
    shape = b"K\x04K\x06\x86"
    assert whole.count(shape) == 1
    with pytest.raises(pickle.UnpicklingError, match=r"24 bytes for an array of shape \(4, 7\)"):
        load_plain(whole.replace(shape, b"K\x04K\x07\x86"))


def test_a_fortran_ordered_array_keeps_its_places() -> None:
    array = np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    assert np.array_equal(load_plain(pickle.dumps([array], 2))[0], array)


def test_a_damaged_pickle_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = data_files.cifar10_python2(2)["test_batch"]
    for end in (0, 1, 10, 50, 200, 1000, len(whole) - 1):
        with pytest.raises(pickle.UnpicklingError):
            load_plain(whole[:end])
    data_files.write(tmp_path, {**data_files.cifar10_python(), "data_batch_2": whole[:500]})
    with pytest.raises(DataError, match=r"data_batch_2: not a batch of CIFAR: .*truncated"):
        _read("cifar10", tmp_path)


@pytest.mark.parametrize(
    "batch",
    [
        [1, 2],
        {"data": np.zeros((2, 3072), np.uint8)},
        {"data": [1], "labels": [1]},
        {"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1, "two"]},
    ],
)
def test_a_pickle_of_another_shape_is_refused(batch: Any, tmp_path: Path) -> None:
    files = {**data_files.cifar10_python(), "data_batch_5": pickle.dumps(batch, 2)}
    data_files.write(tmp_path, files)
    with pytest.raises(DataError, match="data_batch_5: not a batch of CIFAR"):
        _read("cifar10", tmp_path)


# Recognising


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("cifar10", "cifar-10-batches-bin", data_files.cifar10_binary(1)),
        ("cifar10", "", data_files.cifar10_python(1)),
        ("cifar100", "", data_files.cifar100(False, 100)),
        ("svhn", "", {"test_32x32.mat": b""}),
        ("mnist", "MNIST/raw", data_files.mnist(True)),
        ("fashion-mnist", "FashionMNIST/raw", data_files.mnist(False)),
    ],
)
def test_a_folder_is_recognised_by_its_files(
    name: str, folder: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    data_files.write(tmp_path / folder, files)
    assert recognise(tmp_path) == name


def test_files_of_one_name_are_told_apart_by_their_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = data_files.mnist(False)
    data_files.write(tmp_path, files)
    with pytest.raises(DataError, match="mnist or fashion-mnist; name it by --dataset"):
        recognise(tmp_path)
    for layout, name in ((idx.FASHION_PLAIN, "fashion-mnist"), (idx.MNIST_PLAIN, "mnist")):
        with monkeypatch.context() as patched:
            name_of_smallest = "t10k-labels-idx1-ubyte"
            patched.setitem(layout.md5, name_of_smallest, _published(files)[name_of_smallest])
            assert recognise(tmp_path) == name


def test_a_folder_of_two_sets_or_of_none_is_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither class folders nor the files of cifar10"):
        recognise(tmp_path)
    data_files.write(tmp_path / "cifar-10-batches-bin", data_files.cifar10_binary(1))
    data_files.write(tmp_path / "MNIST" / "raw", data_files.mnist(True))
    with pytest.raises(DataError, match="could be cifar10 or mnist"):
        recognise(tmp_path)


def test_class_folders_are_recognised(tmp_path: Path) -> None:
    data_files.class_folders(tmp_path / "flat", {"cat": 1, "dog": 1})
    data_files.class_folders(tmp_path / "split" / "train", {"cat": 1, "dog": 1})
    assert recognise(tmp_path / "flat") == recognise(tmp_path / "split") == "folder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cats"}, "dataset must be one of digits, cifar10"),
        ({"name": "cifar10"}, "--data DIR"),
        ({"name": "digits", "folder": Path()}, "takes no data folder"),
        ({"name": "cifar10", "folder": Path(), "image_size": 64}, "image_size"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(**arguments)
