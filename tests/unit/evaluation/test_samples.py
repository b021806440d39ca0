"""Figures and verdict of samples for the eye, on embeddings made by hand, and through what a run leaves."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation.bank import ImageEmbeddings
from dreambooth.evaluation.figures import BankId, Figures, figures_from
from dreambooth.evaluation.measure import PromptSamples, measure
from dreambooth.evaluation.verdict import Shares, shares_of, similarity_of
from pipelines.driver.summary import PersonalizeResult, describe_result
from pipelines.report.batch_report import render_report
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.evaluated import find_evaluated
from pipelines.report.run_report import RunFacts, render_run
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


def seen_as(scene: Tensor, *, clip: bool) -> ImageEmbeddings:
    return ImageEmbeddings(dino=scene, clip=scene if clip else None)


def judged(
    samples: Tensor,
    instance: Tensor,
    *,
    clip: bool = True,
    class_after: Tensor | None = None,
    prompts: int = PROMPTS,
) -> Figures:
    """Figures of samples; the base model's samples and the texts show the place that each prompt asks for."""
    both = torch.cat([samples, instance])
    of_class = torch.zeros(1, 24)
    of_class[0, -1] = 1.0
    distances = (1 - both @ both.T).clamp(min=0)
    asked = range(10, 10 + prompts)
    texts = pictures(asked, subject=0)
    each, count = len(samples) // prompts, len(samples)
    return measure(
        bank=BankId(name="hand", hash="0"),
        prompts=[
            PromptSamples(
                prompt=f"prompt {place}",
                samples=seen_as(samples[place * each : (place + 1) * each], clip=clip),
                text=texts[place] if clip else None,
                text_no_identifier=texts[place] if clip else None,
                base=seen_as(pictures([asked[place]] * each, subject=0.3), clip=clip),
                to_instance=distances[place * each : (place + 1) * each, count:],
            )
            for place in range(prompts)
        ],
        instance=seen_as(instance, clip=clip),
        class_samples=seen_as(of_class if class_after is None else class_after, clip=clip),
        base_class_samples=seen_as(of_class, clip=clip),
        instance_distances=distances[count:, count:],
        sample_distances=None if clip else distances[:count, :count],
    )


def shares(figures: Figures) -> Shares:
    return shares_of(figures.means)


PHOTOGRAPHS = pictures(range(5))
IN_PLACES = pictures([place for place in range(10, 10 + PROMPTS) for _ in range(EACH)])
COPIES = pictures([place % 5 for place in range(PROMPTS * EACH)])  # each prompt's are of four photographs
ONE_PICTURE = pictures([17] * PROMPTS * EACH)  # the same new picture whatever is asked for


@pytest.mark.parametrize("clip", [True, False])
class TestVerdict:
    def test_new_pictures_in_the_places_asked_for_are_fine(self, clip: bool) -> None:
        figures = judged(IN_PLACES, PHOTOGRAPHS, clip=clip)
        by = "text" if clip else "pictures"
        assert shares(figures) == Shares(near_copies=0.0, prompts_followed=1.0, prompts_by=by)  # type: ignore[arg-type]
        assert figures.warnings == ()

    def test_copies_are_named_with_a_cure(self, clip: bool) -> None:
        figures = judged(COPIES, PHOTOGRAPHS, clip=clip)
        assert (shares(figures).near_copies, shares(figures).prompts_followed) == (1.0, 0.0)
        text = " ".join(figures.warnings)
        assert "samples copy the photographs (100% are near-copies): fewer steps (train.keep=best with" in text
        assert "prompts are not followed" in text
        assert "more class images" in text

    def test_some_copies_are_a_share(self, clip: bool) -> None:
        samples = IN_PLACES.clone()
        samples[:: 2 * EACH] = PHOTOGRAPHS[:3]  # of three prompts one sample each
        figures = judged(samples, PHOTOGRAPHS, clip=clip)
        assert shares(figures).near_copies == pytest.approx(3 / 20)
        assert not any("copy" in warning for warning in figures.warnings)

    def test_likeness_above_that_of_the_photographs_is_no_praise(self, clip: bool) -> None:
        alike = pictures([17] * PROMPTS * EACH, place=0.1)  # the subject with hardly a place
        figures = judged(alike, PHOTOGRAPHS, clip=clip)
        similarity = similarity_of(figures.means)
        assert similarity.identifier > similarity.instance
        assert f"the samples look more like the photographs ({similarity.identifier:.2f})" in figures.warnings[0]
        assert f"than those look like each other ({similarity.instance:.2f})" in figures.warnings[0]

    def test_one_picture_for_all_prompts_follows_none(self, clip: bool) -> None:
        figures = judged(ONE_PICTURE, PHOTOGRAPHS, clip=clip)
        assert (shares(figures).near_copies, shares(figures).prompts_followed) == (0.0, 0.0)
        assert [warning.partition(" (")[0] for warning in figures.warnings] == ["prompts are not followed"]

    @pytest.mark.parametrize("subject", [pictures([0] * 5), pictures([0])], ids=["a burst", "one photograph"])
    def test_photographs_without_a_scale_of_their_own(self, clip: bool, subject: Tensor) -> None:
        copied = judged(pictures([0] * PROMPTS * EACH), subject, clip=clip)
        assert shares(copied).near_copies == 1.0
        assert "samples copy" in copied.warnings[0]
        fine = judged(IN_PLACES, subject, clip=clip)
        assert (shares(fine).near_copies, shares(fine).prompts_followed, fine.warnings) == (0.0, 1.0, ())
        assert similarity_of(fine.means).instance == pytest.approx(1.0, abs=0.001)

    def test_other_failures_are_named(self, clip: bool) -> None:
        lost = judged(pictures(range(20), subject=0, place=1.0), PHOTOGRAPHS, clip=clip)
        assert any("hardly look like the subject" in warning for warning in lost.warnings)
        drifted = judged(IN_PLACES, PHOTOGRAPHS, clip=clip, class_after=IN_PLACES[:2])
        assert ["the class became" in warning for warning in drifted.warnings] == [True]

    def test_the_class_is_seen_before_and_after(self, clip: bool) -> None:
        similarity = similarity_of(judged(IN_PLACES, PHOTOGRAPHS, clip=clip, class_after=IN_PLACES[:2]).means)
        assert similarity.class_before < 0.1 < similarity.class_after


