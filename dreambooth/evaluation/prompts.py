"""Prompts of an evaluation with their applications, and the seed of every picture.

Shipped as data are DreamBench's lists (paper, section 4.1: 25 prompts for objects, 25 for live subjects) and one of 25
prompts in the miniature's own words. In a prompt `[V]` stands for the identifier, `{class_noun}` for the class noun:

>>> prompt = EvaluationPrompt(text="a photo of [V] {class_noun} in the snow", application="recontextualization")
>>> prompt.with_identifier("sks", "owl")
'a photo of sks owl in the snow'
>>> prompt.without_identifier("owl")
'a photo of an owl in the snow'
"""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dreambooth.amounts import counted
from dreambooth.config.subject import fill_identifier, fill_prompt
from dreambooth.config.text_files import read_text
from dreambooth.config.wording import CLASS_NOUN_PLACEHOLDER, IDENTIFIER_PLACEHOLDER, PROMPT_FIELDS, check_wording
from dreambooth.errors import InputError

OWN = "own"
_DATA = Path(__file__).parent

_BEFORE_NOUN = re.compile(r"(?P<before>^|\bof |\b[Aa]n? )" + re.escape(IDENTIFIER_PLACEHOLDER) + r" (?P<next>\S)")


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompt:
    """A prompt with placeholders, and the application of the paper's section 4.2 that it is an example of."""

    text: str
    application: str

    def with_identifier(self, identifier: str, class_noun: str) -> str:
        """The prompt for the fine-tuned model; `class_noun` may be "" (see `fill_prompt`)."""
        return fill_prompt(self.text, identifier, class_noun)

    def without_identifier(self, class_noun: str) -> str:
        """The prompt for the base model: any member of the class, with its article."""
        text = self.text.replace(CLASS_NOUN_PLACEHOLDER, class_noun)
        return fill_identifier(_BEFORE_NOUN.sub(_article, text), "").replace("  ", " ").strip()


@dataclass(frozen=True, kw_only=True)
class PromptList:
    """A named list of prompts, with its source."""

    name: str
    source: str
    prompts: tuple[EvaluationPrompt, ...]

    def __post_init__(self) -> None:
        """Raise InputError for an empty list, a prompt twice, or a placeholder that isn't known."""
        if not self.prompts:
            raise InputError(f"the prompt list {self.name!r} is empty; give at least one prompt")
        texts = [prompt.text for prompt in self.prompts]
        if repeated := sorted({text for text in texts if texts.count(text) > 1}):
            raise InputError(f"the prompt list {self.name!r} holds {repeated[0]!r} twice; expected prompts that differ")
        for text in texts:
            check_wording(text, what=f"the prompt {text!r} of {self.name!r}", known=PROMPT_FIELDS)

    def measurable(self) -> "PromptList":
        """The list itself. Raises InputError for a prompt without the identifier, whose samples need not be alike."""
        lacking = [prompt.text for prompt in self.prompts if IDENTIFIER_PLACEHOLDER not in prompt.text]
        if lacking:
            raise InputError(
                f"no placeholder {IDENTIFIER_PLACEHOLDER} for the identifier in {len(lacking)} of "
                f"{counted(len(self.prompts), 'prompt')} of {self.name!r}, first {lacking[0]!r}; write them like "
                f"'a photo of [V] {{class_noun}} in the snow'"
            )
        return self


def prompt_list(protocol: str, class_noun: str, *, own: Sequence[str] = ()) -> PromptList:
    """The list that a protocol (`dreambench`, `miniature` or `own`) means for a class noun.

    `dreambench` has two lists, for objects and for live subjects; `own` is the prompts given.
    """
    if protocol == OWN:
        return PromptList(
            name=OWN, source=OWN, prompts=tuple(EvaluationPrompt(text=text, application=OWN) for text in own)
        ).measurable()
    if protocol == "miniature":
        return _shipped("miniature", "prompts")
    if protocol == "dreambench":
        return _shipped("dreambench", "live" if _is_live(class_noun) else "objects")
    raise ValueError(f"expected 'dreambench', 'miniature' or 'own', got {protocol!r}")


def dreambench_subjects() -> Mapping[str, str]:
    """DreamBench's 30 subjects and their class nouns."""
    subjects: dict[str, str] = _read("dreambench")["subjects"]
    return subjects


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line; empty lines and those that begin with # are passed over.

    Raises InputError for a file that can't be read or holds none.
    """
    lines = [line.strip() for line in read_text(path, what="the prompts in").split("\n")]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise InputError(f"{path} holds no prompts; expected one a line, such as 'a photo of [V] {{class_noun}}'")
    return prompts


def sample_seed(seed: int, prompt: str, image: int) -> int:
    """The seed of the `image`-th picture of a prompt, given without the identifier.

    It depends only on what the picture shows: the base model and every fine-tuned one start from the same noise, so
    pictures side by side differ by their models, and subjects of one class share the base model's.
    """
    counters = repr((seed, "evaluation", prompt, image))
    return int.from_bytes(hashlib.blake2b(counters.encode(), digest_size=7).digest(), "big")


def _shipped(name: str, part: str) -> PromptList:
    data = _read(name)
    return PromptList(
        name=name if part == "prompts" else f"{name} {part}",
        source=data["source"],
        prompts=tuple(
            EvaluationPrompt(text=text, application=application)
            for application, texts in data[part].items()
            for text in texts
        ),
    )


def _is_live(class_noun: str) -> bool:
    return class_noun.casefold().split()[-1] in _read("dreambench")["live_class_nouns"]


@functools.cache
def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((_DATA / f"{name}.yaml").read_text(encoding="utf-8"))
    return data


def _article(match: re.Match[str]) -> str:
    """The article in place of the identifier, or in place of the article before it."""
    before, letter = match["before"], match["next"]
    article = "an" if letter.lower() in "aeiou" else "a"
    return f"{before if before == 'of ' else ''}{article} {letter}"
