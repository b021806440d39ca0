"""The miniature's tokenizer: a real CLIPTokenizer with a byte-pair vocabulary small enough to read.

Its merges come in the order of how common their words are in captions, and the 64 rare words come last: like the rare
tokens of a large tokenizer they are single tokens with the latest merge ranks, hardly ever seen in training.
"""

import functools
import random

from transformers import CLIPTokenizer

from dreambooth.miniature.pretraining.world import CLASS_NOUNS, COLOURS, PATTERN_PHRASES, PLACES, STYLES

MAX_LENGTH = 24
RARE_WORDS = 64

Merge = tuple[str, str]


@functools.cache
def rare_words() -> tuple[str, ...]:
    """Sixty-four nonsense words of three different consonants, at least one of them a rare letter."""
    rng = random.Random("rare words")
    words: list[str] = []
    while len(words) < RARE_WORDS:
        word = "".join(rng.sample("bcdfghjklmnpqrstvwxz", 3))
        if word not in words and any(letter in "jqxz" for letter in word):
            words.append(word)
    return tuple(words)


def caption_words() -> tuple[str, ...]:
    """Every word that captions are made of, the commonest first."""
    phrases = ("a of", *STYLES, "on in the with", *CLASS_NOUNS, *PLACES, *COLOURS, *PATTERN_PHRASES.values(), "an")
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer: 24 positions, every caption word and every rare word a single token, all else in bytes."""
    symbols = _byte_symbols()
    merges: list[Merge] = []
    for word in (*caption_words(), *rare_words()):
        pieces = _split([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:  # a later merge never breaks an earlier word, as merges apply in their order
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    entries = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def _split(pieces: list[str], merges: list[Merge]) -> list[str]:
    """Byte-pair encoding of one word: apply the merges in their order."""
    for merge in merges:
        position = 0
        while position < len(pieces) - 1:
            if (pieces[position], pieces[position + 1]) == merge:
                pieces = [*pieces[:position], "".join(merge), *pieces[position + 2 :]]
            position += 1
    return pieces


def _byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE: printable ones themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
