from __future__ import annotations

import pytest
import torch

from dfs.train.outcomes import (
    decode_outcomes,
    encode_outcomes,
    paired_difference,
)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1001])
def test_outcomes_come_back_as_they_were(count: int) -> None:
    correct = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.7
    assert torch.equal(decode_outcomes(encode_outcomes(correct), count), correct)


def test_outcomes_of_another_number_are_refused() -> None:
    text = encode_outcomes(torch.ones(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="count is 30"):
        decode_outcomes(text, 30)


def _right(count: int, wrong: slice) -> torch.Tensor:
    correct = torch.ones(count, dtype=torch.bool)
    correct[wrong] = False
    return correct


def test_the_interval_is_that_of_the_paired_differences() -> None:
    # Own is right on 30 images more, and on none less: a difference of 3 points, whose deviation
    # over draws of 1,000 images is sqrt(0.03 * 0.97 / 1000).
    found = paired_difference([_right(1000, slice(0, 100))], [_right(1000, slice(0, 130))])
    deviation = (0.03 * 0.97 / 1000) ** 0.5
    assert found.mean == pytest.approx(0.03)
    assert found.low == pytest.approx(0.03 - 1.96 * deviation, abs=0.0015)
    assert found.high == pytest.approx(0.03 + 1.96 * deviation, abs=0.0015)


def test_being_right_on_other_images_widens_the_interval() -> None:
    own, same, others = (_right(1000, slice(a, a + 100)) for a in (0, 0, 500))
    assert paired_difference([own], [same]).high == 0
    found = paired_difference([own], [others])
    assert found.mean == 0
    assert found.low < -0.02
    assert found.high > 0.02


def test_seeds_that_disagree_widen_the_interval() -> None:
    better, worse = _right(1000, slice(0, 50)), _right(1000, slice(0, 150))
    steady = paired_difference([better, better], [worse, worse])
    split = paired_difference([better, worse], [worse, better])
    assert steady.low > 0.07
    assert split.mean == 0
    assert split.low < -0.09
    assert split.high > 0.09


def test_what_can_not_be_compared_is_refused() -> None:
    some = torch.ones(10, dtype=torch.bool)
    with pytest.raises(ValueError, match="seeds"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="seeds"):
        paired_difference([some, some], [some])
    with pytest.raises(ValueError, match="same images"):
        paired_difference([some], [some[:9]])
