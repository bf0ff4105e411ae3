"""Tiny data sets, written in the file formats of the real ones."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def drawn(
    count: int, channels: int, side: int, classes: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, C, side, side), both extremes among them, and labels of every class."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, channels, side, side), np.uint8)
    pixels[0].flat[:2] = (0, 255)
    return pixels, np.arange(count) % classes


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path: Path, folder: str, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def cifar10_binary(per_file: int = 20) -> dict[str, bytes]:
    files = {}
    for i, name in enumerate(CIFAR10_FILES):
        pixels, labels = drawn(per_file, 3, 32, 10, seed=i)
        rows = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(per_file, -1)], 1)
        files[f"{name}.bin"] = rows.tobytes()
    return files


def cifar10_python(per_file: int = 20, protocol: int = 2) -> dict[str, bytes]:
    """As Python 3 would pickle them again."""
    files = {}
    for i, name in enumerate(CIFAR10_FILES):
        pixels, labels = drawn(per_file, 3, 32, 10, seed=i)
        batch = {b"data": pixels.reshape(per_file, -1), b"labels": labels.tolist()}
        files[name] = pickle.dumps(batch, protocol)
    return files


def cifar10_python2(per_file: int = 20) -> dict[str, bytes]:
    """As Python 2 and an old NumPy pickled the originals, opcode by opcode."""
    files = {}
    for i, name in enumerate(CIFAR10_FILES):
        pixels, labels = drawn(per_file, 3, 32, 10, seed=i)
        content = b"\x80\x02}(" + _short(b"labels") + b"](" + b"".join(map(_byte, labels)) + b"e"
        content += _short(b"data") + _python2_array(pixels.reshape(per_file, -1))
        files[name] = content + _short(b"batch_label") + _short(name.encode()) + b"u."
    return files


def _byte(value: int) -> bytes:
    return b"K" + bytes([value])


def _short(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _python2_array(array: np.ndarray) -> bytes:
    raw = array.tobytes()
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + _short(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + _short(b"u1") + b"K\x00K\x01tR"
    dtype += b"(K\x03" + _short(b"|") + b"NNN" + 2 * _integer(-1) + b"K\x00tb"
    shape = b"(" + b"".join(map(_integer, array.shape)) + b"t"
    state = b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    return made + state


def cifar100(python: bool, count: int = 200) -> dict[str, bytes]:
    files = {}
    for i, name in enumerate(("train", "test")):
        pixels, fine = drawn(count, 3, 32, 100, seed=i)
        flat = pixels.reshape(count, -1)
        if python:
            batch = {"data": flat, "fine_labels": fine.tolist(), "coarse_labels": [0] * count}
            files[name] = pickle.dumps(batch, 2)
        else:
            coarse = np.full((count, 1), 19, np.uint8)
            rows = np.concatenate([coarse, fine[:, None].astype(np.uint8), flat], 1)
            files[f"{name}.bin"] = rows.tobytes()
    return files


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def mnist(packed: bool, train: int = 60, test: int = 20) -> dict[str, bytes]:
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        pixels, labels = drawn(count, 1, 28, 10, seed=count)
        files[f"{part}-images-idx3-ubyte"] = idx(pixels[:, 0])
        files[f"{part}-labels-idx1-ubyte"] = idx(labels)
    return {f"{n}.gz": gzip.compress(c) for n, c in files.items()} if packed else files


def svhn(train: int = 60, test: int = 20) -> dict[str, bytes]:
    from scipy.io import savemat

    files = {}
    for part, count in (("train", train), ("test", test)):
        pixels, labels = drawn(count, 3, 32, 10, seed=count)
        file = io.BytesIO()
        shown = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        savemat(file, {"X": pixels.transpose(2, 3, 1, 0), "y": shown})
        files[f"{part}_32x32.mat"] = file.getvalue()
    return files


def class_folders(root: Path, counts: Mapping[str, int], seed: int = 0) -> Path:
    """Pictures of many sizes, grey and coloured; their brightness grows with the class."""
    generator = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            height, width = generator.integers(10, 40, 2)
            shape = (height, width, 3) if i % 2 else (height, width)
            level = 40 + 60 * label
            pixels = generator.integers(level, level + 20, shape).astype(np.uint8)
            suffix = ("png", "jpg", "bmp")[i % 3]
            Image.fromarray(pixels).save(root / name / f"{i:03}.{suffix}")
    return root
