"""Scores during training, and the weights with the highest.

Scores are measured every few steps and at the end. A tie goes to the earlier step, which is nearer to the base model.
Scores and the best weights so far are part of every checkpoint, so a resumed run makes the same choice.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dreambooth.training.checkpoint_files import CheckpointFile

_WEIGHTS = "best.safetensors"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Fidelity after a step, on few samples: DINO to the instance images, CLIP-T to the prompts, by one bank."""

    step: int
    dino: float
    clip_t: float

    @property
    def score(self) -> float:
        """DINO + CLIP-T: a model that copies gains in one what it loses in the other."""
        return self.dino + self.clip_t

    def as_dict(self) -> dict[str, float]:
        """Plain values for loggers and JSON."""
        return asdict(self) | {"score": self.score}


@dataclass(kw_only=True)
class Scores:
    """Scores so far, oldest first; `weights` are those of the best step (on rank 0, if kept)."""

    measured: list[Score] = field(default_factory=list)
    weights: "Mapping[str, Tensor] | None" = None

    @property
    def best(self) -> Score | None:
        """The highest score, the earliest of equal ones; None before the first."""
        return max(self.measured, key=lambda score: score.score, default=None)

    @property
    def since_best(self) -> int:
        """Number of scores after the best."""
        best = self.best
        return sum(score.step > best.step for score in self.measured) if best is not None else 0

    def add(self, score: Score, weights: "Callable[[], Mapping[str, Tensor]] | None" = None) -> None:
        """Add a score; `weights` is called for its weights if it is the best so far.

        Raises ValueError for a step that isn't later than the last.
        """
        if self.measured and score.step <= self.measured[-1].step:
            raise ValueError(f"step {score.step} was measured already; the last was {self.measured[-1].step}")
        self.measured.append(score)
        if weights is not None and self.best is score:
            self.weights = weights()

    def ends(self, stop_after: int | None) -> bool:
        """Whether the last `stop_after` scores brought no new best."""
        return stop_after is not None and self.since_best >= stop_after

    def files(self) -> "list[CheckpointFile]":
        """A checkpoint's file of the best weights, if kept."""
        if self.weights is None:
            return []
        from dreambooth.models.probe import Trained
        from dreambooth.training.checkpoint_files import CheckpointFile, write_safetensors

        tensors = self.weights.as_tensors() if isinstance(self.weights, Trained) else self.weights
        return [CheckpointFile(name=_WEIGHTS, content=tensors, write=write_safetensors)]

    @classmethod
    def load(cls, folder: Path, measured: list[dict[str, float]]) -> "Scores":
        """Restore scores from their `as_dict` and the weights of `files`."""
        scores = [Score(step=int(one["step"]), dino=one["dino"], clip_t=one["clip_t"]) for one in measured]
        weights = None
        if (folder / _WEIGHTS).is_file():
            from safetensors.torch import load_file

            from dreambooth.models.probe import Trained

            weights = Trained.from_tensors(load_file(folder / _WEIGHTS))
        return cls(measured=scores, weights=weights)
