"""Parts that tiny random replicas of hub repositories are put together from."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

WORDS = ("a photo of dog cat on the beach in snow red small tree car", "bcd", "fgh", "klm", "pqr", "xwz")


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_index(folder: Path, pipeline: str, parts: dict[str, str], **settings: Any) -> None:
    """model_index.json of parts named `library.Class`."""
    named = {name: kind.split(".") for name, kind in sorted(parts.items())}
    write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.30.0"} | settings | named)


def clip_tokenizer(folder: Path) -> int:
    """CLIP's tokenizer in vocab.json and merges.txt; returns the number of ids, the last of which ends a text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in printable] + [chr(256 + place) for place in range(256 - len(printable))]
    tokens, merges = [*symbols, *(f"{symbol}</w>" for symbol in symbols)], []
    for word in " ".join(WORDS).split():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens.append(pieces[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: place for place, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    write_json(
        folder / "tokenizer_config.json", special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    )
    return len(tokens)


def t5_tokenizer(folder: Path, *, fast: bool) -> int:
    """T5's tokenizer as a sentencepiece model, `fast` with tokenizer.json too; returns the number of ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*WORDS, *(" ".join(WORDS),) * 20]),
        model_writer=model,
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        special | {"extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"},
    )
    tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    if fast:
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return len(tokenizer)


def clip_text(ids: int, width: int) -> CLIPTextModel:
    """Two layers, with the token of a text's end as in hub configurations, where it isn't the real one."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=ids,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=width,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def t5_encoder(ids: int, width: int) -> T5EncoderModel:
    """Two layers of T5 v1.1, which has more rows of embeddings than its tokenizer has ids."""
    return T5EncoderModel(
        T5Config(
            vocab_size=ids + 28,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.1,
            tie_word_embeddings=False,
        )
    )


def vae(channels: int, **settings: Any) -> AutoencoderKL:
    """A VAE that shrinks by eight."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        **settings,
    )


def hub_names(weights: Path) -> None:
    """CLIP's names as on the hub, with text_model. before them."""
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
