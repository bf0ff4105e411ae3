"""Checkpoints of the paper's authors (github.com/Torment123/DFS), made into this project's.

Theirs are ``torch.save`` files of {"state_dict": ..., "arch": ...}; the RNN-gated CIFAR ResNets of
any depth and number of options are understood. The network that comes out has the semantics of
``dfs.models.PAPER``, and gives their logits and decisions with the rounding of activations made
deterministic: their code adds uniform noise to the codes before rounding them.

How equal: computed in float64, the logits of a ResNet-38 agree to 1e-6 and all decisions are the
same. In float32 the order of a sum decides how a value on the edge between two codes is rounded,
and what is rounded differently is carried on. With random weights and logits of up to 18, ours then
differ from theirs by up to 1.3e-3, and theirs from themselves by as much: 1.1e-3 between a batch
of 12 and one image at a time, 1.3e-3 from float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfs.data import Preprocessing
from dfs.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES
from dfs.train.checkpoint import CheckpointError, load_exactly, read_saved, save_checkpoint
from dfs.train.config import TrainConfig
from dfs.train.network import build_dynamic

# What their data.py does to CIFAR's images.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_CLASS_NAMES = {"cifar10": CIFAR10_CLASSES, "cifar100": CIFAR100_CLASSES}
# The options that their scripts list, by how many a gate has; a skip comes first, and their 0 bits,
# which are full precision, last.
OPTIONS: dict[int, tuple[int, ...]] = {
    4: (0, 8, 16, 32),
    5: (0, 4, 8, 16, 32),
    7: (0, 8, 10, 12, 14, 16, 32),
    10: (0, 2, 4, 6, 8, 10, 12, 14, 16, 32),
}
_GROUPS = 3
_HIDDEN = 10
_NORM = ("weight", "bias", "running_mean", "running_var")
_CELL = {
    "weight_ih_l0": "weight_ih",
    "weight_hh_l0": "weight_hh",
    "bias_ih_l0": "bias_ih",
    "bias_hh_l0": "bias_hh",
}
# What a fresh network of ours has and theirs does not, or never uses.
_OWN = re.compile(r"streams\.|gate\.(choice_bias|widths)$|classifier\.quantizer\.")


@dataclass(frozen=True)
class AuthorsNetwork:
    """What a state dict of theirs holds.

    Attributes:
        per_group: residual blocks in each of the three groups.
        choices: ascending widths, 0 for a skip and 32 for full precision.
    """

    state: Mapping[str, Tensor]
    per_group: int
    classes: int
    choices: tuple[int, ...]

    @property
    def depth(self) -> int:
        return 2 * _GROUPS * self.per_group + 2

    @property
    def dataset(self) -> str:
        return "cifar10" if self.classes == len(CIFAR10_CLASSES) else "cifar100"

    def to_dict(self) -> dict[str, Any]:
        return {"depth": self.depth, "dataset": self.dataset, "choices": list(self.choices)}


def import_authors(source: Path, out: Path, choices: Sequence[int] | None = None) -> AuthorsNetwork:
    """Write a checkpoint of this project from one of theirs.

    Args:
        choices: the widths that the gate's outputs mean; where None, those that their scripts list
            for so many outputs.

    Raises:
        CheckpointError: the file is not one of theirs; names what is missing or unknown.
    """
    found = describe(read_authors(source), source, choices)
    config = TrainConfig(
        dataset=found.dataset,
        model=f"resnet{found.depth}",
        choices=found.choices,
        stream="float32",
        semantics="paper",
    )
    names = _CLASS_NAMES[found.dataset]
    preprocessing = Preprocessing(32, 32, _MEAN, _STD, names)
    model = build_dynamic(config, found.classes, preprocessing.channels)
    converted = convert(found, source)
    own = {k: v for k, v in model.state_dict().items() if _OWN.match(k)}
    load_exactly(model, {**own, **converted}, str(source))
    data = {"name": found.dataset, "preprocessing": preprocessing.to_dict(), "files": []}
    content = {"config": config.to_dict(), "model": model.state_dict(), "data": data}
    save_checkpoint(out, {**content, "imported_from": source.name})
    return found


def read_authors(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of theirs, without the prefix that data parallelism adds.

    Raises:
        CheckpointError: unreadable, or no state dict; no code in it is run.
    """
    content = read_saved(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: holds no state_dict")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {name!r} of the state_dict is not a tensor")
    return {name.removeprefix("module."): value for name, value in state.items()}


def describe(
    state: Mapping[str, Tensor], source: Path, choices: Sequence[int] | None = None
) -> AuthorsNetwork:
    """Depth, classes and options of a state dict of theirs; CheckpointError if it is none."""
    blocks = [
        len({k.split(".")[0] for k in state if re.match(rf"group{g}_layer\d+\.", k)})
        for g in range(1, _GROUPS + 1)
    ]
    if not blocks[0] or len(set(blocks)) != 1:
        raise CheckpointError(
            f"{source}: not a CIFAR ResNet of the authors: its three groups have {blocks} blocks"
        )
    outputs, hidden = _shape(state, "control.proj.weight", 2, source)
    if hidden != _HIDDEN:
        raise CheckpointError(f"{source}: gates of {hidden} hidden units; {_HIDDEN} are understood")
    classes = _shape(state, "fc.weight", 2, source)[0]
    if classes not in map(len, _CLASS_NAMES.values()):
        raise CheckpointError(f"{source}: {classes} classes; CIFAR has 10 or 100")
    return AuthorsNetwork(state, blocks[0], classes, _choices(outputs, choices, source))


