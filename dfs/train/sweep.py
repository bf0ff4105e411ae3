"""Dynamic networks at several targets beside what they must beat, on equal terms.

Every network of a sweep is trained by the same code, with the same teacher and as many sample
passes. What several can share (the float network; the switchable one) is trained once and kept by
a hash of the settings behind it. Everything is in the sweep's folder, and a sweep that was killed
goes on from there:

    shared/KEY     a run of the first stages
    runs/KEY       a run of the stages behind them
    results/KEY.json
    engines.json    times of all networks as they are deployed, once all are trained
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfs.cost import FULL_BITS, make_cost
from dfs.data import DataSplits
from dfs.engine import Engine, freeze
from dfs.engine.timing import milliseconds_in_turns
from dfs.latency import LatencyTable, describe_machine, thread_count
from dfs.models import architecture_of, resnet_depth
from dfs.train.cascade import cascade_for_target, evaluate_cascade, run_cascade
from dfs.train.checkpoint import write_beside
from dfs.train.config import TrainConfig
from dfs.train.evaluate import Evaluation, costs_of, evaluate
from dfs.train.network import CHECKPOINT_NAME, build_dynamic
from dfs.train.oracle import permuted_accuracies
from dfs.train.outcomes import encode_outcomes
from dfs.train.recipes import prefix_key, shareable_stages, stages_of
from dfs.train.stages import StageError
from dfs.train.trainer import Trainer, check_reach, load_data

# What a sweep can compare, and what the command line calls it.
METHODS = {
    "dfs": "dynamic networks, at every target",
    "constant": "the same with gates that do not look at the input, at every target",
    "static2": "2 bits throughout",
    "static4": "4 bits throughout",
    "static8": "8 bits throughout",
    "static32": "the float network",
    "shallow8": "a network of half the depth, 8 bits throughout",
    "skipnet8": "choices 0 and 8, at every target",
    "skipnet": "choices 0 and 32, skipping about as many blocks as skipnet8",
    "cascade": "the narrowest width, and 8 bits where that is not sure, at every target",
}
# Of them, those whose own choices must be able to cost the target.
_TRAINED_TO_TARGETS = ("dfs", "constant")
_CASCADE_HIGH = 8
# Steps of a stage before its times are believed.
_FEWEST_STEPS = 3
# Of the ImageNet networks.
_HALF_DEPTH = {34: 18, 50: 18, 101: 50}
ENGINES_NAME = "engines.json"
# Images in a call, and in a pass, of the engines' times.
ENGINE_BATCHES = {1: 64, 64: 256}


@dataclass(frozen=True)
class Entry:
    """One network to train and measure.

    Attributes:
        label: without the target and the seed.
        target: that the row is for; None for networks without one.
    """

    method: str
    label: str
    target: float | None
    config: TrainConfig

    @property
    def title(self) -> str:
        """The label with the target and the seed."""
        target = "" if self.target is None else f", {self.target:.2%}"
        return f"{self.label}{target}, seed {self.config.seed}"

    @property
    def key(self) -> str:
        """A short hash of what decides the result."""
        text = json.dumps([self.method, self.target, self.config.to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def run_key(self) -> str:
        """The same of the training alone, which entries may share."""
        return prefix_key(self.config, len(stages_of(self.config)))


@dataclass(frozen=True)
class RunAhead:
    """Stages of one run that are still to be trained.

    Attributes:
        first, last: of the stages; ``last`` is the one behind.
    """

    label: str
    config: TrainConfig
    first: int
    last: int


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep still has to train: (label, steps, seconds) of every run."""

    rows: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class SweepProgress:
    """Where a sweep is.

    Attributes:
        label: what is being trained.
        done, entries: results there are, and are to be.
        seconds_left: None before any step was measured.
        plan: once, as soon as there is one.
    """

    label: str
    stage: str
    step: int
    steps: int
    measured: dict[str, float]
    done: int
    entries: int
    seconds_left: float | None
    plan: SweepPlan | None = None


