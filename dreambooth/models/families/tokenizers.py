"""Tokenizers of CLIP and T5 text encoders, shared by families."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import InputError
from dreambooth.models.config_fields import read_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
"""Files one of which a tokenizer's folder has to have."""


def load_tokenizer(
    directory: Path, kind: str, folder: str, text_encoder: str | None = None
) -> "PreTrainedTokenizerBase":
    """A tokenizer of class `kind`, cached while its files stay unchanged.

    It truncates at the positions of the text encoder in folder `text_encoder`, if given, at the latest. Raises
    InputError for invalid files.
    """
    files = [*(directory / folder).glob("*")]
    if text_encoder is not None:
        files.append(directory / text_encoder / "config.json")
    states = ((str(path), path.stat()) for path in sorted(files) if path.is_file())
    stamp = tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)
    return _load_tokenizer(directory, kind, folder, text_encoder, stamp)


@lru_cache(maxsize=16)
def _load_tokenizer(directory: Path, kind: str, folder: str, text_encoder: str | None, files: Any) -> Any:
    return read_tokenizer(directory, kind, folder, text_encoder)


def read_tokenizer(
    directory: Path, kind: str, folder: str, text_encoder: str | None = None
) -> "PreTrainedTokenizerBase":
    """A new tokenizer, see `load_tokenizer`."""
    import transformers

    try:
        tokenizer: PreTrainedTokenizerBase = getattr(transformers, kind).from_pretrained(
            directory, subfolder=folder, local_files_only=True
        )
        if text_encoder is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(directory / text_encoder))
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises whatever a damaged file leads it to
        raise InputError(
            f"the tokenizer in {directory / folder} can't be loaded: {type(error).__name__}: {error}; is the copy "
            f"complete?"
        ) from None
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer in {directory / folder} has no pad_token; expected one, as <|endoftext|>")
    return tokenizer


def _positions(text_encoder: Path) -> int:
    """Positions of a CLIP text encoder, alone or in the file of a whole CLIP; its class would import PyTorch."""
    config = read_json(text_encoder / "config.json")
    positions: int = config.get("text_config", config).get("max_position_embeddings", 77)
    return positions


def padded_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], length: int | None = None) -> "Tensor":
    """Token ids (N, L), padded and truncated to `length`, or to the tokenizer's own."""
    ids: Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def padded_with_mask(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> "tuple[Tensor, Tensor]":
    """Token ids and attention mask (N, L), the latter 0 where padded; truncated to the tokenizer's own length."""
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def each_once(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Different texts in order, and the place of each of `texts` among them."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return list(places), [places[text] for text in texts]
