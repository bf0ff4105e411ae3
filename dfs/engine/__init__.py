"""Freezing a trained network, and running it."""

from dfs.engine.engine import BlockTime, Engine, EngineOutput, TimedOutput, freeze, load_engine
from dfs.engine.executor import DeviceError
from dfs.engine.timing import EngineTime, EngineTimes, time_engine

__all__ = [
    "BlockTime",
    "DeviceError",
    "Engine",
    "EngineOutput",
    "EngineTime",
    "EngineTimes",
    "TimedOutput",
    "freeze",
    "load_engine",
    "time_engine",
]
