"""Everything that is timed on a layer on a GPU, by name."""

from __future__ import annotations

from bench.gpu.backend_table import FORMS as TABLE_FORMS
from bench.gpu.backends import gpu_candidates
from bench.gpu.ours import FORMS, implementations
from bench.gpu.peers import PEERS
from bench.gpu.prepared import GpuPrepared, to_run
from bench.layers import Layer

_PEERS = {peer.name: peer for peer in PEERS}


def ours(form: str, implementation: str) -> str:
    """The name of one of our contestants."""
    return f"{implementation}_{form}"


_OURS = {
    ours(form, implementation): (form, implementation)
    for form in FORMS
    for implementation in implementations()
} | {ours(form, name): (form, name) for form in TABLE_FORMS for name in gpu_candidates()}


def labels() -> dict[str, str]:
    """What each contestant is called in a report."""
    own = {name: f"{how}: {FORMS[form].label}" for name, (form, how) in _OURS.items()}
    return {**own, **{name: peer.label for name, peer in _PEERS.items()}}


def names_for(layer: Layer, batch: int) -> list[str]:
    """The contestants of a layer: all for what bars are set on, else the most telling few."""
    if layer.family != "square":
        few = [ours("8", how) for how in implementations(buckets=False)]
        return [*few, "cudnn_bf16_channels_last"] if batch == layer.batches[0] else []
    own = [
        name
        for name, (form, how) in _OURS.items()
        if batch >= FORMS[form].smallest_batch
        and (batch == layer.batches[0] or not FORMS[form].largest_batch_only)
        and (FORMS[form].in_buckets or how in (*implementations(buckets=False), *gpu_candidates()))
    ]
    return [*own, *_PEERS]


def prepare(name: str, layer: Layer, batch: int) -> GpuPrepared:
    """A contestant with its tensors made and its weights packed.

    Raises:
        Unavailable: saying why it can't run here.
    """
    layer, batch = to_run(layer, batch)
    if name in _PEERS:
        return _PEERS[name].prepare(layer, batch)
    form, implementation = _OURS[name]
    return FORMS[form].make(layer, batch, implementation)
