"""What pages show of evaluations: figures with intervals, pictures beside the base model's, copies, warnings."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain

from dreambooth.evaluation.bootstrap import Interval
from dreambooth.evaluation.figures import Figures, NearestInstance, column
from pipelines.evaluated import Evaluated, PromptPictures
from pipelines.report_page import cell, note, number, picture, section, table

FIGURES = {
    "dino": ("DINO", "similarity to the photographs, by DINO: is it the subject"),
    "clip_i": ("CLIP-I", "the same, by CLIP"),
    "clip_t": ("CLIP-T", "similarity to the prompt: is it what was asked for"),
    "clip_t_no_identifier": ("CLIP-T without [V]", "similarity to the prompt without the identifier"),
    "clip_t_base": ("CLIP-T of the base model", "the base model's similarity to the same prompt"),
    "pres": ("PRES", "samples of the class prompt like the subject; lower is better: the class stayed a class"),
    "div": ("DIV", "distance between samples of one prompt; higher is more varied"),
    "real_dino": ("DINO of the photographs", "among themselves: what a sample can hardly exceed"),
    "real_clip_i": ("CLIP-I of the photographs", "the same, by CLIP"),
    "context_variance": ("context variance", "of DINO over prompts; higher: appearance changes with the place"),
    "prompts_followed": ("prompts followed", "share of prompts followed at least half as closely as by the base model"),
    "near_copies": ("near-copies", "share of samples that nearly are a photograph; lower is better"),
    "nearest_dino": ("nearest photograph", "mean DINO similarity to it"),
    "background_leak": ("background leak", "background colour in the subject; lower is better"),
}
_IN_BATCH = ("dino", "clip_i", "clip_t", "pres", "div", "near_copies")
_THUMBNAIL = 160  # pixels
_SMALL_THUMBNAIL = 64
_MANY_CELLS = 150
MOST_CELLS = 1000
"""Pictures of a batch's grid, over which it would not open on a phone."""


def warnings_of(evaluated: Sequence[Evaluated]) -> str:
    """What went wrong, in words, with the subject's name where there are several."""
    named = [(each.subject, warning) for each in evaluated if each.figures for warning in each.figures.warnings]
    prefix = len(evaluated) > 1
    lines = "".join(f"<li>{escape(f'{name}: {text}' if prefix else text)}</li>" for name, text in named)
    return f'<ul class="warnings">{lines}</ul>' if lines else ""


def figures_of_run(figures: Figures) -> str:
    """All figures of one subject with their intervals, and what they mean."""
    rows = [
        [cell(title), _interval(figures.figures[name].interval), cell(meaning)]
        for name, (title, meaning) in FIGURES.items()
        if name in figures.figures
    ]
    return section("Figures", table(("figure", "mean", "what it says"), rows), note(_measured_by(figures)))


def prompts_of_run(figures: Figures) -> str:
    """The figures of each prompt."""
    rows = [
        [cell(row.prompt), cell(row.application)]
        + [number(value, 3) for value in (row.dino, row.clip_i, row.clip_t, row.clip_t_base, row.div)]
        for row in figures.per_prompt
    ]
    columns = ("prompt", "application", "DINO", "CLIP-I", "CLIP-T", "CLIP-T of the base model", "DIV")
    return section("Prompts", table(columns, rows))


def figures_of_batch(evaluated: Sequence[Evaluated]) -> str:
    """A row of figures per subject and one of all, a table for each bank: theirs can't be compared."""
    banks: dict[str, list[tuple[str, Figures]]] = defaultdict(list)
    for each in evaluated:
        if each.figures is not None:
            banks[str(each.figures.bank)].append((each.subject, each.figures))
    tables = []
    for measured in banks.values():
        names = [name for name in _IN_BATCH if all(name in figures.figures for _, figures in measured)]
        rows = [
            [cell(subject), *(_interval(figures.figures[name].interval) for name in names)]
            for subject, figures in measured
        ]
        foot = [cell("all"), *(_interval(column(name, [figures for _, figures in measured])) for name in names)]
        columns = ("subject", *(FIGURES[name][0] for name in names))
        tables += [table(columns, rows, foot=foot if len(measured) > 1 else ()), note(_measured_by(measured[0][1]))]
    return section("Figures", *tables)


def grid_of_run(evaluated: Evaluated, pictures: Mapping[str, bytes]) -> str:
    """Every prompt with its samples; the base model's lie under them until one is pointed at."""
    measured = {row.prompt: row for row in evaluated.figures.per_prompt} if evaluated.figures else {}
    cards = []
    for of_prompt in evaluated.prompts:
        pairs = [_pair(of_prompt, place, pictures, _THUMBNAIL) for place in range(len(of_prompt.fine_tuned))]
        row = measured.get(of_prompt.prompt)
        told = f"DINO {row.dino:.2f}, CLIP-T {row.clip_t:.2f}" if row else ""
        caption = f'{escape(of_prompt.prompt)} <span class="interval">{told}</span>'
        cards.append(f'<figure><div class="pictures">{"".join(pairs)}</div><figcaption>{caption}</figcaption></figure>')
    return section(
        "Samples", note("Point at a picture, or tab to it, for the base model's of the same noise."), _cards(cards)
    )


