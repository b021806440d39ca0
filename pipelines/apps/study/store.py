"""A study in one SQLite file: pictures, questions and answers.

Pictures are copied without metadata that could reveal their source, so a study survives its models. An answer is on
disk before its rater sees the next question.
"""

import hashlib
import io
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from dreambooth.data.images import png_bytes
from dreambooth.errors import InputError
from pipelines.apps.study.study import ASPECTS, SIDES, Aspect, Question, Side, choice_of, order_for

_FORMAT = 1
_LARGEST_SIDE = 1024  # pixels
_SCHEMA = """
CREATE TABLE study (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE pictures (hash TEXT PRIMARY KEY, png BLOB NOT NULL) STRICT;
CREATE TABLE questions (
    number INTEGER PRIMARY KEY,
    subject TEXT NOT NULL,
    class_noun TEXT NOT NULL,
    prompt TEXT NOT NULL,
    reference_pictures TEXT NOT NULL,
    left_picture TEXT NOT NULL REFERENCES pictures,
    right_picture TEXT NOT NULL REFERENCES pictures,
    left_is TEXT NOT NULL CHECK (left_is IN ('a', 'b'))
) STRICT;
CREATE TABLE answers (
    question INTEGER NOT NULL REFERENCES questions,
    aspect TEXT NOT NULL CHECK (aspect IN ('subject', 'prompt')),
    rater TEXT NOT NULL,
    side TEXT NOT NULL CHECK (side IN ('left', 'right', 'neither')),
    choice TEXT NOT NULL CHECK (choice IN ('a', 'b', 'neither')),
    answered_at REAL NOT NULL,
    PRIMARY KEY (question, aspect, rater)
) STRICT;
"""


@dataclass(frozen=True, kw_only=True)
class StoredQuestion:
    """A question for raters, with pictures by hash; nothing in it reveals their source."""

    number: int
    class_noun: str
    prompt: str
    references: tuple[str, ...]
    left: str
    right: str
    answers: Mapping[Aspect, Side]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A rater's choice: a, b or neither."""

    question: int
    aspect: Aspect
    rater: str
    choice: str


class StudyFile:
    """A study's file. Thread-safe: each call has its own connection.

    `about` is the argument of `create`: the sources of A and B, and everything that decided the questions.
    """

    def __init__(self, path: Path) -> None:
        """Open a study. Raises InputError for any other file."""
        self._path = path
        if not path.is_file():
            raise InputError(f"there is no study at {path}; 'dreambooth study A B' makes one")
        try:
            with self._connection() as connection:
                rows = dict(connection.execute("SELECT name, value FROM study"))
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} isn't a study ({error}); give the folder of one, or remove it") from None
        if rows.get("format") != str(_FORMAT):
            raise InputError(f"{path} is a study of format {rows.get('format')}, and this version reads {_FORMAT}")
        self.about: dict[str, Any] = json.loads(rows["about"])

    @classmethod
    def create(cls, path: Path, questions: Sequence[Question], about: Mapping[str, Any]) -> "StudyFile":
        """Write a new study atomically; `about` is plain data with `a`, `b` and `seed`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        partial.unlink(missing_ok=True)
        connection = sqlite3.connect(partial)
        try:
            connection.executescript(_SCHEMA)
            with connection:
                values = [("format", str(_FORMAT)), ("about", json.dumps(dict(about)))]
                connection.executemany("INSERT INTO study VALUES (?, ?)", values)
                for number, question in enumerate(questions, start=1):
                    _insert(connection, number, question)
        finally:
            connection.close()
        partial.replace(path)
        return cls(path)

    def questions_for(self, rater: str) -> list[StoredQuestion]:
        """All questions in a rater's own order, with their answers so far."""
        with self._connection() as connection:
            given: dict[int, dict[Aspect, Side]] = {}
            for number, aspect, side in connection.execute(
                "SELECT question, aspect, side FROM answers WHERE rater = ?", (rater,)
            ):
                given.setdefault(number, {})[aspect] = side
            rows = connection.execute(
                "SELECT number, class_noun, prompt, reference_pictures, left_picture, right_picture FROM questions"
            )
            questions = {
                number: StoredQuestion(
                    number=number,
                    class_noun=class_noun,
                    prompt=prompt,
                    references=tuple(json.loads(references)),
                    left=left,
                    right=right,
                    answers=given.get(number, {}),
                )
                for number, class_noun, prompt, references, left, right in rows
            }
        return [questions[number] for number in order_for(rater, sorted(questions), seed=self.about["seed"])]

    def picture(self, name: str) -> bytes | None:
        """The PNG with a hash, or None."""
        with self._connection() as connection:
            row = connection.execute("SELECT png FROM pictures WHERE hash = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def answer(self, *, question: int, aspect: Aspect, rater: str, side: Side) -> None:
        """Store an answer, replacing an earlier one.

        Raises ValueError for an unknown question, aspect or side.
        """
        if aspect not in ASPECTS or side not in SIDES:
            raise ValueError(f"expected one of {ASPECTS} and one of {SIDES}, got {aspect!r} and {side!r}")
        with self._connection() as connection:
            row = connection.execute("SELECT left_is FROM questions WHERE number = ?", (question,)).fetchone()
            if row is None:
                raise ValueError(f"there is no question {question}")
            connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)",
                (question, aspect, rater, side, choice_of(row[0], side), time.time()),
            )

    def answers(self) -> tuple[Answer, ...]:
        """All answers so far."""
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT question, aspect, rater, choice FROM answers ORDER BY question, aspect, rater"
            )
            return tuple(Answer(question=q, aspect=aspect, rater=rater, choice=c) for q, aspect, rater, c in rows)

    def count(self) -> int:
        """Number of questions."""
        with self._connection() as connection:
            return int(connection.execute("SELECT count(*) FROM questions").fetchone()[0])

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=30)
        try:
            with connection:
                yield connection
        finally:
            connection.close()


def _insert(connection: sqlite3.Connection, number: int, question: Question) -> None:
    references = [_insert_picture(connection, picture) for picture in question.references]
    left, right = (_insert_picture(connection, picture) for picture in (question.left, question.right))
    values = (number, question.subject, question.class_noun, question.prompt, json.dumps(references))
    connection.execute(
        "INSERT INTO questions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, left, right, question.left_is)
    )


def _insert_picture(connection: sqlite3.Connection, picture: bytes) -> str:
    """Store a picture's pixels alone: metadata may reveal its source."""
    with Image.open(io.BytesIO(picture)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image.info.clear()
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    png = png_bytes(image)
    name = hashlib.sha256(png).hexdigest()[:32]
    connection.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?)", (name, png))
    return name
