"""Runs the stages, one step at a time, so that it can stop and resume after any of them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dfs.cost import Cost, make_cost
from dfs.data import DataError, DataSplits, load_dataset
from dfs.models import PlainResNet, build_model
from dfs.train.checkpoint import CheckpointError, load_checkpoint, load_exactly, save_checkpoint
from dfs.train.config import TrainConfig
from dfs.train.network import CHECKPOINT_NAME, build_dynamic
from dfs.train.stages import STAGES, Stage, StageError

__all__ = ["SHARED_STAGES", "StageError", "Trainer"]

# S0 to S2 know nothing of the cost target: every target starts from their result.
SHARED_STAGES = 3
_SEED_STRIDE = 1_000_003

Progress = Callable[[str, int, int, dict[str, float]], None]


class Trainer:
    """A training run: networks, the place in the stages, and the folder it is kept in.

    Everything random in a step is drawn from a seed made of the run's seed, the stage and the step,
    so that what was saved after a step is all that resuming needs.

    Args:
        config: the settings.
        folder: where checkpoints and metrics go; None keeps nothing.
        data: the data set, loaded by the config's name if None.
    """

    def __init__(
        self, config: TrainConfig, folder: Path | None = None, data: DataSplits | None = None
    ) -> None:
        self.config = config
        self.folder = folder
        self.data = data if data is not None else _load_data(config)
        torch.manual_seed(config.seed)
        plain = build_model(config.model, self.data.classes, self.data.channels, None)
        assert isinstance(plain, PlainResNet)
        self.plain = plain
        self.model = build_dynamic(config, self.data.classes, self.data.channels)
        self.stage_index = 0
        self.step = 0
        self.results: dict[str, dict[str, float]] = {}
        self._stage: Stage | None = None
        # Lines written after the last checkpoint belong to steps that are done again.
        self._metrics_size = 0
        self._metrics_open = False

    @property
    def cost(self) -> Cost:
        return make_cost(self.config.cost, self.model, self.data.image_size)

    @property
    def done(self) -> bool:
        return self.stage_index >= len(STAGES)

    def fork(self, target: float, folder: Path | None = None) -> Trainer:
        """A run of its own for another cost target, starting from here.

        Raises:
            ValueError: the target has already been trained to.
        """
        if self.stage_index > SHARED_STAGES or (self.stage_index == SHARED_STAGES and self.step):
            raise ValueError("a run can only be forked before its gates are trained")
        other = Trainer(self.config.with_target(target), folder, self.data)
        other.plain.load_state_dict(self.plain.state_dict())
        load_exactly(other.model, self.model.state_dict(), "model")
        other.stage_index, other.step = self.stage_index, self.step
        other.results = copy.deepcopy(self.results)
        return other

    def run(
        self,
        until: int | None = None,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
        max_steps: int | None = None,
        checkpoint_every: int = 50,
    ) -> bool:
        """Train until stage ``until`` begins, or to the end.

        Args:
            progress: called after every step with the stage's name, the step, the steps of the
                stage and what was measured.
            stop: asked after every step; True saves and returns.
            max_steps: stop, saved, after so many steps of this call.
            checkpoint_every: steps between checkpoints.

        Returns:
            Whether it got there.

        Raises:
            StageError: a stage's exit check did not pass; its checkpoint is kept.
        """
        last = len(STAGES) if until is None else until
        taken = 0
        while self.stage_index < last:
            stage = self._current()
            total = stage.steps()
            while self.step < total:
                torch.manual_seed(
                    (self.config.seed * _SEED_STRIDE + self.stage_index) * _SEED_STRIDE + self.step
                )
                measured = stage.take(self.step)
                self.step += 1
                taken += 1
                self._log(stage.name, self.step, measured)
                if progress is not None:
                    progress(stage.name, self.step, total, measured)
                finished = self.step == total
                stopping = (stop is not None and stop()) or taken == max_steps
                if stopping or (self.step % checkpoint_every == 0 and not finished):
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

    def save(self) -> None:
        """Write the checkpoint, if the run has a folder."""
        if self.folder is None:
            return
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
                "metrics_size": self._metrics_size,
                "data": self.data.record(),
            },
        )

    @staticmethod
    def load(
        folder: Path, data: DataSplits | None = None, data_folder: Path | None = None
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
            trainer = Trainer(config, folder, data)
            trainer._expect_data(content["data"], path)
            load_exactly(trainer.plain, content["plain"], f"{path}: plain")
            load_exactly(trainer.model, content["model"], f"{path}: model")
            trainer.stage_index = _count(content, "stage", len(STAGES))
            trainer.step = _count(content, "step")
            trainer._metrics_size = _count(content, "metrics_size")
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
            stage_type = STAGES[self.stage_index]
            if self.step == 0:
                torch.manual_seed(self.config.seed * _SEED_STRIDE - 1 - self.stage_index)
                stage_type.prepare(self)
            self._stage = stage_type(self)
        return self._stage

    def _log(self, stage: str, step: int, measured: dict[str, float], final: bool = False) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"stage": stage, "step": step, "final": final, **measured}
        path = self.folder / "metrics.jsonl"
        if not self._metrics_open:
            path.touch()
            os.truncate(path, min(self._metrics_size, path.stat().st_size))
            self._metrics_open = True
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            self._metrics_size = file.tell()


def _kind_of(record: dict[str, Any]) -> dict[str, Any]:
    """What must not change under a run: means may differ in their last digit."""
    preprocessing = record["preprocessing"] or {}
    return {"name": record["name"], **{k: preprocessing.get(k) for k in ("size", "class_names")}}


def _load_data(config: TrainConfig) -> DataSplits:
    folder = Path(config.data) if config.data else None
    waived = config.allow_unverified
    return load_dataset(config.dataset, config.seed, folder, config.image_size, waived)


def _count(content: dict[str, Any], name: str, limit: int | None = None) -> int:
    value = content[name]
    if type(value) is not int or value < 0 or (limit is not None and value > limit):
        raise CheckpointError(f"checkpoint: {name} can't be {value!r}")
    return value


def stage_names() -> Sequence[str]:
    """The stages in order."""
    return [stage.name for stage in STAGES]
