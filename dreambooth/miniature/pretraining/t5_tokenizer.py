"""The cascade's tokenizer: a real T5Tokenizer of every caption word, every rare word and characters."""

from transformers import T5Tokenizer

from dreambooth.miniature.pretraining.tokenizer import caption_words, rare_words

T5_LENGTH = 77
"""Tokens of a prompt in IF's pipelines, whatever the tokenizer says."""


def build_t5_tokenizer() -> T5Tokenizer:
    """The tokenizer. Pipelines give it prompts in lower case; what it has no word for it reads by characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -2.0) for word in caption_words()] + [(f"▁{word}", -6.0) for word in rare_words()]
    characters = [(character, -10.0) for character in ("▁", *map(chr, range(ord("!"), ord("~") + 1)))]
    known = {piece for piece, _ in words}
    return T5Tokenizer(vocab=[*special, *words, *(one for one in characters if one[0] not in known)], extra_ids=0)
