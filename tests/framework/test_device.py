"""Training on a GPU: what can be seen of it without one, and what needs one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dfs.data import DataSplits
from dfs.nn import PerWidthBatchNorm2d
from dfs.train import TrainConfig, Trainer, evaluate
from dfs.train.distributed import choose_device, mean_values
from dfs.train.stages import float_precision
from tests.framework.helpers import TINY, TINY_PAPER, equal_content, tiny_data

_FACTORIES = {
    *(torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.rand, torch.randn),
    *(torch.randint, torch.eye, torch.linspace, torch.randperm),
}


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return tiny_data()


class _NamedDevices(TorchFunctionMode):
    """Refuses to make a tensor without saying where, and training code that looks at values.

    What the layers below look at on a CPU, to check it, they leave alone on a GPU.

    Attributes:
        looks: how often a whole tensor was taken to the host, which is counted instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in _FACTORIES and "device" not in kwargs and "generator" not in kwargs:
            raise AssertionError(f"{func.__name__} names no device")
        caller = Path(sys._getframe(1).f_code.co_filename).parent.name
        if caller in ("train", Path(__file__).parent.name):
            self.looks += func is Tensor.tolist
            if func in (Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__):
                raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **kwargs)


@pytest.mark.parametrize("config", [TINY, TINY_PAPER], ids=["dfs", "paper"])
def test_steps_name_their_device_and_do_not_wait_for_it(
    config: TrainConfig, data: DataSplits
) -> None:
    trainer = Trainer(config, None, data)
    trainer.check_target = lambda: None  # type: ignore[method-assign]
    for index, kind in enumerate(trainer.stages):
        trainer.run(index)
        if not kind.sharded:
            continue
        stage = trainer._current()
        stage.take(0)
        batch = stage.batch(1), stage.gate_batch(1)
        stage.batch = lambda step, batch=batch: batch[0]  # type: ignore[method-assign,misc]
        stage.gate_batch = lambda step, batch=batch: batch[1]  # type: ignore[method-assign,misc]
        mode = _NamedDevices()
        with mode:
            stage.take(2)
        assert mode.looks == (kind.name in ("S3 gate", "S4 joint")), kind.name
        trainer._stage = None


def test_waiting_and_homeless_tensors_would_be_found() -> None:
    with pytest.raises(AssertionError, match="zeros names no device"), _NamedDevices():
        torch.zeros(3)
    with pytest.raises(AssertionError, match="item waits"), _NamedDevices():
        torch.zeros(1, device="cpu").item()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batchnorm_by_mask_is_that_by_rows(shared: bool, training: bool) -> None:
    torch.manual_seed(0)
    norms = [PerWidthBatchNorm2d(5, (2, 4, 8), min_samples=3, shared=shared) for _ in range(2)]
    for norm in norms:
        torch.manual_seed(1)
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        norm.train(training)
    # 4 bits have too few samples for statistics of their own, unless they are shared.
    bits = torch.tensor([0, 2, 2, 2, 4, 8, 8, 8, 8, 0, 2, 4], dtype=torch.int32)
    x = [torch.randn(12, 5, 4, 3).mul_(3).add_(2).requires_grad_() for _ in range(1)] * 2
    weight = torch.randn(12, 5, 4, 3)
    results = [norms[0](x[0], bits), norms[1]._normalize_by_mask(x[1], bits)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    grads = [
        torch.autograd.grad((y * weight).sum(), [x[0], norm.weight, norm.bias])
        for y, norm in zip(results, norms, strict=True)
    ]
    for by_mask, by_rows in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(by_mask, by_rows, rtol=1e-3, atol=1e-4)
    for name, value in norms[0].state_dict().items():
        torch.testing.assert_close(norms[1].state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="no cuda:0"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    for name in ("gpu", "cuda:x", "cpu:1"):
        with pytest.raises(ValueError, match="device must be"):
            choose_device(name)


def test_measured_values_come_in_the_order_of_the_step() -> None:
    found = mean_values({"a": torch.tensor(1.5), "b": 2, "c": torch.tensor(2.5).double()})
    assert list(found.items()) == [("a", 1.5), ("b", 2.0), ("c", 2.5)]
    assert all(type(v) is float for v in found.values())


def test_the_float_part_runs_in_bfloat16_where_its_images_are() -> None:
    config = replace(TINY, float_precision="bfloat16")
    assert float_precision(config, torch.device("cpu")).device == "cpu"
    assert not float_precision(TINY, torch.device("cpu"))._enabled


@pytest.fixture
def gpu_run(device: torch.device, data: DataSplits) -> Trainer:
    trainer = Trainer(TINY, None, data, device)
    trainer.run()
    return trainer


@pytest.mark.gpu
def test_a_run_on_a_gpu_meets_its_target_there(gpu_run: Trainer, device: torch.device) -> None:
    assert gpu_run.done
    for tensor in (*gpu_run.model.parameters(), *gpu_run.model.buffers()):
        assert tensor.device.type == device.type
    assert gpu_run.data.train.first(1).device.type == device.type
    found = evaluate(gpu_run.model, gpu_run.data.test)
    assert found.accuracy > 0.5
    assert found.bits is not None
    assert found.bits.device.type == "cpu"


@pytest.mark.gpu
def test_resuming_on_a_gpu_changes_no_bit(
    device: torch.device, data: DataSplits, tmp_path: Path
) -> None:
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        whole = Trainer(TINY, None, data, device)
        whole.run(2, max_steps=None)
        parts = Trainer(TINY, tmp_path, data, device)
        parts.run(2, max_steps=5)
        again = Trainer.load(tmp_path, data, device=device)
        again.run(2)
    finally:
        torch.backends.cudnn.deterministic = deterministic
    assert equal_content(whole.model.state_dict(), again.model.state_dict())
    assert equal_content(whole.plain.state_dict(), again.plain.state_dict())


@pytest.mark.gpu
def test_a_joint_step_does_not_wait_for_the_gpu(device: torch.device, data: DataSplits) -> None:
    trainer = Trainer(TINY, None, data, device)
    trainer.run(2)
    stage = trainer._current()
    for step in range(2):
        stage.take(step)
    if device.type != "cuda":
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage.take(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
