"""Rare tokens of byte-pair, unigram and word-piece tokenizers, built here or shipped with the miniature."""

from pathlib import Path
from typing import Any

import pytest
from transformers import BertTokenizer, CLIPTokenizer, GPT2Tokenizer, T5Tokenizer

import dreambooth
from dreambooth.data.identifier import MEANINGFUL, candidates, choose_identifier, choose_identifiers, describe
from dreambooth.errors import InputError

COMMON = ["a", "photo", "of", "dog", "cat", "the", "brr", "house"]
RARE = ["xkq", "zpv", "sks", "vx", "oak", "bqxw", "qrg", "dlm"]
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


def merges_for(words: list[str], end: str) -> list[tuple[str, str]]:
    """Merges that put each word together from the left, none of them twice."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + end]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def numbered(entries: list[str]) -> dict[str, int]:
    return {entry: index for index, entry in enumerate(dict.fromkeys(entries))}


def clip() -> Any:
    merges = merges_for([*COMMON, *RARE], "</w>")
    entries = [*BYTES, *(symbol + "</w>" for symbol in BYTES), *map("".join, merges)]
    return CLIPTokenizer(vocab=numbered([*entries, "<|startoftext|>", "<|endoftext|>"]), merges=merges)


def gpt2() -> Any:
    merges = merges_for([f"Ġ{word}" for word in [*COMMON, *RARE]], "")
    return GPT2Tokenizer(vocab=numbered([*BYTES, *map("".join, merges), "<|endoftext|>"]), merges=merges)


def bert() -> Any:
    letters = [letter for code in range(97, 123) for letter in (chr(code), f"##{chr(code)}")]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab=numbered([*special, *letters, *COMMON, *(f"word{i}" for i in range(60)), *RARE]))


def t5() -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    # A piece has to score better than its letters do, or it would never be used.
    words = [("▁" + word, -3 - 0.01 * rank) for rank, word in enumerate([*COMMON, "an", "with", "red"])]
    window = [("▁" + word, -4 - 0.01 * rank) for rank, word in enumerate(RARE)]
    fillers = [(f"▁filler{rank}", -5 - 0.01 * rank) for rank in range(26)]
    rarest = [("▁wzk", -5.9)]
    letters = [(chr(code), -6 - 0.01 * code) for code in range(97, 123)]
    return T5Tokenizer(vocab=[*special, *words, *window, *fillers, *rarest, *letters], extra_ids=0)


def miniature() -> Any:
    folder = Path(dreambooth.__file__).parent / "miniature" / "weights" / "pipeline" / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder)


BUILDERS = [clip, gpt2, bert, t5, miniature]


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda builder: builder.__name__)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


class TestCandidates:
    def test_each_is_itself_in_a_prompt_and_back(self, tokenizer: Any) -> None:
        found = candidates(tokenizer)
        assert found
        for candidate in found:
            prompt = tokenizer(f"a photo of {candidate.text} dog", add_special_tokens=False).input_ids
            start = prompt.index(candidate.token_ids[0])
            assert tuple(prompt[start : start + len(candidate.token_ids)]) == candidate.token_ids
            assert tokenizer.decode(list(candidate.token_ids)).strip() == candidate.text
            assert len(candidate.token_ids) <= 3
            assert len(candidate.text) <= 3
            assert not set(candidate.text) & set("aeiouy \t\n")

    def test_ranked_by_rarity(self, tokenizer: Any) -> None:
        ranks = [candidate.rank for candidate in candidates(tokenizer)]
        assert ranks == sorted(ranks, reverse=True)
        assert all(0 <= rank <= 1 for rank in ranks)

    def test_limit(self, tokenizer: Any) -> None:
        assert candidates(tokenizer, limit=2) == candidates(tokenizer)[:2]

    @pytest.mark.parametrize("build", [clip, bert])
    def test_the_rare_ones_and_no_others(self, build: Any) -> None:
        # Not brr (frequent), oak (a vowel), bqxw (four characters) and sks (a rifle).
        assert [candidate.text for candidate in candidates(build())] == ["dlm", "qrg", "vx", "zpv", "xkq"]

    def test_unigram_stays_within_the_papers_range(self) -> None:
        texts = {candidate.text for candidate in candidates(t5())}
        assert texts == {
            "xkq",
            "zpv",
            "vx",
            "qrg",
            "dlm",
        }  # and not wzk, which lies where id 10000 and more do in T5-XXL

    def test_the_miniatures_are_the_words_made_for_it(self) -> None:
        found = candidates(miniature())
        assert len(found) == 64
        assert all(len(candidate.token_ids) == 1 for candidate in found)

    def test_why_is_said(self, tokenizer: Any) -> None:
        assert all("%" in candidate.why for candidate in candidates(tokenizer))

    def test_spelled_ones_follow_when_more_are_wanted(self) -> None:
        found = candidates(clip(), limit=50)
        assert len(found) == 50
        assert len({candidate.text for candidate in found}) == 50
        assert all(2 <= len(candidate.token_ids) <= 3 for candidate in found[5:])
        assert not MEANINGFUL & {candidate.text for candidate in found}


class TestChoose:
    def test_the_same_for_the_same_name(self, tokenizer: Any) -> None:
        chosen = choose_identifier(tokenizer, subject_name="rex")
        assert chosen == choose_identifier(tokenizer, subject_name="rex")
        assert chosen in {candidate.text for candidate in candidates(tokenizer)}

    def test_names_spread_over_the_candidates(self) -> None:
        tokenizer = miniature()
        chosen = {choose_identifier(tokenizer, subject_name=f"subject-{number}") for number in range(100)}
        assert len(chosen) > 40  # 64 boxes, 100 balls: 51 expected

    def test_distinct_within_a_set_in_any_order(self) -> None:
        tokenizer = miniature()
        names = [f"subject-{number}" for number in range(64)]
        chosen = choose_identifiers(tokenizer, names)
        assert list(chosen) == names
        assert len(set(chosen.values())) == 64
        assert chosen == choose_identifiers(tokenizer, names[::-1])

    def test_a_set_larger_than_the_rare_tokens_is_spelled(self) -> None:
        names = [f"subject-{number}" for number in range(300)]
        assert len(set(choose_identifiers(miniature(), names).values())) == 300

    def test_taken_ones_are_left(self) -> None:
        tokenizer = clip()
        first = choose_identifier(tokenizer, subject_name="rex")
        second = choose_identifier(tokenizer, subject_name="rex", taken=(first.upper(), "elsewhere"))
        assert second != first
        assert second in {candidate.text for candidate in candidates(tokenizer)}

    def test_more_subjects_than_identifiers(self) -> None:
        with pytest.raises(InputError, match="an identifier for each of 9,000 subjects, but this tokenizer has"):
            choose_identifiers(clip(), [f"subject-{number}" for number in range(9000)])


class TestDescribe:
    @pytest.mark.parametrize("build", [clip, gpt2, bert, t5])
    def test_a_rare_one_has_no_warning(self, build: Any) -> None:
        described = describe(build(), "xkq")
        assert (described.tokens, described.is_rare, described.warning) == (("xkq",), True, None)

    def test_every_candidate_is_rare(self, tokenizer: Any) -> None:
        assert all(describe(tokenizer, candidate.text).is_rare for candidate in candidates(tokenizer))

    @pytest.mark.parametrize("build", [clip, gpt2, bert, t5])
    def test_an_ordinary_word(self, build: Any) -> None:
        described = describe(build(), "dog")
        assert described.tokens == ("dog",)
        assert described.warning is not None
        assert "'dog' is 1 token" in described.warning
        assert "among the commonest" in described.warning
        assert "leave it out" in described.warning

    def test_a_made_up_word_that_splits(self) -> None:
        described = describe(clip(), "xxy5")
        assert described.tokens == ("x", "x", "y", "5")
        assert described.warning is not None
        assert "'xxy5' is 4 tokens" in described.warning
        assert "'5' (among the commonest 1 % of merges)" in described.warning

    def test_case_is_the_tokenizers_business(self) -> None:
        assert describe(clip(), "XKQ").is_rare

    def test_unreadable_for_the_tokenizer(self) -> None:
        described = describe(bert(), "日本")
        assert described.warning is not None
        assert "can't read the identifier '日本'" in described.warning

    def test_letters_beyond_ascii(self) -> None:
        described = describe(clip(), "日")
        assert len(described.tokens) == 3  # its three bytes
        assert described.warning is not None
