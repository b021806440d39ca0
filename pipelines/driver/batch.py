"""Run a batch of subjects: queue, lanes, registration and report.

The driver trains nothing. It starts the queue and the lanes, registers published models (one process writes to MLflow)
and shows progress. After a crash of any part, the same call resumes.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipelines.driver.batch_summary import write_batch_summary
from pipelines.driver.conclude import begin_run, conclude
from pipelines.driver.driving import Driver, LaneGroup, View, ending_with, is_trained, until_ended
from pipelines.driver.follow import Curves
from pipelines.driver.lanes import Lanes
from pipelines.driver.lock import locked
from pipelines.driver.summary import request_key
from pipelines.driver.train_stage import train_task
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.run_plan import Plan
from pipelines.queue.queue_actor import start_queue
from pipelines.queue.subject_queue import QueuedSubject
from pipelines.stages.prior_stage import prior_set
from pipelines.storage.faults import room_for
from pipelines.tasks import BankAddress, SubjectRecord
from pipelines.tracking.runs import track


@dataclass(frozen=True, kw_only=True)
class BatchOutcome:
    """Result of a batch: the content of summary.json, and whether it was interrupted.

    The summary's `untracked` is the reason why MLflow lacks results, if any.
    """

    uri: str
    summary: dict[str, Any]
    interrupted: bool

    @property
    def failed(self) -> int:
        """Number of failed subjects."""
        return int(self.summary["subjects"]["failed"])


def run_batch(
    plan: BatchPlan,
    view: View,
    encoder: BankAddress | None,
    *,
    make_lanes: Callable[[BatchPlan, str, Any, BankAddress | None], LaneGroup] = Lanes,
    conclude: Callable[[Plan, str, str], str] = conclude,
) -> BatchOutcome:
    """Train, publish and register all unfinished subjects. Ray must be running.

    The first KeyboardInterrupt lets lanes finish their step and write checkpoints, the second stops at once. Raises
    RuntimeError when no lane can work, InputError if another command is at work in the batch's folder. `make_lanes` and
    `conclude` can be replaced to measure the driver alone.
    """
    import ray

    began, name = time.time(), secrets.token_hex(4)
    first = plan.subjects[0].config
    with ExitStack() as stack:
        confirm = stack.enter_context(locked(plan.uri, say=view.line))
        queue = start_queue(plan.uri, name, queued_subjects(plan), retries=plan.cluster.subject_retries)
        lanes = make_lanes(plan, name, queue, encoder)
        trained = is_trained(ray.get(queue.snapshot.remote()))
        confirm()
        if not trained:
            lanes.start()
        stack.enter_context(ending_with(lanes, queue))
        run = stack.enter_context(
            track(
                first.tracking,
                run_name=plan.name,
                params={"subjects": len(plan.subjects)},
                resume_key=plan.key,
                say=lambda text: view.line(f"warning: {text}"),
            )
        )
        curves = stack.enter_context(Curves(lambda one: begin_run(one, parent=run.known_id) if run.known_id else None))
        driver = Driver(plan, queue, lanes, view, curves, lambda one: conclude(one, run.run_id, plan.uri))
        interrupted = driver.drive()
        records: Sequence[SubjectRecord] = ray.get(queue.records.remote())
        with room_for("the report of the batch", plan.uri):
            summary = write_batch_summary(plan, records, run, seconds=time.time() - began, untracked=driver.untracked)
        if not interrupted:
            until_ended(lanes)
        ray.kill(queue)
    return BatchOutcome(uri=plan.uri, summary=summary, interrupted=interrupted)


def queued_subjects(plan: BatchPlan) -> list[QueuedSubject]:
    """The queue's input, subject by subject."""
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
