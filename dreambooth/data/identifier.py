"""Choose an identifier: a rare token of the base model's tokenizer.

A good identifier has hardly any meaning to the base model (an ordinary word would have to be unlearned first), yet few
tokens (single common letters carry meanings of their own). The paper (section 3.1) draws uniformly from the ids 5000 to
10000 of T5-XXL's vocabulary, keeps tokens of at most three Unicode characters and decodes them. For any tokenizer:

- Tokens are ranked from 0 (commonest) to 1 (rarest): by the order of merges in a byte-pair vocabulary, where a single
  byte is as common as can be, by score in a unigram vocabulary, else by id.
- The frequent range is left out: the first half of the ranks, or, in a unigram vocabulary, whatever lies outside the
  paper's range, which is 16 to 31 % of T5-XXL's pieces.
- The text has two or three characters, no whitespace, and inside a prompt it becomes that token and back again.
- It consists of lower-case consonants. Words have vowels, so this excludes ordinary words without a dictionary; every
  keyboard types it, too. `MEANINGFUL` lists exceptions.

In CLIP's vocabulary 549 tokens pass, in the miniature's 64, put there for this.
"""

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dreambooth.amounts import counted
from dreambooth.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dreambooth.config.subject import PromptTemplates, Subject

MAX_TOKENS = 3
DRAWN_FROM = 256
"""Size of the pool of rarest candidates that an identifier is drawn from."""
MEANINGFUL = frozenset(("sks", "smg", "fck", "sht", "kkk", "wtf", "lsd", "hmm", "shh", "tsk", "grr", "jpg", "png"))
"""Words without vowels that occur in captions: sks and smg are guns."""

_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_READABLE = re.compile(f"[{_CONSONANTS}]{{2,3}}")
_MARKS = re.compile(r"^(?:Ġ|▁|##)|</w>$")  # how vocabularies write the start or the end of a word
_PAPER_RANGE = 5000 / 32000, 10000 / 32000  # of T5-XXL's 32,000 pieces, which are sorted by score
_WORDS_FOR = {"BPE": "merges", "Unigram": "pieces"}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A possible identifier. `rank` goes from 0 for the commonest to 1 for the rarest token."""

    text: str
    token_ids: tuple[int, ...]
    rank: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """An identifier's tokens, their ranks, and a warning unless it is rare."""

    tokens: tuple[str, ...]
    ranks: tuple[float, ...]
    is_rare: bool
    warning: str | None


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    by_id: dict[int, float]
    common_below: float
    unknown_above: float
    unit: str

    def how_common(self, rank: float) -> str:
        share, which = (rank, "commonest") if rank < 0.5 else (1 - rank, "rarest")
        return f"among the {which} {max(1, math.ceil(100 * share))} % of {self.unit}"


def candidates(tokenizer: "PreTrainedTokenizerBase", *, limit: int | None = None) -> tuple[Candidate, ...]:
    """Possible identifiers, rarest first; if `limit` exceeds the rare tokens, spelled ones follow.

    A spelled identifier is a rare sequence of two or three tokens that need not be rare themselves. Without a limit
    there are none, unless the vocabulary has no rare token at all.
    """
    ranking = _rank(tokenizer)
    found = _rare_tokens(tokenizer, ranking)
    if not found or (limit is not None and limit > len(found)):
        found += _spelled(tokenizer, ranking, without={candidate.text for candidate in found})
    return tuple(found[:limit])


def choose_identifiers(
    tokenizer: "PreTrainedTokenizerBase", subject_names: Sequence[str], *, taken: Collection[str] = ()
) -> dict[str, str]:
    """Choose an identifier per subject name, distinct from each other and from `taken`; deterministic.

    Raises InputError if the tokenizer has too few.
    """
    names = sorted(set(subject_names))
    used = {identifier.casefold() for identifier in taken}
    pool = [candidate for candidate in candidates(tokenizer) if candidate.text not in used]
    if len(names) > len(pool):
        everything = candidates(tokenizer, limit=sys.maxsize)
        pool = [candidate for candidate in everything if candidate.text not in used]
    if len(names) > len(pool):
        raise InputError(
            f"expected an identifier for each of {counted(len(names), 'subject')}, but this tokenizer has "
            f"{len(pool)} that are rare enough; give some of the subjects an identifier of your own"
        )
    chosen: dict[str, str] = {}
    rarest, others = [candidate.text for candidate in pool[:DRAWN_FROM]], [c.text for c in pool[DRAWN_FROM:]]
    for name in names:
        chosen[name] = rarest.pop(_draw(rarest, name)) if rarest else others.pop(0)
    return {name: chosen[name] for name in subject_names}


