"""An evaluation's figures as tags of a registered version: `miniature.dino`, with the bank's name before every one."""

from collections.abc import Mapping
from typing import Any

from dreambooth.evaluation.figures import by_bank

_OWN = ("hash", "prompts", "prompt_list", "key")


def figure_tags(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The tags that an evaluation gives a version: its figures, and what they can be compared with."""
    shared = {name: evaluation[name] for name in ("prompt_list", "key")} | {"prompts": evaluation["prompts_key"]}
    tags: dict[str, str] = {}
    for bank, figures in by_bank(evaluation):
        means = {name: f"{figure['mean']:.6f}" for name, figure in figures.items()}
        tags |= {f"{bank.name}.{name}": value for name, value in ({"hash": bank.hash} | shared | means).items()}
    return tags


def banks_of(tags: Mapping[str, str]) -> list[str]:
    """The banks that a version's tags hold figures of."""
    return sorted(tag.removesuffix(".hash") for tag in tags if tag.endswith(".hash"))


def figures_of(tags: Mapping[str, str], bank: str) -> dict[str, float]:
    """The figures of a bank that a version's tags hold."""
    prefix = f"{bank}."
    names = [tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)]
    return {name: float(tags[prefix + name]) for name in names if name not in _OWN}
