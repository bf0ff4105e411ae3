"""Everything that is timed on a layer, ready to call and able to check itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench import ours, peers
from bench.layers import Layer
from bench.prepared import Prepared, Unavailable

__all__ = ["CONTESTANTS", "Contestant", "Prepared", "Unavailable", "prepare"]


@dataclass(frozen=True)
class Contestant:
    """One way to compute a layer.

    Attributes:
        name: its key in the results.
        label: its name in a report.
        make: from layer, batch and threads; raises :class:`Unavailable` if it can't run here.
        is_integer: whether its rate is a fraction of the integer peak, or of the float one.
        smallest_batch: a mix needs a sample of each width.
    """

    name: str
    label: str
    make: Callable[[Layer, int, int], Prepared]
    is_integer: bool
    smallest_batch: int = 1


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("dfs_8", "DFS 8 bits", ours.packed_at(8), True),
        Contestant("dfs_4", "DFS 4 bits", ours.packed_at(4), True),
        Contestant("dfs_2", "DFS 2 bits", ours.packed_at(2), True),
        Contestant("dfs_mixed", "DFS 0/2/4/8 bits", ours.packed_mix, True, len(ours.MIX)),
        Contestant("dfs_skipped", "DFS skipped", ours.packed_at(0), True),
        Contestant("dfs_8_float", "DFS 8 bits, float in and out", ours.float_at_8, True),
        Contestant("dfs_32_packed", "DFS 32 bits, packed", ours.packed_float, False),
        Contestant("dfs_32", "DFS 32 bits", ours.plain_float(channels_last=False), False),
        Contestant(
            "dfs_32_channels_last",
            "DFS 32 bits, channels last",
            ours.plain_float(channels_last=True),
            False,
        ),
        Contestant("torch_int8", "PyTorch int8", peers.torch_int8, True),
        Contestant("onnxruntime_int8", "ONNX Runtime int8", peers.onnxruntime_int8, True),
        Contestant(
            "torch_float32", "PyTorch float32", peers.torch_float32(channels_last=False), False
        ),
        Contestant(
            "torch_float32_channels_last",
            "PyTorch float32, channels last",
            peers.torch_float32(channels_last=True),
            False,
        ),
        Contestant("onnxruntime_float32", "ONNX Runtime float32", peers.onnxruntime_float32, False),
    )
}


def prepare(name: str, layer: Layer, batch: int, threads: int) -> Prepared:
    """A contestant with its tensors made and its weights packed.

    Raises:
        Unavailable: saying why it can't run here.
    """
    return CONTESTANTS[name].make(layer, batch, threads)
