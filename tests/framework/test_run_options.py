"""Settings, presets, recipes, records and plans: what a run is told and what it keeps."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dfs.data import DataError, DataSplits, ImageSet
from dfs.latency import LatencyTable, part_names
from dfs.progress import format_duration
from dfs.settings import configure, contradictions, parse_settings
from dfs.train import TrainConfig, Trainer
from dfs.train.oracle import best_mix, permuted_accuracies, uniform_oracle
from dfs.train.plan import TimePlan
from dfs.train.presets import load_preset, preset_names, to_toml
from dfs.train.recipes import settings_of, stages_of
from dfs.train.stages import Stage, accumulate, decay
from tests.framework import data_files
from tests.framework.helpers import TINY, TINY_PAPER, equal_content, settled_model, tiny_data


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return tiny_data()


# Presets and settings


def test_every_preset_is_a_readable_file() -> None:
    assert set(preset_names()) == {"default", "digits", "fast", "paper"}
    assert load_preset("default").choices == (0, 2, 4, 8, 32)
    assert load_preset("fast").choices == (0, 2, 4, 8)
    paper = load_preset("paper")
    assert (paper.recipe, paper.semantics, paper.stream) == ("paper", "paper", "float32")
    assert paper.choices == (0, 8, 10, 12, 14, 16, 32)
    assert load_preset("digits").dataset == "digits"


def test_a_preset_knows_what_differs_on_a_data_set() -> None:
    assert load_preset("default").model == "resnet38"
    digits = load_preset("default", "digits")
    assert (digits.dataset, digits.model) == ("digits", "resnet14")
    assert digits.choices == (0, 2, 4, 8, 32)
    assert load_preset("default", "cifar100") == replace(load_preset("default"), dataset="cifar100")


def test_a_runs_settings_are_a_preset_again(tmp_path: Path) -> None:
    config = replace(TINY, target=0.0123, exit_points=((2, 4.5),), float_lr=1e-5)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config.to_dict()))
    assert load_preset(str(path)) == config


def test_a_wrong_preset_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(ValueError, match=r"digits, fast, paper.*mine\.toml"):
        load_preset(str(path))
    for text, message in (("speed = 9", "speed"), ("target = 3", "target"), ("a =", "mine")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_preset(str(path))


def test_settings_replace_what_a_preset_says() -> None:
    texts = [
        "target=0.01",
        "choices=0,8",
        "milestones=0.3,0.6",
        "exit_points=8:1.5",
        "gate=constant",
    ]
    config = configure("fast", {"seed": 3, "target": 0.5}, texts)
    assert config == replace(
        load_preset("fast"),
        seed=3,
        target=0.01,
        choices=(0, 8),
        milestones=(0.3, 0.6),
        exit_points=((8, 1.5),),
        gate="constant",
    )
    assert configure(None, {}, []).dataset == "digits"
    assert configure(None, {"dataset": "cifar10"}, []) == load_preset("fast", "cifar10")


def test_every_setting_can_be_set() -> None:
    for name, value in TrainConfig().to_dict().items():
        if name == "exit_points":
            text = ",".join(f"{width}:{points}" for width, points in value)
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert parse_settings([f"{name}={text}"]) == {name: value}


def test_contradictions_are_told_by_name() -> None:
    config = load_preset("digits")
    assert contradictions(config, "digits", {"target": 0.04, "seed": 0}, ["gate_epochs=80"]) == []
    found = contradictions(config, None, {"target": 0.02}, ["gate_lr=0.5"])
    assert found == [
        "target=0.02, but the run has 0.04",
        "gate_lr=0.5, but the run has 0.01",
    ]
    assert any("preset fast: gate_epochs=60" in f for f in contradictions(config, "fast", {}, []))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate": "wooden"}, "gate"),
        ({"recipe": "soup"}, "recipe"),
        ({"schedule": "random"}, "schedule"),
        ({"float_precision": "int3"}, "float_precision"),
        ({"milestones": (0.7, 0.3)}, "milestones"),
        ({"milestones": (1.5,)}, "milestones"),
        ({"recipe": "static"}, "static_widths"),
        ({"static_widths": (2,)}, "static_widths"),
        ({"recipe": "static", "static_widths": (16,)}, "static_widths"),
        ({"recipe": "static", "static_widths": (2, 32)}, "static_widths"),
        ({"cost": "latency"}, "latency_table"),
        ({"latency_table": "a.json"}, "latency_table"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"steering": -1.0}, "steering"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **values)


def test_a_target_out_of_reach_says_the_range(data: DataSplits) -> None:
    trainer = Trainer(replace(TINY, target=0.5), None, data)
    with pytest.raises(ValueError, match=r"target 50\.000%.*0\.000% to 6\.250%"):
        trainer.run()
    assert trainer.step == 0
    trainer = Trainer(replace(TINY, choices=(2, 8), target=0.001), None, data)
    with pytest.raises(ValueError, match=r"0\.391% to 6\.250%"):
        trainer.run()


# Every setting has its effect


class _Watched:
    """A config that tells which of its settings are read."""

    def __init__(self, config: TrainConfig, seen: set[str]) -> None:
        self.__dict__.update(config=config, seen=seen)

    def __getattr__(self, name: str) -> Any:
        if name in TrainConfig.__dataclass_fields__:
            self.seen.add(name)
        return getattr(self.config, name)


@pytest.mark.parametrize("recipe", ["dfs", "static", "static32", "paper"])
def test_a_stage_declares_every_setting_that_it_reads(recipe: str, data: DataSplits) -> None:
    config = {
        "dfs": TINY,
        "static": replace(TINY, recipe="static", static_widths=(2, 8)),
        "static32": replace(TINY, recipe="static", static_widths=(32,)),
        "paper": TINY_PAPER,
    }[recipe]
    trainer = Trainer(config, None, data)
    trainer.check_target = lambda: None  # type: ignore[method-assign]
    declared: set[str] = set()
    for index, stage in enumerate(trainer.stages):
        seen: set[str] = set()
        trainer.config = _Watched(config, seen)  # type: ignore[assignment]
        trainer.run(index + 1)
        declared |= set(stage.settings)
        # The recipe and what the trainer asks itself are part of which stages there are.
        assert seen <= declared | {"recipe", "static_widths"}, stage.name


# Another value of every setting, and the first stage whose result it changes.
_EFFECTS: list[tuple[dict[str, Any], int]] = [
    ({"seed": 1}, 0),
    ({"batch_size": 8}, 0),
    ({"micro_batches": 2}, 0),
    ({"schedule": "step"}, 0),
    ({"schedule": "step", "milestones": (0.25,)}, 0),
    ({"schedule": "step", "schedule_gamma": 0.5}, 0),
    ({"weight_decay": 0.1}, 0),
    ({"float_epochs": 1}, 0),
    ({"float_lr": 0.01}, 0),
    ({"float_precision": "bfloat16"}, 0),
    ({"choices": (0, 2, 8)}, 1),
    ({"stream": "float32"}, 1),
    ({"calibration_images": 16}, 1),
    ({"switch_epochs": 2}, 2),
    ({"switch_lr": 0.001}, 2),
    ({"distill_temperature": 1.0}, 2),
    ({"batchnorm_images": 16}, 2),
    ({"gate": "feedforward"}, 3),
    ({"target": 0.01}, 3),
    ({"cost": "bitops"}, 3),
    ({"diversity": 0.0}, 3),
    ({"common_gradient": 1.0}, 3),
    ({"lambda_start": 2.0}, 3),
    ({"lambda_rate": 0.5}, 3),
    ({"gate_epochs": 3}, 3),
    ({"gate_lr": 0.1}, 3),
    ({"gumbel_start": 2.0}, 3),
    ({"gumbel_end": 0.5}, 3),
    ({"joint_epochs": 3}, 4),
    ({"joint_lr": 0.05}, 4),
    ({"joint_gate_lr": 0.1}, 4),
    ({"explore": 0.0}, 4),
    ({"gate_every": 1}, 4),
    ({"steering": 0.0}, 4),
    ({"settle_fraction": 0.5}, 5),
    ({"batchnorm_min_routed": 30}, 5),
]
# Tested by what they do: what data, where from, which network, which stages, when a run fails.
_TESTED_ELSEWHERE = {
    *("dataset", "data", "image_size", "train_images", "allow_unverified"),
    *("model", "semantics", "recipe"),
    *("static_widths", "teacher", "latency_table", "exit_points", "cost_tolerance", "beta"),
}


def test_every_setting_is_tested() -> None:
    tested = {name for values, _ in _EFFECTS for name in values}
    assert tested | _TESTED_ELSEWHERE == {f.name for f in fields(TrainConfig)}
    assert not tested & _TESTED_ELSEWHERE


def test_settings_of_the_data_decide_what_is_trained_on(tmp_path: Path) -> None:
    data_files.class_folders(tmp_path, {"ant": 25, "bee": 25, "cow": 25})
    config = replace(TINY, dataset="folder", data=str(tmp_path))
    default = Trainer(config)
    small = Trainer(replace(config, image_size=16))
    assert default.data.image_size != small.data.image_size == (16, 16)
    assert small.data.train.first(2).shape == (2, 3, 16, 16)
    few = Trainer(replace(config, image_size=16, train_images=20))
    assert (len(few.data.train), len(few.data.gate)) == (18, 2)
    assert len(few.data.val) == len(small.data.val)
    assert len(few.data.train) < len(small.data.train)
    assert few.stages[0].length(few.config, few.data) < small.stages[0].length(
        small.config, small.data
    )


def test_unverified_data_must_be_allowed_by_name(tmp_path: Path) -> None:
    data_files.write(tmp_path, data_files.cifar10_binary())
    config = replace(TINY, dataset="cifar10", data=str(tmp_path))
    with pytest.raises(DataError, match="data_batch_1"):
        Trainer(config)
    allowed = Trainer(replace(config, allow_unverified=("cifar10",)))
    assert len(allowed.data.record()["unverified"]) == 6


def test_settings_of_the_network_decide_what_is_built(data: DataSplits) -> None:
    assert Trainer(replace(TINY, model="resnet14"), None, data).model.gated_blocks == 5
    semantics = Trainer(TINY_PAPER, None, data).model.semantics
    assert (semantics.quantizer, semantics.paper_skipping) == ("paper", True)
    assert not Trainer(TINY, None, data).model.semantics.paper_skipping


def test_beta_weighs_the_cost_in_the_papers_loss(data: DataSplits) -> None:
    weights = []
    for beta in (0.0, 0.5):
        trainer = Trainer(replace(TINY_PAPER, beta=beta, gate_epochs=1), None, data)
        trainer.run(2)
        weights.append(trainer.model.gate.state_dict())
    assert not equal_content(*weights)


@pytest.fixture(scope="module")
def beginnings(data: DataSplits) -> list[Trainer]:
    """Runs of the usual settings, at the beginning of each stage and at the end."""
    trainer = Trainer(TINY, None, data)
    kept = []
    for index in range(len(trainer.stages) + 1):
        trainer.run(index)
        kept.append(_copy(trainer, TINY))
    return kept


def _copy(trainer: Trainer, config: TrainConfig) -> Trainer:
    other = Trainer(config, None, trainer.data)
    other.plain.load_state_dict(trainer.plain.state_dict())
    if trainer.stage_index > 1:
        state = trainer.model.state_dict()
        ungated = {k: v for k, v in state.items() if not k.startswith("gate.")}
        same_gate = trainer.config.gate == config.gate
        own = {k: v for k, v in other.model.state_dict().items() if k.startswith("gate.")}
        other.model.load_state_dict(state if same_gate else {**ungated, **own})
    other.stage_index, other.results = trainer.stage_index, dict(trainer.results)
    return other


def test_a_latency_table_decides_what_the_gates_pay_for(
    beginnings: list[Trainer], tmp_path: Path
) -> None:
    model, size = beginnings[3].model, beginnings[3].data.image_size
    gates, costs = [], []
    for dearest in (2, 8):
        parts = part_names(model, size)
        prices = {0: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 32: 20.0} | {dearest: 10.0}
        entries = {(part, bits): ms for part in parts for bits, ms in prices.items()}
        path = tmp_path / f"{dearest}.json"
        LatencyTable(entries, "uint8", 4, 1).save(path)
        config = replace(TINY, cost="latency", latency_table=str(path))
        reach = Trainer(config, None, beginnings[3].data).cost.of_choices()
        costs.append(reach.tolist())
        target = float(reach.min() + reach.max()) / 2
        trainer = _copy(beginnings[3], replace(config, target=target))
        trainer.run(4)
        gates.append(trainer.model.gate.state_dict())
    choices = model.choices
    for dearest, of_choice in zip((2, 8), costs, strict=True):
        assert choices[of_choice.index(max(of_choice))] == dearest
    assert not equal_content(*gates)


@pytest.mark.parametrize(("values", "stage"), _EFFECTS, ids=lambda v: str(v))
def test_a_setting_changes_what_its_stage_comes_to(
    values: dict[str, Any], stage: int, beginnings: list[Trainer], data: DataSplits
) -> None:
    config = replace(TINY, **values)
    declared = stages_of(config)[stage].settings
    assert set(values) & set(declared)
    changed = _copy(beginnings[stage], config)
    changed.run(stage + 1)
    usual = beginnings[stage + 1]
    before = {**usual.plain.state_dict(prefix="plain."), **usual.model.state_dict()}
    after = {**changed.plain.state_dict(prefix="plain."), **changed.model.state_dict()}
    if stage == 0:
        before, after = usual.plain.state_dict(), changed.plain.state_dict()
    assert not equal_content(before, after)


def test_what_a_fork_shares_must_agree(beginnings: list[Trainer], data: DataSplits) -> None:
    floating = beginnings[1]
    assert floating.fork(replace(TINY, choices=(0, 8))).model.choices == (0, 8)
    with pytest.raises(ValueError, match=r"float_lr can't become 0\.5"):
        floating.fork(replace(TINY, float_lr=0.5))
    with pytest.raises(ValueError, match="choices can't become"):
        beginnings[3].fork(replace(TINY, choices=(0, 8)))
    constant = beginnings[3].fork(replace(TINY, gate="constant"))
    assert constant.stage_index == 3
    assert type(constant.model.gate).__name__ == "ConstantGate"
    assert settings_of(TINY, 1).keys() < settings_of(TINY, 3).keys()


@pytest.mark.parametrize("parts", [1, 3, 4, 20])
def test_micro_batches_add_up_to_the_batch(parts: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3)
    batch = ImageSet(torch.randn(10, 5), torch.randint(3, (10,)))

    def loss_of(part: ImageSet) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(linear(part.images), part.labels)

    expected = loss_of(batch)
    (gradient,) = torch.autograd.grad(expected, linear.weight)
    (loss,) = accumulate(batch, parts, loss_of)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(linear.weight.grad, gradient)


def test_learning_rates_fall_as_the_schedule_says() -> None:
    stepped = replace(TINY, schedule="step", milestones=(0.5, 0.75), schedule_gamma=0.1)
    assert [decay(stepped, s, 8) for s in (0, 3, 4, 5, 6, 7)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert [decay(TINY, s, 4) for s in range(5)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447, 0], abs=1e-6
    )


def test_a_teacher_of_another_depth_teaches(data: DataSplits, tmp_path: Path) -> None:
    Trainer(replace(TINY, model="resnet14"), tmp_path / "deep", data).run(1)
    taught = Trainer(replace(TINY, teacher=str(tmp_path / "deep")), tmp_path / "shallow", data)
    assert taught.teacher is not None
    assert taught.teacher.architecture.name == "resnet14"
    taught.run(3)
    own = Trainer(TINY, None, data)
    own.run(3)
    assert equal_content(own.plain.state_dict(), taught.plain.state_dict())
    assert not equal_content(own.model.state_dict(), taught.model.state_dict())
    with pytest.raises(ValueError, match="no such checkpoint"):
        Trainer(replace(TINY, teacher=str(tmp_path / "gone")), None, data)


# The paper's recipe


def _expected_cost(trainer: Trainer) -> float:
    """Of decisions drawn from the gate's softmax."""
    model = trainer.model.train()
    with torch.no_grad():
        logits = model.run(trainer.data.val.first(32), gate_gradient=True).gate_logits
        assert logits is not None
        return float(trainer.cost(logits.softmax(-1)).mean())


