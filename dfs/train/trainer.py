"""Runs the stages, one step at a time, so that it can stop and resume after any of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dfs.cost import Cost, make_cost
from dfs.data import DataError, DataSplits, load_dataset
from dfs.latency import LatencyTable
from dfs.models import PlainResNet, build_model
from dfs.nn import replicas
from dfs.train.checkpoint import CheckpointError, load_checkpoint, load_exactly, save_checkpoint
from dfs.train.config import TrainConfig
from dfs.train.distributed import any_process, correct_step_gradients, mean_values
from dfs.train.network import CHECKPOINT_NAME, build_dynamic
from dfs.train.recipes import SHARED_STAGES, settings_of, shareable_stages, stages_of
from dfs.train.record import RunRecord
from dfs.train.stages import Stage, StageError

__all__ = ["SHARED_STAGES", "StageError", "Trainer"]

_SEED_STRIDE = 1_000_003
# How much longer steps must take than writing a checkpoint before there is another one: it takes
# about a tenth of the time, and a killed run has little to do again.
_WRITING_SHARE = 10

Progress = Callable[[str, int, int, dict[str, float]], None]


class Trainer:
    """A training run: networks, the place in the stages, and the folder it is kept in.

    Everything random in a step is drawn from a seed made of the run's seed, the stage and the step,
    so that what was saved after a step is all that resuming needs.

    Args:
        config: the settings.
        folder: where checkpoints and metrics go; None keeps nothing.
        data: the data set, loaded by the config's name if None.
        device: where everything is computed; sets that are kept in memory lie there, too. It is not
            among the settings: what was saved goes on anywhere, bit for bit only where it began.

    Raises:
        ValueError: a setting that does not fit the data.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path | None = None,
        data: DataSplits | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.folder = folder
        self.device = torch.device(device)
        self.data = (data if data is not None else load_data(config)).to(self.device)
        # Networks are initialised on the CPU: alike, whatever the device.
        torch.manual_seed(config.seed)
        plain = build_model(config.model, self.data.classes, self.data.channels, None)
        assert isinstance(plain, PlainResNet)
        self.plain = plain.to(self.device)
        self.model = build_dynamic(config, self.data.classes, self.data.channels).to(self.device)
        correct_step_gradients(self.model)
        self.stages = stages_of(config)
        self.cost = self._make_cost()
        teacher = _load_teacher(config, self.data) if config.teacher else None
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.stage_index = 0
        self.step = 0
        self.results: dict[str, dict[str, float]] = {}
        self._stage: Stage | None = None
        self.record = self._new_record()
        self._saved_at = time.monotonic()
        self._save_seconds = math.inf

    @property
    def done(self) -> bool:
        return self.stage_index >= len(self.stages)

    def _make_cost(self) -> Cost:
        table = self.config.latency_table
        loaded = LatencyTable.load(Path(table)) if table else None
        return make_cost(self.config.cost, self.model, self.data.image_size, loaded)

    def check_target(self) -> None:
        """ValueError, with the range, if no decisions cost the target."""
        if self.config.recipe != "static":
            costs = self.cost.of_choices()
            check_reach(self.config, float(costs.min()), float(costs.max()))

    def _new_record(self, metrics_size: int = 0) -> RunRecord | None:
        if self.folder is None or replicas.rank():
            return None
        return RunRecord(self.folder, self.config, metrics_size)

    def fork(self, config: TrainConfig, folder: Path | None = None) -> Trainer:
        """A run of its own with other settings, starting from here.

        Raises:
            ValueError: naming a setting on which what has been trained depends, or saying that it
                has been trained too far.
        """
        done = self.stage_index
        if self.step or done > min(shareable_stages(self.config), shareable_stages(config)):
            raise ValueError("a run can only be forked between the stages that others share")
        for name, value in settings_of(self.config, done).items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{name} can't become {getattr(config, name)!r}: "
                    f"what is to be shared was trained with {value!r}"
                )
        other = Trainer(config, folder, self.data, self.device)
        other.plain.load_state_dict(self.plain.state_dict())
        if done > 1:
            # The gates are still untrained, and may be others.
            own = {k: v for k, v in other.model.state_dict().items() if k.startswith("gate.")}
            rest = {k: v for k, v in self.model.state_dict().items() if not k.startswith("gate.")}
            load_exactly(other.model, {**rest, **own}, "model")
        other.stage_index = done
        other.results = copy.deepcopy(self.results)
        return other

    def run(
        self,
        until: int | None = None,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
        max_steps: int | None = None,
        checkpoint_every: int | None = None,
    ) -> bool:
        """Train until stage ``until`` begins, or to the end.

        Args:
            progress: called after every step with the stage's name, the step, the steps of the
                stage and what was measured.
            stop: asked after every step; True saves and returns.
            max_steps: stop, saved, after so many steps of this call.
            checkpoint_every: steps between checkpoints; None writes them as often as a tenth of
                the time allows.

        Returns:
            Whether it got there.

        Raises:
            StageError: a stage's exit check did not pass; its checkpoint is kept.
            ValueError: the choices can't cost the target; nothing was trained.
        """
        last = len(self.stages) if until is None else until
        if last > shareable_stages(self.config):
            self.check_target()
        taken = 0
        while self.stage_index < last:
            stage = self._current()
            total = stage.steps()
            while self.step < total:
                torch.manual_seed(
                    (self.config.seed * _SEED_STRIDE + self.stage_index) * _SEED_STRIDE + self.step
                )
                with replicas.sharded(stage.sharded):
                    measured = mean_values(stage.take(self.step))
                self.step += 1
                taken += 1
                self._log(stage.name, self.step, measured)
                if progress is not None:
                    progress(stage.name, self.step, total, measured)
                stopping = any_process((stop is not None and stop()) or taken == max_steps)
                if stopping or (self.step < total and self._save_is_due(checkpoint_every)):
                    self.save()
                if stopping:
                    return False
            torch.manual_seed(self.config.seed * _SEED_STRIDE + self.stage_index)
            self.results[stage.name] = stage.finish()
            self._log(stage.name, self.step, self.results[stage.name], final=True)
            self.stage_index += 1
            self.step = 0
            self._stage = None
            self.save()
        return True

    def _save_is_due(self, every: int | None) -> bool:
        if every is not None:
            return self.step % every == 0
        if math.isinf(self._save_seconds):
            return True
        return time.monotonic() - self._saved_at >= _WRITING_SHARE * self._save_seconds

    def save(self) -> None:
        """Write the checkpoint, if the run has a folder."""
        if self.folder is None or self.record is None:
            return
        start = time.monotonic()
        self.record.flush()
        stage = {} if self._stage is None else self._stage.state_dict()
        save_checkpoint(
            self.folder / CHECKPOINT_NAME,
            {
                "config": self.config.to_dict(),
                "stage": self.stage_index,
                "step": self.step,
                "plain": self.plain.state_dict(),
                "model": self.model.state_dict(),
                "stage_state": stage,
                "results": self.results,
                "metrics_size": self.record.metrics_size,
                "data": self.data.record(),
            },
        )
        self._saved_at = time.monotonic()
        # The fastest so far: a disk that is busy for once is no reason to wait for long.
        self._save_seconds = min(self._save_seconds, self._saved_at - start)

    @staticmethod
    def load(
        folder: Path,
        data: DataSplits | None = None,
        data_folder: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> Trainer:
        """Take up the run that is kept in ``folder``.

        Args:
            data_folder: where the data set's files are now; where they were if None.

        Raises:
            CheckpointError: it is missing, damaged, or does not fit its own config or its data.
            DataError: the data set can't be read.
        """
        path = folder / CHECKPOINT_NAME
        content = load_checkpoint(path)
        try:
            config = TrainConfig.from_dict(content["config"])
            if data_folder is not None:
                config = replace(config, data=str(data_folder))
            trainer = Trainer(config, folder, data, device)
            trainer._expect_data(content["data"], path)
            load_exactly(trainer.plain, content["plain"], f"{path}: plain")
            load_exactly(trainer.model, content["model"], f"{path}: model")
            trainer.stage_index = _count(content, "stage", len(trainer.stages))
            trainer.step = _count(content, "step")
            trainer.record = trainer._new_record(_count(content, "metrics_size"))
            trainer.results = dict(content["results"])
            if trainer.step:
                stage = trainer._current()
                _count(content, "step", stage.steps())
                stage.load_state_dict(content["stage_state"])
        except KeyError as error:
            raise CheckpointError(f"{path}: entry {error} is missing") from error
        except (CheckpointError, DataError):
            raise
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        return trainer

    def _expect_data(self, recorded: dict[str, Any], path: Path) -> None:
        """CheckpointError unless the data is of the same kind as when the run began."""
        for name, now in _kind_of(self.data.record()).items():
            if now != _kind_of(recorded)[name]:
                raise CheckpointError(f"{path}: began with data of another {name} than found now")

    def _current(self) -> Stage:
        if self._stage is None:
            stage_type = self.stages[self.stage_index]
            if self.step == 0:
                torch.manual_seed(self.config.seed * _SEED_STRIDE - 1 - self.stage_index)
                stage_type.prepare(self)
            self._stage = stage_type(self)
        return self._stage

    def _log(self, stage: str, step: int, measured: dict[str, float], final: bool = False) -> None:
        if self.record is not None:
            self.record.log(stage, step, measured, final)


def _kind_of(record: dict[str, Any]) -> dict[str, Any]:
    """What must not change under a run: means may differ in their last digit."""
    preprocessing = record["preprocessing"] or {}
    return {"name": record["name"], **{k: preprocessing.get(k) for k in ("size", "class_names")}}


def load_data(config: TrainConfig) -> DataSplits:
    """The data set that the settings name, with as many training images as they want."""
    folder = Path(config.data) if config.data else None
    waived = config.allow_unverified
    data = load_dataset(config.dataset, config.seed, folder, config.image_size, waived)
    return data.limited(config.train_images) if config.train_images else data


def check_reach(config: TrainConfig, low: float, high: float) -> None:
    """ValueError unless the target lies between what its cheapest and dearest decisions cost."""
    if not low <= config.target <= high:
        raise ValueError(
            f"target {config.target:.3%} can't be reached: choices {config.choices} cost "
            f"{low:.3%} to {high:.3%} of full precision ({config.cost})"
        )


def _load_teacher(config: TrainConfig, data: DataSplits) -> PlainResNet:
    """The float network of another run.

    Raises:
        ValueError: there is none, or it is for other data.
    """
    path = Path(config.teacher) / CHECKPOINT_NAME
    content = load_checkpoint(path)
    try:
        taught = TrainConfig.from_dict(content["config"])
        teacher = build_model(taught.model, data.classes, data.channels, None)
        load_exactly(teacher, content["plain"], f"teacher {path}: plain")
    except KeyError as error:
        raise CheckpointError(f"teacher {path}: entry {error} is missing") from error
    assert isinstance(teacher, PlainResNet)
    return teacher


def _count(content: dict[str, Any], name: str, limit: int | None = None) -> int:
    value = content[name]
    if type(value) is not int or value < 0 or (limit is not None and value > limit):
        raise CheckpointError(f"checkpoint: {name} can't be {value!r}")
    return value
