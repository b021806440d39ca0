"""Check that the base model reads captions, templates and prompts as intended.

A text fails silently in three ways. Its placeholder is unknown here (`[v]`, `{identifier}` in a caption, `[V]` in a
template) and stays literal. It is too long for the text encoder, and its end is cut, perhaps with the identifier. Or it
reads differently than it looks: no identifier, another one, look-alike letters. Losing the subject is an InputError,
before any work; for texts that may be intended, a warning gives the model's reading.

How much may be cut depends on the use. Prompts for sampling must fit: shortening takes seconds, and a picture of half a
prompt passes for one of the whole. Captions may lose words, with a warning, but never the identifier: generated
captions are often too long, and their beginning is true of the picture.

Of several text encoders one has to read the whole: CLIP cuts what T5 beside it reads, in every pipeline of theirs. But
the identifier has to be within what each of them reads, as it was in training.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from dreambooth.config.subject import fill_identifier
from dreambooth.config.wording import IDENTIFIER_PLACEHOLDER, check_wording
from dreambooth.data.identifier import candidates, token_ids_in_prompts
from dreambooth.errors import InputError
from dreambooth.models.text_readers import TextReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 60
_CURE = "shorten it, or put what matters first"
_MEANT = f"write {IDENTIFIER_PLACEHOLDER} where the subject is meant"
_OF_TUTORIALS = frozenset(("sks", "ohwx", "zwx", "shs", "smg", "tok"))
_BESIDE = re.compile(r"[^\W\d_]+\[V\]|\[V\](?:[^\W\d_]+|\[V\])")
_OF_OTHER_PROGRAMS = re.compile(
    r"\([^()]*:\s*[\d.]+\s*\)"  # (red:1.3)
    r"|<(?:lora|lyco|hypernet|embedding):[^<>]*>"
    r"|\[[^\[\]]*[|:][^\[\]]*\]"  # [from:to:0.5] and [a|b]
    r"|\{[^{}]*\|[^{}]*\}"  # {a|b}
    r"|(?<!\w)__[\w/-]+__(?!\w)"  # wildcards
    r"|\bBREAK\b"
    r"|(?<!\S)--[a-z]+(?:\s+[\d.:]+)?"  # --ar 16:9
)
_ALPHABETS = ("LATIN", "CYRILLIC", "GREEK")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A tokenizer's reading of a text: number of tokens, number that fit, and the words cut off, `by` whom.

    `meant` counts the identifier among all tokens, `names` among those that fit.
    """

    tokens: int
    fits: int
    lost: str
    meant: int
    names: int
    by: str = "the base model"

    def __str__(self) -> str:
        """The fault of its length."""
        return f"has {self.tokens} tokens, and {self.by} reads {self.fits}: {shortened(self.lost)!r} is cut off"


def shortened(text: str) -> str:
    """A text shortened for use in a message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def read(
    tokenizer: "PreTrainedTokenizerBase", text: str, identifier: str | None = None, *, length: int | None = None
) -> Reading:
    """Read a filled-in text as a text encoder of `length` positions will; None: the tokenizer's own length.

    Raises InputError for a text with the tokenizer's own start or end mark.
    """
    ids, offsets = _encoded(tokenizer, text)
    ends, added = _marks(tokenizer)
    for mark in ends & set(ids):
        raise InputError(f"{tokenizer.convert_ids_to_tokens(mark)!r} ends a text for the base model; leave it out")
    fits = (length or tokenizer.model_max_length) - added
    lost = ""
    if len(ids) > fits:
        first = offsets[fits][0]
        lost = text[text.rfind(" ", 0, first + 1) + 1 :]
    own = token_ids_in_prompts(tokenizer, identifier) if identifier else ()
    return Reading(tokens=len(ids), fits=fits, lost=lost, meant=_count(own, ids), names=_count(own, ids[:fits]))


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Reads texts as a base model's text encoders do; with `identifier` None they name no subject."""

    readers: Sequence[TextReader]
    identifier: str | None

    def check(self, text: str, *, what: str, whole: bool, cure: str = _CURE) -> tuple[str, ...]:
        """Warnings about a caption or prompt, each starting with `what`. `[V]` is filled in here.

        Raises InputError for a false placeholder, for an identifier that one of the text encoders cuts off or that is
        part of another word, and, with `whole`, for a word that all of them cut off.
        """
        check_wording(text, what=what, identifier=self.identifier)
        filled = text if self.identifier is None else fill_identifier(text, self.identifier)
        try:
            readings = [self._read(reader, filled) for reader in self.readers]
        except InputError as error:
            raise InputError(f"{what}: {error}") from None
        for nameless in readings:
            if nameless.meant and not nameless.names:
                raise InputError(f"{what} {nameless}, the identifier with it; {cure}")
        reading, first = min(readings, key=lambda one: len(one.lost)), readings[0]
        if reading.lost and whole:
            raise InputError(f"{what} {reading}; {cure}")
        if near := _glued(text, self.identifier, first):
            raise InputError(f"{what}: in {near!r} the identifier becomes part of another word; put spaces around it")
        warnings = [f"{what} {reading}"] if reading.lost else []
        if self.identifier is not None and not first.meant:
            other = _other_identifier(self.readers[0].tokenizer, filled, self.identifier)
            warnings.append(f"{what} names no {IDENTIFIER_PLACEHOLDER}{other}; {_MEANT}")
        return (*warnings, *(f"{what}: {each}" for each in (*strange_letters(filled), *commands(text))))

    def _read(self, reader: TextReader, text: str) -> Reading:
        reading = read(reader.tokenizer, text, self.identifier, length=reader.length)
        return reading if len(self.readers) == 1 else replace(reading, by=f"the base model's {reader.folder}")


