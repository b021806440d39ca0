"""A study's questions, its file and its figures."""

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from study_samples import A, B, picture, samples

from dreambooth.errors import InputError
from pipelines.apps.study.report import describe_report, majority, preferences, report, wilson
from pipelines.apps.study.store import Answer, StudyFile
from pipelines.apps.study.study import SubjectSamples, make_questions


def owner(png: bytes) -> str:
    with Image.open(io.BytesIO(png)) as image:
        pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return "a" if pixel[0] == 10 else "b"


class TestQuestions:
    def test_the_same_seed_is_the_same_study(self) -> None:
        first = make_questions(A, B, count=5, seed=1)
        assert make_questions(A, B, count=5, seed=1) == first
        assert make_questions(A, B, count=5, seed=2) != first

    def test_sides_are_as_often_one_way_as_the_other_and_said_right(self) -> None:
        questions = make_questions(A, B, count=12, seed=3)
        assert Counter(question.left_is for question in questions) == {"a": 6, "b": 6}
        for question in questions:
            assert owner(question.left) == question.left_is
            assert owner(question.right) != question.left_is

    def test_both_pictures_are_of_one_prompt_and_place_and_none_comes_twice(self) -> None:
        questions = make_questions(A, B, count=100, seed=0)
        assert len(questions) == 12
        for question in questions:
            pair = (question.left, question.right) if question.left_is == "a" else (question.right, question.left)
            of_a, of_b = A["rex"].samples[question.prompt], B["rex"].samples[question.prompt]
            assert pair in list(zip(of_a, of_b, strict=True))
        assert len({question.left for question in questions} | {question.right for question in questions}) == 24

    def test_subjects_and_prompts_take_turns(self) -> None:
        a, b = ({name: samples(side, subject=name) for name in ("rex", "mia", "tom")} for side in (10, 20))
        questions = make_questions(a, b, count=9, seed=0)
        assert set(Counter((question.subject, question.prompt) for question in questions).values()) == {1}

    def test_one_subject_each_is_compared_whatever_its_name(self) -> None:
        assert make_questions(A, {"rex-2": samples(20, subject="rex-2")}, count=1, seed=0)[0].subject == "rex"

    @pytest.mark.parametrize(
        ("b", "words"),
        [
            ({"mia": samples(20), "tom": samples(20)}, "no subject in common"),
            ({"rex": replace(samples(20), class_noun="cat")}, "a dog in A and a cat in B"),
            ({"rex": replace(samples(20), samples={"a [V] dog": (picture(1),)})}, "no prompt of rex in common"),
            (A, "show the same pictures"),
        ],
    )
    def test_what_cannot_be_compared_is_said(self, b: Mapping[str, SubjectSamples], words: str) -> None:
        with pytest.raises(InputError, match=words):
            make_questions(A, b, count=5, seed=0)


