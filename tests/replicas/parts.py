"""Components that replicas of several families share."""

import json
from pathlib import Path
from typing import Any

from dreambooth.quiet import quiet

quiet()  # notices at import would be errors
from diffusers import AutoencoderKL  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "photo", "of", "sks", "dog", "cat", "on", "the", "beach", "in", "snow", "and", "red"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_index(folder: Path, pipeline: str, parts: dict[str, str | None], **settings: Any) -> None:
    """model_index.json of parts as "library.Class", or None for one that is left out."""
    entries = {name: [None, None] if kind is None else kind.split(".") for name, kind in parts.items()}
    write_json(
        folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.30.0"} | settings | entries
    )


def save(folder: Path, **parts: Any) -> None:
    """Write components into folders of their names, CLIP's with the prefix that its files on the hub have."""
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        if isinstance(part, CLIPTextModel | CLIPTextModelWithProjection):
            weights = folder / name / "model.safetensors"
            named = {
                tensor if tensor.startswith(("text_model.", "text_projection.")) else f"text_model.{tensor}": value
                for tensor, value in load_file(weights).items()
            }
            save_file(named, weights, {"format": "pt"})


def write_clip_tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> int:
    """A CLIP tokenizer of the hub's four files. Returns the number of ids.

    As in the real vocabulary "!" is id 0, and <|endoftext|> has the highest id, where CLIP takes the pooled text.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]
    vocabulary = dict.fromkeys([*symbols, *(f"{symbol}</w>" for symbol in symbols)])
    merges: dict[str, None] = {}
    for word in WORDS:
        *letters, last = word
        left, *rest = [*letters, f"{last}</w>"]
        for right in rest:
            merges[f"{left} {right}"] = None
            left += right
            vocabulary[left] = None
    ids = {token: place for place, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    more = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    write_json(folder / "vocab.json", ids)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | more | {"tokenizer_class": "CLIPTokenizer"})
    return len(ids)


def write_t5_tokenizer(folder: Path, *, fast: bool = True) -> int:
    """A T5 tokenizer that sentencepiece trains on `WORDS`. Returns the number of ids.

    `fast` adds tokenizer.json, as Stable Diffusion 3 and FLUX.1 have it; DeepFloyd IF has spiece.model alone.
    """
    import sentencepiece
    from transformers import T5TokenizerFast

    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS), *WORDS]),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    extra = [f"<extra_id_{place}>" for place in range(100)]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": extra}
    more = {"extra_ids": 100, "legacy": True, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | more)
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    if fast:
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return len(tokenizer)


def clip_text(
    kind: type, width: int, ids: int, *, activation: str, projection: int | None = None, layers: int = 3
) -> Any:
    """A CLIP text encoder. eos_token_id 2 stands in every repository, though no text ends in it."""
    config = CLIPTextConfig(
        vocab_size=ids,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return kind(config)


def t5_encoder(width: int, ids: int) -> Any:
    """A T5 v1.1 encoder; its embedding has more rows than there are ids, as 32128 is more than 32100."""
    config = T5Config(
        vocab_size=ids + 28,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        tie_word_embeddings=False,
        is_encoder_decoder=True,
    )
    return T5EncoderModel(config)


def autoencoder(channels: int, *, blocks: tuple[int, ...] = (4, 4, 8, 8), **settings: Any) -> Any:
    """An AutoencoderKL that halves between its blocks."""
    return AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        **settings,
    )


def autoencoder_without_quantization(**settings: Any) -> Any:
    """The autoencoder of 16 channels of Stable Diffusion 3 and FLUX.1."""
    return autoencoder(16, use_quant_conv=False, use_post_quant_conv=False, sample_size=64, **settings)
