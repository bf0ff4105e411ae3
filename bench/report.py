"""Turns a run of the benchmarks into Markdown tables and a plot.

``python -m bench.report [FILE.json ...] [--markdown OUT.md] [--plot OUT.png]`` reads what
``pytest bench/ --benchmark-only --benchmark-json=FILE.json`` wrote, by default the newest file in
bench/results/. Several files give one section each: times of different runs are not comparable.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR = 2
RESULTS = Path(__file__).resolve().parent / "results"

COLUMNS = {
    "dfs_8": "DFS 8 bits",
    "dfs_4": "DFS 4 bits",
    "dfs_2": "DFS 2 bits",
    "dfs_mixed": "DFS 0/2/4/8",
    "dfs_skipped": "DFS skipped",
    "dfs_8_float": "DFS 8 bits, float in/out",
    "torch_int8": "PyTorch int8",
    "onnxruntime_int8": "ORT int8",
    "dfs_32_packed": "DFS 32 bits, packed",
    "dfs_32": "DFS 32 bits",
    "dfs_32_channels_last": "DFS 32 bits, NHWC",
    "torch_float32": "PyTorch float32",
    "torch_float32_channels_last": "PyTorch float32, NHWC",
    "onnxruntime_float32": "ORT float32",
}
# What a batch computes depends on its skipped samples: these have a time but no rate.
_WITHOUT_RATE = ("dfs_mixed", "dfs_skipped")
# Contestant, what it is compared with, and the bar that compares them in turns, if there is one.
_RATIOS: tuple[tuple[str, str, str | None], ...] = (
    ("dfs_8", "torch_int8", "int8"),
    ("dfs_8", "onnxruntime_int8", None),
    ("dfs_4", "dfs_8", "four_bits"),
    ("dfs_2", "dfs_8", "two_bits"),
    ("dfs_8_float", "dfs_8", "float_in_out"),
    ("dfs_8", "torch_float32_channels_last", None),
    ("dfs_2", "torch_float32_channels_last", None),
    ("dfs_32_channels_last", "torch_float32_channels_last", "float32"),
    ("dfs_32_packed", "torch_float32_channels_last", "float32_packed"),
    ("dfs_32", "onnxruntime_float32", None),
)
# Ours from pale to dark with the bits, as in the other plots; the peers in colours of their own.
_PLOTTED = {
    "dfs_2": "#a6cee3",
    "dfs_4": "#5aa5cf",
    "dfs_8": "#2171b5",
    "torch_int8": "#e6550d",
    "onnxruntime_int8": "#fdae6b",
    "torch_float32_channels_last": "#969696",
}


class ReportError(Exception):
    """What is wrong with the input, in one line."""


@dataclass(frozen=True)
class Point:
    """One contestant on one layer.

    Attributes:
        seconds: the median of a call.
        rate: multiply-accumulates a second, padding included.
        fraction: of the peak that was measured in the same run.
    """

    contestant: str
    layer: str
    batch: int
    threads: int
    seconds: float
    rate: float
    fraction: float
    peak: float
    peak_source: str


@dataclass(frozen=True)
class NetworkTime:
    """One contestant on a whole network: the median of the rounds, seconds per call."""

    contestant: str
    label: str
    network: str
    batch: int
    threads: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """One bar, judged on one layer: the median ratio of the rounds and its quartiles."""

    bar: str
    label: str
    layer: str
    batch: int
    threads: int
    ratio: float
    low: float
    high: float
    limit: float
    held: bool
    fraction_of_peak: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the middle half of the rounds lies on one side of the limit."""
        return self.high <= self.limit or self.low > self.limit


