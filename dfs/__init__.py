"""Dynamic Fractional Skipping: networks that spend only the bits each input needs."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported when they are asked for: dfs.launch has things to do before PyTorch is loaded.
_HOMES = {
    "PAPER": "dfs.models",
    "DFSConv2d": "dfs.nn",
    "DynamicResNet": "dfs.models",
    "Engine": "dfs.engine",
    "LatencyTable": "dfs.latency",
    "PlainResNet": "dfs.models",
    "build_model": "dfs.models",
    "calibrate": "dfs.train.calibrate",
    "freeze": "dfs.engine",
    "load_engine": "dfs.engine",
    "make_dynamic": "dfs.convert",
}
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
            globals()[name] = value
            return value
        if find_spec(f"dfs.{name}") is not None:
            return import_module(f"dfs.{name}")
        raise AttributeError(f"module 'dfs' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
