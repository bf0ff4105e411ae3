from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dfs.cost import PaperCost
from dfs.data import DataSplits
from dfs.latency import LatencyTable, part_names
from dfs.report import (
    compare_with_rivals,
    pareto_front,
    read_tables,
    rich_summary,
    summarise,
    write_tables,
)
from dfs.report.summary import to_markdown
from dfs.train import Trainer
from dfs.train.cascade import Cascade, cascade_for_target, confidence, evaluate_cascade
from dfs.train.outcomes import decode_outcomes
from dfs.train.recipes import prefix_key, stages_of
from dfs.train.static import dynamic_passes
from dfs.train.sweep import ENGINE_BATCHES, ENGINES_NAME, METHODS, Sweep, SweepProgress
from tests.framework.helpers import TINY, settled_model, sweep_result, tiny_data

# Quick, and as deep as halving the depth needs.
_BASE = replace(
    TINY, model="resnet14", float_lr=0.02, switch_lr=0.002, gate_epochs=1, joint_epochs=1
)


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return tiny_data()


def _sweep(folder: Path, data: DataSplits, **options: object) -> Sweep:
    options = {"targets": (0.03,), "data": lambda seed: data, **options}
    return Sweep(_BASE, folder, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def swept(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of everything at one target."""
    folder = tmp_path_factory.mktemp("sweep")
    assert _sweep(folder, data).run()
    return folder


def test_a_sweep_has_a_result_for_every_method(swept: Path, data: DataSplits) -> None:
    results = _sweep(swept, data).results()
    assert [r["method"] for r in results] == list(METHODS)
    assert not any("failed" in r for r in results)
    by_method = {r["method"]: r for r in results}
    assert by_method["static8"]["paper_cost"] == pytest.approx((8 / 32) ** 2)
    # Two of five gated blocks: costs are those of the deeper network.
    assert by_method["shallow8"]["paper_cost"] == pytest.approx((8 / 32) ** 2 * 2 / 5)
    assert by_method["static32"]["bitops"] == 1
    assert by_method["static2"]["bitops"] < by_method["static4"]["bitops"] < 1
    assert set(by_method["skipnet"]["widths_used"]) <= {0, 32}
    assert set(by_method["cascade"]["widths_used"]) <= {2, 8}
    # Skipping as many blocks costs 16 times as much at 32 bits as at 8.
    assert by_method["skipnet"]["target"] == pytest.approx(16 * 0.03)


def test_a_sweep_times_its_networks_as_they_are_deployed(swept: Path, data: DataSplits) -> None:
    written = (swept / ENGINES_NAME).read_text()
    assert json.loads(written)["threads"] == 1
    for result in _sweep(swept, data).results():
        # The float network is not packed.
        timed = result["method"] != "static32"
        assert all((f"engine_{batch}" in result) == timed for batch in ENGINE_BATCHES)
        if timed:
            assert 0 < result["engine_64"] < 10
    # Once only.
    _sweep(swept, data).time_engines()
    assert (swept / ENGINES_NAME).read_text() == written


def test_results_say_which_images_were_right(swept: Path, data: DataSplits) -> None:
    sweep = _sweep(swept, data)
    for result in sweep.results():
        correct = decode_outcomes(result["outcomes"], result["images"])
        assert len(correct) == len(data.test)
        assert correct.double().mean() == pytest.approx(result["accuracy"])
        decides = result["distinct_decisions"] > 1 and result["method"] != "cascade"
        assert ("permuted" in result) == decides
    compared = compare_with_rivals(sweep.results())
    assert {c.name for c in compared} == {"DFS, 3.00%"}
    assert {c.measure for c in compared} >= {"paper_cost", "bitops"}


def test_a_sweep_shares_what_it_can(swept: Path, data: DataSplits) -> None:
    # Float networks of two depths; switchable ones of the choices, of SkipNet's two and of half
    # the depth.
    assert len(list((swept / "shared").iterdir())) == 2 + 4
    shared = {f.name: f / "checkpoint.pt" for f in (swept / "shared").iterdir()}
    assert prefix_key(_BASE, 1) in shared
    assert prefix_key(_BASE, 3) in shared
    constant = replace(_BASE, gate="constant", target=0.01)
    assert prefix_key(constant, 3) == prefix_key(_BASE, 3)
    assert prefix_key(replace(_BASE, choices=(0, 8)), 3) != prefix_key(_BASE, 3)
    assert prefix_key(replace(_BASE, choices=(0, 8)), 1) == prefix_key(_BASE, 1)


def test_a_finished_sweep_trains_nothing_again(swept: Path, data: DataSplits) -> None:
    def never(at: SweepProgress) -> None:
        raise AssertionError(f"trained {at.label}")

    assert _sweep(swept, data).run(never)


def test_a_sweep_stopped_at_every_turn_comes_to_the_same_results(
    swept: Path, data: DataSplits, tmp_path: Path
) -> None:
    methods = ("dfs", "static2", "shallow8")
    rounds = 0
    left: list[float | None] = []
    while True:
        rounds += 1
        steps = 0

        def progress(at: SweepProgress) -> None:
            nonlocal steps
            steps += 1
            left.append(at.seconds_left)

        def stop() -> bool:
            return steps >= 11  # noqa: B023

        if _sweep(tmp_path, data, methods=methods).run(progress, stop):
            break
    assert rounds > 3
    # Not known before some steps of a stage were timed.
    assert left[0] is None
    assert sum(seconds is not None for seconds in left) > len(left) / 2
    plain = [r for r in _sweep(swept, data).results() if r["method"] in methods]
    for one, other in zip(_sweep(tmp_path, data, methods=methods).results(), plain, strict=True):
        for name in ("method", "accuracy", "paper_cost", "bitops"):
            assert one[name] == other[name], name


def test_static_networks_get_the_passes_of_the_dynamic_one(data: DataSplits) -> None:
    config = replace(TINY, recipe="static", static_widths=(2,))
    passes = dynamic_passes(TINY, data)
    # Gates: 2 epochs of 2 batches. Joint: 2 epochs of 4, a step on gates for every second.
    # Settling: a tenth of 8 steps.
    assert passes == 16 * (4 + 8 + 4 + 1)
    assert stages_of(config)[-1].length(config, data) == 17
    full = replace(config, static_widths=(32,))
    assert stages_of(full)[-1].length(full, data) == 17 + 3 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("dfs", "magic")}, "methods"),
        ({"targets": ()}, "targets"),
        ({"targets": (0.03, 0.03)}, "targets"),
        ({"seeds": ()}, "seeds"),
        ({"latency_targets": (0.1,)}, "latency_table"),
        ({"latency_targets": (0.1, 0.1)}, "latency_targets"),
    ],
)
def test_bad_sweeps_are_refused(
    options: dict[str, object], message: str, data: DataSplits, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        _sweep(tmp_path, data, **options)


def test_an_unattainable_target_says_the_range(data: DataSplits, tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, data, targets=(0.2,))
    with pytest.raises(ValueError, match=r"20\.000%.*0\.000% to 6\.250%"):
        sweep.check()
    assert any("0 and 8 can't cost 20.00%" in reason for reason in sweep.skipped)


def test_latency_targets_are_trained_to_beside_the_others(
    swept: Path, data: DataSplits, tmp_path: Path
) -> None:
    model = Trainer(_BASE, None, data).model
    prices = {0: 1.0, 2: 2.0, 4: 3.0, 8: 4.0, 32: 20.0}
    entries = {
        (part, bits): ms
        for part in part_names(model, data.image_size)
        for bits, ms in prices.items()
    }
    path = tmp_path / "table.json"
    LatencyTable(entries, "uint8", 4, 1).save(path)
    options = {"methods": ("static8", "constant"), "latency_table": path}
    folder = shutil.copytree(swept, tmp_path / "sweep")
    sweep = _sweep(folder, data, **options, latency_targets=(0.2,))
    sweep.check()
    assert [(e.label, e.target, e.config.cost) for e in sweep.entries] == [
        ("static, 8 bits", None, "paper"),
        ("constant gate", 0.03, "paper"),
        ("constant gate, by latency", 0.2, "latency"),
    ]
    # What knows nothing of costs is shared, the rest is not.
    assert prefix_key(sweep.entries[2].config, 3) == prefix_key(_BASE, 3)
    assert sweep.entries[2].run_key != sweep.entries[1].run_key
    with pytest.raises(ValueError, match=r"90\.000%.* to "):
        _sweep(folder, data, **options, latency_targets=(0.9,)).check()
    assert sweep.run()
    by_time = sweep.results()[2]
    assert by_time["latency"] <= 0.2 * (1 + _BASE.cost_tolerance)


def test_a_failed_run_is_told_and_the_sweep_goes_on(data: DataSplits, tmp_path: Path) -> None:
    base = replace(_BASE, exit_points=((2, -300.0),))
    sweep = Sweep(base, tmp_path, (0.03,), methods=("dfs", "static32"), data=lambda seed: data)
    assert sweep.run()
    failed, good = sweep.results()
    assert "at 2 bits the validation accuracy" in failed["failed"]
    assert good["accuracy"] > 0
    row = summarise([failed, good])[0]
    assert (row.seeds, row.accuracy) == (0, None)
    assert "2 bits" in row.note


# Tables


def test_the_table_gives_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    rows = summarise(
        [sweep_result(0, 0.9), sweep_result(1, 0.94), sweep_result(0, 0.8, target=0.01)]
    )
    assert [row.name for row in rows] == ["DFS, 2.00%", "DFS, 1.00%"]
    assert rows[0].accuracy == pytest.approx(0.92)
    assert rows[0].spread == pytest.approx(0.0282843, abs=1e-6)
    assert rows[1].spread is None
    write_tables(tmp_path, rows, {"title": "test"})
    assert read_tables(tmp_path) == rows
    assert "| DFS, 2.00% | 2 | 92.00 ± 2.83 | 2.00 | 3.00 | 0.500 |" in to_markdown(rows)
    assert "latency" not in to_markdown(rows)
    found = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert float(found[0]["accuracy"]) == pytest.approx(0.92)
    assert json.loads((tmp_path / "table.json").read_text())["title"] == "test"
    with_latency = summarise([sweep_result(0, 0.9, latency=0.4)])
    assert "latency %" in to_markdown(with_latency)


def test_the_printed_table_fits_the_terminal() -> None:
    label = "cascade, 2 then 8 bits"
    full = {"engine_1": 0.21, "engine_64": 0.14, "distinct_decisions": 7, "permuted": [0.871]}
    rows = summarise(
        [sweep_result(0, 0.9, label=label, **full), sweep_result(0, 0.8, target=0.01, **full)]
    )
    rows[1] = replace(rows[1], note="seed 1: loss is not finite")

    def printed(width: int) -> str:
        text = io.StringIO()
        Console(file=text, width=width).print(rich_summary(rows, "test", width))
        assert all(len(line) <= width for line in text.getvalue().splitlines())
        return text.getvalue()

    for width in (60, 80, 200):
        assert f"{label}, 2.00%" in printed(width)
        assert "90.00" in printed(width)
        assert "seed 1: loss is not finite" in printed(width)
    assert "87.10" not in printed(80)
    assert "further columns in table.md" in printed(80)
    assert "87.10" in printed(200)
    assert "further columns" not in printed(200)


def test_the_pareto_front_is_what_no_other_point_beats() -> None:
    points = [(1.0, 0.9), (2.0, 0.8), (3.0, 0.95), (1.0, 0.7), (4.0, 0.95)]
    assert pareto_front(points) == [0, 2]


# The cascade


def test_a_cascade_runs_again_what_it_is_not_sure_of(data: DataSplits) -> None:
    model = settled_model(depth=8)
    images = torch.randn(20, 3, 8, 8)
    sure = confidence(model(images, 2))
    middle = float(sure.sort().values[10])
    out = Cascade(model, 2, 8, middle).run(images)
    assert torch.equal(out.again, sure < middle)
    assert int(out.again.sum()) == 10
    # In batches of other sizes, as the kernels promise.
    assert torch.equal(out.logits[out.again], model(images[out.again], 8))
    assert torch.equal(out.logits[~out.again], model(images, 2)[~out.again])


def test_a_cascades_threshold_meets_the_target(data: DataSplits) -> None:
    torch.manual_seed(0)
    trainer = Trainer(TINY, None, data)
    model, cost = trainer.model.eval(), PaperCost(trainer.model)
    low, high = (2 / 32) ** 2, (8 / 32) ** 2
    target = low + high / 2
    cascade = cascade_for_target(model, 2, 8, data.val, cost, target)
    result = evaluate_cascade(cascade, data.val)
    assert result.paper_cost == pytest.approx(target, abs=high / len(data.val) * 1.01)
    everything = cascade_for_target(model, 2, 8, data.val, cost, 1.0)
    assert evaluate_cascade(everything, data.val).paper_cost == pytest.approx(low + high)
    with pytest.raises(ValueError, match="below"):
        cascade_for_target(model, 2, 8, data.val, cost, low / 2)
