"""Training with ``torchrun``: processes that each take a part of every batch.

The curve is that of one process on the whole batch, up to rounding. For that

- every process takes its slice of the batch that one process would take, and of the random numbers
  (:mod:`dfs.nn.replicas`);
- BatchNorm statistics, each width's too, are those of the whole batch;
- gradients are averaged. Those of learned steps carry a factor 1/sqrt(n), n being the elements that
  share a step, so that a slice's is put right before (:func:`correct_step_gradients`);
- evaluation, calibration and the estimation of statistics are done by every process alike.

Only the first process writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfs.data import ImageSet
from dfs.models import DynamicResNet
from dfs.nn import LSQ, DFSConv2d, StreamQuantizer, replicas


def choose_device(name: str) -> torch.device:
    """The device that a name means: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one.

    Under torchrun "cuda" is the GPU of this process's local rank.

    Raises:
        ValueError: an unknown name, or there is no such GPU.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (
        number and not (kind == "cuda" and number.isdigit())
    ):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and not count):
        return torch.device("cpu")
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise ValueError(f"device: there is no cuda:{index}, PyTorch sees {count} GPUs")
    return torch.device("cuda", index)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did.

    Args:
        device: of this process; on GPUs they talk through nccl, else through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_part(batch: ImageSet) -> ImageSet:
    """This process's slice of a batch.

    Raises:
        ValueError: the batch can't be shared out evenly.
    """
    if not replicas.active():
        return batch
    count = replicas.count()
    if len(batch) % count:
        raise ValueError(
            f"batch_size: {len(batch)} images can't be shared out evenly to {count} processes"
        )
    own = len(batch) // count
    return batch.take(torch.arange(replicas.rank() * own, (replicas.rank() + 1) * own))


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replace the gradients of an optimizer's parameters by their means over the processes."""
    if not replicas.active():
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    present = replicas.total(torch.tensor([p.grad is not None for p in parameters]).int())
    used = [p for p, n in zip(parameters, present.tolist(), strict=True) if n]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
    if not used:
        return
    flat = replicas.total(torch.cat([g.flatten() for g in grads])) / replicas.count()
    for parameter, mean in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = mean.view_as(parameter).clone()


def mean_values(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """What was measured on the slices, averaged; a GPU is waited for once."""
    waiting = {name: v.double() for name, v in values.items() if isinstance(v, Tensor)}
    arrived = torch.stack(list(waiting.values())).tolist() if waiting else []
    plain = {n: v for n, v in values.items() if not isinstance(v, Tensor)}
    found = plain | dict(zip(waiting, arrived, strict=True))
    ordered = {name: float(found[name]) for name in values}
    if replicas.count() == 1 or not values:
        return ordered
    with replicas.sharded():
        total = replicas.total(torch.tensor(list(ordered.values()), dtype=torch.float64))
    return dict(zip(ordered, (total / replicas.count()).tolist(), strict=True))


def any_process(flag: bool) -> bool:
    """Whether any process says so; all must ask."""
    if replicas.count() == 1:
        return flag
    with replicas.sharded():
        return bool(replicas.total(torch.tensor(int(flag))))


def correct_step_gradients(model: DynamicResNet) -> None:
    """Make the gradients of learned steps add up to what one process would get.

    LSQ scales a step's gradient by 1/sqrt(n) with n the elements that share it (Esser et al., ICLR
    2020). A slice knows its own n only: its gradient counts sqrt(n_slice / n) times.
    """
    for module in model.modules():
        if isinstance(module, DFSConv2d) and isinstance(module.quantizer, LSQ):
            _correct_input_step(module)
    for stream in model.streams:
        assert isinstance(stream, StreamQuantizer)
        stream.step.register_hook(_by_slices)


def _by_slices(grad: Tensor) -> Tensor:
    return grad * replicas.count() ** -0.5 if replicas.active() else grad


def _correct_input_step(conv: DFSConv2d) -> None:
    shares = [torch.ones(len(conv.bit_options))]
    assert isinstance(conv.quantizer, LSQ)
    step = conv.quantizer.input_step

    def count_samples(module: nn.Module, args: tuple[Tensor, int | Tensor | None]) -> None:
        learning = torch.is_grad_enabled() and step.requires_grad
        if not (replicas.active() and learning) or len(args) < 2 or args[1] is None:
            return
        bits = torch.as_tensor(args[1]).expand(args[0].shape[0])
        own = torch.stack([(bits == width).sum() for width in conv.bit_options]).double()
        shares[0] = (own / replicas.total(own.clone()).clamp_min(1)).sqrt()

    def correct(grad: Tensor) -> Tensor:
        return grad * shares[0].to(grad) if replicas.active() else grad

    conv.register_forward_pre_hook(count_samples)  # type: ignore[arg-type]
    step.register_hook(correct)
