"""T5 text encoders (arXiv 1910.10683), shared by families."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dreambooth.models.families.family import Tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def padded_with_mask(folder: str, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], length: int) -> Tensors:
    """`<folder>.input_ids` (N, length), padded and truncated, and `<folder>.attention_mask`, 0 where padded."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return {f"{folder}.{name}": encoded[name] for name in ("input_ids", "attention_mask")}


def without_dropout(text_encoder: "nn.Module") -> "nn.Module":
    """A T5 whose dropout does nothing in training mode either.

    It is the only dropout in any family. Its draws would make results depend on how the work was split and resumed.
    """
    from torch import nn

    for module in text_encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return text_encoder
