"""Captions of photographs: photo.txt beside photo.jpg."""

from pydantic import TypeAdapter, ValidationError

from dreambooth.config.subject import Words
from dreambooth.config.text_files import decode_text
from dreambooth.data.images.access import read_file
from dreambooth.data.images.names import caption_names, is_caption_name
from dreambooth.errors import InputError


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


def read_caption(address: str | None) -> str | None:
    """The text of a caption's file, if any. Raises InputError if it can't be read or is no text."""
    if address is None:
        return None
    content = read_file(address)
    try:
        return TypeAdapter(Words).validate_python(" ".join(decode_text(content, f"the caption {address}").split()))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"the caption {address}: {message}; write one, or remove it for the instance prompt") from None
