"""Texts that would mean something else to the base model than to their author, found before work starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.config.wording import PROMPT_FIELDS, TEMPLATE_FIELDS, misplaced, one_line
from dreambooth.data.images import InstanceImage
from dreambooth.data.prompt_checks import PromptReader, read
from dreambooth.errors import InputError
from dreambooth.evaluation.banks import load_bank
from dreambooth.evaluation.run_texts import check_texts
from dreambooth.miniature import PIPELINE_DIR
from dreambooth.models.families import load_tokenizer
from dreambooth.models.text_readers import TextReader

LONG = " ".join(["on the beach"] * 8)  # 24 tokens, and the miniature reads 22


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return load_tokenizer(PIPELINE_DIR)


@pytest.fixture(scope="module")
def reader(tokenizer: CLIPTokenizer) -> PromptReader:
    return PromptReader(readers=readers(tokenizer), identifier="tfz")


def readers(tokenizer: CLIPTokenizer) -> list[TextReader]:
    """Those of a base model with one text encoder."""
    return [TextReader(folder="text_encoder", tokenizer=tokenizer, length=tokenizer.model_max_length)]


class TestPlaceholders:
    @pytest.mark.parametrize(
        ("text", "mistaken", "instead"),
        [
            ("a photo of [v] dog", "'[v]'", "write [V] where the identifier goes"),
            ("a photo of [V ] dog", "'[V ]'", "write [V]"),
            ("a photo of [ V] dog", "'[ V]'", "write [V]"),
            ("a photo of <V> dog", "'<V>'", "write [V]"),
            ("a photo of {V} dog", "'{V}'", "write [V]"),
            ("a photo of [V*] dog", "'[V*]'", "write [V]"),
            ("a photo of V* dog", "'V*'", "write [V]"),
            ("a photo of S*", "'S*'", "write [V]"),
            ("a photo of (V) dog", "'(V)'", "write [V]"),
            (r"a photo of \[V\] dog", r"'\\[V\\]'", "write [V]"),
            ("a photo of \uff3bV\uff3d dog", "'[V]'", "write [V]"),  # full-width brackets
            ("a photo of [\uff36] dog", "'[V]'", "write [V]"),
            ("a photo of [\u0412] dog", "'[\u0412]'", "write [V]"),  # Cyrillic
            ("a photo of \u3010V\u3011 dog", "'\u3010V\u3011'", "write [V]"),
            ("a photo of {identifier} dog", "'{identifier}'", "write [V]"),
            ("a photo of [identifier] dog", "'[identifier]'", "write [V]"),
            ("a photo of <token> dog", "'<token>'", "write [V]"),
            ("a photo of $identifier dog", "'$identifier'", "write [V]"),
            ("a photo of {{identifier}} dog", "'{identifier}'", "write [V]"),
            ("a photo of [V] {class_noun}", "'{class_noun}'", "write the class noun itself"),
            ("a photo of [V] [class noun]", "'[class noun]'", "write the class noun itself"),
            ("a photo of [V] {noun}", "'{noun}'", "write the class noun itself"),
            ("a photo of [V] class_noun", "'class_noun'", "write the class noun itself"),
            ("a photo of {} dog", "'{}'", "known is [V]"),
            ("a photo of {0} dog", "'{0}'", "known is [V]"),
            ("a photo of [V dog", "'[V'", "known is [V]"),
            ("a photo of V] dog", "'V]'", "known is [V]"),
        ],
    )
    def test_what_is_mistaken_for_one(self, reader: PromptReader, text: str, mistaken: str, instead: str) -> None:
        with pytest.raises(InputError) as error:
            reader.check(text, what="the caption of 1.png", whole=False)
        message = str(error.value)
        assert message.startswith("the caption of 1.png: ")
        assert mistaken in message
        assert instead in message

    @pytest.mark.parametrize(
        "text",
        [
            "a photo of [V] dog",
            "the [V] dog's bowl, and [V] again",
            "a photo of tfz dog",
            "a photo of TFZ dog",
            "a [V] dog [outdoors], (best)",
            "a [V] dog <3 a} smile",
            "a [V] dog -- (2023), 1:4",
            "a photo of [V] dog beside a letter V",
        ],
    )
    def test_what_may_stand_in_a_caption(self, reader: PromptReader, text: str) -> None:
        assert reader.check(text, what="it", whole=False) == ()

    @pytest.mark.parametrize(
        ("text", "command"),
        [
            ("a photo of ([V] dog:1.3)", "([V] dog:1.3)"),
            ("a [V] dog (big: 1.2) (red)", "(big: 1.2)"),
            ("a [V] dog <lora:style:0.8>", "<lora:style:0.8>"),
            ("a [V] dog, [day:night:0.5]", "[day:night:0.5]"),
            ("a [V] dog in [rain|snow]", "[rain|snow]"),
            ("a [V] dog in {rain|snow}", "{rain|snow}"),
            ("a [V] dog in __weather__", "__weather__"),
            ("a [V] dog BREAK snow", "BREAK"),
            ("a [V] dog --ar 16:9", "--ar 16:9"),
        ],
    )
    def test_commands_of_other_programs(self, reader: PromptReader, text: str, command: str) -> None:
        said = f"it: {command!r} is read letter by letter; weights and commands of other programs mean nothing here"
        assert reader.check(text, what="it", whole=False) == (said,)

    def test_an_identifier_in_brackets_may_be_written_out(self, tokenizer: CLIPTokenizer) -> None:
        reader = PromptReader(readers=readers(tokenizer), identifier="<v>")
        assert reader.check("a photo of <v> dog", what="it", whole=True) == ()

    @pytest.mark.parametrize(
        ("text", "known", "message"),
        [
            ("a [V] {noun}", PROMPT_FIELDS, "'{noun}' is no placeholder here; write {class_noun}"),
            ("a [V] {colour}", PROMPT_FIELDS, "'{colour}' is no placeholder here; known are [V] and {class_noun}"),
            ("a [V] {class_noun!r}", PROMPT_FIELDS, "'{class_noun!r}' is no placeholder here"),
            ("a [V] {class_noun", PROMPT_FIELDS, "the bracket in '{' has no partner"),
            ("a [V] class_noun}", PROMPT_FIELDS, "the bracket in '}' has no partner"),
            ("a [V] {{class_noun}}", PROMPT_FIELDS, "'{}' is no placeholder here"),
            ("a [V] {class_noun}", TEMPLATE_FIELDS, "'[V]' is no placeholder here; write {identifier}"),
            ("a {identifier} {noun}", TEMPLATE_FIELDS, "'{noun}' is no placeholder here; write {class_noun}"),
            ("a {{identifier}} dog", TEMPLATE_FIELDS, "'{}' is no placeholder here"),
        ],
    )
    def test_what_settings_may_hold(self, text: str, known: tuple[str, ...], message: str) -> None:
        assert message in str(misplaced(text, known=known))


class TestLength:
    def test_where_the_identifier_is_cut_off(self, reader: PromptReader) -> None:
        with pytest.raises(InputError) as error:
            reader.check(f"a photo {LONG} of [V] dog", what="the caption of 1.png", whole=False)
        assert str(error.value) == (
            "the caption of 1.png has 29 tokens, and the base model reads 22: 'beach on the beach of tfz dog' is cut "
            "off, the identifier with it; shorten it, or put what matters first"
        )

    @pytest.mark.parametrize("words", [22, 23, 24])
    def test_to_the_token(self, reader: PromptReader, words: int) -> None:
        text = " ".join(["[V]", *["dog"] * (words - 1)])
        found = read(reader.readers[0].tokenizer, text.replace("[V]", "tfz"), "tfz")
        assert (found.tokens, found.fits, found.names) == (words, 22, 1)
        assert found.lost.split() == ["dog"] * (words - 22)
        # What is said to fit is what the text encoder is given.
        kept = reader.readers[0].tokenizer(text.replace("[V]", "tfz"), truncation=True, max_length=24).input_ids
        assert len(kept) == min(words, 22) + 2

    @pytest.mark.parametrize("whole", [True, False])
    def test_words_behind_it(self, reader: PromptReader, whole: bool) -> None:
        text = f"a photo of [V] dog {LONG}"
        if whole:
            with pytest.raises(InputError, match="'beach on the beach on the beach' is cut off; shorten it"):
                reader.check(text, what="the prompt", whole=True)
        else:
            [warning] = reader.check(text, what="the prompt", whole=False)
            assert "is cut off" in warning

    def test_a_word_of_which_half_fits_is_lost(self, reader: PromptReader) -> None:
        text = " ".join(["[V]", *["dog"] * 19, "zebra"])
        assert read(reader.readers[0].tokenizer, text.replace("[V]", "tfz"), "tfz").lost == "zebra"

    def test_an_identifier_of_several_tokens_is_kept_whole_or_not_at_all(self, tokenizer: CLIPTokenizer) -> None:
        found = read(tokenizer, " ".join(["dog"] * 21 + ["tfz rjs"]), "tfz rjs")
        assert (found.meant, found.names) == (1, 0)


class TestIdentifiers:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a photo of a dog", "the caption of 1.png names no [V]; write [V] where the subject is meant"),
            ("a photo of sks dog", "names no [V], but 'sks', and the identifier is 'tfz'; write [V]"),
            ("a photo of tqp dog", "names no [V], but 'tqp', and the identifier is 'tfz'"),  # of another subject
        ],
    )
    def test_a_text_without_it(self, reader: PromptReader, text: str, message: str) -> None:
        [warning] = reader.check(text, what="the caption of 1.png", whole=False)
        assert message in warning

    @pytest.mark.parametrize("text", ["two [V]s at night", "the[V] dog", "a [V]dog", "a photo of [V][V]"])
    def test_one_that_becomes_part_of_a_word(self, reader: PromptReader, text: str) -> None:
        with pytest.raises(InputError, match="the identifier becomes part of another word; put spaces around it"):
            reader.check(text, what="the prompt", whole=False)

    @pytest.mark.parametrize("mark", ["<|endoftext|>", "<|startoftext|>"])
    def test_the_tokenizers_own_marks(self, reader: PromptReader, mark: str) -> None:
        with pytest.raises(InputError, match="ends a text for the base model"):
            reader.check(f"a [V] dog {mark} on the beach", what="the prompt", whole=False)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a [V] \ufb01re engine", "'\ufb01re' is read as other letters than 'fire'"),
            ("a [V] \uff44\uff4f\uff47", "is read as other letters than 'dog'"),
            ("a [V] \U0001d41d\U0001d428\U0001d420", "is read as other letters than 'dog'"),
            ("a [V] d\u043eg", "has letters of two alphabets"),
        ],
    )
    def test_letters_that_only_look_like_others(self, reader: PromptReader, text: str, message: str) -> None:
        [warning] = reader.check(text, what="the prompt", whole=True)
        assert message in warning

    @pytest.mark.parametrize("text", ["a [V] cafe\u0301 \u2026", "a [V] caf\u00e9, \u20ac \u2122 \U0001f436"])
    def test_letters_that_are_what_they_look_like(self, reader: PromptReader, text: str) -> None:
        assert reader.check(text, what="it", whole=False) == ()


class TestSettings:
    @pytest.fixture
    def load(self, tiny_pipeline: Path) -> Callable[..., DreamBoothConfig]:
        def load(*overrides: str, **subject: Any) -> DreamBoothConfig:
            fields = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": "rex"} | subject
            return load_config({"base_model": str(tiny_pipeline), "subject": fields}, overrides)

        return load

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("evaluation.prompts=['a [V] {noun}']", "'a [V] {noun}': '{noun}' is no placeholder here; write"),
            ("evaluation.prompts=['a [V] {}']", "known are [V] and {class_noun}"),
            ("evaluation.prompts=['a [V] {0}']", "known are [V] and {class_noun}"),
            ("evaluation.prompts=['a [V] {class_noun']", "has no partner"),
            ("evaluation.prompts=['a {identifier} dog']", "write [V] where the identifier goes"),
            ("evaluation.prompts=['a [V] dog', 'A [v] Dog']", "'[v]' is no placeholder"),
            ("evaluation.prompts=['a [V] dog', 'A [V] Dog']", "expected prompts that differ"),
            ("prompts.instance='a photo of [V] {class_noun}'", "'[V]' is no placeholder here; write {identifier}"),
            ("prompts.instance='a {{identifier}} dog'", "is no placeholder"),
            ("prompts.instance='a photo of {identifier} {noun}'", "'{noun}' is no placeholder here; write {class_n"),
            ("prompts.class='a photo of {identifier} dog'", "class images show any other member of the class"),
            ("prompts.class='a photo of [V] dog'", "'[V]' is no placeholder here"),
            ("subject.identifier='[V]'", "'[V]' is a placeholder; give a rare word"),
            ("subject.identifier='{identifier}'", "is a placeholder"),
            ("subject.class_noun='[V] dog'", "holds a placeholder"),
            ("subject.class_noun='a dog'", "expected the noun without its article, 'dog'"),
            ("subject.class_noun='Tfz dog'", "holds the identifier 'tfz'"),
            ("subject.identifier='DOG'", "the identifier has to be another, rare word"),
        ],
    )
    def test_what_they_may_not_hold(self, load: Callable[..., DreamBoothConfig], setting: str, message: str) -> None:
        with pytest.raises(InputError) as error:
            load(setting)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            (f"prompts.instance='a photo {LONG} of {{identifier}} dog'", "prompts.instance has"),
            ("prompts.instance='a photo of {identifier}s'", "prompts.instance: in '[V]s' the identifier becomes"),
            (f"prompts.class='a dog {LONG}'", "prompts.class has"),
            (f"evaluation.prompts=['a photo {LONG} of [V] dog']", "evaluation.prompts: 'a photo on the beach"),
            ("evaluation.protocol=dreambench", "evaluation.protocol dreambench: 'a [V] {class_noun} wearing"),
        ],
    )
    def test_what_is_cut_off(
        self, load: Callable[..., DreamBoothConfig], tokenizer: CLIPTokenizer, setting: str, message: str
    ) -> None:
        with pytest.raises(InputError) as error:
            check_texts(load(setting, "evaluation.bank=miniature"), (), readers(tokenizer))
        assert message in str(error.value)

    @pytest.mark.parametrize("scored", [True, False])
    def test_the_end_of_a_prompt_may_be_cut_off_where_nothing_is_measured_against_it(
        self, load: Callable[..., DreamBoothConfig], tokenizer: CLIPTokenizer, scored: bool
    ) -> None:
        settings = (f"evaluation.prompts=['a [V] dog {LONG}']", "evaluation.bank=miniature")
        if scored:
            for measured in ("evaluation.protocol=own", "evaluation.every=2"):
                with pytest.raises(InputError, match="'the beach on the beach' is cut off"):
                    check_texts(load(*settings, measured), (), readers(tokenizer))
        else:
            [warning] = check_texts(load(*settings), (), readers(tokenizer))
            assert "is cut off" in warning

    def test_what_the_banks_clip_would_cut_off(
        self, load: Callable[..., DreamBoothConfig], tokenizer: CLIPTokenizer
    ) -> None:
        """A base that reads 77 tokens, and the miniature's bank, which reads 24."""
        reads_more = CLIPTokenizer.from_pretrained(PIPELINE_DIR / "tokenizer", model_max_length=77)
        config = load(
            f"evaluation.prompts=['a [V] dog {LONG}']", "evaluation.bank=miniature", "evaluation.protocol=own"
        )
        with pytest.raises(InputError, match="the bank miniature, which measures CLIP-T, reads 22"):
            check_texts(config, (), readers(reads_more))
        with pytest.raises(InputError, match="CLIP reads 24 tokens, and 'a dog on the"):
            load_bank("miniature").embed_texts([f"a dog {LONG}"])

    def test_captions_are_named_by_their_picture(
        self, load: Callable[..., DreamBoothConfig], tokenizer: CLIPTokenizer
    ) -> None:
        captions = ["a photo of [V] dog", "a photo of a dog", None, f"[V] {LONG}", *["a dog"] * 9]
        images = [InstanceImage(address=f"rex/{place}.png", caption=text) for place, text in enumerate(captions)]
        warnings = check_texts(load(), images, readers(tokenizer))
        assert warnings[0] == "the caption of rex/1.png names no [V]; write [V] where the subject is meant"
        assert warnings[1].startswith("the caption of rex/3.png has 25 tokens, and the base model reads 22: ")
        assert warnings[-1] == "and 6 more texts of this kind"
        bad = [*images, InstanceImage(address="rex/bad.png", caption="a {identifier} dog")]
        with pytest.raises(InputError, match=r"^the caption of rex/bad.png: '\{identifier\}' is no placeholder here"):
            check_texts(load(), bad, readers(tokenizer))


class TestLines:
    def test_several_become_one(self) -> None:
        assert one_line(" a photo\n of\t[V]\r\n dog ") == "a photo of [V] dog"

    @pytest.mark.parametrize("text", ["", " \n\t", "\u3000", "a \0 dog", "a \x1b[31m dog", "a \u202e dog", "\ud800"])
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"visible character"):
            one_line(text)