@dataclass(frozen=True)
class Run:
    """What one JSON file says."""

    name: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    points: tuple[Point, ...]
    outcomes: tuple[Outcome, ...]
    networks: tuple[NetworkTime, ...] = ()

    @property
    def threads(self) -> list[int]:
        parts = (self.points, self.outcomes, self.networks)
        return sorted({found.threads for part in parts for found in part})

    def layers(self, threads: int) -> list[tuple[str, int]]:
        """(layer, batch) in the order of the file."""
        return list(dict.fromkeys((p.layer, p.batch) for p in self.points if p.threads == threads))

    def point(self, contestant: str, layer: str, batch: int, threads: int) -> Point | None:
        wanted = (contestant, layer, batch, threads)
        found = (p for p in self.points if (p.contestant, p.layer, p.batch, p.threads) == wanted)
        return next(found, None)

    def outcome(self, bar: str, layer: str, batch: int, threads: int) -> Outcome | None:
        wanted = (bar, layer, batch, threads)
        found = (o for o in self.outcomes if (o.bar, o.layer, o.batch, o.threads) == wanted)
        return next(found, None)


def load(path: Path) -> Run:
    """Read what pytest-benchmark wrote.

    Raises:
        ReportError: no such file, or not one of this project's runs.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ReportError(f"{path} is not JSON; is it what --benchmark-json wrote?") from None
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ReportError(f"{path} is JSON, but not what --benchmark-json wrote")
    points, outcomes, networks = [], [], []
    try:
        for benchmark in content["benchmarks"]:
            kind = benchmark["extra_info"].get("kind")
            if kind == "layer":
                points.append(_point(benchmark))
            elif kind == "bar":
                outcomes.append(_outcome(benchmark["extra_info"]))
            elif kind == "network":
                networks.append(_network(benchmark["extra_info"]))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ReportError(f"{path} holds a benchmark that is not understood: {error!r}") from None
    if not points and not outcomes and not networks:
        raise ReportError(f"{path} holds no benchmarks of layers, networks or bars")
    return Run(
        name=path.stem,
        machine=content.get("machine_info") or {},
        commit=content.get("commit_info") or {},
        date=str(content.get("datetime", ""))[:10],
        points=tuple(points),
        outcomes=tuple(outcomes),
        networks=tuple(networks),
    )


def markdown(run: Run) -> str:
    """The run as a section of Markdown."""
    parts = [f"## {run.name}", _describe(run)]
    if run.networks:
        parts.append(_network_table(run.networks))
    for threads in run.threads:
        parts.append(f"### {_count(threads, 'thread')}")
        points = [p for p in run.points if p.threads == threads]
        if points:
            parts.append(_peaks(points))
            parts.append("Milliseconds a call:\n\n" + _layer_table(run, threads, _milliseconds))
            parts.append(
                "GMAC/s, and the fraction of the peak:\n\n"
                + _layer_table(run, threads, _rate, leave_out=_WITHOUT_RATE)
            )
            parts.append(_ratio_table(run, threads))
        outcomes = [o for o in run.outcomes if o.threads == threads]
        if outcomes:
            parts.append(_bar_table(outcomes))
    return "\n\n".join(parts) + "\n"


def plot(run: Run, path: Path) -> None:
    """Rates of the contestants side by side, a panel for each number of threads, as a PNG.

    Raises:
        ReportError: matplotlib is missing, or the run has nothing to show.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("plots need matplotlib; pip install matplotlib")
    panels = [
        (threads, layers)
        for threads in run.threads
        for single in (False, True)
        if (layers := [pair for pair in run.layers(threads) if (pair[1] == 1) == single])
    ]
    if not panels:
        raise ReportError(f"{run.name} has bars only; a plot needs the layers' benchmarks too")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(14, 4.2 * len(panels)), squeeze=False, sharey=True
    )
    for (threads, layers), axis in zip(panels, axes[:, 0], strict=True):
        _draw_panel(axis, run, threads, layers)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1.1), ncols=len(labels), frameon=False
    )
    figure.tight_layout()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(beside, dpi=120, format="png")
    os.replace(beside, path)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: a user's mistake prints one line and gives 2."""
    try:
        _run(_parser().parse_args(arguments))
    except (ReportError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ReportError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bench.report", description="Report a run of the benchmarks.")
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE.json",
        help="what --benchmark-json wrote; by default the newest in bench/results/",
    )
    parser.add_argument("--markdown", type=Path, metavar="OUT.md", help="write the tables too")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the rates of one file")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    files = arguments.files or [_newest_result()]
    if arguments.plot and len(files) != 1:
        raise ReportError(f"--plot takes one file, got {len(files)}")
    runs = [load(path) for path in files]
    text = "\n".join(markdown(run) for run in runs)
    print(text, end="")
    if arguments.markdown:
        beside = arguments.markdown.with_name(f".{arguments.markdown.name}.{os.getpid()}")
        beside.write_text(text)
        os.replace(beside, arguments.markdown)
    if arguments.plot:
        plot(runs[0], arguments.plot)


