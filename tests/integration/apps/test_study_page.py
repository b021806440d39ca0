"""A study in a real browser, with mouse, keys and a phone's screen; and from real folders and models."""

import io
from pathlib import Path

import pytest
from chromium import Browser, needs_browser, open_browser
from PIL import Image

from pipelines.apps.study.server import StudyServer
from pipelines.apps.study.store import StudyFile
from pipelines.apps.study.study import SubjectSamples, make_questions

LEFT, RIGHT, DOWN, BACK = "\ue012", "\ue014", "\ue015", "\ue003"  # WebDriver's codes of keys
PROMPT = "a photo of [V] <b>dog</b> with a very long and unbreakable" + "-collar" * 20


def picture(*colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def study(tmp_path: Path) -> StudyFile:
    def samples(red: int) -> dict[str, SubjectSamples]:
        references = tuple(picture(0, 0, 50 * i) for i in range(5))
        pictures = {PROMPT: tuple(picture(red, 10 * i, 0) for i in range(3))}
        return {"rex": SubjectSamples(subject="rex", class_noun="dog", references=references, samples=pictures)}

    questions = make_questions(samples(255), samples(100), count=3, seed=1)
    return StudyFile.create(tmp_path / "study.sqlite", questions, {"a": "A", "b": "B", "seed": 1})


def begin(page: Browser, name: str) -> None:
    page.until("!document.getElementById('start').hidden")
    page.run(f"document.getElementById('name').value = {name!r}")
    page.click("#who button")


def at(page: Browser, step: str) -> None:
    page.until(f"document.getElementById('count').textContent === '{step}'")
    page.until("!document.querySelector('[data-side=left]').disabled")


def sides(study: StudyFile, rater: str) -> list[tuple[str | None, str | None]]:
    """What a rater has answered, in the order that they met the questions."""
    return [(q.answers.get("subject"), q.answers.get("prompt")) for q in study.questions_for(rater)]


@needs_browser
def test_clicks_and_keys_answer_and_a_rater_goes_on(study: StudyFile, tmp_path: Path) -> None:
    with StudyServer(study, port=0) as server, open_browser(tmp_path / "profile") as page:
        page.open(server.url)
        begin(page, "Ann")
        at(page, "1 of 6")
        assert "this particular dog" in page.run("return document.getElementById('question').textContent")
        assert page.run("return document.querySelectorAll('#references img').length") == 5
        page.click("[data-side=left]")
        at(page, "2 of 6")
        shown = page.run("return document.getElementById('prompt').textContent")
        assert shown == PROMPT.replace("[V] ", "a ").replace("of a", "of a", 1)  # as text, with its tags
        page.press("3")
        at(page, "3 of 6")
        page.press(DOWN)
        at(page, "4 of 6")
        assert sides(study, "Ann")[:2] == [("left", "right"), ("neither", None)]

        page.press(BACK)
        at(page, "3 of 6")
        assert page.run("return document.querySelector('.given').dataset.side") == "neither"
        page.press(RIGHT)
        at(page, "4 of 6")
        assert sides(study, "Ann")[1] == ("right", None)

        page.open(server.url)  # as after a day
        assert page.until("document.getElementById('name').value") == "Ann"
        page.click("#who button")
        at(page, "4 of 6")
        for step, key in ((5, LEFT), (6, "2")):
            page.press(key)
            at(page, f"{step} of 6")
        page.press("1")
        page.until("!document.getElementById('end').hidden")
        assert sides(study, "Ann") == [("left", "right"), ("right", "left"), ("neither", "left")]

        page.click("#other")
        begin(page, "Bob")
        at(page, "1 of 6")
        page.press("2")
        at(page, "2 of 6")
        assert sides(study, "Bob")[0] == ("neither", None)
        assert page.console() == []


@needs_browser
def test_it_fits_a_phone(study: StudyFile, tmp_path: Path) -> None:
    with StudyServer(study, port=0) as server, open_browser(tmp_path / "profile", width=390, height=844) as page:
        page.open(server.url)
        assert page.faults() == []
        begin(page, "Ann")
        for step in range(1, 7):
            at(page, f"{step} of 6")
            assert page.run("return innerWidth") == 390
            assert page.run("return document.documentElement.scrollWidth") == 390
            assert page.run("return document.querySelector('.neither').getBoundingClientRect().bottom") < 844
            if step in (1, 2):
                assert page.faults() == []
            page.click("[data-side=neither]")
        page.until("!document.getElementById('end').hidden")
        assert page.faults() == []
        assert page.console() == []


@needs_browser
def test_pictures_are_level_in_a_narrow_window(study: StudyFile, tmp_path: Path) -> None:
    # With keys in its caption the right one has two lines, and people prefer the higher picture.
    narrow = open_browser(tmp_path / "profile", width=390, touch=False)
    with StudyServer(study, port=0) as server, narrow as page:
        page.open(server.url)
        begin(page, "Ann")
        at(page, "1 of 6")
        heights = "[...document.querySelectorAll('.pair span')].map(caption => caption.clientHeight)"
        left, right = page.run(f"return {heights}")
        assert left < right
        tops = "[...document.querySelectorAll('.pair img')].map(image => image.getBoundingClientRect().top)"
        left, right = page.run(f"return {tops}")
        assert left == right


@needs_browser
def test_an_answer_that_cannot_be_kept_is_said_and_asked_again(study: StudyFile, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as page:
        with StudyServer(study, port=0) as server:
            page.open(server.url)
            begin(page, "Ann")
            at(page, "1 of 6")
            port = int(server.url.rstrip("/").rpartition(":")[2])
        page.press("1")
        page.until("document.getElementById('fault').textContent.includes('not saved')")
        assert sides(study, "Ann")[0] == (None, None)
        with StudyServer(study, port=port):
            page.press("3")
            at(page, "2 of 6")
            assert sides(study, "Ann")[0] == ("right", None)
