"""Create a study, or open it again with the same command."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dreambooth.config.explain import as_given
from dreambooth.config.wording import CLASS_NOUN_PLACEHOLDER, IDENTIFIER_PLACEHOLDER, check_wording
from dreambooth.errors import InputError
from dreambooth.evaluation.prompts import prompt_list
from dreambooth.miniature import BASES
from pipelines.apps.generate import FoundModel, find_model
from pipelines.apps.study.samples import has_samples, read_references, read_samples, sample_model
from pipelines.apps.study.store import StudyFile
from pipelines.apps.study.study import SubjectSamples, make_questions


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Everything that decides a study's questions: A and B, and for models prompts and photographs."""

    a: str
    b: str
    instance_images: str | None = None
    prompts: tuple[str, ...] = ()
    images_per_prompt: int = 1
    questions: int = 25
    seed: int = 0


def open_study(
    path: Path, settings: StudySettings, *, tracking_uri: str | None, say: Callable[[str], None] = lambda line: None
) -> StudyFile:
    """Open the study at a path, or create it.

    Raises InputError if it has other settings, and for unusable models, folders, prompts and photographs.
    """
    asked = asdict(settings) | {"prompts": list(settings.prompts)}
    if path.exists():
        found = StudyFile(path)
        known = found.about["asked"]
        if differ := [name for name, value in asked.items() if known.get(name) != value]:
            raise InputError(
                f"{path.parent} holds a study with other settings: {differ[0]} is "
                f"{as_given(known.get(differ[0]))} there and {as_given(asked[differ[0]])} here. Give another folder "
                f"with --output, or that folder alone to go on with it"
            )
        return found
    a, b = _sides(settings, tracking_uri, say)
    if not set(a[1]) & set(b[1]):
        say(
            f"warning: A shows {', '.join(a[1])} and B {', '.join(b[1])}. If those are two subjects, raters compare "
            f"subjects, not models; give two models of one subject"
        )
    questions = make_questions(a[1], b[1], count=settings.questions, seed=settings.seed)
    return StudyFile.create(path, questions, {"a": a[0], "b": b[0], "seed": settings.seed, "asked": asked})


_Labelled = tuple[str, Mapping[str, SubjectSamples]]


def _sides(
    settings: StudySettings, tracking_uri: str | None, say: Callable[[str], None]
) -> tuple[_Labelled, _Labelled]:
    """A's and B's samples by subject, with their addresses; models sample the prompts of folders."""
    for prompt in settings.prompts:
        check_wording(prompt, what=f"the prompt {prompt!r}")
        if IDENTIFIER_PLACEHOLDER not in prompt:
            raise InputError(f"the prompt {prompt!r} doesn't say where the identifier goes; put [V] in its place")
    stored = {source: read_samples(source) for source in (settings.a, settings.b) if has_samples(source)}
    shown = next(iter(next(iter(stored.values())).values())) if stored else None
    models = {source: find_model(source, tracking_uri) for source in (settings.a, settings.b) if source not in stored}
    references = _references(settings, shown, say) if models else ()

    def side(source: str) -> _Labelled:
        if source in stored:
            return source, stored[source]
        say(f"sampling from {models[source].address}")
        samples = sample_model(
            models[source],
            settings.prompts or (tuple(shown.samples) if shown else _prompts(models[source])),
            references,
            images_per_prompt=settings.images_per_prompt,
            seed=settings.seed,
            tracking_uri=tracking_uri,
        )
        return models[source].address, {samples.subject: samples}

    return side(settings.a), side(settings.b)


def _references(settings: StudySettings, shown: SubjectSamples | None, say: Callable[[str], None]) -> tuple[bytes, ...]:
    if settings.instance_images is not None:
        return read_references(settings.instance_images, say)
    if shown is None:
        raise InputError("a study of two models needs photographs to compare with; give --instance-images DIR")
    return shown.references


def _prompts(model: FoundModel) -> tuple[str, ...]:
    """The evaluation's prompts for a model's base, with its class noun."""
    chosen = prompt_list("miniature" if model.base_model in BASES else "dreambench", model.class_noun)
    return tuple(prompt.text.replace(CLASS_NOUN_PLACEHOLDER, model.class_noun) for prompt in chosen.prompts)