@pytest.mark.parametrize(("target", "up"), [(1.0, True), (0.001, False)])
def test_the_papers_rule_pushes_the_cost_towards_the_target(
    target: float, up: bool, data: DataSplits
) -> None:
    # A joint step with nearly nothing but the rule in its loss.
    config = replace(TINY_PAPER, target=target, gate_epochs=1, beta=10.0, joint_lr=1e-4)
    trainer = Trainer(config, None, data)
    trainer.run(2)
    with torch.no_grad():
        trainer.model.gate.proj.bias.copy_(torch.tensor([0.0, 0.0, 0.1]))
    before = _expected_cost(trainer)
    trainer.run(3, max_steps=2)
    assert (_expected_cost(trainer) > before) == up
    assert trainer.results["oracle"]["agreement"] >= trainer.results["oracle"]["agreement_32"]


def test_the_papers_second_stage_goes_to_full_execution(data: DataSplits) -> None:
    costs: list[float] = []
    trainer = Trainer(replace(TINY_PAPER, gate_epochs=6, beta=0.3), None, data)
    trainer.run(1)
    with torch.no_grad():
        trainer.model.gate.proj.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    trainer.run(2, lambda stage, step, total, measured: costs.append(measured["cost"]))
    assert costs[0] < 0.1
    assert costs[-1] == 1
    assert trainer.results["P1 full execution"]["val_cost"] == 1


