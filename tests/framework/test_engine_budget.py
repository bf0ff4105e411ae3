"""Moving the cost of an engine at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfs import Engine, freeze, load_engine
from dfs.engine.budget import BudgetCurve, BudgetPoint, measure_curve, tilted_bias
from tests.framework.test_engine import SIZE, make_model


def point(tilt: float, cost: float) -> BudgetPoint:
    return BudgetPoint(tilt, cost, None, 1.0, 2.0)


@pytest.fixture
def engine() -> Engine:
    return freeze(make_model(14), SIZE)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(60, 3, *SIZE, generator=torch.Generator().manual_seed(2))


def test_tilts_spare_skips_downwards_and_wake_them_upwards() -> None:
    bias = torch.tensor([0.5, 0.0, -1.0, 2.0], dtype=torch.float64)
    choices = (0, 2, 4, 8)
    assert torch.equal(tilted_bias(bias, choices, 0.0), bias)
    cheaper = tilted_bias(bias, choices, 16.0) - bias
    assert cheaper.tolist() == [0, -1, -4, -16]
    dearer = tilted_bias(bias, choices, -16.0) - bias
    assert dearer.tolist() == [0, 4, 8, 16]


def test_tilts_are_interpolated_between_points() -> None:
    curve = BudgetCurve((point(4, 0.0), point(1, 0.02), point(-1, 0.06)))
    assert curve.attainable == (0.0, 0.06)
    assert curve.tilt_for(0.0) == 4
    assert curve.tilt_for(0.01) == 2.5
    assert curve.tilt_for(0.02) == 1
    assert curve.tilt_for(0.04) == pytest.approx(0)
    assert curve.tilt_for(0.06) == -1
    with pytest.raises(ValueError, match=r"cost must lie in \[0.00000, 0.06000\], got 0.1"):
        curve.tilt_for(0.1)


@pytest.mark.parametrize(
    "points", [(), (point(0, 0.1),), (point(1, 0.1), point(0, 0.1)), (point(0, 0.1), point(1, 0.2))]
)
def test_curves_that_do_not_ascend_are_refused(points: Any) -> None:
    with pytest.raises(ValueError, match="budget curve"):
        BudgetCurve(points)


def test_a_curve_survives_json() -> None:
    curve = BudgetCurve((point(4, 0.0), BudgetPoint(1.0, 0.02, 0.5, 1.0, 3.0)))
    assert BudgetCurve.from_json(curve.to_json()) == curve
    for wrong in (
        {},
        [1],
        [{"tilt": 1}],
        [{**curve.to_json()[0], "cost": "low"}],
        [{**curve.to_json()[0], "p99": float("nan")}],
        [{**curve.to_json()[0], "tilt": 10**400}],
    ):
        with pytest.raises(ValueError, match="budget curve"):
            BudgetCurve.from_json(wrong)


def test_a_budget_is_met_on_the_images_of_its_calibration(engine: Engine, images: Tensor) -> None:
    trained = engine(images)
    curve = engine.calibrate_budget(images, torch.zeros(60, dtype=torch.int64), points=6)
    assert len(curve.points) > 2
    assert curve.attainable[0] == 0.0
    assert curve.attainable[1] == (8 / 32) ** 2
    for found in curve.points:
        engine.set_budget(found.cost)
        output = engine(images)
        assert float(output.cost.mean()) == pytest.approx(found.cost, rel=1e-9)
        accuracy = float((output.logits.argmax(1) == 0).double().mean())
        assert found.accuracy == pytest.approx(accuracy)
        assert 0 < found.p50 <= found.p99
    engine.set_budget(None)
    assert torch.equal(engine(images).bits, trained.bits)


def test_a_calibrated_engine_keeps_its_curve(
    engine: Engine, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has no budget curve"):
        engine.set_budget(0.01)
    curve = engine.calibrate_budget(images, points=4)
    engine.save(tmp_path / "network.dfs")
    loaded = load_engine(tmp_path / "network.dfs")
    assert loaded.budget_curve == curve
    cost = curve.points[1].cost
    for one in (engine, loaded):
        one.set_budget(cost)
    assert torch.equal(engine(images).bits, loaded(images).bits)
    with pytest.raises(ValueError, match="cost must lie in"):
        loaded.set_budget(0.5)


def test_a_file_with_a_curve_that_makes_no_sense_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.extra["budget"] = [1, 2]
    engine.save(tmp_path / "network.dfs")
    with pytest.raises(ValueError, match="is not a usable engine: a point of a budget curve"):
        load_engine(tmp_path / "network.dfs")


def test_decisions_that_nothing_moves_are_named() -> None:
    def run(tilt: float, images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(images), 2), torch.full((len(images),), 0.25)

    with pytest.raises(ValueError, match=r"every budget costs 0\.25000"):
        measure_curve(run, torch.zeros(3, 1), None, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(0, 3, *SIZE)}, "images must not be empty"),
        ({"labels": torch.zeros(3)}, "labels must be"),
        ({"points": 1}, "points must be at least 2"),
    ],
)
def test_wrong_arguments_of_a_calibration(
    engine: Engine, images: Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.calibrate_budget(**{"images": images, **arguments})
