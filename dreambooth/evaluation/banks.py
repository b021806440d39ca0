"""Choose and load banks by name."""

from functools import lru_cache
from typing import TYPE_CHECKING

from dreambooth.errors import InputError
from dreambooth.evaluation.bank import BANKS, ENCODER, Bank, BankLocations
from dreambooth.miniature import BASES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def default_bank(base_model: str) -> str:
    """The bank that fits a base model, by its address."""
    return "miniature" if base_model in BASES else "paper"


def load_bank(name: str, *, device: str = "cpu", locations: BankLocations | None = None) -> Bank:
    """Load a bank's encoders; of ENCODER `locations.dino` alone.

    Raises InputError for an unknown name, and for missing weights, which it names.
    """
    if name == "miniature":
        from dreambooth.evaluation.miniature_bank import MiniatureBank

        return MiniatureBank(device=device)
    locations = locations or BankLocations()
    if name == "paper":
        from dreambooth.evaluation.paper_bank import PaperBank

        return PaperBank(locations, device=device)
    if name == ENCODER:
        from dreambooth.evaluation.encoder_bank import EncoderBank

        return EncoderBank(locations.dino, device=device)
    raise InputError(f"there is no bank {name!r}; expected {' or '.join(BANKS)}")


@lru_cache(maxsize=8)
def text_reader(name: str, clip: str) -> "tuple[CLIPTokenizer, int]":
    """The tokenizer of a bank's CLIP and its length in tokens; `clip` is the location of the paper's."""
    from dreambooth.evaluation.clip import load_text_reader
    from dreambooth.evaluation.encoder_files import find_encoder_directory
    from dreambooth.miniature import CLIP_DIR

    if name == "miniature":
        return load_text_reader(CLIP_DIR)
    return load_text_reader(find_encoder_directory(clip, what="CLIP ViT-B/32", model_type="clip"))
