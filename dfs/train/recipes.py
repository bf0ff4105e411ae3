"""Which stages a run has, and what of its settings each depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dfs.cost import FULL_BITS
from dfs.train.config import TrainConfig
from dfs.train.paper import FullExecutionStage, PaperJointStage
from dfs.train.stages import (
    CalibrateStage,
    FloatStage,
    GateStage,
    JointStage,
    SettleStage,
    Stage,
    SwitchStage,
)
from dfs.train.static import StaticFloatStage, StaticStage

_SWITCHABLE: tuple[type[Stage], ...] = (FloatStage, CalibrateStage, SwitchStage)
# S0 to S2 know nothing of the cost target: every target starts from their result.
SHARED_STAGES = len(_SWITCHABLE)


def stages_of(config: TrainConfig) -> tuple[type[Stage], ...]:
    """The stages of a run, in order."""
    if config.recipe == "paper":
        return (FloatStage, FullExecutionStage, PaperJointStage)
    if config.recipe == "dfs":
        return (*_SWITCHABLE, GateStage, JointStage, SettleStage)
    if config.static_widths == (FULL_BITS,):
        return (FloatStage, StaticFloatStage)
    return (*_SWITCHABLE, StaticStage)


def shareable_stages(config: TrainConfig) -> int:
    """How many of a run's first stages other runs can start from."""
    return SHARED_STAGES if SwitchStage in stages_of(config) else 1


def settings_of(config: TrainConfig, stages: int) -> dict[str, Any]:
    """The settings that decide the result of a run's first stages."""
    first = stages_of(config)[:stages]
    return {name: getattr(config, name) for stage in first for name in stage.settings}


def prefix_key(config: TrainConfig, stages: int) -> str:
    """A short hash of the settings behind a run's first stages, and of which stages those are."""
    names = [stage.name for stage in stages_of(config)[:stages]]
    text = json.dumps([names, settings_of(config, stages)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