class Sweep:
    """Everything to be compared, and how far it is.

    Args:
        base: settings of the dynamic networks; target and seed are replaced.
        targets: costs to train to.
        methods: out of ``METHODS``.
        data: gives a seed's data set; loaded by the settings if None.
        latency_table: file of one; adds latencies to the results.
        latency_targets: latencies by that table, as fractions of full precision, that dynamic
            networks and those with constant gates are trained to as well.
        device: where everything is computed.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        base: TrainConfig,
        folder: Path,
        targets: Sequence[float],
        seeds: Sequence[int] = (0,),
        methods: Sequence[str] = tuple(METHODS),
        data: Callable[[int], DataSplits] | None = None,
        latency_table: Path | None = None,
        device: torch.device | str = "cpu",
        latency_targets: Sequence[float] = (),
    ) -> None:
        unknown = [m for m in methods if m not in METHODS]
        if unknown:
            raise ValueError(f"methods must be out of {', '.join(METHODS)}, got {unknown[0]!r}")
        for name, given in (("targets", targets), ("seeds", seeds), ("methods", methods)):
            if not given or len(set(given)) != len(given):
                raise ValueError(f"{name} must be different, at least one, got {list(given)}")
        if len(set(latency_targets)) != len(latency_targets):
            raise ValueError(f"latency_targets must be different, got {list(latency_targets)}")
        if latency_targets and latency_table is None:
            raise ValueError("latency_targets need a latency_table")
        if base.recipe != "dfs":
            raise ValueError(f"a sweep compares networks of recipe 'dfs', got {base.recipe!r}")
        self.folder = folder.resolve()
        self.seeds = tuple(seeds)
        self.device = torch.device(device)
        self.base = base
        self.latency_table = None if latency_table is None else LatencyTable.load(latency_table)
        self.arguments = {
            "targets": list(targets),
            "seeds": list(seeds),
            "methods": list(methods),
            "latency_targets": list(latency_targets),
        }
        self._load = data or (lambda seed: load_data(replace(base, seed=seed)))
        self._loaded: tuple[int, DataSplits] | None = None
        self.skipped: list[str] = []
        self._table_path = "" if latency_table is None else str(latency_table.resolve())
        self._latency_targets = tuple(latency_targets)
        self.entries = [
            entry
            for seed in seeds
            for method in methods
            for entry in self._entries(method, targets, replace(base, seed=seed))
        ]
        self.skipped = list(dict.fromkeys(self.skipped))

    def check(self) -> None:
        """ValueError, with the range, if the dynamic networks can't cost a target."""
        reaches: dict[str, tuple[float, float]] = {}
        for entry in self.entries:
            if entry.method in _TRAINED_TO_TARGETS:
                cost = entry.config.cost
                if cost not in reaches:
                    reaches[cost] = self._reach(entry.config)
                check_reach(entry.config, *reaches[cost])

    def results(self) -> list[dict[str, Any]]:
        """Of the entries that are done, in order, with the times of their engines if known."""
        times = self._engine_times()
        done = [entry for entry in self.entries if self._result_path(entry).exists()]
        return [self._saved(entry) | times.get(entry.key, {}) for entry in done]

    def about(self) -> dict[str, Any]:
        """What its table says beside the rows: title, settings, decisions of the first seed."""
        seed = self.seeds[0]
        data = self.data(seed)
        test, unverified = len(data.test), data.record()["unverified"]
        note = f"{test} test images"
        if unverified:
            note += f"; data not as published: {', '.join(unverified)}"
        return {
            "title": f"{self.base.model} on {self.base.dataset}",
            "note": note,
            "test_images": test,
            "left_out": self.skipped,
            "arguments": self.arguments,
            "base": self.base.to_dict(),
            "decisions": [
                {
                    "title": f"{r['label']}, target {r['target']:.2%}: cost {r['paper_cost']:.2%}",
                    "shares": r["shares"],
                    "run": r["run"],
                }
                for r in self.results()
                if r["method"] == "dfs" and r["seed"] == seed and "failed" not in r
            ],
        }

    def run(
        self,
        progress: Callable[[SweepProgress], None] | None = None,
        stop: Callable[[], bool] | None = None,
        finished: Callable[[dict[str, Any]], None] | None = None,
    ) -> bool:
        """Train and measure what has no result yet.

        Args:
            finished: told of every result as it comes.

        Returns:
            Whether all is done; False if ``stop`` ended it, with everything saved.
        """
        clock = _Clock(self)
        for entry in self.entries:
            if self._result_path(entry).exists():
                continue
            try:
                trainer = self._trained(entry, clock.watch(entry, progress), stop)
            except StageError as error:
                result = self._describe(entry) | {"failed": str(error)}
            else:
                if trainer is None:
                    return False
                result = self._measure(entry, trainer)
            write_beside(self._result_path(entry), json.dumps(result, indent=2) + "\n")
            if finished is not None:
                finished(result)
        self.time_engines()
        return True

    def time_engines(self, threads: int = 1) -> None:
        """Freeze all networks and time them in turns, unless that was done since the last result.

        Milliseconds per image on a CPU, as the gates decide, on the first test images. A network
        that has no frozen form has no times.
        """
        good = [(e, saved) for e in self.entries if "failed" not in (saved := self._saved(e))]
        if not good or self._engine_times().keys() >= {entry.key for entry, _ in good}:
            return
        runs = {entry.key: self._deployed(entry, saved) for entry, saved in good}
        found: dict[str, dict[str, float]] = {key: {} for key in runs}
        timed = {key: run for key, run in runs.items() if run is not None}
        test = self.data(self.seeds[0]).test
        with thread_count(threads), torch.no_grad():
            for batch, count in ENGINE_BATCHES.items():
                images = test.first(count).cpu()
                passes = [partial(_run_all, run, images.split(batch)) for run in timed.values()]
                for key, took in zip(
                    timed, milliseconds_in_turns(passes, len(images)), strict=True
                ):
                    found[key][f"engine_{batch}"] = took
        content = {"threads": threads, "machine": describe_machine(), "milliseconds": found}
        write_beside(self.folder / ENGINES_NAME, json.dumps(content, indent=2) + "\n")

    def _engine_times(self) -> dict[str, dict[str, float]]:
        path = self.folder / ENGINES_NAME
        if not path.exists():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, dict[str, float]] = content["milliseconds"]
        return found

    def _saved(self, entry: Entry) -> dict[str, Any]:
        """The entry's result as it is kept."""
        saved: dict[str, Any] = json.loads(self._result_path(entry).read_text(encoding="utf-8"))
        return saved

    def _deployed(self, entry: Entry, saved: dict[str, Any]) -> Callable[[Tensor], object] | None:
        """What runs images (N, C, H, W) as the entry's network is deployed."""
        config, data = entry.config, self.data(entry.config.seed)
        widths = config.static_widths
        if widths == (FULL_BITS,):
            return None
        model = Trainer.load(self._run_folder(entry), data).model.eval()
        try:
            engine = freeze(model, data.image_size)
        except ValueError:
            # Widths or quantizers that are only simulated.
            return None
        if entry.method == "cascade":
            low, high = widths
            return partial(run_cascade, partial(_logits, engine), low, high, saved["threshold"])
        return partial(engine, policy=widths[0] if widths else None)

    def runs_ahead(self) -> Iterator[RunAhead]:
        """What is still to be trained, each once."""
        seen: set[str] = set()
        for entry in self.entries:
            if self._result_path(entry).exists():
                continue
            config, begun = entry.config, (self._run_folder(entry) / CHECKPOINT_NAME).exists()
            shared = shareable_stages(config)
            every = len(stages_of(config))
            widths = "/".join(map(str, config.choices))
            parts = [(entry.run_key, RunAhead(entry.title, config, shared, every))]
            if not begun:
                start = RunAhead(f"shared: float {config.model}, seed {config.seed}", config, 0, 1)
                switch = RunAhead(
                    f"shared: {widths} bits, {config.model}, seed {config.seed}", config, 1, shared
                )
                parts = [
                    (prefix_key(config, 1), start),
                    (prefix_key(config, shared), switch),
                    *parts,
                ]
            for key, run in parts:
                done = (self.folder / "shared" / key / CHECKPOINT_NAME).exists()
                if key not in seen and run.last > run.first and not done:
                    seen.add(key)
                    yield run

    def data(self, seed: int) -> DataSplits:
        """The data set of a seed; one is kept."""
        if self._loaded is None or self._loaded[0] != seed:
            self._loaded = (seed, self._load(seed).to(self.device))
        return self._loaded[1]

    def _entries(
        self, method: str, targets: Sequence[float], config: TrainConfig
    ) -> Iterator[Entry]:
        if method.startswith("static"):
            width = int(method.removeprefix("static"))
            if width in (*config.choices, FULL_BITS):
                yield Entry(method, f"static, {width} bits", None, _static(config, width))
            else:
                self.skipped.append(f"{method}: {width} bits are not among the choices")
        elif method == "shallow8":
            shallow = _half_depth(config.model)
            settings = replace(
                _static(config, 8),
                model=shallow,
                choices=(0, 8),
                teacher=str(self._shared_folder(config, 1)),
            )
            yield Entry(method, f"static, 8 bits, {shallow}", None, settings)
        else:
            for target in targets:
                yield from self._at_target(method, target, config.with_target(target))
            if method in _TRAINED_TO_TARGETS:
                for target in self._latency_targets:
                    timed = replace(
                        config, target=target, cost="latency", latency_table=self._table_path
                    )
                    for entry in self._at_target(method, target, timed):
                        yield replace(entry, label=f"{entry.label}, by latency")

    def _at_target(self, method: str, target: float, config: TrainConfig) -> Iterator[Entry]:
        if method == "dfs":
            yield Entry(method, "DFS", target, config)
        elif method == "constant":
            yield Entry(method, "constant gate", target, replace(config, gate="constant"))
        elif method == "cascade":
            narrow = min(c for c in config.choices if c)
            if _CASCADE_HIGH not in config.choices or narrow == _CASCADE_HIGH:
                self.skipped.append("cascade: needs 8 bits and a lower width among the choices")
            elif not self._reach(replace(config, choices=(narrow, _CASCADE_HIGH)))[0] <= target:
                self.skipped.append(f"cascade: {narrow} bits alone cost more than {target:.2%}")
            else:
                trained = _static(config.with_target(self.base.target), narrow, _CASCADE_HIGH)
                yield Entry(method, f"cascade, {narrow} then 8 bits", target, trained)
        else:
            skipnet8 = replace(config, choices=(0, 8), exit_points=_without(config, 8))
            low, high = self._reach(skipnet8)
            if not low <= target <= high:
                self.skipped.append(f"{method}: choices 0 and 8 can't cost {target:.2%}")
            elif method == "skipnet8":
                yield Entry(method, "SkipNet, 8 bits", target, skipnet8)
            else:
                full = replace(skipnet8, choices=(0, FULL_BITS))
                cheapest, dearest = self._reach(full)
                as_many = cheapest + (target - low) / (high - low) * (dearest - cheapest)
                yield Entry(method, "SkipNet", as_many, full.with_target(as_many))

    def _reach(self, config: TrainConfig) -> tuple[float, float]:
        """The least and the most that a network's choices cost."""
        data = self.data(config.seed)
        model = build_dynamic(config, data.classes, data.channels)
        costs = make_cost(config.cost, model, data.image_size, self._table(config)).of_choices()
        return float(costs.min()), float(costs.max())

    @staticmethod
    def _table(config: TrainConfig) -> LatencyTable | None:
        return LatencyTable.load(Path(config.latency_table)) if config.latency_table else None

    def _trained(self, entry: Entry, progress: Any, stop: Any) -> Trainer | None:
        """The entry's network, trained; None if stopped before."""
        folder, config = self._run_folder(entry), entry.config
        data = self.data(config.seed)
        if (folder / CHECKPOINT_NAME).exists():
            trainer = Trainer.load(folder, data, device=self.device)
        else:
            shared = self._shared(config, shareable_stages(config), progress, stop)
            if shared is None:
                return None
            trainer = shared.fork(config, folder)
        return trainer if trainer.run(None, progress, stop) else None

    def _shared(self, config: TrainConfig, count: int, progress: Any, stop: Any) -> Trainer | None:
        """A run of the first stages, trained or found; None if stopped before."""
        folder = self._shared_folder(config, count)
        settings = replace(config, recipe="dfs", static_widths=())
        if (folder / CHECKPOINT_NAME).exists():
            trainer = Trainer.load(folder, self.data(config.seed), device=self.device)
        elif count == 1:
            # The float network needs no teacher, which it may be itself.
            begun = replace(settings, teacher="")
            trainer = Trainer(begun, folder, self.data(config.seed), self.device)
        else:
            start = self._shared(config, 1, progress, stop)
            if start is None:
                return None
            teacher = replace(self.base, seed=config.seed)
            if config.teacher and self._shared(teacher, 1, progress, stop) is None:
                return None
            trainer = start.fork(settings, folder)
        return trainer if trainer.run(count, progress, stop) else None

    def _measure(self, entry: Entry, trainer: Trainer) -> dict[str, Any]:
        test, table = trainer.data.test, self.latency_table
        result = self._describe(entry)
        model, widths = trainer.model, entry.config.static_widths
        try:
            costs_of(model, test.image_size, table)
        except ValueError as error:
            # A table knows the parts that it was measured on, and no others.
            table, result["latency_note"] = None, str(error)
        if entry.method == "cascade":
            assert entry.target is not None
            cost = make_cost(entry.config.cost, model, test.image_size, self._table(entry.config))
            narrow, wide = widths
            found = (trainer.data.val, cost, entry.target)
            cascade = cascade_for_target(model, narrow, wide, *found)
            result["threshold"] = cascade.threshold
            measured = evaluate_cascade(cascade, test, latency_table=table)
        elif widths == (FULL_BITS,):
            measured = evaluate(trainer.plain, test, latency_table=table)
        else:
            policy = widths[0] if widths else None
            measured = evaluate(model, test, policy, latency_table=table)
            if measured.distinct_decisions > 1:
                assert measured.bits is not None
                result["permuted"] = permuted_accuracies(model, test, measured.bits)
        return result | self._figures(trainer, measured, table)

    def _figures(
        self, trainer: Trainer, measured: Evaluation, table: LatencyTable | None
    ) -> dict[str, Any]:
        """What was measured, costs as fractions of the base network at full precision."""
        size = trainer.data.image_size
        own = costs_of(trainer.model, size, table)
        base = build_dynamic(
            replace(self.base, seed=trainer.config.seed),
            trainer.data.classes,
            trainer.data.channels,
        )
        relative = {
            mine.name: mine.full / theirs.full
            for mine, theirs in zip(own, costs_of(base, size, table), strict=True)
        }
        costs = {"paper": measured.paper_cost, "bitops": measured.bitops}
        if measured.latency is not None:
            costs["latency"] = measured.latency
        return {
            "accuracy": measured.accuracy,
            "images": len(measured.correct),
            "outcomes": encode_outcomes(measured.correct),
            "paper_cost": costs["paper"] * relative["paper"],
            "bitops": costs["bitops"] * relative["bitops"],
            "latency": costs["latency"] * relative["latency"] if "latency" in costs else None,
            "milliseconds_per_image": measured.milliseconds,
            "widths_used": list(measured.widths_used),
            "distinct_decisions": measured.distinct_decisions,
            "shares": None
            if measured.bits is None
            else measured.shares(trainer.model.choices).tolist(),
            "validation": trainer.results.get(trainer.stages[-1].name, {}),
        }

    def _describe(self, entry: Entry) -> dict[str, Any]:
        return {
            "method": entry.method,
            "label": entry.label,
            "target": entry.target,
            "seed": entry.config.seed,
            "run": str(self._run_folder(entry).relative_to(self.folder)),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _run_folder(self, entry: Entry) -> Path:
        return self.folder / "runs" / entry.run_key

    def _shared_folder(self, config: TrainConfig, count: int) -> Path:
        return self.folder / "shared" / prefix_key(config, count)

    def _result_path(self, entry: Entry) -> Path:
        return self.folder / "results" / f"{entry.key}.json"


class _Clock:
    """How long a sweep has to go, by the steps ahead and the time of those it has taken.

    A stage's steps are expected to take as long as its steps took before, or, until then, as those
    of the latest other stage, by the passes of each; both by the size of the networks.
    """

    def __init__(self, sweep: Sweep, clock: Callable[[], float] = time.monotonic) -> None:
        self._sweep = sweep
        self._clock = clock
        self._runs = list(sweep.runs_ahead())
        self._ahead: dict[str, float] = defaultdict(float)
        self._macs: dict[tuple[str, int], int] = {}
        for run in self._runs:
            for stage, steps, work in self._stages(run):
                self._ahead[stage] += steps * work
        # By stage: steps, seconds, work.
        self._taken: dict[str, tuple[int, float, float]] = {}
        self._latest = ""
        self._planned = False

    def _stages(self, run: RunAhead) -> Iterator[tuple[str, int, float]]:
        """Name, steps, and the work of a step, of the stages of a run."""
        data = self._sweep.data(run.config.seed)
        for stage in stages_of(run.config)[run.first : run.last]:
            yield stage.name, stage.length(run.config, data), stage.passes * self._size(run.config)

    def _size(self, config: TrainConfig) -> int:
        key = (config.model, config.seed)
        if key not in self._macs:
            data = self._sweep.data(config.seed)
            model = build_dynamic(config, data.classes, data.channels)
            self._macs[key] = model.macs(*data.image_size).total
        return self._macs[key]

    def _rate(self, stage: str) -> float | None:
        """Seconds of a unit of work."""
        for name in (stage, self._latest):
            steps, seconds, work = self._taken.get(name, (0, 0.0, 0.0))
            if steps >= _FEWEST_STEPS:
                return seconds / work
        return None

    def _left(self) -> float | None:
        rates = {stage: self._rate(stage) for stage in self._ahead}
        if None in rates.values():
            return None
        return sum(max(work, 0.0) * (rates[s] or 0.0) for s, work in self._ahead.items())

    def _plan(self) -> SweepPlan:
        rows = []
        for run in self._runs:
            stages = list(self._stages(run))
            seconds = sum(steps * work * (self._rate(s) or 0.0) for s, steps, work in stages)
            rows.append((run.label, sum(steps for _, steps, _ in stages), seconds))
        return SweepPlan(tuple(rows))

    def watch(self, entry: Entry, progress: Callable[[SweepProgress], None] | None) -> Any:
        """What a trainer of an entry is to tell its steps."""
        passes = {s.name: s.passes for s in stages_of(entry.config)}
        done = len(self._sweep.results())
        size, entries = self._size(entry.config), len(self._sweep.entries)
        before: list[Any] = ["", 0.0]

        def told(stage: str, step: int, steps: int, measured: dict[str, float]) -> None:
            now, work = self._clock(), passes.get(stage, 1.0) * size
            # The first step of a stage comes after what prepared it.
            if before[0] == stage:
                count, seconds, known = self._taken.get(stage, (0, 0.0, 0.0))
                self._taken[stage] = (count + 1, seconds + now - before[1], known + work)
                if count + 1 >= _FEWEST_STEPS:
                    self._latest = stage
            before[:] = stage, now
            self._ahead[stage] -= work
            left = self._left()
            plan = self._plan() if left is not None and not self._planned else None
            self._planned |= plan is not None
            if progress is not None:
                at = (entry.title, stage, step, steps, measured, done, entries, left, plan)
                progress(SweepProgress(*at))

        return told


def _run_all(run: Callable[[Tensor], object], batches: Sequence[Tensor]) -> None:
    for images in batches:
        run(images)


def _logits(engine: Engine, images: Tensor, width: int) -> Tensor:
    return engine(images, width).logits


def _static(config: TrainConfig, *widths: int) -> TrainConfig:
    return replace(config, recipe="static", static_widths=widths, gate=TrainConfig.gate)


def _half_depth(model: str) -> str:
    """The name of a network of about half the depth.

    Raises:
        ValueError: there is none that is smaller.
    """
    depth = resnet_depth(model)
    per_stage = (depth - 2) // 6
    if depth in _HALF_DEPTH:
        return f"resnet{_HALF_DEPTH[depth]}"
    if architecture_of(model).pool is None and per_stage > 1:
        return f"resnet{6 * (per_stage // 2) + 2}"
    raise ValueError(
        f"methods: there is no network of half the depth of {model}; leave out shallow8"
    )


def _without(config: TrainConfig, width: int) -> tuple[tuple[int, float], ...]:
    """The exit checks that concern a width."""
    return tuple(check for check in config.exit_points if check[0] == width)
