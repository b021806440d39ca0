"""What pages show of an evaluation, from evaluation.json and pictures as a run leaves them."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth.config.wording import IDENTIFIER_PLACEHOLDER
from dreambooth.errors import InputError
from dreambooth.evaluation.bootstrap import Interval
from dreambooth.evaluation.figures import FIGURE_NAMES, BankId, Figure, Figures, NearestInstance, PromptRow
from pipelines.apps.study.make import StudySettings, open_study
from pipelines.apps.study.samples import has_samples, read_samples
from pipelines.report.batch_report import render_report
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.evaluated import Evaluated, find_evaluated
from pipelines.report.report_evaluation import FIGURES, MOST_CELLS
from pipelines.report.run_report import RunFacts, render_run
from pipelines.storage.pictures import read_pictures
from pipelines.tasks import SubjectRecord

PLACES = ("on a carpet", "in the <snow>")


def png(*colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def figures(*, bank: str = "miniature", warnings: tuple[str, ...] = ()) -> Figures:
    made = BankId(name=bank, hash="0123456789abcdef")
    row = {"application": "recontextualization", "clip_i": 0.8, "clip_t": 0.31, "clip_t_no_identifier": 0.3}
    more = {"clip_t_base": 0.33, "followed": True, "div": None, "background_leak": None, "near_copies": 0.5}
    return Figures(
        bank=made,
        figures={
            name: Figure(
                bank=made, interval=Interval(mean=mean, low=mean - 0.05, high=mean + 0.05, n=2), values=(mean, mean)
            )
            for name, mean in {"dino": 0.7, "clip_t": 0.31, "pres": 0.0}.items()
        },
        per_prompt=tuple(
            PromptRow(prompt=f"a photo of sks car {place}", dino=0.7, **row, **more)  # type: ignore[arg-type]
            for place in PLACES
        ),
        nearest=tuple(
            NearestInstance(sample=i, prompt="p", instance=i % 2, similarity=0.9 + i / 100, near_copy=i == 3)
            for i in range(4)
        ),
        warnings=warnings,
        unmeasured={"div": "no distances"},
    )


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """A run's folder and summary, with two samples of two prompts and of the class, and figures where given."""

    def make(measured: Figures | None = None, *, name: str = "rex") -> tuple[str, dict[str, Any]]:
        folder, subject = tmp_path / name, {"subject": name, "class_noun": "car", "identifier": "sks"}
        folder.mkdir(exist_ok=True)

        def written(what: str, *colour: int) -> str:
            (folder / f"{what}.png").write_bytes(png(*colour))
            return str(folder / f"{what}.png")

        def pictures(side: str, red: int, place: int) -> list[str]:
            return [written(f"{side}-{place}-{image}", red + (measured is None), place, image) for image in range(2)]

        prompts = [f"a photo of sks car {place}" for place in PLACES]
        content = subject | {
            "pictures": [
                {"prompt": prompt, "fine_tuned": pictures("fine_tuned", 30, place), "base": pictures("base", 40, place)}
                for place, prompt in enumerate(prompts)
            ],
            "class_prompt": "a photo of a car",
            "class_pictures": pictures("fine_tuned", 30, 9),
            "base_class_pictures": pictures("base", 40, 9),
            "instance_images": ["/gone/0.jpg"],
            "photographs": [written("photograph-0", 1, 0, 0), written("photograph-1", 2, 0, 0)],
        }
        content |= {} if measured is None else measured.as_dict()
        (folder / "evaluation.json").write_text(json.dumps(content))
        uri, summary = str(folder), subject | {"key": "key", "evaluation": None, "samples": None}
        found = {"uri": str(folder / "evaluation.json")}
        if measured is None:
            summary["samples"] = found
        else:
            summary["evaluation"] = found | {"warnings": list(measured.warnings)}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        return uri, summary

    return make


def evaluated(uri: str, summary: dict[str, Any]) -> Evaluated:
    found = find_evaluated(uri, summary)
    assert found is not None
    return found


def run_page(uri: str, summary: dict[str, Any]) -> str:
    return render_run(summary, RunFacts(places=[("model", "<where>")]), [], evaluated(uri, summary))


