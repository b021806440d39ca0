"""CLIP embeddings of images and texts, for CLIP-I and CLIP-T."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.evaluation.encoders import IMAGES_AT_ONCE, load_whole, read_transform, some_at_once
from dreambooth.quiet import hide_progress_bars, quiet

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class CLIPEncoder:
    """A transformers CLIPModel with its tokenizer."""

    def __init__(self, directory: Path, *, device: str) -> None:
        """Load model, tokenizer and transform."""
        quiet()
        hide_progress_bars()
        from transformers import CLIPModel

        self.transform = read_transform(directory)
        self._model = load_whole(CLIPModel, directory).to(device).eval()
        self._tokenizer, self._length = load_text_reader(directory)
        self._device = device

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images: (N, D), float32, of unit norm, on the CPU; raises InputError for no images."""
        embeddings = []
        for some in some_at_once(images):
            pixels = torch.stack([self.transform(image) for image in some])
            pooled = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output  # (B, H)
            embeddings.append(self._model.visual_projection(pooled).float().cpu())
        return torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts: (M, D), float32, of unit norm, on the CPU.

        Raises InputError for no texts, and for one over 77 tokens: a similarity to half a prompt would pass for one to
        all of it.
        """
        if not texts:
            raise InputError("expected at least one text to encode, got none")
        tokens = self._tokenizer(list(texts), padding="max_length", max_length=self._length, verbose=False)
        for text, ids in zip(texts, tokens["input_ids"], strict=True):
            if len(ids) > self._length:
                raise InputError(f"CLIP reads {self._length} tokens, and {text!r} has {len(ids)}; shorten the prompt")
        tokens = tokens.convert_to_tensors("pt")
        embeddings = []
        for start in range(0, len(texts), IMAGES_AT_ONCE):
            rows = slice(start, start + IMAGES_AT_ONCE)
            pooled = self._model.text_model(
                input_ids=tokens.input_ids[rows].to(self._device),
                attention_mask=tokens.attention_mask[rows].to(self._device),
            ).pooler_output
            embeddings.append(self._model.text_projection(pooled).float().cpu())
        return torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)


def load_text_reader(directory: Path) -> "tuple[CLIPTokenizer, int]":
    """The tokenizer of a CLIP in a folder, and its text encoder's length in tokens."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    length = CLIPTextConfig.from_pretrained(directory, local_files_only=True).max_position_embeddings
    return CLIPTokenizer.from_pretrained(directory, local_files_only=True), int(length)
