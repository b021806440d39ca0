"""What `dreambooth serve` answers to requests that are wrong: a status, and a sentence that can be read."""

import asyncio
import json
from typing import Any

import pytest

from dreambooth.errors import InputError
from pipelines.apps.serve.api import make_api
from pipelines.apps.serve.requests import MOST_BYTES, Asked, Drawn, Refused, read_request
from pipelines.apps.serve.sampler import alike
from pipelines.apps.serve.subjects import ServedSubject

GOOD = {"subject": "rex", "prompt": "a photo of [V] dog"}
REX = ServedSubject(
    name="rex",
    address="models:/dreambooth-rex/3",
    identifier="zqx",
    class_noun="dog",
    base_model="miniature",
    base_hash="0",
    resolution=64,
)


async def draw(asked: Asked) -> Drawn:
    """As many files as asked for; the prompt decides what else happens."""
    if "crowd" in asked.prompt:
        raise Refused(429, "too many wait already; try again")
    return Drawn(images=tuple(bytes([place]) for place in range(asked.num)), warnings=("it is odd",))


def post(body: bytes, content_type: str | None = "application/json", *, chunk: int = 4096) -> tuple[int, Any, dict]:
    """The application's answer to a body, as a server would hand it over: (status, content, headers)."""
    sent: list[Any] = []
    parts = [body[start : start + chunk] for start in range(0, len(body), chunk)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": place < len(parts) - 1} for place, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1")] + ([(b"content-type", content_type.encode())] if content_type else [])
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(make_api([REX], draw, loopback=True)(scope, receive, send))
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content), dict(sent[0]["headers"])


def refused(body: bytes, content_type: str | None = "application/json") -> str:
    """The sentence of an answer 422."""
    status, answer, _ = post(body, content_type)
    assert status == 422, answer
    assert isinstance(answer["detail"], str)
    return answer["detail"]