def test_a_run_shows_figures_with_intervals_and_their_bank(finished: Any) -> None:
    page = run_page(*finished(figures(warnings=("samples copy the <photographs>: fewer steps",))))
    assert '0.700 <span class="interval">0.650 to 0.750</span>' in page
    assert "the bank miniature (0123456789abcdef)" in page
    assert "samples copy the &lt;photographs&gt;: fewer steps" in page
    assert "&lt;where&gt;" in page
    assert "<snow>" not in page


def test_every_sample_has_the_base_models_behind_it(finished: Any) -> None:
    page = run_page(*finished(figures()))
    picture = r'<img[^>]*alt="([^"]*)"[^>]*>'
    pairs = re.findall(rf'class="pair" aria-label="[^"]*">{picture}<img class="base[^>]*>', page)
    assert len(pairs) == 6
    assert pairs[0] == "a photo of sks car on a carpet"


def test_the_nearest_pairs_are_shown_with_the_most_alike_first(finished: Any) -> None:
    page = run_page(*finished(figures()))
    shown = re.findall(r"<figcaption>(0\.\d\d[^<]*)</figcaption>", page)
    assert shown == ["0.93, a near-copy: p", "0.92: p", "0.91: p", "0.90: p"]


def test_a_run_without_a_protocol_shows_its_samples(finished: Any) -> None:
    page = run_page(*finished())
    assert page.count('class="pair"') == 6
    assert "Figures</h2>" not in page
    assert "Nearest" not in page


def test_the_losses_of_both_stages_are_drawn(finished: Any) -> None:
    uri, summary = finished()
    first, second = (
        [{"step": float(step), "loss": 0.1, "instance_loss": 0.1, "prior_loss": 0.1} for step in range(1, steps + 1)]
        for steps in (20, 12)
    )
    shown = r'aria-label="(Loss [^:]*):'
    page = render_run(summary, RunFacts(), first, evaluated(uri, summary), second=second)
    assert re.findall(shown, page) == ["Loss over 20 steps", "Loss of the super-resolution stage over 12 steps"]
    assert re.findall(shown, render_run(summary, RunFacts(), first, None)) == ["Loss over 20 steps"]


def test_pictures_that_are_gone_leave_a_dash(finished: Any, tmp_path: Path) -> None:
    uri, summary = finished(figures())
    (tmp_path / "rex" / "fine_tuned-0-0.png").unlink()
    page = run_page(uri, summary)
    assert page.count('class="pair"') == 5


def test_pictures_are_read_from_several_places(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "a.png").write_bytes(b"a")
    fsspec.filesystem("memory").pipe_file("/pictures/b.png", b"b")
    wanted = [str(tmp_path / "a.png"), "memory://pictures/b.png", str(tmp_path / "gone.png"), str(tmp_path / "a.png")]
    assert read_pictures(wanted) == {wanted[0]: b"a", wanted[1]: b"b"}


def batch_page(*subjects: Evaluated) -> str:
    results = [
        SubjectResult(
            record=SubjectRecord(name=each.subject, key="k", class_noun="car", identifier="sks", state="done"),
            evaluated=each,
        )
        for each in subjects
    ]
    return render_report(BatchResult(name="cars", facts=[], subjects=results))


def test_a_batch_shows_subjects_by_prompts(finished: Any) -> None:
    page = batch_page(*(evaluated(*finished(figures(warnings=("bad",)), name=name)) for name in ("rex", "mia")))
    assert page.count('<table class="matrix"') == 1
    assert '<th scope="col">a photo of [V] … on a carpet</th>' in page
    assert page.count('class="pair"') == 6
    assert '<tfoot><tr><th scope="row">all</th><td class="n" data-v="0.7">' in page


def test_figures_of_two_banks_stand_in_two_tables(finished: Any) -> None:
    first = evaluated(*finished(figures()))
    page = batch_page(first, replace(first, subject="mia", figures=figures(bank="paper")))
    assert page.count("<tfoot>") == 0
    assert "the bank miniature" in page
    assert "the bank paper" in page


def further(*hashes: str) -> Figures:
    """Figures of the miniature's bank, and of DINOv2 or DreamSim by these hashes."""
    measured = figures()
    for name, digit in zip(("dinov2", "dreamsim"), hashes, strict=False):
        one = replace(measured.figures["dino"], bank=BankId(name=name, hash=digit * 16))
        measured = replace(measured, figures={**measured.figures, name: one})
    return measured


