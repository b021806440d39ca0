"""Does a text mean to the base model what its author meant? One answer for captions, templates and prompts.

A text goes wrong without a word in three ways. Its placeholder is none that is known here (`[v]`, `{identifier}` in a
caption, `[V]` in a template) and stays in it literally. It is longer than the text encoder reads, and its end is cut,
the identifier perhaps included. Or it reads otherwise than it looks: no identifier, another one, letters that only look
like others. What takes the subject out of a text is an InputError, before any work; of what may be meant a warning says
how the model reads it.

How much may be cut depends on the use. A prompt that is drawn has to be read whole: to shorten it takes seconds, and a
picture of half a prompt passes for one of all of it. Of a caption words may be lost, with a warning, but never the
identifier: captions that a program wrote are often too long, and what they begin with is true of the picture.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from dreambooth.errors import InputError
from dreambooth.evaluation.prompts import OWN, prompt_list
from dreambooth.evaluation.protocol import named
from dreambooth.identifier import candidates, token_ids_in_prompts
from dreambooth.images import InstanceImage
from dreambooth.subject import fill_identifier, fill_prompt
from dreambooth.wording import IDENTIFIER_PLACEHOLDER, check_wording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dreambooth.config import DreamBoothConfig

_SHOWN = 60
_MOST = 5
_OF_TUTORIALS = frozenset(("sks", "ohwx", "zwx", "shs", "smg", "tok"))
_ALPHABETS = ("LATIN", "CYRILLIC", "GREEK")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a tokenizer reads a text: how many tokens it makes of it, how many fit, and the words that are cut off.

    `meant` is how often the identifier is among the tokens, `names` how often among those that fit.
    """

    tokens: int
    fits: int
    lost: str
    meant: int
    names: int

    def __str__(self) -> str:
        """What is wrong with its length."""
        return f"has {self.tokens} tokens, and the base model reads {self.fits}: {shortened(self.lost)!r} is cut off"


def shortened(text: str) -> str:
    """A text as a sentence may repeat it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def read(tokenizer: "PreTrainedTokenizerBase", text: str, identifier: str | None = None) -> Reading:
    """Read a text, its placeholders filled, as the text encoder of a base model will.

    Raises InputError for one that holds the tokenizer's own mark of a beginning or an end.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    for mark in {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids):
        raise InputError(f"{tokenizer.convert_ids_to_tokens(mark)!r} ends a text for the base model; leave it out")
    fits = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    lost = ""
    if len(ids) > fits:
        first = offsets[fits][0]
        lost = text[text.rfind(" ", 0, first + 1) + 1 :]
    own = list(token_ids_in_prompts(tokenizer, identifier)) if identifier else []
    return Reading(tokens=len(ids), fits=fits, lost=lost, meant=_count(own, ids), names=_count(own, ids[:fits]))


def check_prompt(
    text: str, *, what: str, identifier: str, tokenizer: "PreTrainedTokenizerBase", whole: bool
) -> tuple[str, ...]:
    """Warnings about a caption or prompt, each a sentence that begins with `what`. `[V]` is filled in here.

    Raises InputError where it holds a placeholder that is none, where the identifier is cut off or glued to a word, and
    for a text that has to be read `whole` where any word is cut off.
    """
    check_wording(text, what=what, identifier=identifier)
    filled = fill_identifier(text, identifier)
    try:
        reading = read(tokenizer, filled, identifier)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    if reading.lost and (whole or (reading.meant and not reading.names)):
        identifier_too = ", the identifier with it" if reading.meant and not reading.names else ""
        raise InputError(f"{what} {reading}{identifier_too}; shorten it, or put what matters first")
    if IDENTIFIER_PLACEHOLDER in text and not reading.meant:
        near = next(word for word in text.split() if IDENTIFIER_PLACEHOLDER in word)
        raise InputError(f"{what}: in {near!r} the identifier becomes part of another word; put spaces around it")
    warnings = [f"{what} {reading}"] if reading.lost else []
    if not reading.meant:
        warnings.append(f"{what} names no {IDENTIFIER_PLACEHOLDER}{_other_identifier(tokenizer, filled, identifier)}")
    return (*warnings, *(f"{what}: {each}" for each in strange_letters(text)))


