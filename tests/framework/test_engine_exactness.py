"""The engine's exactness campaign, at a size for every day; a long one is a command of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("dfs_kernels._cpu")

from tests.framework import engine_exactness
from tests.kernels.exactness import MismatchError, all_work_split

SEED = 2


@pytest.fixture(scope="module")
def real() -> Tensor:
    return engine_exactness.real_images(None)[1]


@pytest.fixture(autouse=True)
def split_work() -> Iterator[None]:
    with all_work_split():
        yield


@pytest.mark.parametrize("number", range(20))
def test_networks_drawn_at_random(number: int, real: Tensor) -> None:
    tally = engine_exactness.Tally()
    engine_exactness.check_case(engine_exactness.numbered_case(SEED, number, real, 12), tally)
    assert sum(tally.images.values()) == 12
    assert tally.ties == 0


def _spoil(name: str, values: Any) -> Any:
    changed = values.clone()
    changed[3, 0] += 1
    return {name: changed}


@pytest.mark.parametrize("name", ["logits", "bits"])
def test_a_difference_is_noticed(name: str, real: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    case = engine_exactness.numbered_case(SEED, 0, real, 5)
    found = case.engine(case.images)
    spoilt = found._replace(**_spoil(name, getattr(found, name)))
    monkeypatch.setattr(type(case.engine), "__call__", lambda self, images: spoilt)
    with pytest.raises(MismatchError, match=f"{name} of image 3"):
        engine_exactness.check_case(case, engine_exactness.Tally())


def test_only_ties_may_differ_at_32_bits(real: Tensor) -> None:
    """What counts is the gap between the two logits of the first gate that differs."""
    number = next(n for n in range(0, 40, 2) if _choices(n, real)[-1] == 32)
    case = engine_exactness.numbered_case(SEED, number, real, 5)
    expected = case.model.run(case.floats)
    assert expected.gate_logits is not None
    found = case.engine(case.images)
    both = [0, len(case.model.choices) - 1]
    found.bits[2, 1] = case.model.choices[both[0]]
    expected.bits[2, 1] = case.model.choices[both[1]]
    for gap, is_tie in ((9e-6, True), (2e-5, False)):
        expected.gate_logits[2, 1, both] = torch.tensor([0.5, 0.5 + gap], dtype=torch.float64)
        tally = engine_exactness.Tally()
        if is_tie:
            engine_exactness._check_ties(case, found, expected, tally)
            assert (tally.ties, tally.largest_tie) == (1, pytest.approx(gap))
        else:
            with pytest.raises(MismatchError, match="block 1, which is no tie"):
                engine_exactness._check_ties(case, found, expected, tally)


def _choices(number: int, real: Tensor) -> tuple[int, ...]:
    return engine_exactness.numbered_case(SEED, number, real, 1).model.choices


def test_the_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    assert engine_exactness.main(["--images", "100", "--seed", "3", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["images"] == {"random": 100}
    assert record["failures"] == 0
    assert "images: 100 random" in capsys.readouterr().out