def test_further_encoders_stand_in_tables_of_their_own(finished: Any) -> None:
    page = run_page(*finished(further("2", "3")))
    for title in ("DINOv2@2222222222222222", "DreamSim@3333333333333333"):
        assert f"Figures by {title}" in page
    assert "by DINOv2 (2222222222222222), beside the bank" in page
    assert page.count("by the encoders of the bank miniature") == 1

    first, second = (
        evaluated(*finished(further(*hashes), name=name)) for name, hashes in (("rex", "23"), ("mia", "43"))
    )
    page = batch_page(first, replace(second, subject="mia"))
    for title in ("the bank miniature@", "DINOv2@2222", "DINOv2@4444", "DreamSim@3333"):
        assert f"Figures by {title}" in page
    assert page.count("<tfoot>") == 2  # of the bank and of DreamSim; two DINOv2s have no mean


def test_the_page_of_a_large_batch_opens(finished: Any) -> None:
    first = evaluated(*finished(figures()))
    many = replace(first, prompts=first.prompts[:2] * 20, figures=None)  # 40 prompts
    page = batch_page(*(replace(many, subject=f"s-{place}") for place in range(60)))
    assert page.count('class="pair"') == MOST_CELLS
    assert "35 more subjects are on their own pages" in page
    assert len(page) < 5_000_000


@pytest.mark.parametrize("measured", [None, figures()])
def test_a_study_reads_what_a_run_and_a_batch_left(finished: Any, tmp_path: Path, measured: Figures | None) -> None:
    uri, _ = finished(measured)
    rows = [{"subject": "rex", "state": "done", "uri": uri}, {"subject": "mia", "state": "failed", "uri": None}]
    (tmp_path / "summary.json").write_text(json.dumps({"results": rows}))
    assert has_samples(uri)
    for address in (uri, str(tmp_path)):
        samples = read_samples(address)["rex"]
        assert list(samples.samples) == [f"a photo of {IDENTIFIER_PLACEHOLDER} car {place}" for place in PLACES]
        assert all(len(pictures) == 2 for pictures in samples.samples.values())
        assert samples.references == (png(1, 0, 0), png(2, 0, 0))


def test_a_study_of_two_subjects_is_warned_of(finished: Any, tmp_path: Path) -> None:
    (rex, _), (mia, _) = finished(figures()), finished(name="mia")
    said: list[str] = []
    open_study(tmp_path / "two.sqlite", StudySettings(a=rex, b=mia), tracking_uri=None, say=said.append)
    assert said[0].startswith("warning: A shows rex and B mia. If those are two subjects, raters compare subjects")
    said.clear()
    summary = json.loads((Path(mia) / "summary.json").read_text()) | {"subject": "rex"}
    (Path(mia) / "summary.json").write_text(json.dumps(summary))
    open_study(tmp_path / "one.sqlite", StudySettings(a=rex, b=mia), tracking_uri=None, say=said.append)
    assert said == []


def test_every_figure_has_a_name_in_words() -> None:
    assert set(FIGURES) == set(FIGURE_NAMES)


def test_a_study_reads_an_evaluation_alone(finished: Any, tmp_path: Path) -> None:
    uri, summary = finished(figures())
    content = json.loads((tmp_path / "rex" / "evaluation.json").read_text())
    (tmp_path / "photo.png").write_bytes(png(9, 9, 9))
    named = {name: summary[name] for name in ("subject", "class_noun", "identifier")}
    content |= named | {"instance_images": [str(tmp_path / "photo.png")]}
    del content["photographs"]  # as earlier versions wrote it
    (tmp_path / "again.json").write_text(json.dumps(content))
    assert has_samples(str(tmp_path / "again.json"))
    samples = read_samples(str(tmp_path / "again.json"))["rex"]
    assert samples.references == (png(9, 9, 9),)
    assert len(samples.samples) == len(PLACES)
    with pytest.raises(InputError, match="isn't an evaluation"):
        read_samples(f"{uri}/summary.json")
    with pytest.raises(InputError, match="no evaluation at"):
        read_samples(f"{uri}/gone.json")
    (tmp_path / "photo.png").unlink()
    with pytest.raises(InputError, match="none of rex's photographs"):
        read_samples(str(tmp_path / "again.json"))
