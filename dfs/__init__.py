"""Dynamic Fractional Skipping: networks that spend only the bits each input needs."""

from dfs.convert import make_dynamic
from dfs.engine import Engine, freeze, load_engine
from dfs.latency import LatencyTable
from dfs.models import PAPER, DynamicResNet, PlainResNet, build_model
from dfs.nn import DFSConv2d
from dfs.train.calibrate import calibrate

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "DFSConv2d",
    "DynamicResNet",
    "Engine",
    "LatencyTable",
    "PlainResNet",
    "__version__",
    "build_model",
    "calibrate",
    "freeze",
    "load_engine",
    "make_dynamic",
]
