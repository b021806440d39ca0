"""The text encoders of a base model as readers: their tokenizers, and how many tokens each of them reads.

CLIP reads 77 tokens and cuts the rest, while T5 beside it reads hundreds, and the denoiser sees both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.models.families import Component, Family, family_of, family_of_pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """A text encoder in `folder`: its tokenizer, and the tokens that it reads, its own marks among them."""

    folder: str
    tokenizer: "PreTrainedTokenizerBase"
    length: int


def text_readers(directory: Path) -> tuple[TextReader, ...]:
    """Readers of a base model, in the order of its text encoders. Raises InputError for invalid files."""
    family = family_of(directory)
    return tuple(
        _reader(family, part, family.tokenizer(directory, _tokenizer_of(part)))
        for part in family.text_encoders(directory)
    )


def readers_of_pipeline(pipeline: Any) -> tuple[TextReader, ...]:
    """Readers of a loaded diffusers pipeline."""
    family = family_of_pipeline(pipeline)
    present = [part for part in family.role("text_encoder") if pipeline.components.get(part.folder) is not None]
    return tuple(_reader(family, part, pipeline.components[_tokenizer_of(part)]) for part in present)


def _reader(family: Family, part: Component, tokenizer: "PreTrainedTokenizerBase") -> TextReader:
    return TextReader(folder=part.folder, tokenizer=tokenizer, length=family.tokens_read(part, tokenizer))


def _tokenizer_of(part: Component) -> str:
    return part.folder.replace("text_encoder", "tokenizer")
