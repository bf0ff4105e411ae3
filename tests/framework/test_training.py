from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfs.cost import PaperCost
from dfs.data import DataSplits, ImageSet, Preprocessing, training_batch
from dfs.models import DynamicResNet
from dfs.nn import PerWidthBatchNorm2d, ResidualBlock
from dfs.train import StageError, TrainConfig, Trainer, evaluate
from dfs.train.calibrate import (
    CostTilt,
    best_input_step,
    best_weight_steps,
    calibrate_gate_bias,
    reestimate_batchnorm,
)
from dfs.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dfs.train.controller import CostController
from dfs.train.recipes import stages_of
from dfs.train.stages import distillation, diversity
from dfs.train.trainer import SHARED_STAGES
from dfs_kernels import reference
from tests.framework.helpers import TINY, equal_content, settled_model, tiny_data


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return tiny_data()


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _total_steps(data: DataSplits) -> int:
    trainer = Trainer(TINY, None, data)
    trainer.results["S0 float"] = {"val_accuracy": 0.0}
    return sum(stage(trainer).steps() for stage in stages_of(TINY))


# Resuming


@pytest.fixture(scope="module")
def straight(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    assert Trainer(TINY, folder, data).run()
    return folder


@pytest.mark.parametrize("every", [1, 5])
def test_stopping_and_resuming_changes_no_bit(
    every: int, data: DataSplits, straight: Path, tmp_path: Path
) -> None:
    trainer = Trainer(TINY, tmp_path, data)
    sessions = 1
    while not trainer.run(max_steps=every):
        trainer = Trainer.load(tmp_path, data)
        sessions += 1
    assert sessions > _total_steps(data) // every - 1
    assert equal_content(
        load_checkpoint(tmp_path / "checkpoint.pt"), load_checkpoint(straight / "checkpoint.pt")
    )
    assert _lines(tmp_path) == _lines(straight)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    data: DataSplits, straight: Path, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    def die_in_joint_stage(stage: str, step: int, total: int, measured: dict[str, float]) -> None:
        if stage == "S4 joint" and step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        Trainer(TINY, tmp_path, data).run(progress=die_in_joint_stage, checkpoint_every=3)
    resumed = Trainer.load(tmp_path, data)
    assert (resumed.stage_index, resumed.step) == (4, 3)
    assert resumed.run()
    assert equal_content(
        load_checkpoint(tmp_path / "checkpoint.pt"), load_checkpoint(straight / "checkpoint.pt")
    )
    assert _lines(tmp_path) == _lines(straight)


@pytest.mark.slow
def test_killing_at_random_moments_changes_nothing_and_costs_little() -> None:
    command = [sys.executable, "-m", "tests.framework.kill_and_resume", "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (disturbed,) = found["disturbed"]
    assert disturbed["killed"] == 3
    assert disturbed["same"]
    assert found["steps"] <= disturbed["steps"] <= 1.2 * found["steps"]


def test_a_full_disk_leaves_the_last_checkpoint(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(TINY, tmp_path, data)
    trainer.run(max_steps=3)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            trainer.run(max_steps=3)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not [f.name for f in tmp_path.iterdir() if f.name.startswith(".")]
    resumed = Trainer.load(tmp_path, data)
    assert (resumed.stage_index, resumed.step) == (0, 3)
    assert resumed.run(max_steps=1) is False
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 4]


def test_a_seed_decides_everything(data: DataSplits, straight: Path, tmp_path: Path) -> None:
    other = Trainer(replace(TINY, seed=1), tmp_path, data)
    other.run()
    first = load_checkpoint(straight / "checkpoint.pt")["model"]
    assert not equal_content(first, other.model.state_dict())


def test_forks_share_what_came_before_them(data: DataSplits, straight: Path) -> None:
    shared = Trainer(TINY, None, data)
    assert shared.run(SHARED_STAGES)
    fork = shared.fork(TINY)
    assert fork.run()
    assert equal_content(
        fork.model.state_dict(), load_checkpoint(straight / "checkpoint.pt")["model"]
    )
    with pytest.raises(ValueError, match="forked"):
        fork.fork(TINY)


def test_a_finished_run_meets_its_target(data: DataSplits, straight: Path) -> None:
    trainer = Trainer.load(straight, data)
    assert trainer.done
    result = evaluate(trainer.model, data.val)
    assert trainer.results["S5 settle"]["val_cost"] == pytest.approx(result.paper_cost)
    assert result.paper_cost == pytest.approx(TINY.target, rel=0.2)


def test_a_missed_target_is_said_and_fails(data: DataSplits, straight: Path) -> None:
    trainer = Trainer.load(straight, data)
    trainer.config = replace(TINY, cost_tolerance=1e-9)
    trainer.stage_index, trainer.step = 5, 0
    with pytest.raises(StageError, match=r"validation cost is .* off the target"):
        trainer.run()


def test_a_width_that_lost_too_much_stops_the_run(data: DataSplits) -> None:
    config = replace(TINY, exit_points=((2, -200.0),))
    with pytest.raises(StageError, match="at 2 bits the validation accuracy"):
        Trainer(config, None, data).run(SHARED_STAGES)


# Checkpoints


def test_damaged_and_foreign_checkpoints_are_refused(straight: Path, tmp_path: Path) -> None:
    content = (straight / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Trainer.load(tmp_path)
    for damaged in (content[: len(content) // 2], content[:100], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            Trainer.load(tmp_path)
        assert path.read_bytes() == damaged
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        Trainer.load(tmp_path)


def test_a_checkpoint_of_another_version_or_architecture_is_refused(
    data: DataSplits, straight: Path, tmp_path: Path
) -> None:
    content = load_checkpoint(straight / "checkpoint.pt")
    path = tmp_path / "checkpoint.pt"
    torch.save({**content, "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99"):
        Trainer.load(tmp_path, data)
    save_checkpoint(path, {**content, "config": {**content["config"], "model": "resnet14"}})
    with pytest.raises(CheckpointError, match="is missing; was it another architecture"):
        Trainer.load(tmp_path, data)
    save_checkpoint(path, {**content, "config": {**content["config"], "choices": (0, 2, 8)}})
    with pytest.raises(CheckpointError, match="has shape"):
        Trainer.load(tmp_path, data)
    save_checkpoint(path, {**content, "config": {**content["config"], "colour": "blue"}})
    with pytest.raises(ValueError, match="colour"):
        Trainer.load(tmp_path, data)
    fewer = {
        k: v for k, v in content["model"].items() if k != "blocks.1.conv1.quantizer.input_step"
    }
    save_checkpoint(path, {**content, "model": fewer})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.conv1\.quantizer\.input_step"):
        Trainer.load(tmp_path, data)


def test_a_run_does_not_go_on_with_other_data(data: DataSplits, straight: Path) -> None:
    record = Preprocessing(8, 8, (0.0,), (1.0,), ("a", "b", "c", "d"))
    with pytest.raises(CheckpointError, match="began with data of another size"):
        Trainer.load(straight, replace(data, preprocessing=record))
    with pytest.raises(CheckpointError, match="began with data of another name"):
        Trainer.load(straight, replace(data, name="others"))


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": lambda: None})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Calibration


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_calibrated_input_step_has_the_least_error(bits: int) -> None:
    torch.manual_seed(bits)
    values = torch.relu(torch.randn(4000))
    zero = torch.tensor(0, dtype=torch.int32)

    def error(step: float) -> float:
        s = torch.tensor(step)
        codes = reference.quantize_activation(values, bits, s, zero)
        return float((reference.dequantize_activation(codes, s, zero) - values).square().sum())

    best = best_input_step(values, bits, 0)
    assert error(best) <= min(error(best * f) for f in (0.5, 0.7, 1.5, 2.0))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_calibrated_weight_steps_have_the_least_error_per_channel(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(6, 3, 3, 3) * torch.arange(1, 7).view(-1, 1, 1, 1)
    centred = bits == 2

    def errors(steps: Tensor) -> Tensor:
        codes = reference.quantize_weight(weight, bits, steps, centred)
        levels = reference.weight_levels(codes, centred).double()
        values = reference.dequantize_weight(levels, steps, centred)
        return (values - weight).square().flatten(1).sum(1)

    best = best_weight_steps(weight, bits)
    for factor in (0.5, 0.7, 1.5, 2.0):
        assert (errors(best) <= errors(best * factor)).all()


def _statistics(block: ResidualBlock, x: Tensor, bits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    y = block.conv1(x, bits)[bits == width].double()
    return y.mean((0, 2, 3)), y.var((0, 2, 3))


def test_batchnorm_is_estimated_from_what_each_width_sees() -> None:
    model = settled_model(depth=8)
    torch.manual_seed(3)
    batches = list(torch.randn(24, 3, 8, 8).split(8))
    kept = reestimate_batchnorm(model, batches, None, min_samples=1)
    model.train()
    for module in model.modules():
        if isinstance(module, PerWidthBatchNorm2d):
            module.eval()
    with torch.no_grad():
        stream = model.start(torch.cat(batches))
        assert isinstance(stream, Tensor)
        bits = model.decide(0, stream, None).bits
        block = model.blocks[1]
        assert isinstance(block, ResidualBlock)
        seen = set(bits.tolist()) - {0}
        assert seen
        for width in seen:
            mean, var = _statistics(block, stream, bits, width)
            index = block.bn1.bit_options.index(width)
            torch.testing.assert_close(
                block.bn1.running_mean[index].double(), mean, rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(
                block.bn1.running_var[index].double(), var, rtol=1e-4, atol=1e-4
            )
    unseen = {2, 4, 8} - seen
    assert {k.width for k in kept if k.block == 1} == unseen


def test_batchnorm_that_sees_too_few_samples_keeps_what_it_had() -> None:
    model = settled_model(depth=8)
    before = model.blocks[1].bn1.running_mean.clone()
    kept = reestimate_batchnorm(model, [torch.randn(8, 3, 8, 8)], None, min_samples=9)
    assert torch.equal(model.blocks[1].bn1.running_mean, before)
    assert {(k.block, k.width) for k in kept} == {(b, w) for b in (1, 2) for w in (2, 4, 8)}


@pytest.mark.parametrize("target", [0.01, 0.04])
def test_gate_bias_brings_hard_decisions_to_the_target(target: float) -> None:
    model = settled_model(depth=14)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.gate.proj.weight)
    images = torch.randn(128, 3, 8, 8)
    cost = PaperCost(model)
    labels = torch.zeros(len(images), dtype=torch.long)
    reached = calibrate_gate_bias(model, ImageSet(images, labels), cost, target, 32)
    with torch.no_grad():
        measured = float(cost(model.run(images).mask).double().mean())
    assert reached == pytest.approx(measured)
    assert reached == pytest.approx(target, rel=0.05)


def test_tilting_spares_skips_and_does_not_jump_to_full_precision() -> None:
    model = settled_model(depth=14, choices=(0, 2, 4, 8, 32))
    tilts = CostTilt(PaperCost(model), 0.02)
    # 8 bits cost 6.25 %, which is near; 32 bits are far beyond.
    torch.testing.assert_close(
        tilts.bias(3.0), torch.tensor([0, -3 / 16, -3 / 4, -3, -48], dtype=torch.float64)
    )
    torch.testing.assert_close(
        tilts.bias(-3.0), torch.tensor([0, 0.75, 1.5, 3, 3], dtype=torch.float64)
    )
    for tilt in (-2.0, 0.0, 0.5):
        assert tilts.of(tilts.bias(tilt)) == tilt


def test_a_constant_gate_is_held_within_the_target() -> None:
    torch.manual_seed(0)
    model = settled_model(depth=14, gate="constant")
    torch.nn.init.normal_(model.gate.logits)
    images = ImageSet(torch.randn(16, 3, 8, 8), torch.zeros(16, dtype=torch.long))
    cost = PaperCost(model)
    for target in (0.001, 0.01, 0.02, 0.04):
        reached = calibrate_gate_bias(model, images, cost, target, 16)
        assert reached <= target
    # A block more at 8 bits would be beyond.
    assert reached > 0.04 - (8 / 32) ** 2 / model.gated_blocks


# Pieces of the loss


def test_controller_rises_above_the_target_and_falls_below_it() -> None:
    controller = CostController(0.01, 1.0)
    controller.update(0.02, 1.0)
    assert controller.weight == pytest.approx(1.01)
    controller = CostController(0.01, 1.0)
    controller.update(0.005, 1.0)
    assert controller.weight == pytest.approx(0.995)
    for _ in range(10000):
        controller.update(1.0, 1.0)
    assert controller.weight == 5.0
    for _ in range(10000):
        controller.update(0.0, 1.0)
    assert controller.weight == 0.0


def test_target_falls_geometrically_over_the_first_half() -> None:
    controller = CostController(0.01, 0.0)
    targets = [controller.target_at(p) for p in (0.0, 0.25, 0.5, 1.0)]
    assert targets == pytest.approx([0.02, 0.01 * 2**0.5, 0.01, 0.01])


def test_diversity_is_zero_for_equal_and_largest_for_opposite_decisions() -> None:
    same = torch.tensor([[[9.0, -9.0]], [[9.0, -9.0]]])
    opposite = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])
    assert float(diversity(same)) == pytest.approx(0.0, abs=1e-6)
    assert float(diversity(opposite)) == pytest.approx(0.6931, abs=1e-3)


def test_distillation_of_the_teacher_by_itself_is_zero() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 10)
    assert float(distillation(logits, logits, 4.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(distillation(logits + torch.randn(5, 10), logits, 4.0)) > 0.1


# Data order


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    images = torch.arange(12.0).view(-1, 1, 1, 1)
    subset = ImageSet(images, torch.arange(12))
    data = DataSplits("d", 12, subset, subset, subset, subset, shift=0, flip=False)
    epochs = []
    for epoch in range(3):
        labels = [training_batch(data, subset, 4, 0, 3 * epoch + i).labels for i in range(3)]
        epochs.append(torch.cat(labels).tolist())
    assert all(sorted(order) == list(range(12)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3


def test_shifting_moves_an_image_by_whole_pixels() -> None:
    image = torch.zeros(1, 1, 7, 7)
    image[..., 3, 3] = 1
    images = ImageSet(image.repeat(200, 1, 1, 1), torch.zeros(200, dtype=torch.long))
    data = DataSplits("d", 1, images, images, images, images, shift=2, flip=False)
    batch = training_batch(data, images, 200, 0, 0)
    places = {tuple(i[0].nonzero()[0].tolist()) for i in batch.images}
    assert batch.images.sum().item() == 200
    assert places == {(r, c) for r in range(1, 6) for c in range(1, 6)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": 0.0}, "target"),
        ({"target": 2.0}, "target"),
        ({"batch_size": 1}, "batch_size"),
        ({"choices": (0,)}, "besides 0"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_the_networks_of_a_run_have_the_data_sets_shape(data: DataSplits) -> None:
    trainer = Trainer(TINY, None, data)
    assert isinstance(trainer.model, DynamicResNet)
    assert trainer.model.in_channels == 1
    assert trainer.model.num_classes == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stage", 99),
        ("stage", -1),
        ("step", "a"),
        ("step", -5),
        ("metrics_size", -5),
        ("model", None),
        ("config", "abc"),
        ("results", 3),
    ],
)
def test_a_checkpoint_with_a_wrong_entry_is_refused(
    name: str, value: Any, data: DataSplits, straight: Path, tmp_path: Path
) -> None:
    content = load_checkpoint(straight / "checkpoint.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", {**content, name: value})
    with pytest.raises(CheckpointError):
        Trainer.load(tmp_path, data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cost", "joules"),
        ("float_lr", float("nan")),
        ("target", float("nan")),
        ("gate_every", 0),
        ("explore", 5.0),
        ("float_epochs", -3),
        ("float_epochs", 1.5),
        ("seed", 1 << 70),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        replace(TINY, **{name: value})
