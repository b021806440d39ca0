"""The gate of registered models: decides which version has the alias `champion`.

It moves to a new version only when the figures of the paper's protocol allow it, and never on figures that are missing,
broken, or of other encoders or prompts than the champion's. The decision and its figures become tags of the
version.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dreambooth.config.evaluation import GateConfig

CHAMPION = "champion"
JUDGED = ("dino", "clip_t", "pres")
"""The figures that decide."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A version's figures by name, their bank, and the prompts' key."""

    version: int
    figures: Mapping[str, float]
    bank: str | None = None
    prompts: str | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether the alias moves to the version, and why, in words."""

    moved: bool
    reason: str


def decide(candidate: Standing, champion: Standing | None, gate: GateConfig, *, force: bool = False) -> Decision:
    """Judge a version; `force` overrules margins, the limit, age and what can't be compared, but no missing figure."""
    broken = [name for name in JUDGED if not math.isfinite(candidate.figures.get(name, math.nan))]
    if broken:
        return Decision(moved=False, reason=f"version {candidate.version} has no figure for {', '.join(broken)}")
    if champion is not None and champion.version == candidate.version:
        return Decision(moved=False, reason=f"version {candidate.version} is the champion already")
    against = _against(candidate, champion, gate)
    if against and force:
        return Decision(moved=True, reason=f"forced, although {against}")
    return Decision(moved=not against, reason=against or _for(candidate, champion))


def _against(candidate: Standing, champion: Standing | None, gate: GateConfig) -> str:
    """Reasons against the candidate; empty if there are none."""
    found = candidate.figures
    if not found["pres"] < gate.pres_limit:
        return f"PRES is {found['pres']:.3f}, and has to be under {gate.pres_limit} (gate.pres_limit)"
    if champion is None:
        return ""
    if candidate.version < champion.version:
        return f"version {candidate.version} is older than the champion, version {champion.version}"
    comparable = (candidate.bank, candidate.prompts) == (champion.bank, champion.prompts)
    if not comparable or not all(math.isfinite(champion.figures.get(name, math.nan)) for name in JUDGED):
        return (
            f"the champion, version {champion.version}, has no figures of the same bank and prompts to compare with; "
            f"measure it alike with 'dreambooth evaluate'"
        )
    margins = {"dino": gate.dino_margin, "clip_t": gate.clip_t_margin}
    worse = [
        f"{name} is {found[name]:.3f}, more than {margin} under the {champion.figures[name]:.3f} of version "
        f"{champion.version} (gate.{name}_margin)"
        for name, margin in margins.items()
        if found[name] < champion.figures[name] - margin
    ]
    return "; ".join(worse)


def _for(candidate: Standing, champion: Standing | None) -> str:
    figures = ", ".join(f"{name} {candidate.figures[name]:.3f}" for name in JUDGED)
    if champion is None:
        return f"the first version with figures: {figures}"
    before = ", ".join(f"{name} {champion.figures[name]:.3f}" for name in JUDGED)
    return f"{figures}, against version {champion.version} with {before}"
