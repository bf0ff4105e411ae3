"""A trained network out of its checkpoint, without the data it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dfs.data import Preprocessing
from dfs.models import PAPER, DynamicResNet, build_model
from dfs.train.checkpoint import CheckpointError, load_checkpoint, load_exactly
from dfs.train.config import TrainConfig
from dfs.train.recipes import stages_of

CHECKPOINT_NAME = "checkpoint.pt"


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A dynamic network in evaluation mode, and what must be known to use it."""

    model: DynamicResNet
    config: TrainConfig
    preprocessing: Preprocessing


def build_dynamic(config: TrainConfig, classes: int, channels: int) -> DynamicResNet:
    """The dynamic network that the settings describe, with fresh parameters."""
    options = dict(PAPER) if config.semantics == "paper" else {}
    options |= {"choices": config.choices, "stream": config.stream, "gate": config.gate}
    model = build_model(config.model, classes, channels, **options)
    assert isinstance(model, DynamicResNet)
    return model


def load_network(path: Path) -> TrainedNetwork:
    """The network of a finished run, or of an imported checkpoint.

    Args:
        path: a run's folder, or a checkpoint file.

    Raises:
        CheckpointError: it is missing, damaged or unfinished, or does not say what pictures its
            network takes.
    """
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    content = load_checkpoint(path)
    try:
        config = TrainConfig.from_dict(content["config"])
        last = len(stages_of(config))
        if content.get("stage", last) != last:
            raise CheckpointError(f"{path}: the run is not finished; dfs train --resume goes on")
        described = content["data"]["preprocessing"]
        if described is None:
            raise CheckpointError(
                f"{path}: was trained on tensors; it doesn't say how pictures become its input"
            )
        preprocessing = Preprocessing.from_dict(described)
        model = build_dynamic(config, preprocessing.classes, preprocessing.channels)
        load_exactly(model, content["model"], f"{path}: model")
    except KeyError as error:
        raise CheckpointError(f"{path}: entry {error} is missing") from error
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return TrainedNetwork(model.eval(), config, preprocessing)
