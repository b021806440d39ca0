"""A model card: what a model is, what it was made of, and how good it is, as the hub and MLflow show it.

A pure function of `CardFacts`, which hold nothing private: no address, no path, no photograph.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import yaml

from dreambooth.amounts import counted
from dreambooth.evaluation.figures import by_bank
from dreambooth.models.licence import Licence

Form = Literal["diffusers", "single-file", "lora"]

README, SAMPLES = "README.md", "samples"
_PAPER = "https://arxiv.org/abs/2208.12242"
_SHOWN = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "dino_subject": "DINO of the subject",
    "dino_subject_patches": "DINO of the subject's patches",
    "clip_t": "CLIP-T",
    "pres": "PRES",
    "div": "DIV",
    "prompts_followed": "prompts followed",
    "near_copies": "near-copies",
    "dinov2": "DINOv2",
    "dinov2_subject_patches": "DINOv2 of the subject's patches",
    "real_dinov2": "DINOv2 of the photographs",
    "dreamsim": "DreamSim",
    "real_dreamsim": "DreamSim of the photographs",
}
_DESCRIBED = ("Base model and licence", "Prompts", "Figures", "Training")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture beside the card: its file's name, and the prompt that it was made from."""

    file: str
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model: what to call it, its hub id (None for one that isn't on the hub), its hash and licence."""

    name: str
    id: str | None
    hash: str
    licence: Licence | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures of one bank on one list of prompts, each as (mean, low, high, n)."""

    bank: str
    prompts: str
    figures: Mapping[str, tuple[float, float, float, int]]


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything a card says. `base_id` is the base model's hub id, None for a model that isn't on the hub;
    `second_base` is that of a cascade's second stage.

    `training` and `seen`, of the samples for the eye, are (what, value) rows; `settings` are the training's by section.
    """

    subject: str
    class_noun: str
    identifier: str
    base_name: str
    base_id: str | None
    base_hash: str
    licence: Licence | None = None
    pipeline_class: str = "DiffusionPipeline"
    cascade: bool = False
    second_base: Base | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    training: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    seen: Sequence[tuple[str, str]] = ()
    measured: Sequence[Measured] = ()
    warnings: Sequence[str] = ()

    def as_json(self) -> str:
        """The card as JSON; `from_json` is the inverse."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CardFacts":
        """Facts that `as_json` wrote."""
        plain = json.loads(text)
        second = plain.get("second_base")  # earlier versions wrote none
        return cls(
            **plain
            | {
                "licence": _licence_from(plain["licence"]),
                "second_base": Base(**second | {"licence": _licence_from(second["licence"])}) if second else None,
                **{name: tuple((what, value) for what, value in plain[name]) for name in ("training", "seen")},
                "warnings": tuple(plain["warnings"]),
                "samples": tuple(Sample(**sample) for sample in plain["samples"]),
                "measured": tuple(
                    Measured(**each | {"figures": {name: tuple(ends) for name, ends in each["figures"].items()}})
                    for each in plain["measured"]
                ),
            }
        )

    def with_figures(self, evaluation: Mapping[str, Any]) -> "CardFacts":
        """The card with an evaluation.json's figures, in the place of earlier ones by the same bank and prompts."""
        measured = all_measured(self.measured, measured_in(evaluation))
        return replace(self, measured=measured, warnings=tuple(evaluation["warnings"]))


def all_measured(earlier: Sequence[Measured], later: Sequence[Measured]) -> tuple[Measured, ...]:
    """Earlier and later figures, the later ones of a bank and its prompts."""
    return tuple({(each.bank, each.prompts): each for each in (*earlier, *later)}.values())


def measured_in(evaluation: Mapping[str, Any]) -> list[Measured]:
    """The figures of an evaluation.json, apart by what measured them."""
    count, images = len(evaluation["per_prompt"]), evaluation["images_per_prompt"]
    return [
        Measured(
            bank=f"{bank.name} ({bank.hash})",
            prompts=f"{counted(count, 'prompt')} ({evaluation['prompt_list']}) x {images}",
            figures={
                name: (figure["mean"], figure["low"], figure["high"], figure["n"]) for name, figure in figures.items()
            },
        )
        for bank, figures in by_bank(evaluation)
    ]


def model_card(facts: CardFacts, *, form: Form = "diffusers", place: str = "path/to/this/folder") -> str:
    """README.md of a model that lies at a `place` (a hub id, or a folder) in a form: YAML metadata, then Markdown."""
    from huggingface_hub import ModelCard

    head = yaml.safe_dump(_metadata(facts, form), sort_keys=False, allow_unicode=True, width=1000)
    sections = _sections(facts, form, place)
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    card = ModelCard(f"---\n{head}---\n\n{_opening(facts)}\n\n{body}\n")
    return str(card.content)


def description(facts: CardFacts, *, most: int) -> str:
    """The card as MLflow shows it: without metadata, pictures and settings, `most` characters long."""
    sections = _sections(replace(facts, settings={}), "diffusers", "")
    chosen = "\n\n".join(f"## {name}\n\n{sections[name]}" for name in _DESCRIBED if name in sections)
    text = f"{_opening(facts)}\n\n{chosen}"
    return text if len(text) <= most else text[: most - 1] + "…"


def _metadata(facts: CardFacts, form: Form) -> dict[str, Any]:
    licence = facts.licence
    data: dict[str, Any] = {}
    if licence is not None:
        stated = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
        data |= {name: value for name, value in stated.items() if value is not None}
    hub_ids = list(dict.fromkeys(one.id for one in _bases(facts) if one.id is not None))
    if hub_ids:
        data |= {"base_model": hub_ids if len(hub_ids) > 1 else hub_ids[0]}
        data |= {"base_model_relation": "adapter" if form == "lora" else "finetune"}
    tags = ["text-to-image", "diffusers", "dreambooth", *(["lora"] if form == "lora" else [])]
    data |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if facts.instance_prompt is not None:
        data["instance_prompt"] = facts.instance_prompt
    if facts.samples:
        data["widget"] = [{"text": one.prompt, "output": {"url": one.file}} for one in facts.samples]
    return data


def _opening(facts: CardFacts) -> str:
    subject = f"{facts.identifier} {facts.class_noun}"
    bases = " and ".join(dict.fromkeys(map(_base, _bases(facts))))
    return (
        f"# {_plain(facts.subject)}\n\n"
        f"{bases}, fine-tuned on photographs of one {_plain(facts.class_noun)} by "
        f"[DreamBooth]({_PAPER}). In prompts, {_code(subject)} is this {_plain(facts.class_noun)}."
    )


def _sections(facts: CardFacts, form: Form, place: str) -> dict[str, str]:
    """The card's sections by title; those of which nothing is known are left out."""
    sections = {
        "Samples": _samples(facts),
        "Use": _use(facts, form, place),
        "Base model and licence": _licence(facts),
        "Prompts": _prompts(facts),
        "Figures": _figures(facts),
        "Training": _training(facts),
    }
    return {title: text for title, text in sections.items() if text}


def _samples(facts: CardFacts) -> str:
    if not facts.samples:
        return ""
    return _table(
        [_plain(one.prompt) for one in facts.samples],
        [[f"![{_plain(one.prompt)}]({one.file})" for one in facts.samples]],
    )


def _use(facts: CardFacts, form: Form, place: str) -> str:
    base = facts.base_id or "path/to/the/base/model"
    prompt = facts.samples[-1].prompt if facts.samples else f"a photo of {facts.identifier} {facts.class_noun}"
    load = {
        "diffusers": f"pipeline = DiffusionPipeline.from_pretrained({place!r})",
        "single-file": f"pipeline = {facts.pipeline_class}.from_single_file({place!r}, config={base!r})",
        "lora": f"pipeline = DiffusionPipeline.from_pretrained({base!r})\npipeline.load_lora_weights({place!r})",
    }[form]
    what = facts.pipeline_class if form == "single-file" else "DiffusionPipeline"
    settings = ""
    if facts.num_inference_steps is not None:
        settings = f", num_inference_steps={facts.num_inference_steps}, guidance_scale={facts.guidance_scale}"
    second = ""
    if facts.cascade:
        second = "\n\nIts second stage, which scales pictures up, is a pipeline of its own in `super_resolution`."
    return (
        f"```python\nfrom diffusers import {what}\n\n{load}\n"
        f"image = pipeline({prompt!r}{settings}).images[0]\n```{second}"
    )


def _bases(facts: CardFacts) -> list[Base]:
    first = Base(name=facts.base_name, id=facts.base_id, hash=facts.base_hash, licence=facts.licence)
    return [first, *([facts.second_base] if facts.second_base is not None else [])]


def _licence(facts: CardFacts) -> str:
    """A paragraph for each stage's base model."""
    stages = ("base model", "second stage's base model")
    return "\n\n".join(_licence_of(base, stage) for base, stage in zip(_bases(facts), stages, strict=False))


def _licence_of(base: Base, stage: str) -> str:
    licence = base.licence
    if licence is None:
        stated = f"The licence of the {stage} isn't known here; it binds this model, so look it up before sharing it."
    else:
        name = licence.name or licence.id
        shown = f"[{_plain(name)}]({licence.link})" if licence.link else _plain(name)
        stated = f"The {stage}'s licence is {shown}; it binds this model, too."
    return f"{_base(base)}, with hash `{base.hash}`. {stated}"


def _licence_from(plain: Mapping[str, Any] | None) -> Licence | None:
    return Licence(**plain) if plain else None


def _prompts(facts: CardFacts) -> str:
    rows = [("instance prompt", facts.instance_prompt), ("class prompt", facts.class_prompt)]
    rows += [("sample", one.prompt) for one in facts.samples]
    return _table(["", "prompt"], [[what, _code(prompt)] for what, prompt in rows if prompt is not None])


def _figures(facts: CardFacts) -> str:
    parts = [_table(["", ""], [[_plain(what), _plain(value)] for what, value in facts.seen])] if facts.seen else []
    parts += [
        _table(
            ["figure", "mean", "95 % interval", "n"],
            [
                [shown, f"{mean:.3f}", f"{low:.3f} to {high:.3f}", str(count)]
                for name, shown in _SHOWN.items()
                if name in each.figures
                for mean, low, high, count in [each.figures[name]]
            ],
        )
        + f"\n\nBank {_plain(each.bank)}, {_plain(each.prompts)}. Figures of two banks can't be compared."
        for each in facts.measured
    ]
    parts += [f"Warning: {_plain(warning)}." for warning in facts.warnings]
    return "\n\n".join(parts)


def _training(facts: CardFacts) -> str:
    if not facts.training:
        return ""
    rows = _table(["", ""], [[_plain(what), _plain(value)] for what, value in facts.training])
    if not facts.settings:
        return rows
    settings = yaml.safe_dump(dict(facts.settings), sort_keys=False, allow_unicode=True)
    return f"{rows}\n\n<details><summary>All settings</summary>\n\n```yaml\n{settings}```\n\n</details>"


def _base(base: Base) -> str:
    if base.id is None:
        return _plain(base.name)
    return f"[{base.id}](https://huggingface.co/{base.id})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in " ".join(text.split()))


def _code(text: str) -> str:
    """A span of code, in a table too."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
