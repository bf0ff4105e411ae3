"""The results file of a GPU check, and its short table.

``bench/results/<gpu>/<commit>.json`` holds what the GPU is, what each part of the check came to,
and the benchmarks: a point for each contestant, layer and batch, those of whole networks, and the
bars.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.verdicts import verdict_line

FORMAT = 1
_ROOT = Path(__file__).resolve().parents[2]
RESULTS = _ROOT / "bench" / "results"
_ID_LENGTH = 10
# What a point keeps of its benchmark.
_POINT = (
    "contestant", "label", "layer", "family", "batch", "seconds", "low", "high", "copies",
    "bytes", "operations", "roofline_fraction",
)  # fmt: skip
_BAR = (
    "bar", "label", "layer", "batch", "implementation", "ratio", "low", "high", "limit",
    "at_least", "held", "seconds",
)  # fmt: skip


def file_name(commit: Mapping[str, Any]) -> str:
    """Of the results of a commit; those of a dirty tree never take the place of a clean one's."""
    return commit["id"][:_ID_LENGTH] + ("-dirty" if commit["dirty"] else "") + ".json"


def of_benchmarks(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The GPU and its benchmarks, out of what pytest-benchmark wrote, in one run or several."""
    gpu: dict[str, Any] = {}
    points, networks, bars = [], [], []
    for run in runs:
        gpu.update(run["machine_info"].get("gpu", {}))
        for benchmark in run["benchmarks"]:
            info = benchmark["extra_info"]
            if info.get("kind") == "gpu_layer":
                points.append({name: info[name] for name in _POINT if name in info})
            elif info.get("kind") == "gpu_bar":
                bars.append({name: info[name] for name in _BAR if name in info})
            elif info.get("kind") == "gpu_network":
                networks += info["points"]
                bars += [{name: bar[name] for name in _BAR if name in bar} for bar in info["bars"]]
    return {"gpu": gpu, "points": points, "networks": networks, "bars": bars}


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Write results below ``folder``, over an earlier run's of the same commit, part by part."""
    path = folder / content["gpu"].get("slug", "unknown") / file_name(content["commit"])
    earlier = json.loads(path.read_text()) if path.exists() else {}
    merged = {
        "format": FORMAT,
        **earlier,
        **content,
        "gpu": {**earlier.get("gpu", {}), **content["gpu"]},
        "parts": {**earlier.get("parts", {}), **content.get("parts", {})},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(merged, indent=1) + "\n")
    os.replace(beside, path)
    return path


def table(content: Mapping[str, Any]) -> str:
    """What passed and failed, the fractions of the roofline, and the bars: some dozen lines."""
    gpu = content["gpu"]
    version = content["commit"]["id"][:_ID_LENGTH]
    if content["commit"]["dirty"]:
        version += " with uncommitted changes"
    lines = [f"GPU check of {version} on {gpu.get('name', 'an unknown GPU')}"]
    for name, part in content.get("parts", {}).items():
        lines.append(f"{name:<9} {part['status']:<8} {part['seconds']:4.0f} s  {part['summary']}")
        lines += [f"    {line}" for line in part.get("details", ())]
    if "peaks" in gpu:
        peaks = gpu["peaks"]
        lines.append(
            f"\nmeasured: copies {peaks['copy'] / 1e9:.0f} GB/s, "
            f"int8 products {peaks['int8'] / 1e12:.0f} TOPS"
        )
    if content.get("points"):
        lines += ["", *_times(content["points"])]
    if content.get("networks"):
        lines += ["", *_network_times(content["networks"])]
    if content.get("bars"):
        lines += ["", *map(verdict_line, content["bars"])]
        held = sum(bar["held"] for bar in content["bars"])
        lines.append(f"{held} of {len(content['bars'])} bars held")
    return "\n".join(lines)


def _times(points: list[dict[str, Any]]) -> list[str]:
    """Per layer and batch: ours at 8 bits with their share of the roofline, and the best peer."""
    lines = ["microseconds a call (% of the roofline)"]
    for layer, batch in dict.fromkeys((p["layer"], p["batch"]) for p in points):
        here = [p for p in points if (p["layer"], p["batch"]) == (layer, batch)]
        cells = [
            f"{p['contestant']} {1e6 * p['seconds']:.1f} ({100 * p['roofline_fraction']:.0f} %)"
            for p in here
            if p["contestant"].endswith("_8") and "stream" not in p["contestant"]
        ]
        peers = [p for p in here if p["contestant"].startswith("cudnn_")]
        if peers:
            best = min(peers, key=lambda p: p["seconds"])
            cells.append(f"{best['contestant']} {1e6 * best['seconds']:.1f}")
        lines.append(f"{layer + ' batch ' + str(batch):<36} {', '.join(cells)}")
    return lines


def _network_times(points: list[dict[str, Any]]) -> list[str]:
    """Per network and batch: every contestant."""
    lines = ["microseconds for a batch"]
    for network, batch in dict.fromkeys((p["network"], p["batch"]) for p in points):
        here = [p for p in points if (p["network"], p["batch"]) == (network, batch)]
        cells = [f"{p['contestant']} {1e6 * p['seconds']:.0f}" for p in here]
        lines.append(f"{f'{network} batch {batch}':<36} {', '.join(cells)}")
    return lines
