"""Checkpoints: written beside and renamed, read without running code, refused if they don't fit."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

FORMAT = "dfs-training-checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that can't be used, and why."""


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values; an existing file is replaced only by a complete one."""
    with _beside(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def write_beside(path: Path, text: str) -> None:
    """Write a text file; an existing one is replaced only by a complete one."""
    with _beside(path) as file:
        file.write(text.encode())


@contextmanager
def _beside(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_saved(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU; no code in it is run.

    Raises:
        CheckpointError: missing, truncated, or holding more than tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or truncated ({reason})") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: missing, truncated, of another format or of another version.
    """
    content = read_saved(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a training checkpoint of this project")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {content.get('version')}, this build reads {VERSION}"
        )
    return content


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict whose every key and shape must fit; nothing is changed otherwise.

    Raises:
        CheckpointError: naming the first entry that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{what}: must be a dict of tensors, got {type(state).__name__}")
    for name in own.keys() - state.keys():
        raise CheckpointError(f"{what}: entry {name!r} is missing; was it another architecture?")
    for name in state.keys() - own.keys():
        raise CheckpointError(f"{what}: unknown entry {name!r}; was it another architecture?")
    for name, value in own.items():
        found = state[name]
        if not isinstance(found, Tensor) or found.dtype != value.dtype:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(f"{what}: {name!r} must be {value.dtype}, got {kind}")
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{what}: {name!r} holds values that are not finite")
        if found.shape != value.shape:
            raise CheckpointError(
                f"{what}: {name!r} has shape {tuple(state[name].shape)}, "
                f"this network needs {tuple(value.shape)}"
            )
    module.load_state_dict(dict(state))