def test_a_single_prompt_says_nothing_of_following() -> None:
    figures = judged(COPIES[:EACH], PHOTOGRAPHS, clip=False, prompts=1)
    assert shares(figures) == Shares(near_copies=1.0, prompts_followed=None, prompts_by=None)


def test_without_a_clip_nothing_is_measured_against_texts() -> None:
    figures = judged(IN_PLACES, PHOTOGRAPHS, clip=False)
    assert {"clip_i", "real_clip_i"} <= {name for name, why in figures.unmeasured.items() if "no CLIP" in why}
    assert {"clip_t", "clip_t_no_identifier"} <= {name for name, why in figures.unmeasured.items() if "text" in why}
    again = figures_from(json.loads(json.dumps(figures.as_dict())))
    assert again == figures


def test_embeddings_of_two_banks_are_refused() -> None:
    with pytest.raises(InputError, match=r"one has CLIP's and one has not"):
        measure(
            bank=BankId(name="hand", hash="0"),
            prompts=[
                PromptSamples(prompt="a", samples=seen_as(IN_PLACES, clip=False), text=None, text_no_identifier=None)
            ],
            instance=seen_as(PHOTOGRAPHS, clip=True),
        )


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def summary_of(figures: Figures | None, uri: Path | None = None) -> dict[str, Any]:
    summary: dict[str, Any] = dict.fromkeys(("contact_sheet", "registered_model", "evaluation", "untracked"))
    summary |= {"subject": "rex", "class_noun": "dog", "identifier": "sks", "key": "key", "model_uri": "m"}
    summary |= {"loss_curve": "l", "mlflow": {"look": "there"}}
    summary["similarity"] = {"identifier": 0.84, "instance": 0.72, "class_before": 0.1, "class_after": 0.1}
    if figures is None:
        return summary
    verdict = asdict(shares(figures)) | {"warnings": list(figures.warnings)}
    return summary | {"verdict": verdict, "samples": {"uri": str(uri)}}


def test_a_verdict_reaches_terminal_and_pages(tmp_path: Path) -> None:
    figures = judged(COPIES, PHOTOGRAPHS)
    for name, colour in (("photograph", 1), ("tuned", 2), ("base", 3)):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    tuned, base = [str(tmp_path / "tuned.png")], [str(tmp_path / "base.png")]
    record = figures.as_dict() | {
        "subject": "rex",
        "class_noun": "dog",
        "identifier": "sks",
        "instance_images": ["gone.jpg"],
        "photographs": [str(tmp_path / "photograph.png")],
        "pictures": [{"prompt": "a photo of sks dog", "fine_tuned": tuned, "base": base}],
        "class_prompt": "a photo of a dog",
        "class_pictures": tuned,
        "base_class_pictures": base,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    summary = json.loads(json.dumps(summary_of(figures, tmp_path / "evaluation.json")))
    rows = describe_result(PersonalizeResult(run_uri=str(tmp_path), summary=summary))
    assert ("samples", "100% near-copies of a photograph, 0% of prompts followed") in rows
    assert [value for what, value in rows if what == "warning"] == list(figures.warnings)
    evaluated = find_evaluated(str(tmp_path), summary)
    assert evaluated is not None
    assert [of.prompt for of in evaluated.prompts] == ["a photo of sks dog", "a photo of a dog"]
    assert evaluated.instance == (str(tmp_path / "photograph.png"),)
    page = render_run(summary, RunFacts(), [], evaluated)
    assert "<b>copies</b><p>samples copy the photographs (100% are near-copies)" in page
    of_rex = SubjectRecord(name="rex", key="key", class_noun="dog", identifier="sks", state="done")
    said, warnings = summary["verdict"], figures.warnings
    of_batch = SubjectResult(record=of_rex, evaluated=evaluated, similarity={}, verdict=said, warnings=warnings)
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
    (stored / "evaluation.json").write_text(json.dumps(index | {"similarity": similarity}))
    publish(stored, f"{run}/evaluation", metadata={"key": "key"})
    evaluated = find_evaluated(run, summary_of(None))
    assert evaluated is not None
    assert [of.prompt for of in evaluated.prompts] == list(sides)
    assert [Path(address).read_bytes() for address in evaluated.instance] == [png(1)]
    rows = describe_result(PersonalizeResult(run_uri=run, summary=summary_of(None)))
    assert not [what for what, _ in rows if what in ("samples", "warning")]
