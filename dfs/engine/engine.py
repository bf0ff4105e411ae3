"""The frozen network that users run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs.cost import BitOps, Cost, PaperCost
from dfs.data import Preprocessing
from dfs.engine.budget import BudgetCurve, measure_curve, tilted_bias
from dfs.engine.executor import Executor, check_device, make_executor
from dfs.engine.file import load_graph, save_graph
from dfs.engine.freeze import freeze_network
from dfs.engine.graph import EngineGraph
from dfs.engine.native import EngineRun
from dfs.models import DynamicResNet
from dfs_kernels.arguments import is_debugging

Policy = int | Tensor | None
# What travels along in a file, by name.
_BUDGET, _PREPROCESSING, _COSTS = "budget", "preprocessing", "costs"


class EngineOutput(NamedTuple):
    """What an engine says of a batch.

    Attributes:
        logits: float32 (N, classes); NaN for an image with a value that is not finite.
        bits: int32 (N, gated blocks), the decisions.
        cost: float64 (N,), the mean over gated blocks of (bits/32)^2 (Shen et al., section 4.1).
    """

    logits: Tensor
    bits: Tensor
    cost: Tensor


class TimedOutput(NamedTuple):
    """What :meth:`Engine.timed` gives.

    Attributes:
        block_nanoseconds: float64 (blocks + 2,), the stem first and the classifier last.
        gate_nanoseconds: float64 (gated blocks,), which the blocks' own do not contain.
    """

    output: EngineOutput
    block_nanoseconds: Tensor
    gate_nanoseconds: Tensor


class BlockTime(NamedTuple):
    """One line of a profile: milliseconds for the whole batch.

    Attributes:
        name: "stem", "block 0" and so on, "classifier".
        gate: of the block's gate; 0 where there is none.
        share: of the total.
    """

    name: str
    milliseconds: float
    gate: float
    share: float


class Engine:
    """A frozen network; make one with :func:`freeze` or :func:`load_engine`.

    Attributes:
        graph: what it consists of.
        preprocessing: how pictures become its input, or None if nobody said.
        costs: "paper" and "bitops", see :mod:`dfs.cost`.
        budget_curve: what :meth:`set_budget` can set, or None.

    Calls may come from several threads at once; on a GPU they run one after the other. A sample's
    result does not depend on what else is in its batch, nor on the number of threads
    (:func:`torch.get_num_threads`), nor on the device unless blocks run at 32 bits.
    """

    def __init__(
        self,
        graph: EngineGraph,
        tensors: dict[str, Tensor],
        extra: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.graph = graph
        self.extra = dict(extra or {})
        described = self.extra.get(_PREPROCESSING)
        self.preprocessing = None if described is None else Preprocessing.from_dict(described)
        _check_fits(self.preprocessing, graph)
        self.costs = {
            name: Cost.from_dict(values, graph.gated_blocks, len(graph.choices))
            for name, values in dict(self.extra.get(_COSTS, {})).items()
        }
        self._image_shape = (graph.architecture.in_channels, *graph.image_size)
        self._tensors = tensors
        self._executor = self._make_executor(device)
        stored = self.extra.get(_BUDGET)
        self.budget_curve = None if stored is None else BudgetCurve.from_json(stored)
        self._choice_bias: Tensor | None = None

    def _make_executor(self, device: torch.device | str) -> Executor:
        values = _pixel_values(self.preprocessing)
        return make_executor(self.graph, self._tensors, values, device)

    @property
    def device(self) -> torch.device:
        """Where it runs, and where images and results are."""
        return self._executor.device

    def to(self, device: torch.device | str) -> Engine:
        """Run on a CPU or a CUDA GPU from now on; returns this engine. A budget that was set stays.

        On a GPU the network is recorded in CUDA graphs, one for each of a few batch sizes at its
        first use; a later call only copies images in and results out, and doesn't wait for the
        GPU. Results are those of the CPU, bit for bit, unless blocks run at 32 bits, whose sums
        depend on the backend.

        Raises:
            ValueError: the device is neither.
            DeviceError: there is no such GPU, or PyTorch is built without CUDA.
        """
        self._executor = self._make_executor(device)
        return self

    @property
    def choices(self) -> tuple[int, ...]:
        return self.graph.choices

    @property
    def gated_blocks(self) -> int:
        return self.graph.gated_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, scales and gates, as they are saved."""
        return sum(value.numel() * value.element_size() for value in self._tensors.values())

    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held for running, re-tiled for this machine."""
        return self._executor.weight_bytes()

    def __call__(self, images: Tensor, policy: Policy = None) -> EngineOutput:
        """Classify images.

        Args:
            images: float32 (N, C, H, W) of any strides, on :attr:`device`; or uint8 pixels of that
                shape, looked up in a table of :meth:`Preprocessing.normalize` of all 256 levels, so
                that results are those of the normalized floats, bit for bit.
            policy: None asks the gates; an int out of the choices runs every gated block at that
                width; an integer tensor (N, gated blocks) gives every decision. One that is on a
                GPU isn't looked at: a value that is no choice makes its sample's logits NaN and
                its decisions 0. (DFS_DEBUG=1 refuses it.)

        Raises:
            TypeError, ValueError: naming the argument.
        """
        executor = self._executor
        arguments = self._arguments(images, policy, executor.device)
        return _output(executor.run(*arguments, self._choice_bias))

    def set_budget(self, cost: float | None) -> None:
        """Move the mean cost of the decisions; None goes back to those that were trained.

        Args:
            cost: mean over images and gated blocks of (bits/32)^2, as it was on the images of
                :meth:`calibrate_budget`.

        Raises:
            ValueError: the engine was not calibrated, or the cost can't be attained.
        """
        if cost is None:
            self._choice_bias = None
            return
        if self.budget_curve is None:
            raise ValueError("the engine has no budget curve; call calibrate_budget(images) first")
        self._choice_bias = self._tilted(self.budget_curve.tilt_for(cost))

    def calibrate_budget(
        self, images: Tensor, labels: Tensor | None = None, points: int = 9
    ) -> BudgetCurve:
        """Measure what budgets can be set, and keep it for :meth:`set_budget` and :meth:`save`.

        Args:
            images: some hundreds that the network was not trained on.
            labels: integers (N,), for the accuracy at each budget.
            points: how many settings to keep, at least two.

        Raises:
            ValueError: naming the argument; or the gates' biases change nothing.
        """
        executor = self._executor
        checked, _ = self._arguments(images, None, executor.device)
        if len(checked) == 0:
            raise ValueError("images must not be empty")
        if labels is not None and tuple(labels.shape) != (len(checked),):
            raise ValueError(f"labels must be ({len(checked)},), got {tuple(labels.shape)}")
        if points < 2:
            raise ValueError(f"points must be at least 2, got {points}")

        def run(tilt: float, some: Tensor) -> tuple[Tensor, Tensor]:
            found = _output(executor.run(some, None, self._tilted(tilt)))
            # It is timed, so it has to wait for a GPU.
            return found.logits.cpu(), found.cost.cpu()

        known = None if labels is None else labels.cpu()
        self.budget_curve = measure_curve(run, checked, known, points)
        self.extra[_BUDGET] = self.budget_curve.to_json()
        return self.budget_curve

    def _tilted(self, tilt: float) -> Tensor:
        return tilted_bias(self._tensors["gate.choice_bias"], self.choices, tilt)

    def timed(self, images: Tensor, policy: Policy = None) -> TimedOutput:
        """A call like any other that takes the time of its parts: on a CPU, on one thread.

        On a GPU the kernels are launched one by one, gates apart from blocks, and CUDA events take
        the time.
        """
        executor = self._executor
        arguments = self._arguments(images, policy, executor.device)
        found = executor.run(*arguments, self._choice_bias, timed=True)
        assert found.block_times is not None
        assert found.gate_times is not None
        return TimedOutput(_output(found), found.block_times, found.gate_times)

    def profile(self, images: Tensor, policy: Policy = None, rounds: int = 5) -> list[BlockTime]:
        """Milliseconds of every block for a batch, by :meth:`timed`: the median of ``rounds``."""
        if rounds < 1:
            raise ValueError(f"rounds must be positive, got {rounds}")
        self.timed(images, policy)
        runs = [self.timed(images, policy) for _ in range(rounds)]
        blocks = torch.stack([r.block_nanoseconds for r in runs]).median(0).values / 1e6
        gates = torch.stack([r.gate_nanoseconds for r in runs]).median(0).values / 1e6
        total = float(blocks.sum() + gates.sum())
        count = len(self.graph.architecture.blocks)
        names = ["stem", *(f"block {i}" for i in range(count)), "classifier"]
        # The first block has no gate.
        own = [0.0, 0.0, *gates.tolist(), 0.0]
        return [
            BlockTime(name, time, gate, (time + gate) / total)
            for name, time, gate in zip(names, blocks.tolist(), own, strict=True)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the engine into one file, for :func:`load_engine`."""
        save_graph(path, self.graph, self._tensors, self.extra)

    def _arguments(
        self, images: Tensor, policy: Policy, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        shape = self._image_shape
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        if images.dtype not in (torch.float32, torch.uint8):
            raise TypeError(f"images must be float32 or uint8, got {images.dtype}")
        if images.dim() != 4 or images.shape[1:] != shape:
            raise ValueError(f"images must be (N, {shape}), got {tuple(images.shape)}")
        if images.device != device:
            place = "the CPU" if device.type == "cpu" else device
            raise ValueError(f"images must be on {place}, got {images.device}")
        if images.dtype == torch.uint8 and self.preprocessing is None:
            raise ValueError("images are uint8, but the engine was frozen without a preprocessing")
        if images.requires_grad:
            images = images.detach()
        return images, self._policy(policy, images.shape[0], device)

    def _policy(self, policy: Policy, batch: int, device: torch.device) -> Tensor | None:
        if policy is None:
            return None
        expected = (batch, self.gated_blocks)
        if not isinstance(policy, Tensor):
            if isinstance(policy, bool) or not isinstance(policy, int):
                raise TypeError(f"policy must be None, an int or a tensor, got {policy!r}")
            if policy not in self.choices:
                raise ValueError(f"policy is {policy}, which is not one of {self.choices}")
            return torch.full(expected, policy, dtype=torch.int32, device=device)
        if policy.is_floating_point() or policy.dtype == torch.bool:
            raise TypeError(f"policy must be an integer tensor, got {policy.dtype}")
        if tuple(policy.shape) != expected:
            raise ValueError(f"policy must have shape {expected}, got {tuple(policy.shape)}")
        if "cpu" not in (policy.device.type, device.type) and not is_debugging():
            # What would wrap around to a choice must stay none.
            return policy.to(torch.int64).clamp(-1, 64).to(device, torch.int32)
        wrong = ~torch.isin(policy.cpu(), torch.tensor(self.choices))
        if bool(wrong.any()):
            sample, block = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"policy[{sample}, {block}] is {int(policy[sample, block])}, "
                f"which is not one of {self.choices}"
            )
        return policy.to(device, torch.int32, non_blocking=device.type != "cpu").contiguous()


