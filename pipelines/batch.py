"""Many subjects: plan, queue, lanes; and behind the lanes, registration and the report.

The driver trains nothing. It starts the queue and the lanes, registers what they have published (one process writes to
MLflow), and shows how it all stands. Whatever of it is killed, the same call goes on.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.batch_plan import BatchPlan
from pipelines.batch_summary import write_batch_summary
from pipelines.conclude import conclude
from pipelines.lanes import Lanes
from pipelines.plan import printable_settings
from pipelines.prior_stage import prior_set, seal
from pipelines.subject_queue import QueuedSubject, Snapshot, SubjectQueue
from pipelines.subject_record import Progress, State, SubjectRecord
from pipelines.summary import request_key
from pipelines.tracking import TrackedRun, track
from pipelines.train_stage import train_task

_POLL_SECONDS = 0.5


class View(Protocol):
    """Whoever shows how a batch stands."""

    def update(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        *,
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        """Show subjects by state, those in lanes, class images (made, to make), and (name, reason) of failures."""

    def line(self, text: str) -> None:
        """Print a line."""


@dataclass(frozen=True, kw_only=True)
class BatchOutcome:
    """How a batch ended: what its summary.json holds, and whether it was interrupted."""

    uri: str
    summary: dict[str, Any]
    interrupted: bool

    @property
    def failed(self) -> int:
        """How many subjects were set aside."""
        return int(self.summary["subjects"]["failed"])


def run_batch(plan: BatchPlan, view: View, encoder: str | None) -> BatchOutcome:
    """Train, publish and register every subject that isn't yet. Needs a Ray that is started.

    The first KeyboardInterrupt lets lanes finish their step and write checkpoints, the second stops at once. Raises
    RuntimeError when no lane can work.
    """
    import ray

    began, driver = time.time(), secrets.token_hex(4)
    actor = ray.remote(SubjectQueue).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    queue: Any = actor.remote(plan.uri, driver, queued_subjects(plan), retries=plan.cluster.subject_retries)
    first = plan.subjects[0].config
    lanes = Lanes(plan, driver, queue, encoder)
    with ExitStack() as stack:
        run = stack.enter_context(
            track(first.tracking, run_name=plan.name, params={"subjects": len(plan.subjects)}, resume_key=plan.key)
        )
        driving = _Driving(plan, queue, lanes, run, view)
        lanes.start()
        interrupted = False
        try:
            driving.until_finished()
        except KeyboardInterrupt:
            interrupted = True
            view.line("stopping after this step; checkpoints are written (Ctrl-C again stops at once)")
            driving.until_stopped()
        records: Sequence[SubjectRecord] = ray.get(queue.records.remote())
        summary = write_batch_summary(plan, records, run, seconds=time.time() - began)
        ray.kill(queue)
    return BatchOutcome(uri=plan.uri, summary=summary, interrupted=interrupted)


def queued_subjects(plan: BatchPlan) -> list[QueuedSubject]:
    """What the queue is told of every subject."""
    return [
        QueuedSubject(
            record=SubjectRecord(
                name=subject.config.subject.name,
                key=request_key(subject),
                class_noun=subject.config.subject.class_noun,
                identifier=str(subject.config.subject.identifier),
            ),
            task=train_task(
                subject, prior_set(subject.config.prior_uri, subject.prior) if subject.prior is not None else None
            ),
            prior=subject.prior,
        )
        for subject in plan.subjects
    ]


class _Driving:
    """The driver's loop."""

    def __init__(self, plan: BatchPlan, queue: Any, lanes: Lanes, run: TrackedRun, view: View) -> None:
        self._plan, self._queue, self._lanes, self._run, self._view = plan, queue, lanes, run, view
        self._plans = {subject.config.subject.name: subject for subject in plan.subjects}

    def until_finished(self) -> None:
        import ray

        while True:
            snapshot: Snapshot = ray.get(self._queue.snapshot.remote())
            self._show(snapshot)
            self._seal(snapshot)
            self._conclude(snapshot)
            if snapshot.finished:
                return
            settled = snapshot.counts["done"] + snapshot.counts["failed"] + snapshot.counts["trained"]
            if not self._lanes.tend(settled) and not snapshot.trained:
                self._no_lane_left()
            time.sleep(_POLL_SECONDS)

    def until_stopped(self) -> None:
        import ray

        ray.get(self._queue.stop.remote())
        while self._lanes.tend(-1):
            snapshot: Snapshot = ray.get(self._queue.snapshot.remote())
            self._show(snapshot)
            time.sleep(_POLL_SECONDS)
        self._conclude(ray.get(self._queue.snapshot.remote()))

    def _show(self, snapshot: Snapshot) -> None:
        made = snapshot.class_images if snapshot.class_images[1] else None
        self._view.update(snapshot.counts, snapshot.running, class_images=made, failures=snapshot.failures)

    def _seal(self, snapshot: Snapshot) -> None:
        import ray

        parents = {prior.key: uri for uri, prior in self._plan.class_sets}
        for prior in snapshot.sets_to_seal:
            seal(parents[prior.key], prior)
            ray.get(self._queue.sealed.remote(prior.key))

    def _conclude(self, snapshot: Snapshot) -> None:
        """Register what lanes have published; a subject's trouble here is its own too."""
        import ray

        for name in snapshot.trained:
            plan = self._plans[name]
            try:
                with track(
                    plan.config.tracking,
                    run_name=name,
                    params=printable_settings(plan.config),
                    resume_key=plan.key,
                    parent=self._run.run_id,
                ) as run:
                    result = conclude(plan, run)
                ray.get(self._queue.done.remote(name))
                self._view.line(f"{name}: {result}")
            except Exception as error:  # noqa: BLE001 - MLflow's, the database's, the store's
                ray.get(self._queue.failed.remote(name, f"{type(error).__name__}: {error}"))

    def _no_lane_left(self) -> None:
        import ray

        if ray.get(self._queue.snapshot.remote()).finished:
            return
        reasons = "\n".join(dict.fromkeys(self._lanes.errors)) or "their workers ended without a word"
        raise RuntimeError(f"no lane can work any more: {reasons}")
