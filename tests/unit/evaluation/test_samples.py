"""The short evaluation's verdict, on embeddings made by hand, and through what a run leaves."""

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation.glance import look
from dreambooth.evaluation.short import Glance, judge, similarity_of
from dreambooth.evaluation.verdict import ShortVerdict, Similarity
from dreambooth.miniature import VIT_DIR
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.world import PLACES, sample_look, sample_scene
from pipelines.driver.summary import PersonalizeResult, describe_result
from pipelines.report.batch_report import render_report
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.evaluated import find_evaluated
from pipelines.report.run_report import RunFacts, render_run
from pipelines.stages.evaluation_store import INDEX, load_evaluation, store_evaluation
from pipelines.stages.photographs import Evaluation
from pipelines.storage.publications import publish
from pipelines.tasks import SubjectRecord

PROMPTS, EACH = 5, 4
SUBJECT, PLACE = 0, 1  # the axes: the subject's own, and one for each place


def pictures(places: Sequence[int], *, subject: float = 1.0, place: float = 0.6) -> Tensor:
    """The subject in places, (N, 24): pictures of one place are alike, those of two share the subject alone."""
    made = torch.zeros(len(places), 24)
    made[:, SUBJECT] = subject
    made[torch.arange(len(places)), PLACE + torch.tensor(places)] = place
    return torch.nn.functional.normalize(made + 0.001 * torch.randn(made.shape, generator=_generator()), dim=1)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def glance(samples: Tensor, instance: Tensor, *, clip: bool = True, class_after: Tensor | None = None) -> Glance:
    """What an evaluation saw; the base model's samples and the texts show the place that each prompt asks for."""
    both = torch.cat([samples, instance])
    of_class = torch.zeros(1, 24)
    of_class[0, -1] = 1.0
    images = {
        "instance": instance,
        "samples": samples,
        "class_before": of_class,
        "class_after": of_class if class_after is None else class_after,
    }
    asked = [place for place in range(10, 10 + PROMPTS) for _ in range(EACH)]
    texts = pictures(range(10, 10 + PROMPTS), subject=0)
    return Glance(
        images=images,
        distances=(1 - both @ both.T).clamp(min=0),
        clip={"instance": instance, "samples": samples, "base": pictures(asked, subject=0.3)} if clip else None,
        texts=texts if clip else None,
    )


PHOTOGRAPHS = pictures(range(5))
IN_PLACES = pictures([place for place in range(10, 10 + PROMPTS) for _ in range(EACH)])
COPIES = pictures([place % 5 for place in range(PROMPTS * EACH)])  # each prompt's are of four photographs
ONE_PICTURE = pictures([17] * PROMPTS * EACH)  # the same new picture whatever is asked for