def test_the_papers_backbone_is_frozen_in_its_second_stage(data: DataSplits) -> None:
    trainer = Trainer(TINY_PAPER, None, data)
    trainer.run(1)
    trainer.run(2, max_steps=1)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.run(2, max_steps=2)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(n.startswith("gate.") for n in moved)


# Oracle and permuted decisions


def test_the_oracle_takes_the_cheapest_width_that_agrees(beginnings: list[Trainer]) -> None:
    trainer = beginnings[3]
    found = uniform_oracle(trainer.model, trainer.plain, trainer.data.val, trainer.cost)
    images = trainer.data.val
    with torch.no_grad():
        taught = trainer.plain.eval()(images.first(len(images))).argmax(1)
        votes = {
            c: trainer.model.eval()(images.first(len(images)), c).argmax(1) == taught
            for c in trainer.model.choices
        }
    spent, agreed = 0.0, 0
    for i in range(len(images)):
        width = next((c for c in trainer.model.choices if votes[c][i]), trainer.model.choices[0])
        spent += (width / 32) ** 2
        agreed += bool(votes[width][i])
    assert found["cost"] == pytest.approx(spent / len(images))
    assert found["agreement"] == pytest.approx(agreed / len(images))
    assert found["constant_agreement"] <= found["agreement"] + 1e-9
    assert sum(found[f"share_{c}"] for c in trainer.model.choices) == pytest.approx(1)


