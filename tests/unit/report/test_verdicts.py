"""One word for every subject: each warning has one, and the worst one is said."""

import pytest

from dreambooth.evaluation.verdict import FAULTS, findings, warnings_of, worst_first
from pipelines.report.verdicts import Verdict, verdict_of_result, verdict_of_state

FINE = {"dino": 0.7, "real_dino": 0.75, "pres": 0.3, "near_copies": 0.0, "prompts_followed": 1.0}
WRONG = {
    "not bound": {"dino": 0.3},
    "copies": {"near_copies": 0.5},
    "prompt not followed": {"prompts_followed": 0.5},
    "class drifted": {"pres": 0.7},
    "too alike": {"dino": 0.9},
}


def verdict(*changes: dict[str, float]) -> Verdict:
    means = FINE.copy()
    for each in changes:
        means |= each
    return verdict_of_result(warnings_of(means), similarity=None, shares=None, measured=True)


@pytest.mark.parametrize("name", WRONG)
def test_every_warning_has_a_word_its_measure_and_a_cure(name: str) -> None:
    warnings = warnings_of(FINE | WRONG[name])
    [found] = findings(warnings)
    assert found.name == name
    assert f"{found.measured}: {found.cure}" == warnings[0]
    assert found.cure
    assert verdict(WRONG[name]).name == name
    assert [fault.name for fault in FAULTS] == list(WRONG)


def test_prompts_judged_by_pictures_have_the_same_word() -> None:
    assert verdict({"prompts_apart": 0.2}).name == "prompt not followed"


def test_the_worst_is_said_first_and_the_others_too() -> None:
    both = verdict(WRONG["class drifted"], WRONG["copies"])
    assert both.name == "copies"
    assert both.why == "samples copy the photographs (50% are near-copies); also class drifted"
    sentences = warnings_of(FINE | WRONG["prompt not followed"] | WRONG["not bound"])
    assert [sentence.partition(" (")[0] for sentence in worst_first(sentences)] == [
        "the samples hardly look like the subject",
        "prompts are not followed",
    ]
    ranks = [verdict(WRONG[name]).rank for name in WRONG]
    assert ranks == sorted(ranks)
    assert verdict_of_state("failed", None).rank < ranks[0]
    assert ranks[-1] < verdict_of_state("training", None).rank < verdict().rank


def test_what_is_well_says_by_which_figures() -> None:
    shares = {"near_copies": 0.0, "prompts_followed": 1.0}
    fine = verdict_of_result((), similarity={"identifier": 0.7, "instance": 0.75}, shares=shares, measured=True)
    assert (fine.name, fine.kind) == ("bound", "good")
    assert fine.why == "similarity 0.70, the photographs among themselves 0.75; no near-copies; all prompts followed"
    assert verdict_of_result((), similarity=None, shares=None, measured=False).name == "not measured"


def test_a_sentence_of_another_version_is_no_good_sign() -> None:
    other = verdict_of_result(("it looks odd",), similarity=None, shares=None, measured=True)
    assert (other.name, other.why, other.cure) == ("doubtful", "it looks odd", "")