@pytest.mark.parametrize("clip", [True, False])
class TestJudge:
    def test_new_pictures_in_the_places_asked_for_are_fine(self, clip: bool) -> None:
        verdict = judge(glance(IN_PLACES, PHOTOGRAPHS, clip=clip), prompts=PROMPTS)
        by = "text" if clip else "pictures"
        assert verdict == ShortVerdict(near_copies=0.0, prompts_followed=1.0, prompts_by=by, warnings=())

    def test_copies_are_named_with_a_cure(self, clip: bool) -> None:
        verdict = judge(glance(COPIES, PHOTOGRAPHS, clip=clip), prompts=PROMPTS)
        assert (verdict.near_copies, verdict.prompts_followed) == (1.0, 0.0)
        text = " ".join(verdict.warnings)
        assert "samples copy the photographs (100% are near-copies): fewer steps (train.keep=best with" in text
        assert "prompts are not followed" in text
        assert "more class images" in text

    def test_some_copies_are_a_share(self, clip: bool) -> None:
        samples = IN_PLACES.clone()
        samples[:: 2 * EACH] = PHOTOGRAPHS[:3]  # of three prompts one sample each
        verdict = judge(glance(samples, PHOTOGRAPHS, clip=clip), prompts=PROMPTS)
        assert verdict.near_copies == pytest.approx(3 / 20)
        assert not any("copy" in warning for warning in verdict.warnings)

    def test_likeness_above_that_of_the_photographs_is_no_praise(self, clip: bool) -> None:
        alike = pictures([17] * PROMPTS * EACH, place=0.1)  # the subject with hardly a place
        seen = glance(alike, PHOTOGRAPHS, clip=clip)
        similarity = similarity_of(seen.images)
        assert similarity.identifier > similarity.instance
        warnings = judge(seen, prompts=PROMPTS).warnings
        assert f"the samples look more like the photographs ({similarity.identifier:.2f})" in warnings[0]
        assert f"than those look like each other ({similarity.instance:.2f})" in warnings[0]

    def test_one_picture_for_all_prompts_follows_none(self, clip: bool) -> None:
        verdict = judge(glance(ONE_PICTURE, PHOTOGRAPHS, clip=clip), prompts=PROMPTS)
        assert (verdict.near_copies, verdict.prompts_followed) == (0.0, 0.0)
        assert [warning.partition(" (")[0] for warning in verdict.warnings] == ["prompts are not followed"]

    @pytest.mark.parametrize("subject", [pictures([0] * 5), pictures([0])], ids=["a burst", "one photograph"])
    def test_photographs_without_a_scale_of_their_own(self, clip: bool, subject: Tensor) -> None:
        copied = judge(glance(pictures([0] * PROMPTS * EACH), subject, clip=clip), prompts=PROMPTS)
        assert copied.near_copies == 1.0
        assert "samples copy" in copied.warnings[0]
        fine = judge(glance(IN_PLACES, subject, clip=clip), prompts=PROMPTS)
        assert (fine.near_copies, fine.prompts_followed, fine.warnings) == (0.0, 1.0, ())

    def test_other_failures_are_the_protocols(self, clip: bool) -> None:
        lost = judge(glance(pictures(range(20), subject=0, place=1.0), PHOTOGRAPHS, clip=clip), prompts=PROMPTS)
        assert any("hardly look like the subject" in warning for warning in lost.warnings)
        seen = glance(IN_PLACES, PHOTOGRAPHS, clip=clip, class_after=IN_PLACES[:2])
        assert ["the class became" in warning for warning in judge(seen, prompts=PROMPTS).warnings] == [True]

    def test_samples_belong_to_prompts(self, clip: bool) -> None:
        with pytest.raises(InputError, match="as many samples of each of 3 prompts, got 20"):
            judge(glance(IN_PLACES, PHOTOGRAPHS, clip=clip), prompts=3)


def test_a_single_prompt_says_nothing_of_following() -> None:
    verdict = judge(glance(COPIES, PHOTOGRAPHS, clip=False), prompts=1)
    assert (verdict.prompts_followed, verdict.prompts_by, verdict.near_copies) == (None, None, 1.0)


