"""Hooks of the training loop: small classes with `on_step`, called in order after every step.

They run on every rank, with the step's metrics, if any.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.data.images import png_bytes
from dreambooth.models.base_model import BaseModel
from pipelines.cluster.preemption import Leaving
from pipelines.worker.checkpoint_hook import Checkpoint, Report
from pipelines.worker.history import History

if TYPE_CHECKING:
    from dreambooth.training.loop import StepMetrics
    from pipelines.worker.fidelity import Scoring


class Hook(Protocol):
    """A hook of the training loop."""

    def on_step(self, step: int, metrics: "StepMetrics | None") -> None:
        """Called after every step."""


class Stopped(RuntimeError):
    """The worker was asked to stop; a checkpoint has been written."""


class Terminated(RuntimeError):
    """A worker of the group got SIGTERM; of a training, a checkpoint has been written."""


class NoLongerRising(Exception):
    """The score has not risen for `train.stop_after` measurements."""


class Hooks:
    """All hooks in one."""

    def __init__(self, *hooks: Hook) -> None:
        self._hooks = hooks

    def __call__(self, step: int, metrics: "StepMetrics | None") -> None:
        """Call each in order; an exception skips the rest."""
        for hook in self._hooks:
            hook.on_step(step, metrics)


class Record:
    """Appends to the history and reports every step's metrics."""

    def __init__(self, history: History, report: Report) -> None:
        self._history, self._report = history, report

    def on_step(self, step: int, metrics: "StepMetrics | None") -> None:
        """Record the step."""
        self._history.step = step
        if metrics is not None:
            self._history.metrics.append(metrics.as_dict())
            self._report({"kind": "step", "metrics": metrics.as_dict()})


class Score:
    """Scores the weights every `evaluation.every` steps and after the last; may end training early."""

    def __init__(self, scoring: "Scoring", history: History, config: DreamBoothConfig, report: Report) -> None:
        self._scoring, self._history, self._config, self._report = scoring, history, config, report

    def on_step(self, step: int, metrics: "StepMetrics | None") -> None:
        """Score if due. Raises NoLongerRising."""
        every, train = self._config.evaluation.every, self._config.train
        last = step == train.max_train_steps
        if every is None or not (last or step % every == 0):
            return
        self._report({"kind": "score", "score": self._scoring.measure(step, self._history.scores).as_dict()})
        if not last and self._history.scores.ends(train.stop_after):
            raise NoLongerRising


class Leave:
    """Ends training with a whole checkpoint when `stopping` is True or this worker is terminated or preempted."""

    def __init__(
        self,
        leaving: Leaving,
        checkpoint: Checkpoint,
        any_rank: Callable[[bool], bool],
        config: DreamBoothConfig,
        *,
        stopping: Callable[[], bool],
    ) -> None:
        self._leaving, self._checkpoint, self._any_rank, self._stopping = leaving, checkpoint, any_rank, stopping
        self._last = config.train.max_train_steps

    def on_step(self, step: int, metrics: "StepMetrics | None") -> None:
        """Check whether to leave, except after the last step. Raises Stopped or Terminated, on every rank."""
        if step == self._last:
            return
        stop, noticed = self._any_rank(self._stopping()), self._leaving.noticed(step)
        if not (stop or noticed):
            return
        self._checkpoint.save(step)
        if self._leaving.terminated:
            raise Terminated(f"terminated after step {step}")
        if stop:
            raise Stopped(f"stopped after step {step}")


class Samples:
    """Sends a picture per evaluation prompt every `train.validate_every` steps."""

    def __init__(self, base: BaseModel, engine: Any, config: DreamBoothConfig, device: str, report: Report) -> None:
        self._base, self._engine, self._config, self._device, self._report = base, engine, config, device, report

    def on_step(self, step: int, metrics: "StepMetrics | None") -> None:
        """Sample from the current weights if due."""
        every, last = self._config.train.validate_every, self._config.train.max_train_steps
        if not every or step % every or step == last:
            return
        state = self._engine.state_dict()
        if self._engine.rank == 0:
            self._report({"kind": "samples", "step": step, "images": self._pictures(state)})

    def _pictures(self, state: dict[str, Any]) -> list[bytes]:
        import torch

        from dreambooth.sampling.sampler import load_trained, sample_each

        config, evaluation = self._config, self._config.evaluation
        prompts = evaluation.prompts_of(config.subject, config.prompts)
        pipeline = load_trained(self._base.directory, state, device=self._device, dtype=torch.float32)
        return sample_each(
            png_bytes,
            pipeline,
            prompts,
            [evaluation.seed] * len(prompts),
            num_inference_steps=evaluation.num_inference_steps,
            guidance_scale=evaluation.guidance_scale,
            height=config.images.resolution,
            width=config.images.resolution,
        )