def choose_identifier(tokenizer: "PreTrainedTokenizerBase", *, subject_name: str, taken: Collection[str] = ()) -> str:
    """Choose one subject's identifier, uniformly from the rarest candidates not in `taken`."""
    return choose_identifiers(tokenizer, (subject_name,), taken=taken)[subject_name]


def describe(tokenizer: "PreTrainedTokenizerBase", identifier: str) -> Description:
    """Tokens of an identifier in a prompt, how common they are, and a warning if it is a poor choice."""
    ranking = _rank(tokenizer)
    ids = token_ids_in_prompts(tokenizer, identifier)
    ids = tuple(index for index in ids if _show(tokenizer, index))  # the start of a word has no meaning
    ranks = tuple(ranking.by_id.get(index, 0.0) for index in ids)
    tokens = tuple(_show(tokenizer, index) for index in ids)
    is_unknown = tokenizer.unk_token_id in ids
    is_rare = 1 <= len(ids) <= MAX_TOKENS and min(ranks) >= ranking.common_below and not is_unknown
    warning = None
    if is_unknown or not ids:
        warning = f"the base model's tokenizer can't read the identifier {identifier!r}"
    elif not is_rare:
        split = ", ".join(f"{token!r} ({ranking.how_common(rank)})" for token, rank in zip(tokens, ranks, strict=True))
        warning = (
            f"the identifier {identifier!r} is {counted(len(ids), 'token')} with a meaning for the base model: {split}"
        )
    if warning is not None:
        warning += "; leave it out to have a rare one chosen, or see 'dreambooth identifiers'"
    return Description(tokens=tokens, ranks=ranks, is_rare=is_rare, warning=warning)


@lru_cache(maxsize=1024)
def token_ids_in_prompts(tokenizer: "PreTrainedTokenizerBase", identifier: str) -> tuple[int, ...]:
    """Tokens of an identifier within a prompt."""
    return _ids_in_prompts(tokenizer, [identifier])[0]


def check_own_tokens(
    tokenizer: "PreTrainedTokenizerBase", subject: "Subject", templates: "PromptTemplates", *, learnt_apart: bool
) -> str | None:
    """A warning if the identifier shares tokens with other words of the training prompts, else None.

    Training changes every prompt with such a word, class prompts included. Raises InputError if the identifier's
    embedding has its own learning rate (`learnt_apart`) and the word is the class noun.
    """
    own = set(token_ids_in_prompts(tokenizer, str(subject.identifier)))
    words = {
        "the class noun": subject.class_noun,
        "the class prompt": templates.class_prompt(subject),
        "the instance prompt": templates.instance_prompt(subject.model_copy(update={"identifier": " "})),
    }
    for where, text in words.items():
        shared = [
            _show(tokenizer, index) for index in own & set(token_ids_in_prompts(tokenizer, " ".join(text.split())))
        ]
        if not (named := ", ".join(repr(token) for token in sorted(shared) if token)):
            continue
        if learnt_apart and where == "the class noun":
            raise InputError(
                f"the identifier {subject.identifier!r} is read as {named}, and so is the class noun "
                f"{subject.class_noun!r}: every picture of the class would be learnt as the subject; choose an "
                f"identifier without that word, or leave it out and one is chosen"
            )
        return (
            f"the identifier {subject.identifier!r} shares {named} with {where} {text!r}, so what it learns changes "
            f"that word too; leave it out to have one chosen, or see 'dreambooth identifiers'"
        )
    return None


def _draw(texts: Sequence[str], name: str) -> int:
    # The smallest hash of (name, text) is a uniform draw without a generator, and another subject's choice changes it
    # only if the two collide.
    lots = [hashlib.sha256(f"{name} {text}".encode()).digest() for text in texts]
    return lots.index(min(lots))