@pytest.mark.parametrize("encoder", ["miniature", str(VIT_DIR)])
def test_what_is_drawn_is_seen(encoder: str) -> None:
    # A drawn world, where what is a copy is known; the second encoder is a ViT alone, without a CLIP.
    rng = random.Random(3)
    subject = sample_look(rng, "car")
    places = rng.sample(list(PLACES), 8)

    def drawn(wanted: Sequence[str]) -> list[Image.Image]:
        return [draw(sample_scene(rng, subject, place=place, photo=True)) for place in wanted]

    real, asked = drawn(places[:5]), places[5:]
    new, before = (drawn([place for place in asked for _ in range(2)]) for _ in range(2))
    of_class = drawn(places[:2])
    texts = [f"a photo of a car {place}" for place in asked]
    for samples, copies in ((new, 0.0), ([*real, real[0]], 1.0)):
        sets = {"instance": real, "samples": samples, "base": before, "class_before": of_class, "class_after": of_class}
        verdict = judge(look(encoder, sets, texts), prompts=3)
        assert verdict.near_copies == copies
        assert verdict.prompts_by == ("text" if encoder == "miniature" else "pictures")
        assert any("copy the photographs" in warning for warning in verdict.warnings) == bool(copies)
        if not copies:
            assert verdict.prompts_followed == 1.0
    long = ["a photo of a car " + "on the beach " * 40] * 3  # no CLIP reads that far
    assert judge(look(encoder, sets, long), prompts=3).prompts_by == "pictures"


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def summary_of(verdict: ShortVerdict | None) -> dict[str, Any]:
    summary: dict[str, Any] = dict.fromkeys(("contact_sheet", "registered_model", "evaluation", "untracked"))
    summary |= {"subject": "rex", "class_noun": "dog", "identifier": "sks", "key": "key", "model_uri": "m"}
    summary |= {"loss_curve": "l", "mlflow": {"look": "there"}}
    summary["similarity"] = {"identifier": 0.84, "instance": 0.72, "class_before": 0.1, "class_after": 0.1}
    return summary | ({} if verdict is None else {"verdict": verdict.as_dict()})


def test_a_verdict_reaches_terminal_and_pages(tmp_path: Path) -> None:
    verdict = judge(glance(COPIES, PHOTOGRAPHS), prompts=PROMPTS)
    sides = {"a photo of sks dog": [png(2)], "a photo of a dog": [png(3)]}
    evaluation = Evaluation(
        instance=(png(1),), before=sides, after=sides, class_prompt="a photo of a dog", similarity=None, verdict=verdict
    )
    store_evaluation(evaluation, str(tmp_path), "key")
    assert load_evaluation(str(tmp_path), "key") == evaluation
    summary = json.loads(json.dumps(summary_of(verdict)))
    rows = describe_result(PersonalizeResult(run_uri=str(tmp_path), summary=summary))
    assert ("samples", "100% near-copies of a photograph, 0% of prompts followed") in rows
    assert [value for what, value in rows if what == "warning"] == list(verdict.warnings)
    evaluated = find_evaluated(str(tmp_path), summary)
    page = render_run(summary, RunFacts(), [], evaluated)
    assert "<b>copies</b><p>samples copy the photographs (100% are near-copies)" in page
    record = SubjectRecord(name="rex", key="key", class_noun="dog", identifier="sks", state="done")
    shares, warnings = summary["verdict"], verdict.warnings
    of_batch = SubjectResult(record=record, evaluated=evaluated, similarity={}, verdict=shares, warnings=warnings)
    page = render_report(BatchResult(name="dogs", facts=[], subjects=[of_batch]))
    assert '<td class="why">samples copy the photographs (100% are near-copies)' in page
    assert ">near-copies</button></th>" in page
    assert ">100%</td>" in page


def test_what_earlier_versions_left_is_read(tmp_path: Path) -> None:
    run, stored = str(tmp_path / "run"), tmp_path / "stored"
    stored.mkdir()
    (stored / "0.png").write_bytes(png(1))
    sides = {"a photo of sks dog": ["0.png"], "a photo of a dog": ["0.png"]}
    similarity = dict.fromkeys(("identifier", "class_before", "class_after", "instance"), 0.5)
    index = {"before": sides, "after": sides, "instance": ["0.png"], "class_prompt": "a photo of a dog"}
    (stored / INDEX).write_text(json.dumps(index | {"similarity": similarity}))
    publish(stored, f"{run}/evaluation", metadata={"key": "key"})
    loaded = load_evaluation(run, "key")
    assert loaded is not None
    assert loaded.similarity == Similarity(**similarity)
    assert loaded.verdict is None
    evaluated = find_evaluated(run, summary_of(None))
    assert evaluated is not None
    rows = describe_result(PersonalizeResult(run_uri=run, summary=summary_of(None)))
    assert not [what for what, _ in rows if what in ("samples", "warning")]
