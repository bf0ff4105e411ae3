"""The table of which backend is faster on a GPU, out of the benchmarks' medians.

It goes where the package looks for it, ``dfs_kernels/backends/tables/<gpu>.json``: once it is
committed, calls that ask for no backend take the faster one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.layers import GPU_LAYERS, Layer
from dfs_kernels.backends import measured
from dfs_kernels.backends.measured import BackendTable, ConvProblem
from dfs_kernels.geometry import ConvGeometry

# Forms of a call that a network in evaluation makes, at integer widths; each counts alike.
FORMS = (
    "8",
    "4",
    "2",
    "mixed",
    "from_stream_8",
    "from_stream_2",
    "into_stream_8",
    "into_stream_2",
)
_LAYERS = {layer.name: layer for layer in GPU_LAYERS}


def candidate(
    points: Sequence[Mapping[str, Any]], device: str, source: Mapping[str, str]
) -> BackendTable | None:
    """The mean seconds of both backends over the forms that both were timed at.

    A candidate beside them counts where it was timed at all of these.

    Args:
        points: of a results file, see :mod:`bench.gpu.results`.

    Returns:
        None where no layer was timed on both.
    """
    times: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    known = (*measured.BACKENDS, *measured.CANDIDATES)
    for point in points:
        backend, _, form = point["contestant"].partition("_")
        if backend in known and form in FORMS and point["layer"] in _LAYERS:
            here = times.setdefault((point["layer"], point["batch"]), {})
            here.setdefault(form, {})[backend] = point["seconds"]
    seconds: dict[str, dict[int, dict[str, float]]] = {}
    for (layer, batch), forms in times.items():
        both = [found for found in forms.values() if found.keys() >= set(measured.BACKENDS)]
        if both:
            timed = [name for name in known if all(name in found for found in both)]
            means = {name: mean(found[name] for found in both) for name in timed}
            seconds.setdefault(_key(_LAYERS[layer]), {})[batch] = means
    return BackendTable(device, source, seconds) if seconds else None


def _key(layer: Layer) -> str:
    shape = (layer.out_channels, layer.group_channels, layer.kernel, layer.kernel)
    geometry = ConvGeometry.create(
        layer.in_channels, shape, layer.stride, layer.padding, groups=layer.groups
    )
    return ConvProblem(geometry, layer.side, layer.side, 1).key


def write(table: BackendTable, path: Path) -> Path:
    """Write beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(table.to_json(), indent=1) + "\n")
    os.replace(beside, path)
    return path