def convert(found: AuthorsNetwork, source: Path) -> dict[str, Tensor]:
    """Their tensors under this project's names.

    Raises:
        CheckpointError: naming an entry that is missing, or those that are unknown.
    """
    left = dict(found.state)
    converted: dict[str, Tensor] = {}
    for theirs, ours in _names(found.per_group):
        if theirs not in left:
            raise CheckpointError(f"{source}: entry {theirs!r} is missing")
        converted[ours] = _reshaped(left.pop(theirs), ours)
    for theirs, twin in _unused(found.per_group):
        value = left.pop(theirs, None)
        if value is not None and twin is not None and not torch.equal(value, found.state[twin]):
            raise CheckpointError(f"{source}: {theirs!r} and {twin!r} must be the same")
    unknown = [name for name in left if not name.endswith(".num_batches_tracked")]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5]))
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(f"{source}: unknown entries {shown}{more}")
    return converted


def _choices(outputs: int, given: Sequence[int] | None, source: Path) -> tuple[int, ...]:
    if given is None:
        if outputs not in OPTIONS:
            raise CheckpointError(
                f"{source}: its gate has {outputs} outputs; say by --choices what they mean, "
                "such as 0,4,8,16,32"
            )
        return OPTIONS[outputs]
    ordered = list(given) == sorted(set(given))
    if not ordered or len(given) != outputs or given[0] != 0 or given[-1] != 32:
        raise CheckpointError(
            f"{source}: choices must be {outputs} ascending widths from 0 to 32, got {given}"
        )
    return tuple(given)


def _blocks(per_group: int) -> Iterator[tuple[int, int, int]]:
    """(our index, their group, their index in it) of every block."""
    for k in range(_GROUPS * per_group):
        yield k, k // per_group + 1, k % per_group


def _names(per_group: int) -> Iterator[tuple[str, str]]:
    """(their name, ours) of every tensor that counts."""
    yield from _conv("conv1", "stem")
    yield from _norm("bn1", "bn_stem")
    for k, group, i in _blocks(per_group):
        theirs, ours = f"group{group}_layer{i}", f"blocks.{k}"
        for n in (1, 2):
            yield from _conv(f"{theirs}.conv{n}", f"{ours}.conv{n}")
            yield from _norm(f"{theirs}.bn{n}", f"{ours}.bn{n}")
        if _downsamples(group, i):
            yield from _conv(f"{theirs}.downsample", f"{ours}.shortcut")
            yield from _norm(f"{theirs}.bn3", f"{ours}.bn_shortcut")
        # The gate behind the last block decides nothing.
        if k < _GROUPS * per_group - 1:
            for name in ("weight", "bias"):
                yield f"group{group}_gate{i}.1.{name}", f"gate.embed.{k}.{name}"
    for name, own in _CELL.items():
        yield f"control.rnn_one.{name}", f"gate.cell.{own}"
    for name in ("weight", "bias"):
        yield f"control.proj.{name}", f"gate.proj.{name}"
        yield f"fc.{name}", f"classifier.{name}"


def _unused(per_group: int) -> Iterator[tuple[str, str | None]]:
    """Names of theirs that never count, with the tensor that they must equal if they are a twin."""
    for k, group, i in _blocks(per_group):
        layer = f"group{group}_layer{i}"
        if _downsamples(group, i):
            for theirs, _ in _conv("", ""):
                yield f"group{group}_ds{i}{theirs}", f"{layer}.downsample{theirs}"
            for theirs, _ in _norm("", ""):
                yield f"group{group}_bn{i}{theirs}", f"{layer}.bn3{theirs}"
        else:
            for theirs, _ in _norm(f"{layer}.bn3", ""):
                yield theirs, None
        if k == _GROUPS * per_group - 1:
            for name in ("weight", "bias"):
                yield f"group{group}_gate{i}.1.{name}", None


def _downsamples(group: int, index: int) -> bool:
    return group > 1 and index == 0


def _conv(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.weight", f"{ours}.weight"
    for name in ("running_min", "running_max"):
        yield f"{theirs}.quantize_input.{name}", f"{ours}.quantizer.{name}"


def _norm(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for name in _NORM:
        yield f"{theirs}.{name}", f"{ours}.{name}"


def _reshaped(value: Tensor, ours: str) -> Tensor:
    """A row per BatchNorm, a matrix per embedding, a 1x1 convolution as the classifier."""
    if re.search(r"(^|\.)bn", ours):
        return value[None]
    if ours.startswith("gate.embed") and value.dim() == 4:
        return value.flatten(1)
    if ours == "classifier.weight":
        return value[:, :, None, None]
    return value


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int, source: Path) -> list[int]:
    if name not in state:
        raise CheckpointError(f"{source}: entry {name!r} is missing; is it an RNN-gated network?")
    if state[name].dim() != dimensions:
        raise CheckpointError(f"{source}: {name!r} has shape {tuple(state[name].shape)}")
    return list(state[name].shape)