def _newest_result() -> Path:
    """By the date inside: a fresh clone gives all files the same age."""
    dated = []
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "benchmarks" in content:
            dated.append((content.get("datetime", ""), path))
    if not dated:
        raise ReportError(f"no file given, and no benchmarks in {RESULTS}")
    return max(dated)[1]


def _point(benchmark: dict[str, Any]) -> Point:
    info = benchmark["extra_info"]
    seconds = float(benchmark["stats"]["median"])
    rate = info["macs"] / seconds
    return Point(
        contestant=info["contestant"],
        layer=info["layer"],
        batch=info["batch"],
        threads=info["threads"],
        seconds=seconds,
        rate=rate,
        fraction=rate / info["peak"],
        peak=info["peak"],
        peak_source=info["peak_source"],
    )


def _network(info: dict[str, Any]) -> NetworkTime:
    names = ("contestant", "label", "network", "batch", "threads", "seconds")
    return NetworkTime(**{name: info[name] for name in names})


def _outcome(info: dict[str, Any]) -> Outcome:
    names = ("bar", "label", "layer", "batch", "threads", "ratio", "low", "high", "limit", "held")
    return Outcome(
        **{name: info[name] for name in names}, fraction_of_peak=info.get("fraction_of_peak")
    )


def _describe(run: Run) -> str:
    ours = run.machine.get("dfs", {})
    facts = [
        f"processor: {ours.get('cpu', 'unknown')}",
        f"kernels: {ours.get('backend', {}).get('isa', 'unknown')}",
        f"PyTorch {ours.get('torch', 'unknown')}",
        f"commit {str(run.commit.get('id', 'unknown'))[:10]}"
        + (" with uncommitted changes" if run.commit.get("dirty") else ""),
        run.date,
    ]
    text = ", ".join(fact for fact in facts if fact)
    if ours.get("missing_flags"):
        text += f". The bars assume {' and '.join(ours['missing_flags'])}, which it lacks"
    if not ours.get("is_quiet", True):
        share = 100 * ours.get("busy_share", 0)
        text += f". **Others took {share:.0f} % of the processors' time**: do not trust the times"
    return f"{text}."


def _peaks(points: Sequence[Point]) -> str:
    """Both peaks; the kind of each is told by who is measured against it."""
    found = {("float32" if "32" in p.contestant else "int8"): p for p in points}
    texts = [f"{kind} {p.peak / 1e9:.0f} GMAC/s" for kind, p in sorted(found.items())]
    how = {
        "native": "of instruction loops",
        "library": "the best that PyTorch reached on a large problem",
    }
    return f"Measured peak, {how.get(points[0].peak_source, 'unknown')}: {', '.join(texts)}."


def _layer_table(
    run: Run, threads: int, cell: Callable[[Point], str], leave_out: Sequence[str] = ()
) -> str:
    present = {p.contestant for p in run.points if p.threads == threads} - set(leave_out)
    columns = [name for name in COLUMNS if name in present]
    rows = []
    for layer, batch in run.layers(threads):
        points = (run.point(name, layer, batch, threads) for name in columns)
        rows.append([layer, str(batch), *("-" if p is None else cell(p) for p in points)])
    return _table(["layer", "batch", *(COLUMNS[name] for name in columns)], rows)


def _network_table(networks: Sequence[NetworkTime]) -> str:
    """A row per contestant, a column per network, batch and number of threads."""
    cells = {(n.label, n.network, n.batch, n.threads): n.seconds for n in networks}
    columns = sorted({(n.network, n.batch, n.threads) for n in networks})
    header = [f"{name}, batch {batch}, {_count(t, 'thread')}" for name, batch, t in columns]
    rows = []
    for label in dict.fromkeys(n.label for n in networks):
        found = ((cells.get((label, *column)), column[1]) for column in columns)
        times = ("-" if t is None else f"{1e3 * t / batch:#.3g}" for t, batch in found)
        rows.append([label, *times])
    return "Milliseconds per image:\n\n" + _table(["", *header], rows)


