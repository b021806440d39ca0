"""CLIP text encoders as SDXL and Stable Diffusion 3 read them: by their last hidden states but one, and pooled."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dreambooth.models.families.family import Tensors

if TYPE_CHECKING:
    from torch import nn


def encode_with_clip(folder: str, text_encoder: "nn.Module", tokens: Tensors) -> Tensors:
    """`<folder>.states` (N, L, D), the last hidden states but one, and `.pooled` (N, P) if it has a projection."""
    output = text_encoder(tokens[f"{folder}.input_ids"], output_hidden_states=True)
    encoded = {f"{folder}.states": output.hidden_states[-2]}
    if "text_embeds" in output:
        encoded[f"{folder}.pooled"] = output.text_embeds
    return encoded


def after_states(text_encoder: "nn.Module") -> Iterable[str]:
    """Names of a CLIPTextModel's parameters behind its last hidden states but one: last layer and last norm."""
    last = text_encoder.config.num_hidden_layers - 1  # type: ignore[operator, union-attr]
    behind = (f"encoder.layers.{last}.", "final_layer_norm.")
    return [name for name, _ in text_encoder.named_parameters() if name.startswith(behind)]
