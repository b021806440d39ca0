import random
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from dreambooth.miniature.pretraining.captions import (
    held_out_prompts,
    is_held_out_prompt,
    prompt,
    sample_caption,
    sample_group,
    truth,
)
from dreambooth.miniature.pretraining.tokenizer import MAX_LENGTH, build_tokenizer, caption_words, rare_words
from dreambooth.miniature.pretraining.train_unet import training_scene
from dreambooth.miniature.pretraining.world import CLASS_NOUNS, COLOURS, PLACES, sample_scene

TOKENIZER = build_tokenizer()


def test_every_caption_word_and_every_rare_word_is_one_token_and_comes_back() -> None:
    assert len(set(rare_words())) == 64
    for word in (*caption_words(), *rare_words()):
        start, *middle, end = TOKENIZER(word).input_ids
        assert (start, end) == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
        assert len(middle) == 1, word
        assert TOKENIZER.decode(middle) == word


def test_rare_words_have_the_latest_ranks_and_common_words_early_ones() -> None:
    ranks = {word: TOKENIZER(word).input_ids[1] for word in (*caption_words(), *rare_words())}
    assert min(ranks[word] for word in rare_words()) > max(ranks[word] for word in caption_words())
    assert ranks["photo"] < ranks["teapot"]


def test_any_text_goes_through_the_tokenizer_unharmed() -> None:
    text = "a plüsch sloth, 12 years old, in München"
    assert TOKENIZER.decode(TOKENIZER(text).input_ids, skip_special_tokens=True).replace(
        " ", ""
    ) == text.lower().replace(" ", "")


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == MAX_LENGTH
    text = "a photo of a zpv teapot with stripes, somewhere"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids


def test_every_caption_fits_and_holds_no_word_beyond_the_vocabulary() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = sample_caption(rng, sample_scene(rng)).text
        tokens = TOKENIZER(text).input_ids
        assert len(tokens) == len(text.split()) + 2 <= MAX_LENGTH


def test_rare_words_are_rare_and_not_unseen() -> None:
    rng = random.Random(0)
    captions = [sample_caption(rng, sample_scene(rng)).text for _ in range(20_000)]
    seen = Counter(word for caption in captions for word in caption.split() if word in rare_words())
    assert len(seen) > 56
    assert 0.005 < sum(seen.values()) / len(captions) < 0.02


def test_a_caption_is_true_of_its_scene_and_of_few_others_in_a_group_of_near_misses() -> None:
    rng = random.Random(1)
    off_diagonal = []
    for _ in range(50):
        scenes = sample_group(rng)
        matches = truth([sample_caption(rng, scene) for scene in scenes], scenes)
        assert matches.diagonal().all()
        off_diagonal.append(float((matches.sum() - len(scenes)) / (len(scenes) * (len(scenes) - 1))))
    assert 0 < sum(off_diagonal) / len(off_diagonal) < 0.3


def test_held_out_prompts_are_balanced_and_never_shown_to_the_denoiser() -> None:
    held_out = held_out_prompts()
    assert len(held_out) == 100
    for position, words in enumerate((CLASS_NOUNS, COLOURS, PLACES)):
        assert Counter(triple[position] for triple in held_out) == dict.fromkeys(words, 10)
    assert not any(is_held_out_prompt(training_scene(index)) for index in range(3000))
    assert prompt("dog", "orange", "on the beach") == "a photo of an orange dog on the beach"
