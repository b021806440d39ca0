"""Batches drawn ahead are the batches of their steps."""

import math
from functools import partial

import pytest

from dreambooth.miniature.pretraining.ahead import Ahead


@pytest.mark.parametrize("processes", [0, 2])
def test_each_step_gets_its_own_from_wherever_it_starts(processes: int) -> None:
    with Ahead(partial(math.pow, 2), processes=processes) as powers:
        assert [powers(step) for step in range(5, 30)] == [2.0**step for step in range(5, 30)]


def test_steps_that_do_not_follow_are_refused() -> None:
    with Ahead(partial(math.pow, 2), processes=1) as powers:
        powers(0)
        with pytest.raises(ValueError, match="expected step 1, the next of those drawn ahead, got 7"):
            powers(7)


def test_what_drawing_raises_is_raised_where_it_is_asked_for() -> None:
    with Ahead(partial(math.pow, 0), processes=1) as powers, pytest.raises(ValueError, match="math domain error"):
        powers(-1)
