"""Training to a cost target, in stages that can be stopped and resumed at any step."""

from dfs.train.config import TrainConfig
from dfs.train.evaluate import Evaluation, evaluate
from dfs.train.trainer import StageError, Trainer

__all__ = ["Evaluation", "StageError", "TrainConfig", "Trainer", "evaluate"]