def test_a_request_as_it_should_be() -> None:
    status, answer, _ = post(json.dumps(GOOD | {"num": 2, "seed": 2**63 - 9, "guidance_scale": 4}).encode())
    assert status == 200
    assert answer == {
        "subject": "rex",
        "model": "models:/dreambooth-rex/3",
        "seeds": [2**63 - 9, 2**63 - 8],
        "images": ["AA==", "AQ=="],
        "warnings": ["it is odd"],
    }


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", "", "prompt: expected at least one visible character"),
        ("prompt", " \n\t\u3000", "prompt: expected at least one visible character"),
        ("prompt", "a \0 dog", "prompt: expected visible characters, got the control character U+0000"),
        ("prompt", "a \x1b[31m dog", "control character U+001B"),
        ("prompt", "a \u202e dog", "control character U+202E"),
        ("prompt", "\ud800", "prompt holds half of a character (a lone surrogate)"),
        ("prompt", "a photo of [V] \udc00 dog", "prompt holds half of a character"),
        ("subject", "\ud83d", "subject holds half of a character"),
        ("prompt", 7, "prompt: must be text; got 7"),
        ("prompt", None, "prompt: must be text; got null"),
        ("prompt", ["a [V] dog"], "prompt: must be text; got ['a [V] dog']"),
        ("prompt", "x" * 1001, "prompt: string should have at most 1000 characters"),
        ("prompt", "a photo of [v] dog", "the prompt: '[v]' is no placeholder here; write [V]"),
        ("prompt", "a photo of {identifier}", "the prompt: '{identifier}' is no placeholder here; write [V]"),
        ("prompt", "a [V] {class_noun}", "write the class noun itself"),
        ("subject", "", "subject: string should have at least 1 character"),
        ("subject", 7, "subject: must be text"),
        ("num", 0, "num: must be at least 1; got 0"),
        ("num", 9, "num: must be at most 8; got 9"),
        ("num", "2", "num: must be a whole number; got '2'"),
        ("num", 2.5, "num: must be a whole number; got 2.5"),
        ("num", True, "num: must be a whole number; got true"),
        ("num", None, "num: must be a whole number; got null"),
        ("seed", -1, "seed: must be at least 0; got -1"),
        ("seed", 2**63 - 1, "seed: must be at most 9223372036854775800"),
        ("seed", 2**64, "seed: must be at most 9223372036854775800"),
        ("seed", 10**100, "seed: "),
        ("num_inference_steps", 0, "num_inference_steps: must be at least 1"),
        ("num_inference_steps", 201, "num_inference_steps: must be at most 200"),
        ("guidance_scale", 0.5, "guidance_scale: must be at least 1"),
        ("guidance_scale", 51, "guidance_scale: must be at most 50"),
        ("guidance_scale", float("nan"), "NaN is no number that JSON knows"),
        ("guidance_scale", float("inf"), "Infinity is no number that JSON knows"),
        ("guidance_scale", float("-inf"), "-Infinity is no number that JSON knows"),
        ("num", float("nan"), "NaN is no number that JSON knows"),
        ("seeds", 1, "unknown field 'seeds'; did you mean seed?"),
        ("promt", "a [V] dog", "unknown field 'promt'; did you mean prompt?"),
        ("steps", 5, "unknown field 'steps'; did you mean num_inference_steps?"),
        ("guidance", 5, "unknown field 'guidance'; did you mean guidance_scale?"),
        ("height", 64, "unknown field 'height'; known are subject, prompt, num, seed, num_inference_steps, guidance_s"),
        ("\ud800", 1, r"unknown field '\ud800'; known are"),
    ],
)
def test_a_field_that_is_wrong(field: str, value: Any, message: str) -> None:
    assert message in refused(json.dumps(GOOD | {field: value}).encode())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"subject=rex", "the body is not JSON"),
        (b'{"subject": "rex"', "the body is not JSON"),
        (b"[" * 10_000, "the body is not JSON"),
        (b"[1, 2]", 'expected a JSON object such as {"subject": "rex", '),
        (b'"rex"', "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"subject": "rex"}', "prompt is missing; expected a JSON object such as"),
        (b'{"subject": "rex", "prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
        (b'{"subject": "rex", "prompt": "\xff"}', "the body is not UTF-8 text: byte 30 is 0xff"),
        (json.dumps(GOOD).encode("utf-16"), "the body is not UTF-8 text"),
        (b'{"subject": "rex", "prompt": "a [V]", "guidance_scale": 1e999}', "guidance_scale: must be "),
        (b'{"subject": "rex", "prompt": "a [V]", "seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"subject": "rex", "prompt": "' + b"x" * MOST_BYTES + b'"}', f"the body has more than {MOST_BYTES} bytes"),
        (b"x" * 10_000_000, f"the body has more than {MOST_BYTES} bytes"),
    ],
)
def test_a_body_that_is_wrong(body: bytes, message: str) -> None:
    assert message in refused(body)


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/"])
def test_a_content_type_that_is_wrong(content_type: str | None) -> None:
    assert "expected application/json" in refused(json.dumps(GOOD).encode(), content_type)


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_content_type_however_it_is_written(content_type: str, mark: bytes) -> None:
    assert post(mark + json.dumps(GOOD).encode(), content_type)[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message", "again"),
    [
        (GOOD | {"subject": "new"}, 404, "there is no subject 'new' here; there are rex", False),
        (GOOD | {"subject": "r\u00e9x"}, 404, "there is no subject 'r\u00e9x' here", False),
        (GOOD | {"prompt": "a crowd of [V]"}, 429, "too many wait already; try again", True),
    ],
)
def test_other_answers(body: dict[str, Any], status: int, message: str, again: bool) -> None:
    got, answer, headers = post(json.dumps(body).encode())
    assert (got, message in answer["detail"]) == (status, True)
    assert (b"retry-after" in headers) == again


def test_several_lines_are_one_prompt() -> None:
    asked = read_request(json.dumps(GOOD | {"prompt": " a photo\r\n of [V] "}).encode(), "application/json")
    assert asked.prompt == "a photo of [V]"


def test_a_prompt_as_long_as_may_be_has_room_in_a_body() -> None:
    prompt = "\U0001f436" * 1000
    asked = read_request(json.dumps(GOOD | {"prompt": prompt}).encode(), "application/json")
    assert asked.prompt == prompt
    with pytest.raises(InputError, match="at most 1000"):
        read_request(json.dumps(GOOD | {"prompt": prompt + "x"}).encode(), "application/json")


def test_only_requests_of_one_kind_are_sampled_together() -> None:
    asked = [
        Asked(subject="rex", prompt="a", seed=1),
        Asked(subject="mug", prompt="a"),
        Asked(subject="rex", prompt="b", num=2),
        Asked(subject="rex", prompt="a", num_inference_steps=3),
        Asked(subject="rex", prompt="a", guidance_scale=3.0),
    ]
    assert alike(asked) == [[0, 2], [1], [3], [4]]