def _milliseconds(point: Point) -> str:
    return f"{1e3 * point.seconds:#.3g}"


def _rate(point: Point) -> str:
    return f"{point.rate / 1e9:.0f} ({100 * point.fraction:.0f} %)"


def _ratio_table(run: Run, threads: int) -> str:
    rows = []
    for layer, batch in run.layers(threads):
        ratios = (_ratio(run, *pair, layer, batch, threads) for pair in _RATIOS)
        rows.append([layer, str(batch), *ratios])
    columns = [f"{COLUMNS[name]} / {COLUMNS[other]}" for name, other, _ in _RATIOS]
    return (
        "Ratios of times, less than 1 where the first is faster. Those with ~ come from separate "
        "benchmarks of the run, the others from turns:\n\n"
        + _table(["layer", "batch", *columns], rows)
    )


def _ratio(
    run: Run, name: str, other: str, bar: str | None, layer: str, batch: int, threads: int
) -> str:
    outcome = run.outcome(bar, layer, batch, threads) if bar else None
    if outcome is not None:
        return f"{outcome.ratio:.2f}"
    ours, theirs = (run.point(n, layer, batch, threads) for n in (name, other))
    return f"~{ours.seconds / theirs.seconds:.2f}" if ours and theirs else "-"


def _bar_table(outcomes: Sequence[Outcome]) -> str:
    held = sum(outcome.held for outcome in outcomes)
    rows = [
        [
            o.label,
            o.layer,
            str(o.batch),
            f"{o.ratio:.3f}",
            f"{o.low:.3f} to {o.high:.3f}",
            f"{o.limit:g}",
            _verdict(o),
        ]
        for o in sorted(outcomes, key=lambda o: o.label)
    ]
    return (
        f"{held} of {_count(len(outcomes), 'bar')} held. The ratio is the median of the rounds, "
        "the range their middle half; where the limit lies within it, the run does not settle "
        "the matter (?):\n\n"
        + _table(["bar", "layer", "batch", "ratio", "range", "limit", "verdict"], rows, 2)
    )


def _verdict(outcome: Outcome) -> str:
    text = "held" if outcome.held else "**missed**"
    if outcome.held and outcome.ratio > outcome.limit and outcome.fraction_of_peak is not None:
        return f"{text}: {100 * outcome.fraction_of_peak:.0f} % of the peak"
    return text if outcome.is_clear else f"{text} (?)"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table whose first columns hold text, and the others numbers."""
    rule = ["---" if i < texts else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _draw_panel(axis: Any, run: Run, threads: int, layers: Sequence[tuple[str, int]]) -> None:
    width = 0.8 / len(_PLOTTED)
    for i, (name, colour) in enumerate(_PLOTTED.items()):
        points = [run.point(name, layer, batch, threads) for layer, batch in layers]
        offset = (i - (len(_PLOTTED) - 1) / 2) * width
        axis.bar(
            [x + offset for x, p in enumerate(points) if p],
            [p.rate / 1e9 for p in points if p],
            width,
            color=colour,
            label=COLUMNS[name],
        )
    axis.set_yscale("log")
    axis.set_ylabel("GMAC/s, log scale")
    axis.grid(axis="y", which="both", linewidth=0.4, alpha=0.5)
    axis.set_axisbelow(True)
    single = all(batch == 1 for _, batch in layers)
    names = [layer if single else f"{layer}\nbatch {batch}" for layer, batch in layers]
    axis.set_xticks(range(len(layers)), names, rotation=30, ha="right", fontsize=8)
    axis.set_xlim(-0.6, len(layers) - 0.4)
    kind = "batch 1" if single else "batches"
    axis.set_title(f"{kind}, {_count(threads, 'thread')}", loc="left", fontsize=10)


if __name__ == "__main__":
    sys.exit(main())