def grid_of_batch(evaluated: Sequence[Evaluated], pictures: Mapping[str, bytes]) -> str:
    """Subjects by prompts, the first sample of each; a table for each list of prompts."""
    lists: dict[tuple[str, ...], list[Evaluated]] = defaultdict(list)
    for each in evaluated:
        lists[tuple(_template(each, of_prompt.prompt) for of_prompt in each.prompts)].append(each)
    cells = sum(len(prompts) * len(subjects) for prompts, subjects in lists.items())
    side = _SMALL_THUMBNAIL if cells > _MANY_CELLS else _THUMBNAIL
    tables = []
    for prompts, subjects in lists.items():
        head = "".join(f"<th>{escape(prompt)}</th>" for prompt in prompts)
        rows = "".join(
            f"<tr><th>{escape(each.subject)}</th>"
            + "".join(f"<td>{_pair(of_prompt, 0, pictures, side)}</td>" for of_prompt in each.prompts)
            + "</tr>"
            for each in subjects
        )
        tables.append(
            f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    told = note("The first sample of each prompt. Point at a picture, or tab to it, for the base model's.")
    return section("Subjects by prompts", told, *tables) if tables else ""


def copies(evaluated: Sequence[Evaluated], pictures: Mapping[str, bytes], *, most: int) -> str:
    """The samples that are most like a photograph, beside it."""
    cards = []
    for each, pair in nearest(evaluated, most=most):
        sample, photograph = pictures.get(sample_address(each, pair)), pictures.get(each.instance[pair.instance])
        if sample is None or photograph is None:
            continue
        shown = picture(sample, side=_THUMBNAIL, alt=f"sample: {pair.prompt}")
        beside = picture(photograph, side=_THUMBNAIL, alt=f"photograph {pair.instance + 1}")
        told = f"{pair.similarity:.2f}{', a near-copy' if pair.near_copy else ''}: "
        whose = f"{each.subject}: " if len(evaluated) > 1 else ""
        caption = escape(f"{whose}{told}{pair.prompt}")
        cards.append(f'<figure><div class="duo">{shown}{beside}</div><figcaption>{caption}</figcaption></figure>')
    told = note("Samples on the left, the photograph that DINO finds nearest on the right; the most alike first.")
    return section("Nearest photographs", told, _cards(cards)) if cards else ""


def nearest(evaluated: Sequence[Evaluated], *, most: int) -> list[tuple[Evaluated, NearestInstance]]:
    """The pairs to show: of one subject the most alike, of several the most alike of each."""
    found = []
    for each in evaluated:
        pairs = sorted(each.figures.nearest if each.figures else (), key=lambda pair: -pair.similarity)
        usable = [pair for pair in pairs if pair.instance < len(each.instance) and sample_address(each, pair)]
        found += [(each, pair) for pair in usable[: most if len(evaluated) == 1 else 1]]
    return sorted(found, key=lambda pair: -pair[1].similarity)[:most]


def sample_address(evaluated: Evaluated, pair: NearestInstance) -> str:
    """Where a pair's sample lies; samples are counted prompt after prompt. Empty where that is not known."""
    addresses = list(chain.from_iterable(of_prompt.fine_tuned for of_prompt in evaluated.prompts))
    return addresses[pair.sample] if pair.sample < len(addresses) else ""


def addresses_of_grid(evaluated: Evaluated, *, images: int | None) -> list[str]:
    """The pictures that a grid with so many samples of each prompt shows, None for all."""
    return [
        address
        for of_prompt in evaluated.prompts
        for address in (*of_prompt.fine_tuned[:images], *of_prompt.base[:images])
    ]


def _pair(of_prompt: PromptPictures, place: int, pictures: Mapping[str, bytes], side: int) -> str:
    tuned = pictures.get(of_prompt.fine_tuned[place]) if place < len(of_prompt.fine_tuned) else None
    base = pictures.get(of_prompt.base[place]) if place < len(of_prompt.base) else None
    if tuned is None:
        return "–"
    over = picture(base, side=side, alt=f"base model: {of_prompt.prompt}", kind="base") if base else ""
    return f'<span class="pair" tabindex="0">{picture(tuned, side=side, alt=of_prompt.prompt)}{over}</span>'


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def _interval(interval: Interval) -> str:
    return number(interval.mean, 3, more=interval.ends)


def _measured_by(figures: Figures) -> str:
    return (
        f"Figures and their 95 % intervals over prompts or images, by the encoders of the bank {figures.bank.name} "
        f"({figures.bank.hash}). Figures of different banks can't be compared."
    )


def _template(evaluated: Evaluated, prompt: str) -> str:
    """A prompt without what is this subject's own, so that subjects of one list stand under each other."""
    for own, shown in ((evaluated.identifier, "[V]"), (evaluated.class_noun, "…")):
        prompt = re.sub(rf"(?<!\w){re.escape(own)}(?!\w)", shown, prompt)
    return prompt
