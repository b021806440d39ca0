"""Parts of pages about evaluations: figures with intervals, pictures beside the base model's, copies, warnings."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from dreambooth.evaluation.bank import ENCODER
from dreambooth.evaluation.bootstrap import Interval
from dreambooth.evaluation.figures import BankId, Figures, NearestInstance, PromptRow, column
from pipelines.report.evaluated import Evaluated, PromptPictures
from pipelines.report.pages import Cell, Picture, Table, cell, number, picture

FIGURES = {
    "dino": ("DINO", "similarity to the photographs, by DINO: subject fidelity"),
    "clip_i": ("CLIP-I", "the same, by CLIP"),
    "dino_subject": ("DINO of the subject", "the same by DINO, to the photographs cut to the subject by their masks"),
    "dino_subject_patches": (
        "DINO of the subject's patches",
        "how much of the masked subject is found in a sample, patch by patch, wherever it is",
    ),
    "clip_t": ("CLIP-T", "similarity to the prompt: prompt fidelity"),
    "clip_t_no_identifier": ("CLIP-T without [V]", "similarity to the prompt without the identifier"),
    "clip_t_base": ("CLIP-T of the base model", "the base model's similarity to the same prompt"),
    "pres": (
        "PRES",
        "similarity of the class prompt's samples to the subject; lower: the class is preserved",
    ),
    "pres_base": ("PRES of the base model", "the same of the base model's samples: where the class came from"),
    "div": ("DIV", "distance between samples of one prompt; higher is more varied"),
    "real_dino": ("DINO of the photographs", "among themselves: about the most a sample can reach"),
    "real_clip_i": ("CLIP-I of the photographs", "the same, by CLIP"),
    "context_variance": ("context variance", "of DINO over prompts; higher: appearance changes with the place"),
    "prompts_followed": ("prompts followed", "share of prompts followed at least half as closely as by the base model"),
    "prompts_apart": ("prompts apart", "share of prompts whose samples are none of another prompt's"),
    "near_copies": ("near-copies", "share of samples nearly identical to a photograph; lower is better"),
    "nearest_dino": ("nearest photograph", "mean DINO similarity to it"),
    "background_leak": ("background leak", "background colour in the subject; lower is better"),
    "dinov2": ("DINOv2", "similarity to the photographs, by DINOv2: subject fidelity"),
    "dinov2_subject_patches": (
        "DINOv2 of the subject's patches",
        "how much of the masked subject is found in a sample, patch by patch, wherever it is",
    ),
    "real_dinov2": ("DINOv2 of the photographs", "among themselves: about the most a sample can reach"),
    "dreamsim": ("DreamSim", "1 - distance to the photographs, as tuned to what people find alike"),
    "real_dreamsim": ("DreamSim of the photographs", "among themselves: about the most a sample can reach"),
}
_IN_BATCH = (
    *("dino", "clip_i", "dino_subject", "dino_subject_patches", "clip_t", "pres", "div", "near_copies"),
    *("dinov2", "dinov2_subject_patches", "real_dinov2", "dreamsim", "real_dreamsim"),
)
_FURTHER = {"dinov2": "DINOv2", "dreamsim": "DreamSim"}
_THUMBNAIL = 160  # pixels
_SIDES = ((40, 320), (150, 160))
"""(most cells, pixels of a picture's side): few pictures are shown large."""
_SMALL_THUMBNAIL = 64
MOST_CELLS = 1000
"""Most pictures of a batch's grid; more would not open on a phone."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A sample and the base model's from the same noise; None for a missing picture."""

    fine_tuned: Picture | None
    base: Picture | None


@dataclass(frozen=True, kw_only=True)
class PromptCard:
    """A prompt, its figures in words, and its samples."""

    prompt: str
    figures: str
    pairs: Sequence[Pair]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Subjects by prompts; `rows` are (subject, a pair for each prompt)."""

    prompts: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Pair]]]


@dataclass(frozen=True, kw_only=True)
class CopyCard:
    """A sample beside its nearest photograph."""

    sample: Picture
    photograph: Picture
    caption: str


def figures_of_run(figures: Figures) -> list[tuple[Table, str]]:
    """All figures of one subject with their intervals, and what measured them; a table per bank and further encoder."""
    tables = []
    for bank in figures.banks:
        rows = [
            [cell(title), _interval(figures.figures[name].interval), cell(meaning, kind="why")]
            for name, (title, meaning) in FIGURES.items()
            if name in figures.figures and figures.figures[name].bank == bank
        ]
        title = "Figures" if bank == figures.bank else _title(bank)
        tables.append((Table(title=title, columns=("figure", "mean", "what it says"), rows=rows), _measured_by(bank)))
    return tables


def prompts_of_run(figures: Figures) -> Table:
    """Figures by prompt."""
    rows = [
        [cell(row.prompt), cell(row.application)]
        + [number(value, 3) for value in (row.dino, row.clip_i, row.clip_t, row.clip_t_base, row.div)]
        for row in figures.per_prompt
    ]
    columns = ("prompt", "application", "DINO", "CLIP-I", "CLIP-T", "CLIP-T of the base model", "DIV")
    return Table(title="Figures by prompt", columns=columns, rows=rows)


def figures_of_batch(evaluated: Sequence[Evaluated]) -> list[tuple[Table, str]]:
    """A row of figures per subject and one of all; a table per bank and further encoder, as these can't be compared."""
    banks: dict[BankId, list[tuple[str, Figures]]] = defaultdict(list)
    for each in evaluated:
        if each.figures is not None:
            for bank in each.figures.banks:
                banks[bank].append((each.subject, each.figures))
    tables = []
    for bank, measured in banks.items():
        names = [
            name
            for name in _IN_BATCH
            if all(name in figures.figures and figures.figures[name].bank == bank for _, figures in measured)
        ]
        rows = [
            [cell(subject), *(_interval(figures.figures[name].interval) for name in names)]
            for subject, figures in measured
        ]
        foot = [cell("all"), *(_interval(column(name, [figures for _, figures in measured])) for name in names)]
        columns = ("subject", *(FIGURES[name][0] for name in names))
        table = Table(title=_title(bank), columns=columns, rows=rows, foot=foot if len(measured) > 1 else ())
        tables.append((table, _measured_by(bank)))
    return tables


def cards_of_run(evaluated: Evaluated, pictures: Mapping[str, bytes]) -> list[PromptCard]:
    """Every prompt with its samples."""
    measured = {row.prompt: row for row in evaluated.figures.per_prompt} if evaluated.figures else {}
    cards = []
    for of_prompt in evaluated.prompts:
        row = measured.get(of_prompt.prompt)
        cards.append(
            PromptCard(
                prompt=of_prompt.prompt,
                figures=_of_prompt(row) if row else "",
                pairs=[_pair(of_prompt, place, pictures, _THUMBNAIL) for place in range(len(of_prompt.fine_tuned))],
            )
        )
    return cards


def _of_prompt(row: PromptRow) -> str:
    return f"DINO {row.dino:.2f}" + ("" if row.clip_t is None else f", CLIP-T {row.clip_t:.2f}")


def grids_of_batch(evaluated: Sequence[Evaluated], pictures: Mapping[str, bytes]) -> list[Grid]:
    """Subjects by prompts, the first sample of each; a grid for each list of prompts."""
    lists: dict[tuple[str, ...], list[Evaluated]] = defaultdict(list)
    for each in evaluated:
        lists[tuple(_template(each, of_prompt.prompt) for of_prompt in each.prompts)].append(each)
    cells = sum(len(prompts) * len(subjects) for prompts, subjects in lists.items())
    side = next((pixels for most, pixels in _SIDES if cells <= most), _SMALL_THUMBNAIL)
    return [
        Grid(
            prompts=prompts,
            rows=[
                (each.subject, [_pair(of_prompt, 0, pictures, side) for of_prompt in each.prompts]) for each in subjects
            ],
        )
        for prompts, subjects in lists.items()
    ]


def copies(evaluated: Sequence[Evaluated], pictures: Mapping[str, bytes], *, most: int) -> list[CopyCard]:
    """The samples most like a photograph, beside it."""
    cards = []
    for each, pair in nearest(evaluated, most=most):
        sample, photograph = pictures.get(sample_address(each, pair)), pictures.get(each.instance[pair.instance])
        if sample is None or photograph is None:
            continue
        whose = f"{each.subject}: " if len(evaluated) > 1 else ""
        cards.append(
            CopyCard(
                sample=picture(sample, side=_THUMBNAIL, alt=f"sample: {pair.prompt}"),
                photograph=picture(photograph, side=_THUMBNAIL, alt=f"photograph {pair.instance + 1}"),
                caption=f"{whose}{pair.similarity:.2f}{', a near-copy' if pair.near_copy else ''}: {pair.prompt}",
            )
        )
    return cards


def nearest(evaluated: Sequence[Evaluated], *, most: int) -> list[tuple[Evaluated, NearestInstance]]:
    """The pairs to show: the most alike of one subject, or the most alike of each."""
    found = []
    for each in evaluated:
        pairs = sorted(each.figures.nearest if each.figures else (), key=lambda pair: -pair.similarity)
        usable = [pair for pair in pairs if pair.instance < len(each.instance) and sample_address(each, pair)]
        found += [(each, pair) for pair in usable[: most if len(evaluated) == 1 else 1]]
    return sorted(found, key=lambda pair: -pair[1].similarity)[:most]


def sample_address(evaluated: Evaluated, pair: NearestInstance) -> str:
    """Address of a pair's sample, counted prompt after prompt; empty if unknown."""
    addresses = list(chain.from_iterable(of_prompt.fine_tuned for of_prompt in evaluated.prompts))
    return addresses[pair.sample] if pair.sample < len(addresses) else ""


def addresses_of_grid(evaluated: Evaluated, *, images: int | None) -> list[str]:
    """Addresses of the pictures of a grid with so many samples per prompt; None for all."""
    return [
        address
        for of_prompt in evaluated.prompts
        for address in (*of_prompt.fine_tuned[:images], *of_prompt.base[:images])
    ]


def _pair(of_prompt: PromptPictures, place: int, pictures: Mapping[str, bytes], side: int) -> Pair:
    tuned = pictures.get(of_prompt.fine_tuned[place]) if place < len(of_prompt.fine_tuned) else None
    base = pictures.get(of_prompt.base[place]) if place < len(of_prompt.base) else None
    return Pair(
        fine_tuned=picture(tuned, side=side, alt=of_prompt.prompt) if tuned else None,
        base=picture(base, side=side, alt=f"base model: {of_prompt.prompt}") if base else None,
    )


def _interval(interval: Interval) -> Cell:
    return number(interval.mean, 3, more=interval.ends)


def _title(bank: BankId) -> str:
    return f"Figures by {_FURTHER[bank.name]}@{bank.hash}" if bank.name in _FURTHER else f"Figures by the bank {bank}"


def _measured_by(bank: BankId) -> str:
    encoder = _FURTHER.get(bank.name)
    if encoder:
        by = f"{encoder} ({bank.hash}), beside the bank"
    elif bank.name == ENCODER:
        by = f"the image encoder ({bank.hash})"
    else:
        by = f"the encoders of the bank {bank.name} ({bank.hash})"
    return (
        f"Figures and their 95 % intervals over prompts or images, by {by}. Figures of different "
        f"{'encoders' if encoder else 'banks'} can't be compared."
    )


def _template(evaluated: Evaluated, prompt: str) -> str:
    """A prompt without the subject's own words, to align subjects of one list of prompts."""
    for own, shown in ((evaluated.identifier, "[V]"), (evaluated.class_noun, "…")):
        prompt = re.sub(rf"(?<!\w){re.escape(own)}(?!\w)", shown, prompt)
    return prompt