def _check_fits(preprocessing: Preprocessing | None, graph: EngineGraph) -> None:
    if preprocessing is None:
        return
    size, shape = (preprocessing.size, preprocessing.size), graph.architecture
    for name, got, expected in (
        ("size", size, graph.image_size),
        ("channels", preprocessing.channels, shape.in_channels),
        ("classes", preprocessing.classes, shape.num_classes),
    ):
        if got != expected:
            raise ValueError(f"preprocessing is for {name} {got}, the network for {expected}")


def _pixel_values(preprocessing: Preprocessing | None) -> Tensor | None:
    """What each pixel level stands for, float32 (C, 256)."""
    if preprocessing is None:
        return None
    levels = torch.arange(256, dtype=torch.uint8).repeat(1, preprocessing.channels, 1, 1)
    values = preprocessing.normalize(levels)[0, :, 0].contiguous()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("preprocessing makes pixels into values that are not finite")
    return values


def _output(found: EngineRun) -> EngineOutput:
    return EngineOutput(found.logits, found.bits, found.cost)


def freeze(
    model: DynamicResNet,
    image_size: Sequence[int] = (32, 32),
    preprocessing: Preprocessing | None = None,
) -> Engine:
    """A trained network as one that only runs: BatchNorm folded per width, weights packed.

    Args:
        model: in evaluation mode; it is copied and not changed.
        image_size: (H, W) of the images it will be given.
        preprocessing: how pictures become its input; travels along, and lets it take pixels.

    Raises:
        ValueError: naming what can't be frozen.
    """
    if not isinstance(model, DynamicResNet):
        raise TypeError(f"model must be a DynamicResNet, got {type(model).__name__}")
    if len(image_size) != 2:
        raise ValueError(f"image_size must be (H, W), got {tuple(image_size)}")
    size = (int(image_size[0]), int(image_size[1]))
    graph, tensors = freeze_network(model, size)
    extra: dict[str, Any] = {
        _COSTS: {cost.name: cost.to_dict() for cost in (PaperCost(model), BitOps(model, size))}
    }
    if preprocessing is not None:
        extra[_PREPROCESSING] = preprocessing.to_dict()
    return Engine(graph, tensors, extra)


def load_engine(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Engine:
    """The engine that :meth:`Engine.save` wrote. Runs no code from the file.

    Args:
        device: see :meth:`Engine.to`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no engine file, of another version, or damaged; or there is no such kind
            of device.
        DeviceError: there is no such GPU, or PyTorch is built without CUDA.
    """
    target = check_device(device)
    graph, tensors, extra = load_graph(path)
    try:
        return Engine(graph, tensors, extra, target)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} is not a usable engine: {error}") from None
