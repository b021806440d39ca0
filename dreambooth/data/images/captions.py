"""Captions of photographs: photo.txt beside photo.jpg, or a row of a metadata file (`metadata.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from dreambooth.config.explain import plain_message
from dreambooth.config.subject import Words
from dreambooth.config.text_files import decode_text
from dreambooth.data.images.access import read_file
from dreambooth.data.images.names import caption_names, is_caption_name
from dreambooth.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption, and its place for messages: a file, or a row of one."""

    text: str
    where: str


class CaptionFiles:
    """Captions by possible names, ignoring case where that is unambiguous."""

    def __init__(self, paths: frozenset[str]) -> None:
        self._paths = {path for path in paths if is_caption_name(path)}
        self._folded = {path.casefold(): path for path in sorted(self._paths)}

    def of(self, picture: str) -> str | None:
        """The caption of a picture."""
        for name in caption_names(picture):
            if name in self._paths:
                return name
        return next(
            (self._folded[name.casefold()] for name in caption_names(picture) if name.casefold() in self._folded), None
        )


def read_caption(address: str) -> Caption:
    """The caption of a file. Raises InputError if it can't be read or is no text."""
    what = f"the caption {address}"
    text = caption_words(decode_text(read_file(address), what), what, "write one, or remove it for the instance prompt")
    return Caption(text=text, where=address)


def the_caption(picture: str, captions: Sequence[Caption]) -> str | None:
    """The caption of a picture; None: it has the instance prompt. Raises InputError if it has two that differ."""
    texts = list(dict.fromkeys(caption.text for caption in captions))
    if len(texts) > 1:
        both = " and ".join(f"{caption.text!r} in {caption.where}" for caption in captions)
        raise InputError(f"{picture} has two captions, {both}; leave one of them out")
    return texts[0] if texts else None


def caption_words(text: str, what: str, cure: str) -> str:
    """A caption on one line. Raises InputError for one that can't be a prompt."""
    try:
        words: str = TypeAdapter(Words).validate_python(" ".join(text.split()))
    except ValidationError as error:
        raise InputError(f"{what}: {plain_message(error.errors()[0]['msg'])}; {cure}") from None
    return words
