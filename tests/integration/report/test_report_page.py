"""The pages of a run and of a batch in a real browser: by mouse and by keys, on phones and large screens."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import Browser, needs_browser, open_browser
from PIL import Image

from dreambooth.evaluation.bootstrap import Interval
from dreambooth.evaluation.figures import BankId, Figure, Figures, NearestInstance, PromptRow
from pipelines.report.batch_report import render_report
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.evaluated import Evaluated, PromptPictures
from pipelines.report.pages import Cell
from pipelines.report.run_report import RunFacts, render_run
from pipelines.tasks import SubjectRecord

pytestmark = needs_browser

ROWS = "[...document.querySelectorAll('#subjects tbody tr:not([hidden])')]"
NAMES = f"{ROWS}.map(row => row.dataset.name[0]).join('')"
LONG = "s3://a-bucket/with/a/very/long/address/that/has/no/place/to/be/broken/in/at/all"
SIMILARITIES = {"b-long-name-of-a-subject-that-is-as-long-as-allowed": 0.0, "c": -0.2, "a": 0.9, "d": None}
COPIES = ("samples copy the photographs (50% are near-copies): fewer steps or more class images",)
ENTER, SPACE, ESCAPE, BACKSPACE = "\ue007", " ", "\ue00c", "\ue003"
HISTORY = [{"step": i, "loss": 0.1, "instance_loss": 0.1, "prior_loss": 0.1} for i in range(9)]


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    bank = BankId(name="miniature", hash="0123456789abcdef")
    interval = Interval(mean=0.7, low=0.6, high=0.8, n=25)
    prompts = [f"a photo of sks dog in place {place}" for place in range(25)]
    addresses = []
    for place in range(51):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (5 * place, 80, 0)).save(buffer, "PNG")
        (tmp_path / f"{place}.png").write_bytes(buffer.getvalue())
        addresses.append(str(tmp_path / f"{place}.png"))
    row = {"application": "recontextualization", "clip_i": 0.8, "clip_t": 0.31, "clip_t_no_identifier": 0.3}
    more = {"clip_t_base": 0.33, "followed": True, "div": 0.1, "background_leak": None, "near_copies": 0.0}
    return Evaluated(
        subject="rex",
        class_noun="dog",
        identifier="sks",
        instance=(addresses[50],) * 5,
        prompts=tuple(
            PromptPictures(prompt=prompt, fine_tuned=(addresses[place],), base=(addresses[25 + place],))
            for place, prompt in enumerate(prompts)
        ),
        figures=Figures(
            bank=bank,
            figures={name: Figure(bank=bank, interval=interval, values=(0.7,) * 25) for name in ("dino", "clip_t")},
            per_prompt=tuple(
                PromptRow(prompt=prompt, dino=place / 25, **row, **more)  # type: ignore[arg-type]
                for place, prompt in enumerate(prompts)
            ),
            nearest=tuple(
                NearestInstance(sample=place, prompt=prompt, instance=place % 5, similarity=0.5, near_copy=False)
                for place, prompt in enumerate(prompts)
            ),
            warnings=(),
            unmeasured={},
        ),
    )


def subject(name: str, similarity: float | None, evaluated: Evaluated | None) -> SubjectResult:
    return SubjectResult(
        record=SubjectRecord(name=name, key="k", class_noun="dog", identifier="sks", state="done", attempts=1),
        page="rex/report.html",
        sample=None if evaluated is None else evaluated.prompts[0].fine_tuned[0],
        similarity=None if similarity is None else {"identifier": similarity, "instance": 0.7},
        verdict={"near_copies": 0.5 if name == "c" else 0.0, "prompts_followed": 1.0},
        warnings=COPIES if name == "c" else (),
        history=HISTORY,
        evaluated=evaluated and replace(evaluated, subject=name),
    )


def batch_page(evaluated: Evaluated) -> str:
    subjects = [subject(name, similarity, evaluated) for name, similarity in SIMILARITIES.items()]
    lost = SubjectRecord(
        name="lost", key="k", class_noun="dog", identifier="sks", state="failed", reason="no memory", traceback="Trace"
    )
    facts, commands = [("writes to", LONG)], [("MLflow", "mlflow ui --backend-store-uri sqlite:///mlflow.db")]
    return render_report(
        BatchResult(
            name="pets", facts=facts, commands=commands, subjects=[*subjects, SubjectResult(record=lost)], lede="5"
        )
    )


def run_page(evaluated: Evaluated, uri: Path | None = None) -> str:
    verdict = {"near_copies": 0.5, "prompts_followed": 1.0, "warnings": COPIES}
    summary = {"subject": "rex", "class_noun": "dog", "identifier": "sks", "key": "key", "verdict": verdict}
    summary |= {"scores": [{"step": 4, "dino": 0.4, "clip_t": 0.3}, {"step": 8, "dino": 0.6, "clip_t": 0.3}]}
    facts = RunFacts(
        settings=[("seed", "0"), ("time", "15 min")],
        commands=[("generate", 'dreambooth generate --model models:/dreambooth-rex@latest "a [V] dog"')],
        places=[("model", LONG)],
        batch=Cell(text="pets", link="../report.html"),
    )
    return render_run(summary, facts, HISTORY, evaluated, uri=None if uri is None else str(uri))


@pytest.fixture
def pages(evaluated: Evaluated, tmp_path: Path) -> tuple[str, str]:
    """Addresses of a batch's page and of a run's, which link to each other."""
    steps = tmp_path / "rex" / "validation" / "key"
    steps.mkdir(parents=True)
    for step in (4, 8):
        (steps / f"{step:08d}-0.png").write_bytes(Path(evaluated.instance[0]).read_bytes())
    for path, html in (
        ("report.html", batch_page(evaluated)),
        ("rex/report.html", run_page(evaluated, tmp_path / "rex")),
    ):
        (tmp_path / path).write_text(html)
    return (tmp_path / "report.html").as_uri(), (tmp_path / "rex" / "report.html").as_uri()


def sort_by(page: Browser, title: str, key: str = ENTER) -> str:
    heads = "[...document.querySelectorAll('#subjects thead button')]"
    page.run(f"{heads}.find(head => head.textContent === '{title}').focus()")
    page.press(key)
    names: str = page.run(f"return {NAMES}")
    return names


def test_a_batch_is_sorted_filtered_and_linked(pages: tuple[str, str], tmp_path: Path) -> None:
    batch, run = pages
    with open_browser(tmp_path / "profile") as page:
        page.open(batch)
        assert page.run(f"return {NAMES}") == "lcbda"  # failed, copies, then the least similar
        assert sort_by(page, "similarity") in ("ldcba", "dlcba")  # what was not measured is below all that was
        assert sort_by(page, "similarity", SPACE)[:3] == "abc"
        assert sort_by(page, "subject") == "abcdl"
        assert page.run("return document.querySelectorAll('[aria-sort]').length") == 1
        page.click(".chips [data-verdict=copies]")
        assert page.run(f"return {NAMES}") == "c"
        assert page.run("return document.getElementById('shown').textContent") == "1 of 5 shown"
        assert page.run("return document.querySelectorAll('.matrix tbody tr:not([hidden])').length") == 1
        page.click(".chips [data-verdict=copies]")
        page.run("document.getElementById('word').focus()")
        page.press(*"memory")
        assert page.run(f"return {NAMES}") == "l"
        page.press(*[BACKSPACE] * 6)
        page.click("#subjects tbody a")
        assert page.run("return location.href") == run
        page.click("nav a")
        assert page.run("return location.href") == batch
        assert page.console() == []


def test_pictures_point_at_the_base_models_and_open_by_keys(pages: tuple[str, str], tmp_path: Path) -> None:
    opacity = "return getComputedStyle(document.querySelector('.pair .base')).opacity"
    with open_browser(tmp_path / "profile") as page:
        for address, pairs in zip(pages, (100, 27), strict=True):
            page.open(address)
            assert page.run("return document.querySelectorAll('.pair').length") == pairs
            assert page.run(opacity) == "0"
            page.run("document.querySelector('.pair').scrollIntoView({block: 'center'})")
            page.hover(".pair")
            assert page.run(opacity) == "1"
            page.hover("h2")
            assert page.run(opacity) == "0"
            page.run("document.querySelector('.pair').focus()")
            assert page.run(opacity) == "1"
            for key in (ENTER, SPACE):
                page.press(key)
                assert page.run(
                    "return [...document.querySelectorAll('dialog[open] figcaption')].map(each => each.textContent)"
                ) == ["fine-tuned", "base model"]
                page.press(ESCAPE)
                assert page.run("return document.querySelector('dialog[open]')") is None
            page.until("document.querySelector('.pair img').src.startsWith('data:')")
            page.click("[data-copy]")
            page.until("document.querySelector('[data-copy]').textContent === 'Copied'")
        assert page.console() == []


def test_charts_have_axes_and_values_under_the_pointer(pages: tuple[str, str], tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as page:
        page.open(pages[1])
        page.run("document.querySelector('.chart').scrollIntoView({block: 'center'})")
        page.until("document.querySelectorAll('.chart canvas').length === 2")
        page.hover(".chart .u-over")
        values = "[...document.querySelector('.chart').querySelectorAll('.u-value')].map(each => each.textContent)"
        values = page.until(f"{values}.filter(text => text && text !== '--')")
        assert values[-1] == "0.1"
        page.open(pages[0])
        page.run("document.querySelector('.chart').scrollIntoView({block: 'center'})")
        page.until("document.querySelector('.chart canvas')")
        page.hover(".chart .u-over")
        assert page.until(
            "document.querySelector('.chart').nextElementSibling.textContent.match(/^.+: 0.1 at step [0-9]$/)"
        )
        assert page.console() == []


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_have_no_faults_for_eyes_and_readers(pages: tuple[str, str], tmp_path: Path, width: int) -> None:
    with open_browser(tmp_path / "profile", width=width) as page:
        for address in pages:
            page.open(address)
            assert page.faults() == []
            assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert page.console() == []


@pytest.mark.parametrize("width", [1280, 1920])
def test_names_are_narrow_and_pictures_wide(evaluated: Evaluated, tmp_path: Path, width: int) -> None:
    few = replace(evaluated, prompts=evaluated.prompts[:5], figures=None)
    (tmp_path / "report.html").write_text(batch_page(few))
    with open_browser(tmp_path / "profile", width=width) as page:
        page.open((tmp_path / "report.html").as_uri())
        name, picture = page.run(
            "return [...document.querySelector('.matrix tbody tr').children].map(each => each.clientWidth).slice(0, 2)"
        )
        room = page.run("return document.querySelector('.scroll:has(.matrix)').clientWidth")
        assert name < 0.12 * room
        assert name + 5 * picture > 0.95 * room


def test_a_phone_shows_the_similarity_the_base_model_and_that_there_is_more(
    pages: tuple[str, str], tmp_path: Path
) -> None:
    with open_browser(tmp_path / "profile", width=390, height=844) as page:
        for address in pages:
            page.open(address)
            assert page.run("return innerWidth") == 390
            tuned, base = page.run(
                "return [...document.querySelector('.pair').children].map(each => each.getBoundingClientRect().left)"
            )
            assert base > tuned
        page.open(pages[0])
        row = "document.querySelector('.matrix tbody tr')"
        page.run(f"{row}.querySelectorAll('img').forEach(each => each.removeAttribute('src'))")  # as those out of sight
        height, width = page.run(f"return [{row}.clientHeight, {row}.cells[1].clientWidth]")
        assert height < width  # two pictures side by side, loaded or not
        cells = "document.querySelector('#subjects tbody tr:nth-child(2)').cells"
        head = "document.querySelectorAll('#subjects thead th')[2]"
        assert page.run(f"return {head}.textContent") == "similarity"
        assert page.run(f"return {head}.getBoundingClientRect().right") < 390
        assert page.run("return getComputedStyle(document.querySelector('.sideways')).display") == "block"
        page.run("document.querySelector('#subjects .scroll').scrollLeft = 300")
        assert page.run(f"return {cells}[0].getBoundingClientRect().left") >= 0  # names stay in sight
        assert page.console() == []


def test_a_thousand_subjects_open_in_two_seconds(evaluated: Evaluated, tmp_path: Path) -> None:
    shown = [subject(f"s-{place}", place / 1000, evaluated) for place in range(200)]
    rest = [
        replace(subject(f"s-{place}", place / 1000, None), sample=evaluated.instance[0]) for place in range(200, 1001)
    ]
    (tmp_path / "report.html").write_text(render_report(BatchResult(name="many", facts=(), subjects=[*shown, *rest])))
    with open_browser(tmp_path / "profile", width=1280) as page:
        assert page.seconds_to_open((tmp_path / "report.html").as_uri()) < 2
        loaded = "document.querySelectorAll('#subjects img[src]').length"
        assert 0 < page.until(loaded) < 100
        assert page.run("return document.querySelectorAll('#subjects img').length") == 1000  # of 1001
        assert page.run(f"return {ROWS}.length") == 100
        page.run("document.getElementById('word').focus()")
        page.press(*"s-99")
        assert page.until(f"{ROWS}.length") == 11
        page.press(*[BACKSPACE] * 4)
        sort_by(page, "similarity")
        sort_by(page, "similarity")
        assert page.run(f"return {ROWS}[0].dataset.name") == "s-1000"
        page.run(f"{ROWS}.at(-1).scrollIntoView()")
        page.until(f"{ROWS}.length > 100")
        page.until("[...document.querySelectorAll('#subjects tbody tr:nth-child(100) img')].every(each => each.src)")
