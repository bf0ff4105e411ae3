"""Dynamic Fractional Skipping: networks that spend only the bits each input needs."""

from dfs.models import DynamicResNet, PlainResNet, build_model
from dfs.nn import DFSConv2d

__version__ = "0.1.0"

__all__ = ["DFSConv2d", "DynamicResNet", "PlainResNet", "__version__", "build_model"]
