"""Engine files: safetensors, with the graph as versioned JSON and a checksum over everything."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfs.engine.graph import EngineGraph

_GRAPH, _DIGEST, _EXTRA = "dfs_engine", "sha256", "extra"


def save_graph(
    path: str | os.PathLike[str],
    graph: EngineGraph,
    tensors: dict[str, Tensor],
    extra: dict[str, Any],
) -> None:
    """Write beside and rename, so that what was there survives a failure.

    Args:
        extra: plain data that travels along, such as the preprocessing.
    """
    target = Path(path)
    texts = {
        _GRAPH: json.dumps(graph.to_json(), sort_keys=True),
        _EXTRA: json.dumps(extra, sort_keys=True),
    }
    metadata = {**texts, _DIGEST: _digest(texts, tensors)}
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load_graph(
    path: str | os.PathLike[str],
) -> tuple[EngineGraph, dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_graph` wrote. Runs no code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no engine file, of another version, damaged or truncated; says which.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"engine file {source} does not exist")
    try:
        metadata, tensors = _read(source)
        texts = {name: metadata[name] for name in (_GRAPH, _EXTRA)}
        digest = metadata[_DIGEST]
    except KeyError as error:
        raise ValueError(f"{source} is not an engine file: it has no {error}") from None
    except SafetensorError as error:
        raise ValueError(f"{source} is not an engine file, or is damaged: {error}") from None
    if digest != _digest(texts, tensors):
        raise ValueError(f"{source} is damaged: its contents do not match their checksum")
    try:
        graph = EngineGraph.from_json(json.loads(texts[_GRAPH]))
        extra = json.loads(texts[_EXTRA])
        if not isinstance(extra, dict):
            raise ValueError("extra must be an object")
        graph.check_tensors(tensors)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not a usable engine: {error}") from None
    return graph, tensors, extra


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return metadata, tensors


def _digest(texts: dict[str, str], tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, text in sorted(texts.items()):
        _add(sha, name.encode(), text.encode())
    for name, value in sorted(tensors.items()):
        kind = f"{name} {value.dtype} {tuple(value.shape)}"
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        _add(sha, kind.encode(), data.tobytes())
    return sha.hexdigest()


def _add(sha: Any, *parts: bytes) -> None:
    for part in parts:
        # Lengths first, so that no two contents run together alike.
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
