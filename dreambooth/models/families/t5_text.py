"""T5 as a text encoder."""

from dreambooth.models.component import Component

_SIZES = ("d_model", "num_layers", "vocab_size", "num_heads", "d_kv", "d_ff")


def t5_part(folder: str, *, optional: bool = False) -> Component:
    """T5's encoder without dropout: its masks would come from no seed of ours, and none of the others has any."""
    return Component(
        folder=folder,
        role="text_encoder",
        library="transformers",
        kind="T5EncoderModel",
        weights="model",
        optional=optional,
        overrides={"dropout_rate": 0.0},
        width="d_model",
        sizes=_SIZES,
        table="shared.weight",
        buffers=("embed_tokens.weight",),
    )