def check_plain(text: str, *, what: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Warnings about a text without the identifier, such as the class prompt; InputError where any of it is cut off."""
    reading = read(tokenizer, text)
    if reading.lost:
        raise InputError(f"{what} {reading}; shorten it")
    return tuple(f"{what}: {each}" for each in strange_letters(text))


def check_texts(
    config: "DreamBoothConfig", images: Sequence[InstanceImage], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, ...]:
    """Warnings about all texts of a run whose identifier is decided; one InputError for all faults of them."""
    subject, identifier = config.subject, str(config.subject.identifier)
    instance, of_class = config.prompts.instance_prompt(subject), config.prompts.class_prompt(subject)
    checks: list[Callable[[], tuple[str, ...]]] = [
        partial(
            check_prompt, instance, what="prompts.instance", identifier=identifier, tokenizer=tokenizer, whole=True
        ),
        partial(check_plain, of_class, what="prompts.class", tokenizer=tokenizer),
    ]
    captions: list[Callable[[], tuple[str, ...]]] = [
        partial(
            check_prompt,
            image.caption,
            what=f"the caption of {image.address}",
            identifier=identifier,
            tokenizer=tokenizer,
            whole=False,
        )
        for image in images
        if image.caption is not None
    ]
    warned = list(_all_of(checks))
    of_captions = list(_all_of(captions))
    more = len(of_captions) - _MOST
    warned += [*of_captions[:_MOST], *([f"and {more} more warnings about captions"] if more > 0 else [])]
    return (*warned, *check_evaluation(config, tokenizer))


def check_evaluation(config: "DreamBoothConfig", tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Warnings about the prompts that samples are drawn from; one InputError for all faults of them.

    Prompts that figures or scores are measured on have to be read whole, by the base model and by the bank's CLIP.
    """
    settings = config.evaluation
    own = settings.enabled or settings.every is not None or settings.protocol == OWN
    scored = settings.every is not None or settings.protocol == OWN
    texts = [(text, f"evaluation.prompts: {shortened(text)!r}", scored) for text in settings.prompts if own]
    if settings.protocol not in ("none", OWN):
        shipped = prompt_list(named(settings.protocol, config.base_model), config.subject.class_noun)
        texts += [(each.text, f"evaluation.protocol {shipped.name}: {each.text!r}", True) for each in shipped.prompts]
    noun, identifier = config.prompts.noun_beside_identifier(config.subject), str(config.subject.identifier)
    return _all_of(
        [
            partial(
                check_prompt,
                fill_prompt(text, IDENTIFIER_PLACEHOLDER, noun),
                what=what,
                identifier=identifier,
                tokenizer=tokenizer,
                whole=whole,
            )
            for text, what, whole in texts
        ]
    )


def _all_of(checks: Sequence[Callable[[], tuple[str, ...]]]) -> tuple[str, ...]:
    """What all of them warn of; one InputError with the faults of all."""
    warnings: list[str] = []
    faults: list[str] = []
    for check in checks:
        try:
            warnings += check()
        except InputError as error:
            faults.append(str(error))
    if faults:
        more = [f"and {len(faults) - _MOST} more such texts"] if len(faults) > _MOST else []
        raise InputError("\n".join([*faults[:_MOST], *more]))
    return tuple(warnings)


def strange_letters(text: str) -> Iterator[str]:
    """What is said of words that look like others: ligatures, full-width letters, and letters of two alphabets.

    >>> list(strange_letters("a photo of a \N{LATIN SMALL LIGATURE FI}re engine"))
    ["'\N{LATIN SMALL LIGATURE FI}re' is read as other letters than 'fire'; write 'fire'"]
    """
    for word in unicodedata.normalize("NFC", text).split():
        plain = "".join(unicodedata.normalize("NFKC", char) if char.isalnum() else char for char in word)
        if plain != word:
            yield f"{word!r} is read as other letters than {plain!r}; write {plain!r}"
        used = {unicodedata.name(char, "").partition(" ")[0] for char in word if char.isalpha()}
        if len(used & set(_ALPHABETS)) > 1:
            yield f"{word!r} has letters of two alphabets that look alike; type it again"


def _other_identifier(tokenizer: "PreTrainedTokenizerBase", text: str, identifier: str) -> str:
    """ ", but ..." for a text that names the identifier of something else."""
    others = _OF_TUTORIALS | _rare(tokenizer)
    found = next((word for word in text.casefold().replace(",", " ").split() if word in others), None)
    return f", but {found!r}, and the identifier is {identifier!r}" if found else ""


@lru_cache(maxsize=8)
def _rare(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    return frozenset(candidate.text for candidate in candidates(tokenizer))


def _count(own: Sequence[int], ids: Sequence[int]) -> int:
    return sum(ids[start : start + len(own)] == own for start in range(len(ids))) if own else 0
