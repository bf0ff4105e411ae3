"""Freezing a trained network, and running it."""

from dfs.engine.engine import BlockTime, Engine, EngineOutput, freeze, load_engine

__all__ = ["BlockTime", "Engine", "EngineOutput", "freeze", "load_engine"]
