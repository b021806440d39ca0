"""Pictures made during a training, by step."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.report.pages import picture
from pipelines.report.report_evaluation import Pair
from pipelines.storage.files import filesystem, full_address, join

_SIDE = 160  # pixels
_STEPS = 12
"""Most steps shown."""


@dataclass(frozen=True, kw_only=True)
class ByStep:
    """Rows of one prompt's samples at the same steps."""

    steps: Sequence[int]
    rows: Sequence[Sequence[Pair]]


def validation_folder(run_uri: str, key: str) -> str:
    """Folder of the pictures made during the training of a plan's key, named STEP-NUMBER.png."""
    return join(run_uri, "validation", key)


def find_pictures(run_uri: str, key: str) -> dict[int, dict[int, str]]:
    """Addresses of a training's pictures by step and number; empty if none were made."""
    fs, path = filesystem(validation_folder(run_uri, key))
    try:
        names = [name for name in fs.ls(path, detail=False) if name.endswith(".png")]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found: dict[int, dict[int, str]] = defaultdict(dict)
    for name in sorted(names):
        step, _, number = name.rsplit("/", 1)[-1].removesuffix(".png").partition("-")
        found[int(step)][int(number)] = full_address(fs, name)
    return dict(found)


def chosen_steps(found: Mapping[int, Mapping[int, str]]) -> dict[int, Mapping[int, str]]:
    """As many steps as fit a page, evenly chosen, with the last."""
    steps = sorted(found)
    every = -(-len(steps) // _STEPS) if steps else 1
    return {step: found[step] for step in sorted(steps[::-1][::every])}


def samples_by_step(chosen: Mapping[int, Mapping[int, str]], pictures: Mapping[str, bytes]) -> ByStep | None:
    """A row for every number of sample; None without any."""
    if not chosen:
        return None

    def pair(step: int, number: int) -> Pair:
        content = pictures.get(chosen[step].get(number, ""))
        made = picture(content, side=_SIDE, alt=f"sample {number + 1} at step {step}") if content is not None else None
        return Pair(fine_tuned=made, base=None)

    numbers = sorted({number for addresses in chosen.values() for number in addresses})
    return ByStep(steps=list(chosen), rows=[[pair(step, number) for step in chosen] for number in numbers])