class TestFile:
    def test_choices_follow_the_sides(self, study: StudyFile) -> None:
        for question in study.questions_for("ann"):
            study.answer(question=question.number, aspect="subject", rater="ann", side="left")
            left = study.picture(question.left)
            assert left is not None
            [answer] = [answer for answer in study.answers() if answer.question == question.number]
            assert answer.choice == owner(left)

    def test_a_rater_goes_on_where_they_were(self, study: StudyFile, tmp_path: Path) -> None:
        first = study.questions_for("ann")[0]
        study.answer(question=first.number, aspect="subject", rater="ann", side="neither")
        again = StudyFile(tmp_path / "study.sqlite")
        assert [question.number for question in again.questions_for("ann")] == [
            question.number for question in study.questions_for("ann")
        ]
        assert again.questions_for("ann")[0].answers == {"subject": "neither"}
        assert all(not question.answers for question in again.questions_for("bob"))

    def test_raters_meet_the_questions_in_different_orders(self, study: StudyFile) -> None:
        orders = {tuple(q.number for q in study.questions_for(name)) for name in ("ann", "bob", "cid", "dora")}
        assert len(orders) > 1
        assert {tuple(sorted(order)) for order in orders} == {(1, 2, 3, 4, 5, 6)}

    def test_an_answer_given_again_takes_the_place_of_the_first(self, study: StudyFile) -> None:
        for side in ("left", "neither"):
            study.answer(question=1, aspect="prompt", rater="ann", side=side)  # type: ignore[arg-type]
        assert [answer.choice for answer in study.answers()] == ["neither"]

    def test_pictures_say_nothing_of_where_they_came_from(self, tmp_path: Path) -> None:
        secret = replace(samples(10), samples={"a [V] dog": (picture(1, 2, 3, Software="model A"),)})
        plain = replace(samples(20), samples={"a [V] dog": (picture(4, 5, 6),)})
        questions = make_questions({"rex": secret}, {"rex": plain}, count=1, seed=0)
        StudyFile.create(tmp_path / "s.sqlite", questions, {"a": "A", "b": "B", "seed": 0})
        assert b"Software" in secret.samples["a [V] dog"][0]
        assert b"Software" not in (tmp_path / "s.sqlite").read_bytes()

    @pytest.mark.parametrize("content", [None, b"", b"not a database at all, but text" * 100])
    def test_what_is_no_study(self, tmp_path: Path, content: bytes | None) -> None:
        if content is not None:
            (tmp_path / "s.sqlite").write_bytes(content)
        with pytest.raises(InputError, match=r"no study at|isn't a study"):
            StudyFile(tmp_path / "s.sqlite")


def answered(*choices: str, question: int = 1) -> list[Answer]:
    return [
        Answer(question=question, aspect="subject", rater=f"r{place}", choice=choice)
        for place, choice in enumerate(choices)
    ]


class TestFigures:
    @pytest.mark.parametrize(
        ("choices", "expected"),
        [("a", "a"), ("aab", "a"), ("ab", "neither"), ("abn", "neither"), ("bbaan", "neither"), ("nnb", "neither")],
    )
    def test_majority(self, choices: str, expected: str) -> None:
        named = {"a": "a", "b": "b", "n": "neither"}
        assert majority([named[letter] for letter in choices]) == expected

    @pytest.mark.parametrize(("count", "n"), [(0, 10), (1, 3), (5, 10), (10, 10), (81, 100)])
    def test_wilson_ends_where_the_score_test_would_reject(self, count: int, n: int) -> None:
        share = wilson(count, n)
        assert 0 <= share.low <= share.mean <= share.high <= 1
        for end in {share.low, share.high} - {share.mean}:
            assert abs(share.mean - end) / (end * (1 - end) / n) ** 0.5 == pytest.approx(1.96, abs=1e-4)

    def test_wilson_of_none_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="0 of 0"):
            wilson(0, 0)

    def test_shares_are_of_questions_not_of_answers(self) -> None:
        answers = [*answered("a", "a", "b"), *answered("b", question=2), *answered("a", question=3)]
        [found] = preferences(answers)
        assert {choice: share.count for choice, share in found.shares.items()} == {"a": 2, "neither": 0, "b": 1}
        assert sum(share.mean for share in found.shares.values()) == pytest.approx(1)
        assert found.agreement == pytest.approx(1 / 3)  # of three pairs, all of question 1

    def test_a_report_in_words(self) -> None:
        about = {"a": "models:/x/1", "b": "models:/y/2", "seed": 0}
        lines = "\n".join(describe_report(report(about, answered("a"), 4)))
        assert "4 questions, 1 rater, 1 answer" in lines
        assert "100% (21% to 100%)" in lines
        assert "nobody has answered yet" in "\n".join(describe_report(report(about, [], 4)))


def test_photographs_are_looked_at_as_a_run_looks_at_them(instance_folder: Path, tmp_path: Path) -> None:
    import shutil

    from pipelines.apps.study.samples import read_references

    photos = Path(shutil.copytree(instance_folder, tmp_path / "photos"))
    shutil.copyfile(photos / "00.png", photos / "05.png")
    said: list[str] = []
    assert len(read_references(str(photos), said.append)) == 6
    assert said == ["warning: 00.png and 05.png are the same picture"]
    (photos / "06.png").write_bytes((photos / "00.png").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"06\.png is damaged"):
        read_references(str(photos), said.append)