def test_a_constant_mix_lies_on_the_upper_hull() -> None:
    costs, values = [0.0, 1.0, 4.0], [0.1, 0.9, 0.8]
    assert best_mix(costs, values, 0.5) == pytest.approx(0.5)
    assert best_mix(costs, values, 1.0) == pytest.approx(0.9)
    assert best_mix(costs, values, 4.0) == pytest.approx(0.9)
    assert best_mix([0.0, 1.0, 2.0], [0.0, 0.1, 1.0], 1.0) == pytest.approx(0.5)


def test_permuting_equal_decisions_changes_nothing(data: DataSplits) -> None:
    model = settled_model(depth=8)
    images = replace_channels(data)
    same = torch.full((len(images), model.gated_blocks), 8, dtype=torch.int32)
    own = permuted_accuracies(model, images, same)
    assert len(set(own)) == 1
    torch.manual_seed(0)
    mixed = torch.tensor([0, 2, 8])[torch.randint(3, same.shape)].int()
    assert permuted_accuracies(model, images, mixed, 1) == permuted_accuracies(
        model, images, mixed, 1
    )


def replace_channels(data: DataSplits) -> Any:
    return type(data.val)(data.val.first(32).repeat(1, 3, 1, 1), data.val.labels)


# The plan and the record


def test_the_plan_learns_how_long_stages_take(data: DataSplits) -> None:
    now = [0.0]
    plan = TimePlan(TINY, data, clock=lambda: now[0])
    assert plan.remaining() is None
    lengths = [s.length(TINY, data) for s in stages_of(TINY)]
    for step in range(1, 6):
        plan.observe("S0 float", step)
        now[0] += 2.0
    # Two seconds a step of one pass; the others by their passes.
    expected = 2.0 * (lengths[0] - 5)
    expected += sum(
        2.0 * n * s.passes for n, s in zip(lengths[1:], stages_of(TINY)[1:], strict=True)
    )
    assert plan.remaining() == pytest.approx(expected)
    first = plan.stages()[0]
    assert (first.steps, first.measured) == (8, True)
    assert first.seconds == pytest.approx(16)
    assert not plan.stages()[2].measured
    assert plan.stages()[4].epochs == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (600, "10 min"), (3600 * 3, "3.0 h"), (9e5, "10.4 days")]
)
def test_times_are_told_in_words(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_runs_folder_says_what_made_it(data: DataSplits, tmp_path: Path) -> None:
    Trainer(TINY, tmp_path, data).run(max_steps=2)
    Trainer.load(tmp_path, data).run(max_steps=1)
    assert load_preset(str(tmp_path / "config.toml")) == TINY
    lines = (tmp_path / "environment.jsonl").read_text().splitlines()
    assert len(lines) == 2
    found = json.loads(lines[0])
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"]
    assert found["threads"] == torch.get_num_threads()
    assert found["seed"] == TINY.seed
    assert found["machine"]["processor"]
    assert {"commit", "python", "dfs", "numpy"} <= found.keys()


def test_curves_go_to_tensorboard_where_it_is_installed(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    Trainer(TINY, tmp_path, data).run(max_steps=2)
    assert [(name, step) for name, _, step in written] == [
        ("S0 float/loss", 1),
        ("S0 float/loss", 2),
    ]


def test_every_stage_says_what_it_is() -> None:
    for config in (TINY, TINY_PAPER, replace(TINY, recipe="static", static_widths=(2,))):
        names = [stage.name for stage in stages_of(config)]
        assert len(set(names)) == len(names)
        assert all(stage.__doc__ and stage.settings for stage in stages_of(config))
        assert all(stage is not Stage for stage in stages_of(config))
