"""Many subjects: plan, queue, lanes; and behind the lanes, registration and the report.

The driver trains nothing. It starts the queue and the lanes, registers what they have published (one process writes to
MLflow), and shows how it all stands. Whatever of it is killed, the same call goes on.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pipelines.driver.batch_summary import write_batch_summary
from pipelines.driver.conclude import conclude
from pipelines.driver.lanes import Lanes
from pipelines.driver.summary import request_key
from pipelines.driver.train_stage import train_task
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.run_plan import Plan
from pipelines.queue.queue_actor import start_queue
from pipelines.queue.subject_queue import QueuedSubject, Snapshot
from pipelines.stages.prior_stage import prior_set, seal
from pipelines.tasks import Progress, State, SubjectRecord
from pipelines.tracking.line import Away
from pipelines.tracking.runs import track

_POLL_SECONDS = 0.5
_ENDING_SECONDS = 20.0
_STARTING_SECONDS = 60.0
_NODES_SECONDS = 1.0
"""Between looks which nodes are there."""
_AGAIN_SECONDS = 5.0
"""Between two tries to register a subject."""
_AWAY_SECONDS = 30.0
"""The same where MLflow is away."""


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


class LaneGroup(Protocol):
    """The lanes of a batch, as the driver sees them."""

    errors: list[str]

    def start(self) -> None:
        """Start all."""

    def tend(self, settled: int) -> bool:
        """Take notice of lanes that ended; `settled` counts finished subjects. False: none is left."""


@dataclass(frozen=True, kw_only=True)
class BatchOutcome:
    """How a batch ended: what its summary.json holds, and whether it was interrupted.

    The summary's `untracked` says why MLflow lacks something, if it does.
    """

    uri: str
    summary: dict[str, Any]
    interrupted: bool

    @property
    def failed(self) -> int:
        """How many subjects were set aside."""
        return int(self.summary["subjects"]["failed"])


def run_batch(
    plan: BatchPlan,
    view: View,
    encoder: str | None,
    *,
    make_lanes: Callable[[BatchPlan, str, Any, str | None], LaneGroup] = Lanes,
    conclude: Callable[[Plan, str], str] = conclude,
) -> BatchOutcome:
    """Train, publish and register every subject that isn't yet. Needs a Ray that is started.

    The first KeyboardInterrupt lets lanes finish their step and write checkpoints, the second stops at once. Raises
    RuntimeError when no lane can work. Lanes, and what is done with a subject whose model they have published, can be
    others: so the rest can be measured without them.
    """
    import ray

    began, driver = time.time(), secrets.token_hex(4)
    queue = start_queue(plan.uri, driver, queued_subjects(plan), retries=plan.cluster.subject_retries)
    first = plan.subjects[0].config
    lanes = make_lanes(plan, driver, queue, encoder)
    if not _is_trained(ray.get(queue.snapshot.remote())):
        lanes.start()
    with ExitStack() as stack:
        run = stack.enter_context(
            track(
                first.tracking,
                run_name=plan.name,
                params={"subjects": len(plan.subjects)},
                resume_key=plan.key,
                say=lambda text: view.line(f"warning: {text}"),
            )
        )
        driving = stack.enter_context(_Driving(plan, queue, lanes, view, lambda one: conclude(one, run.run_id)))
        interrupted = False
        try:
            driving.until_finished()
        except KeyboardInterrupt:
            interrupted = True
            view.line("stopping after this step; checkpoints are written (Ctrl-C again stops at once)")
            driving.until_stopped()
        records: Sequence[SubjectRecord] = ray.get(queue.records.remote())
        summary = write_batch_summary(plan, records, run, seconds=time.time() - began, untracked=driving.untracked)
        _until_ended(lanes)
        ray.kill(queue)
    return BatchOutcome(uri=plan.uri, summary=summary, interrupted=interrupted)


def _is_trained(snapshot: Snapshot) -> bool:
    """Whether no lane has anything left to do."""
    return not snapshot.counts["waiting"] and not snapshot.counts["training"]


def _until_ended(lanes: LaneGroup) -> None:
    """Wait, a while, for lanes that were told there is no more: a thread in Ray's midst must not outlive it."""
    deadline = time.monotonic() + _ENDING_SECONDS
    while lanes.tend(-1) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS / 2)


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
    """The driver's loop.

    Subjects are concluded in a thread of their own, one after the other, since one writes to MLflow at a time: lanes
    that wait for the seal of a set of class images need not wait for that too.
    """

    def __init__(
        self, plan: BatchPlan, queue: Any, lanes: LaneGroup, view: View, conclude: Callable[[Plan], str]
    ) -> None:
        self._plan, self._queue, self._lanes, self._view, self._conclude = plan, queue, lanes, view, conclude
        self._plans = {subject.config.subject.name: subject for subject in plan.subjects}
        self._parents = {prior.key: uri for uri, prior in plan.class_sets}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="conclude")
        self._concluding: dict[str, Future[str]] = {}
        self._not_before: dict[str, float] = {}
        self._away_until = 0.0
        self._last_words = False
        self.untracked: str | None = None
        """Why MLflow could not be reached when a subject was to be registered last; None when it could."""
        self._nodes: dict[str, frozenset[str]] = {}
        self._looked_at_nodes = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def until_finished(self) -> None:
        told_by: float | None = time.monotonic() + _STARTING_SECONDS
        while True:
            snapshot = self._look()
            if snapshot.finished or self._waits_for_mlflow_alone(snapshot):
                return
            if snapshot.lanes:
                told_by = None
            elif told_by is not None and time.monotonic() > told_by:
                told_by = None
                self._view.line(
                    f"no lane has started for {_STARTING_SECONDS:.0f} s: others hold what the cluster has; "
                    f"the batch goes on when there is room (look with `ray status`)"
                )
            settled = snapshot.counts["done"] + snapshot.counts["failed"] + snapshot.counts["trained"]
            if not self._lanes.tend(settled) and not snapshot.trained:
                self._no_lane_left()
            time.sleep(_POLL_SECONDS)

    def _waits_for_mlflow_alone(self, snapshot: Snapshot) -> bool:
        """Whether all is published, and MLflow could not be reached since: the same command registers the rest."""
        if not _is_trained(snapshot):
            return False
        if not self._last_words:  # one more try for those that it was away for
            self._last_words, self.untracked = True, None
            self._away_until = 0.0
            return False
        return self.untracked is not None and not self._concluding

    def until_stopped(self) -> None:
        import ray

        ray.get(self._queue.stop.remote())
        working = True
        while working:
            lanes_left, snapshot = self._lanes.tend(-1), self._look()
            working = lanes_left or (bool(snapshot.trained) and self.untracked is None)
            time.sleep(_POLL_SECONDS)

    def _look(self) -> Snapshot:
        """See how the batch stands, show it, and do what waits for the driver."""
        import ray

        self._take_concluded()
        snapshot: Snapshot = ray.get(self._queue.snapshot.remote())
        self._take_lost_nodes(snapshot)
        made = snapshot.class_images if snapshot.class_images[1] else None
        self._view.update(snapshot.counts, snapshot.running, class_images=made, failures=snapshot.failures)
        for prior in snapshot.sets_to_seal:
            seal(self._parents[prior.key], prior)
            ray.get(self._queue.sealed.remote(prior.key))
        now = time.monotonic()
        for name in snapshot.trained:
            if not self._concluding and now >= max(self._away_until, self._not_before.get(name, 0.0)):
                self._concluding[name] = self._thread.submit(self._conclude, self._plans[name])
        return snapshot

    def _take_lost_nodes(self, snapshot: Snapshot) -> None:
        """Tell the queue of lanes whose node is gone, those too that it forgot when it was on that node itself."""
        import ray

        self._nodes |= snapshot.nodes
        if time.monotonic() - self._looked_at_nodes < _NODES_SECONDS:
            return
        self._looked_at_nodes = time.monotonic()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        for lane, nodes in list(self._nodes.items()):
            if not nodes <= alive:
                del self._nodes[lane]
                if ray.get(self._queue.nodes_lost.remote(lane, nodes)):
                    self._view.line(f"lane {lane.rpartition('/')[2]} has lost a node: others get what it had")

    def _take_concluded(self) -> None:
        """Tell the queue of subjects that are registered; a subject's trouble here is its own too."""
        import ray

        told = []  # waited for together: a call stands in line behind those of all lanes
        for name in [name for name, future in self._concluding.items() if future.done()]:
            try:
                result = self._concluding.pop(name).result()
            except Away as error:  # the fault of no subject
                self._away_until = time.monotonic() + _AWAY_SECONDS
                self.untracked = str(error)
            except Exception as error:  # noqa: BLE001 - MLflow's, the database's, the store's
                self._not_before[name] = time.monotonic() + _AGAIN_SECONDS
                told.append(self._queue.unregistered.remote(name, f"{type(error).__name__}: {error}"))
            else:
                self.untracked = None
                told.append(self._queue.done.remote(name))
                self._view.line(f"{name}: {result}")
        ray.get(told)

    def _no_lane_left(self) -> None:
        import ray

        if ray.get(self._queue.snapshot.remote()).finished:
            return
        reasons = "\n".join(dict.fromkeys(self._lanes.errors)) or "their workers ended without a word"
        raise RuntimeError(f"no lane can work any more: {reasons}")
