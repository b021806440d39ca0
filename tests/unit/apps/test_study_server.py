"""What a study's server answers, and what it refuses."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from dreambooth.errors import InputError
from pipelines.apps.study.server import StudyServer
from pipelines.apps.study.store import StudyFile

_WITHOUT_BODY = (
    b"POST /answers HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
)


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
