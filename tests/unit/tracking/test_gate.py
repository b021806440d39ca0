"""When the alias `champion` moves, and when it doesn't."""

import math
from typing import Any

import pytest

from dreambooth.config.evaluation import GateConfig
from pipelines.tracking.champion import Standing, decide

GATE = GateConfig(dino_margin=0.02, clip_t_margin=0.01, pres_limit=0.5)


def standing(version: int = 2, *, bank: str | None = "b1", prompts: str | None = "p1", **figures: float) -> Standing:
    known = {"dino": 0.7, "clip_t": 0.3, "pres": 0.2} | figures
    return Standing(version=version, figures=known, bank=bank, prompts=prompts)


CHAMPION = standing(1)


@pytest.mark.parametrize(
    "figures",
    [{}, {"dino": 0.9}, {"dino": 0.681}, {"clip_t": 0.291}, {"pres": 0.499}],
    ids=["equal", "better", "within the margin of dino", "within the margin of clip_t", "under the limit"],
)
def test_as_good_is_enough(figures: dict[str, float]) -> None:
    decision = decide(standing(**figures), CHAMPION, GATE)
    assert decision.moved
    assert "against version 1" in decision.reason


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"dino": 0.679}, "dino is 0.679, more than 0.02 under the 0.700 of version 1 (gate.dino_margin)"),
        ({"clip_t": 0.289}, "clip_t is 0.289, more than 0.01 under the 0.300 of version 1 (gate.clip_t_margin)"),
        ({"pres": 0.5, "dino": 0.9}, "PRES is 0.500, and has to be under 0.5 (gate.pres_limit)"),
    ],
)
def test_worse_is_held_back_and_force_overrules(figures: dict[str, float], reason: str) -> None:
    decision = decide(standing(**figures), CHAMPION, GATE)
    assert (decision.moved, decision.reason) == (False, reason)
    forced = decide(standing(**figures), CHAMPION, GATE, force=True)
    assert (forced.moved, forced.reason) == (True, f"forced, although {reason}")


def test_the_first_version_needs_a_low_pres_alone() -> None:
    assert decide(standing(1, dino=0.1, clip_t=-0.1), None, GATE).moved
    assert not decide(standing(1, pres=0.6), None, GATE).moved


@pytest.mark.parametrize("other", [{"bank": "b2"}, {"bank": None}, {"prompts": "p2"}])
def test_figures_of_other_banks_or_prompts_are_not_compared(other: dict[str, Any]) -> None:
    decision = decide(standing(dino=0.99, **other), CHAMPION, GATE)
    assert not decision.moved
    assert "no figures of the same bank and prompts" in decision.reason
    assert not decide(standing(dino=0.99), standing(1, **other), GATE).moved
    assert decide(standing(dino=0.99, **other), CHAMPION, GATE, force=True).moved


def test_a_champion_with_a_broken_figure_is_not_compared_with() -> None:
    assert not decide(standing(), standing(1, dino=math.nan), GATE).moved


@pytest.mark.parametrize("force", [False, True])
def test_never_on_a_missing_or_failed_evaluation(force: bool) -> None:
    missing = decide(Standing(version=2, figures={}), CHAMPION, GATE, force=force)
    assert (missing.moved, missing.reason) == (False, "version 2 has no figure for dino, clip_t, pres")
    assert not decide(Standing(version=2, figures={}), None, GATE, force=force).moved
    assert not decide(standing(pres=math.nan), CHAMPION, GATE, force=force).moved


def test_an_older_version_comes_back_by_force_alone() -> None:
    champion = standing(3)
    decision = decide(standing(2, dino=0.99), champion, GATE)
    assert (decision.moved, decision.reason) == (False, "version 2 is older than the champion, version 3")
    assert decide(standing(2, dino=0.99), champion, GATE, force=True).moved


def test_the_champion_itself_stays() -> None:
    assert not decide(standing(1), CHAMPION, GATE, force=True).moved