def strange_letters(text: str) -> Iterator[str]:
    """Warnings about words that look like others: ligatures, full-width letters, mixed alphabets.

    >>> list(strange_letters("a photo of a \N{LATIN SMALL LIGATURE FI}re engine"))
    ["'\N{LATIN SMALL LIGATURE FI}re' is read as other letters than 'fire'; write 'fire'"]
    """
    if text.isascii():
        return
    for word in unicodedata.normalize("NFC", text).split():
        plain = "".join(unicodedata.normalize("NFKC", char) if char.isalnum() else char for char in word)
        if plain != word:
            yield f"{word!r} is read as other letters than {plain!r}; write {plain!r}"
        used = {unicodedata.name(char, "").partition(" ")[0] for char in word if char.isalpha()}
        if len(used & set(_ALPHABETS)) > 1:
            yield f"{word!r} has letters of two alphabets that look alike; type it again"


def commands(text: str) -> Iterator[str]:
    """Warnings about weights and commands that other programs read in a prompt.

    >>> list(commands("a photo of a (red:1.3) car"))
    ["'(red:1.3)' is read letter by letter; weights and commands of other programs mean nothing here"]
    """
    for found in _OF_OTHER_PROGRAMS.finditer(text):
        yield f"{found[0]!r} is read letter by letter; weights and commands of other programs mean nothing here"


def _glued(text: str, identifier: str | None, reading: Reading) -> str | None:
    """The word in which `[V]` is glued to other letters and read differently, or None."""
    if identifier is None or IDENTIFIER_PLACEHOLDER not in text:
        return None
    if identifier.isalnum() and (found := _BESIDE.search(text)):
        return found[0]
    return None if reading.meant else next(word for word in text.split() if IDENTIFIER_PLACEHOLDER in word)


def _other_identifier(tokenizer: "PreTrainedTokenizerBase", text: str, identifier: str) -> str:
    """ ", but ..." for a text that names the identifier of something else."""
    others = _OF_TUTORIALS | _rare(tokenizer)
    found = next((word for word in text.casefold().replace(",", " ").split() if word in others), None)
    return f", but {found!r}, and the identifier is {identifier!r}" if found else ""


@lru_cache(maxsize=8)
def _rare(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    return frozenset(candidate.text for candidate in candidates(tokenizer))


@lru_cache(maxsize=256)
def _encoded(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Tokens of a text, and where each starts and stops in it: subjects of a batch share the prompts of their class."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return tuple(encoded["input_ids"]), tuple(encoded["offset_mapping"])


@lru_cache(maxsize=8)
def _marks(tokenizer: "PreTrainedTokenizerBase") -> tuple[frozenset[int | None], int]:
    """The tokens that start and end a text, and how many a tokenizer adds."""
    return frozenset((tokenizer.bos_token_id, tokenizer.eos_token_id)), tokenizer.num_special_tokens_to_add()


def _count(own: tuple[int, ...], ids: tuple[int, ...]) -> int:
    return sum(ids[start : start + len(own)] == own for start in range(len(ids))) if own else 0