@lru_cache(maxsize=8)
def _rank(tokenizer: "PreTrainedTokenizerBase") -> _Ranking:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model: dict[str, Any] = json.loads(backend.to_str())["model"] if backend is not None else {}
    kind = str(model.get("type", ""))
    common_below, unknown_above = _PAPER_RANGE if kind == "Unigram" else (0.5, 1.0)
    by_id = dict.fromkeys(vocabulary.values(), 0.0)
    if kind == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        ordered = [vocabulary[left + right.removeprefix(prefix)] for left, right in pairs]
        # Two merges can give one token; the earlier one shows how common it is.
        ordered = list(dict.fromkeys(ordered))
    elif kind == "Unigram":
        scored = sorted(enumerate(model["vocab"]), key=lambda entry: -entry[1][1])
        ordered = [index for index, _ in scored if index not in special]
    else:
        ordered = sorted(set(vocabulary.values()) - special)
    by_id.update({index: position / max(1, len(ordered) - 1) for position, index in enumerate(ordered)})
    return _Ranking(
        by_id=by_id, common_below=common_below, unknown_above=unknown_above, unit=_WORDS_FOR.get(kind, "tokens")
    )


def _rare_tokens(tokenizer: "PreTrainedTokenizerBase", ranking: _Ranking) -> list[Candidate]:
    ranks: dict[str, float] = {}
    for entry, index in tokenizer.get_vocab().items():
        text, rank = _MARKS.sub("", entry), ranking.by_id[index]
        if ranking.common_below <= rank <= ranking.unknown_above and _is_readable(text):
            ranks[text] = rank
    found = []
    for text, ids in zip(ranks, _ids_in_prompts(tokenizer, list(ranks)), strict=True):
        telling = [index for index in ids if _show(tokenizer, index)]
        # Text and token need not agree: the prompt may merge "xk" and "q" where the entry was "xkq" without its mark.
        if len(telling) == 1 and len(ids) <= MAX_TOKENS and _returns(tokenizer, ids, text):
            rank = ranking.by_id[telling[0]]
            if ranking.common_below <= rank <= ranking.unknown_above:
                why = f"one token, {ranking.how_common(rank)}"
                found.append(Candidate(text=text, token_ids=ids, rank=rank, why=why))
    return sorted(found, key=lambda candidate: (-candidate.rank, candidate.text))


def _spelled(tokenizer: "PreTrainedTokenizerBase", ranking: _Ranking, *, without: set[str]) -> list[Candidate]:
    texts = ["".join(letters) for letters in itertools.product(_CONSONANTS, repeat=3) if len(set(letters)) == 3]
    texts = [text for text in texts if text not in without and _is_readable(text)]
    found = []
    for text, ids in zip(texts, _ids_in_prompts(tokenizer, texts), strict=True):
        if 1 < len(ids) <= MAX_TOKENS and tokenizer.unk_token_id not in ids and _returns(tokenizer, ids, text):
            rank = sum(ranking.by_id.get(index, 0.0) for index in ids) / len(ids)
            why = f"spelled with {len(ids)} tokens, as no single rare token is left"
            found.append(Candidate(text=text, token_ids=ids, rank=rank, why=why))
    return sorted(found, key=lambda candidate: (-candidate.rank, candidate.text))


def _is_readable(text: str) -> bool:
    return _READABLE.fullmatch(text) is not None and text not in MEANINGFUL


def _ids_in_prompts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Tokens of each text within a prompt, after a space."""
    if not texts:
        return []
    before = _tokens_before(tokenizer)
    prompts = tokenizer([f"a {text}" for text in texts], add_special_tokens=False).input_ids
    return [tuple(ids[before:]) for ids in prompts]


@lru_cache(maxsize=8)
def _tokens_before(tokenizer: "PreTrainedTokenizerBase") -> int:
    return len(tokenizer("a", add_special_tokens=False).input_ids)


def _returns(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], text: str) -> bool:
    return str(tokenizer.decode(list(ids))).strip() == text


@lru_cache(maxsize=4096)
def _show(tokenizer: "PreTrainedTokenizerBase", index: int) -> str:
    """One token as text without its marks; empty for a token that only starts a word."""
    shown = str(tokenizer.decode([index])).strip()
    return (
        _MARKS.sub("", str(tokenizer.convert_ids_to_tokens(index))) if "\N{REPLACEMENT CHARACTER}" in shown else shown
    )
