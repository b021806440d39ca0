"""The banks by name: which fits a base model, and how each is loaded."""

from functools import lru_cache
from typing import TYPE_CHECKING

from dreambooth.errors import InputError
from dreambooth.evaluation.bank import BANKS, Bank, BankLocations

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def default_bank(base_model: str) -> str:
    """The bank that fits a base model, by its address."""
    return "miniature" if base_model == "miniature" else "paper"


def load_bank(name: str, *, device: str = "cpu", locations: BankLocations | None = None) -> Bank:
    """Load a bank's encoders. Raises InputError for another name, and for weights that aren't there: it says which."""
    if name == "miniature":
        from dreambooth.evaluation.miniature_bank import MiniatureBank

        return MiniatureBank(device=device)
    if name == "paper":
        from dreambooth.evaluation.paper_bank import PaperBank

        return PaperBank(locations or BankLocations(), device=device)
    raise InputError(f"there is no bank {name!r}; expected {' or '.join(BANKS)}")


@lru_cache(maxsize=8)
def text_reader(name: str, clip: str) -> "tuple[CLIPTokenizer, int]":
    """What a bank's CLIP reads texts with, and how many tokens of them; `clip` is where the paper's is."""
    from dreambooth.evaluation.clip import load_text_reader
    from dreambooth.evaluation.encoders import find_encoder_directory
    from dreambooth.miniature import CLIP_DIR

    if name == "miniature":
        return load_text_reader(CLIP_DIR)
    return load_text_reader(find_encoder_directory(clip, what="CLIP ViT-B/32", model_type="clip"))
