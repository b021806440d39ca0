"""A study's questions, its file, its figures, and what its server refuses."""

import http.client
import io
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from dreambooth.errors import InputError
from pipelines.apps.study.report import describe_report, majority, preferences, report, wilson
from pipelines.apps.study.server import StudyServer
from pipelines.apps.study.store import Answer, StudyFile
from pipelines.apps.study.study import SubjectSamples, make_questions


def picture(*colour: int, **said: str) -> bytes:
    buffer, more = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, value in said.items():
        more.add_text(name, value)
    Image.new("RGB", (8, 8), tuple(colour)).save(buffer, "PNG", pnginfo=more)
    return buffer.getvalue()


def samples(side: int, *, subject: str = "rex", prompts: int = 3, images: int = 4) -> SubjectSamples:
    """Pictures whose red says whose they are."""
    return SubjectSamples(
        subject=subject,
        class_noun="dog",
        references=(picture(0, 0, 255),),
        samples={
            f"a photo of [V] dog, {prompt}": tuple(picture(side, prompt, image) for image in range(images))
            for prompt in range(prompts)
        },
    )


def owner(png: bytes) -> str:
    with Image.open(io.BytesIO(png)) as image:
        pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return "a" if pixel[0] == 10 else "b"


_WITHOUT_BODY = (
    b"POST /answers HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
)
A, B = {"rex": samples(10)}, {"rex": samples(20)}


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


@pytest.fixture
def study(tmp_path: Path) -> StudyFile:
    return StudyFile.create(
        tmp_path / "study.sqlite", make_questions(A, B, count=6, seed=0), {"a": "A", "b": "B", "seed": 0}
    )


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


class TestServer:
    @pytest.fixture
    def ask(self, study: StudyFile) -> Iterator[Any]:
        with StudyServer(study, port=0) as server:
            port = int(server.url.rstrip("/").rpartition(":")[2])

            def ask(
                path: str, body: Any = None, *, host: str = "localhost", kind: str = "application/json"
            ) -> tuple[int, bytes, http.client.HTTPMessage]:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                headers = {"Host": f"{host}:{port}"} | ({"Content-Type": kind} if body is not None else {})
                content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
                connection.request("GET" if body is None else "POST", path, content, headers)
                answer = connection.getresponse()
                result = answer.status, answer.read(), answer.headers
                connection.close()
                return result

            yield ask

    def test_questions_do_not_say_whose_a_picture_is(self, ask: Any, study: StudyFile) -> None:
        status, content, _ = ask("/questions?rater=ann")
        assert status == 200
        questions = json.loads(content)
        assert len(questions) == 6
        keys = {"number", "class_noun", "prompt", "references", "left", "right", "answers"}
        assert all(set(question) == keys for question in questions)
        assert questions[0]["prompt"].startswith("a photo of a dog, ")
        assert ask(f"/pictures/{questions[0]['left']}")[1] == study.picture(questions[0]["left"])

    def test_an_answer_is_kept(self, ask: Any, study: StudyFile) -> None:
        given = {"rater": " ann ", "question": 2, "aspect": "subject", "side": "right"}
        assert ask("/answers", given)[0] == 200
        assert [(answer.question, answer.rater) for answer in study.answers()] == [(2, "ann")]

    @pytest.mark.parametrize(
        ("changes", "status"),
        [
            ({"question": 7}, 400),
            ({"question": "x"}, 400),
            ({"question": 1e400}, 400),
            ({"question": 2**70}, 400),
            ({"aspect": "taste"}, 400),
            ({"aspect": []}, 400),
            ({"side": "a"}, 400),
            ({"rater": ""}, 400),
            ({"rater": None}, 400),
            ({"rater": "x" * 61}, 400),
            ({"rater": "x" * 5000}, 413),
        ],
    )
    def test_what_is_no_answer_is_refused(self, ask: Any, study: StudyFile, changes: Any, status: int) -> None:
        given = {"rater": "ann", "question": 2, "aspect": "subject", "side": "right"} | changes
        got, content, _ = ask("/answers", given)
        assert got == status
        assert json.loads(content)["error"]
        assert study.answers() == ()

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 4000])
    def test_what_is_no_json_is_refused(self, ask: Any, body: bytes) -> None:
        assert ask("/answers", body)[0] == 400

    def test_pages_of_other_origins_cannot_reach_it(
        self, ask: Any, study: StudyFile, capfd: pytest.CaptureFixture[str]
    ) -> None:
        given = {"rater": "ann", "question": 2, "aspect": "subject", "side": "right"}
        assert ask("/answers", given, kind="text/plain")[0] == 415  # what a form of another page could send
        assert ask("/answers", given, host="evil.example")[0] == 403
        assert ask("/", host="evil.example")[0] == 403
        assert study.answers() == ()
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize(
        "path", ["/study.sqlite", "/pictures/", "/pictures/../study.sqlite", "/../../etc/passwd", "//etc/passwd"]
    )
    def test_it_serves_no_files(self, ask: Any, path: str) -> None:
        assert ask(path)[0] == 404

    def test_the_page_may_run_its_own_script_alone(self, ask: Any) -> None:
        policy = ask("/")[2]["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'sha256-" in policy
        assert "unsafe" not in policy

    def test_a_body_of_unknown_length_is_not_read(self, study: StudyFile) -> None:
        with StudyServer(study, port=0) as server:
            connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rstrip("/").rpartition(":")[2]))
            connection.request("POST", "/answers", iter([b"{}"]), {"Content-Type": "application/json"})
            assert connection.getresponse().status == 413
            connection.close()

    def test_connections_that_say_nothing_hold_nobody_up(self, study: StudyFile) -> None:
        with StudyServer(study, port=0) as server:
            port = int(server.url.rstrip("/").rpartition(":")[2])
            silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/questions?rater=ann")
            assert connection.getresponse().status == 200
            for one in [connection, *silent]:
                one.close()

    @pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", _WITHOUT_BODY])
    def test_a_connection_whose_request_does_not_arrive_is_closed(
        self, study: StudyFile, capfd: pytest.CaptureFixture[str], sent: bytes
    ) -> None:
        with StudyServer(study, port=0, request_seconds=0.3) as server:
            port = int(server.url.rstrip("/").rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
                slow.sendall(sent)
                assert slow.recv(4096) == b""
        assert capfd.readouterr().err == ""

    def test_one_whose_headers_come_byte_by_byte_is_closed(self, study: StudyFile) -> None:
        with StudyServer(study, port=0, request_seconds=0.3) as server:
            port = int(server.url.rstrip("/").rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=0.05) as slow:
                until, closed = time.monotonic() + 10, False
                while not closed and time.monotonic() < until:
                    with suppress(TimeoutError):
                        slow.sendall(b"x")
                        closed = slow.recv(4096) == b""
            assert closed

    def test_one_that_goes_on_asking_stays(self, study: StudyFile) -> None:
        with StudyServer(study, port=0, request_seconds=0.3) as server:
            port = int(server.url.rstrip("/").rpartition(":")[2])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.connect()
            asked_by = connection.sock
            for _ in range(3):
                connection.request("GET", "/questions?rater=ann")
                answer = connection.getresponse()
                assert (answer.status, bool(answer.read())) == (200, True)
                time.sleep(0.4)  # longer than a request may take
            assert connection.sock is asked_by
            connection.close()

    def test_a_taken_port_is_said(self, study: StudyFile) -> None:
        with StudyServer(study, port=0) as server:
            port = int(server.url.rstrip("/").rpartition(":")[2])
            with pytest.raises(InputError, match=f"port {port}"):
                StudyServer(study, port=port)


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
