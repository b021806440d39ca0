"""Check all texts of a run before it starts: captions, prompts of the settings, and evaluation prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dreambooth.amounts import counted
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.config.subject import fill_identifier, fill_prompt
from dreambooth.config.wording import IDENTIFIER_PLACEHOLDER
from dreambooth.data.images import InstanceImage
from dreambooth.data.prompt_checks import PromptReader, read, shortened
from dreambooth.errors import InputError
from dreambooth.evaluation.banks import default_bank, text_reader
from dreambooth.evaluation.prompts import OWN, prompt_list
from dreambooth.evaluation.protocol import named
from dreambooth.models.text_readers import TextReader

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class _Text:
    """`what` names the text in messages; `scored` marks one that samples are measured against."""

    text: str
    what: str
    whole: bool = True
    scored: bool = False
    cure: str = "shorten it, or put what matters first"


def check_texts(
    config: DreamBoothConfig, images: Sequence[InstanceImage], readers: Sequence[TextReader]
) -> tuple[str, ...]:
    """Warnings about the texts of a run with an identifier. Raises one InputError for all faults.

    A caption may lose words at its end, with a warning; texts in the settings have to fit.
    """
    reader = PromptReader(readers=readers, identifier=str(config.subject.identifier))
    classes = PromptReader(readers=readers, identifier=None)
    captions = [
        _Text(text=image.caption, what=f"the caption of {image.address}", whole=False)
        for image in images
        if image.caption is not None
    ]
    unnamed = config.subject.model_copy(update={"identifier": IDENTIFIER_PLACEHOLDER})
    return (
        *_check_all(reader, [_Text(text=config.prompts.instance_prompt(unnamed), what="prompts.instance")]),
        *_check_all(classes, [_Text(text=config.prompts.class_prompt(config.subject), what="prompts.class")]),
        *_check_all(reader, captions),
        *check_evaluation(config, readers),
    )


def check_evaluation(config: DreamBoothConfig, readers: Sequence[TextReader]) -> tuple[str, ...]:
    """Warnings about the evaluation's prompts. Raises one InputError for all faults.

    Prompts of figures or scores have to fit the base model and the bank's CLIP. Prompts of samples for the eye may be
    cut off, with a warning.
    """
    reader = PromptReader(readers=readers, identifier=str(config.subject.identifier))
    texts = list(_drawn(config))
    warnings = _check_all(reader, texts)
    _check_for_bank(config, [text for text in texts if text.scored])
    return warnings


def _drawn(config: DreamBoothConfig) -> Iterator[_Text]:
    settings, noun = config.evaluation, config.prompts.noun_beside_identifier(config.subject)
    scored = settings.every is not None or settings.protocol == OWN
    for prompt in settings.prompts if settings.enabled or scored else ():
        text = fill_prompt(prompt, IDENTIFIER_PLACEHOLDER, noun)
        yield _Text(text=text, what=f"evaluation.prompts: {shortened(prompt)!r}", whole=scored, scored=scored)
    if settings.protocol in ("none", OWN):
        return
    shipped = prompt_list(named(settings.protocol, config.base_model), config.subject.class_noun)
    for each in shipped.prompts:
        text = fill_prompt(each.text, IDENTIFIER_PLACEHOLDER, noun)
        what = f"evaluation.protocol {shipped.name.split()[0]}: {each.text!r}"
        yield _Text(text=text, what=what, scored=True, cure="set evaluation.protocol to another list, or to own")


def _check_for_bank(config: DreamBoothConfig, texts: Sequence[_Text]) -> None:
    """Raise InputError for a text that the CLIP of CLIP-T would cut off."""
    if not texts:
        return
    settings = config.evaluation
    bank = default_bank(config.base_model) if settings.bank == "auto" else settings.bank
    tokenizer, length = text_reader(bank, settings.clip)
    for each in texts:
        reading = read(tokenizer, fill_identifier(each.text, str(config.subject.identifier)), length=length)
        if reading.lost:
            raise InputError(
                f"{each.what} has {reading.tokens} tokens, and the bank {bank}, which measures CLIP-T, reads "
                f"{reading.fits}: {shortened(reading.lost)!r} is cut off; {each.cure}"
            )


def _check_all(reader: PromptReader, texts: Sequence[_Text]) -> tuple[str, ...]:
    """Warnings about texts. Raises one InputError for all faults, the first few of many."""
    warnings: list[str] = []
    faults: list[str] = []
    for each in texts:
        try:
            warnings += reader.check(each.text, what=each.what, whole=each.whole, cure=each.cure)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(_first(faults)))
    return tuple(_first(warnings))


def _first(sentences: Sequence[str]) -> list[str]:
    more = len(sentences) - _SHOWN
    return [*sentences[:_SHOWN], *([f"and {counted(more, 'more text')} of this kind"] if more > 0 else [])]
