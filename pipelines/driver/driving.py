"""The driver's loop: show progress, conclude published subjects, handle lost lanes and nodes.

It trains nothing, and is the one process that writes to MLflow. A run is a batch of one with
its own view and conclusion.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from pipelines.cluster.nodes import nodes_there
from pipelines.driver.follow import Curves
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.run_plan import Plan
from pipelines.queue.subject_queue import Snapshot
from pipelines.storage.faults import StoreAway
from pipelines.tasks import Message, Progress, State
from pipelines.tracking.line import Away

_POLL_SECONDS = 0.5
_ENDING_SECONDS = 20.0
_STARTING_SECONDS = 60.0
_NODES_SECONDS = 1.0
"""Seconds between checks of the nodes."""
_AGAIN_SECONDS = 5.0
"""Seconds between attempts to register a subject."""
_AWAY_SECONDS = 30.0
"""Seconds between attempts while MLflow is unreachable."""


class View(Protocol):
    """A view of a batch's progress."""

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

    def message(self, name: str, message: Message) -> None:
        """Show what a lane reports of a subject."""


class LaneGroup(Protocol):
    """The lanes of a batch for the driver."""

    errors: list[str]

    def start(self) -> None:
        """Start all lanes."""

    def tend(self, settled: int) -> bool:
        """Handle ended lanes; `settled` counts finished subjects. False if no lane is left."""


def is_trained(snapshot: Snapshot) -> bool:
    """Whether all lanes are idle for good."""
    return not snapshot.counts["waiting"] and not snapshot.counts["training"]


def until_ended(lanes: LaneGroup) -> None:
    """Wait briefly for lanes without further work: their threads must not outlive Ray."""
    deadline = time.monotonic() + _ENDING_SECONDS
    while lanes.tend(-1) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS / 2)


@contextmanager
def ending_with(lanes: LaneGroup, queue: Any) -> Iterator[None]:
    """Stop the lanes where this context ends in an exception, and let them end before Ray does.

    A thread of a lane that calls Ray while it is shut down takes the process with it, before a word is said.
    """
    try:
        yield
    except Exception:
        with suppress(Exception):
            queue.stop.remote()
            until_ended(lanes)
        raise


class Driver:
    """Drives the lanes of a plan until nothing is left to do.

    Subjects are concluded in a thread of their own, one after the other: `conclude` returns the result in a line.
    """

    def __init__(
        self,
        plan: BatchPlan,
        queue: Any,
        lanes: LaneGroup,
        view: View,
        curves: Curves,
        conclude: Callable[[Plan], str],
    ) -> None:
        self._queue, self._lanes, self._view, self._curves, self._conclude = queue, lanes, view, curves, conclude
        self._plans = {subject.config.subject.name: subject for subject in plan.subjects}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="conclude")
        self._concluding: dict[str, Future[str]] = {}
        self._not_before: dict[str, float] = {}
        self._away_until = 0.0
        self._last_words = False
        self.untracked: str | None = None
        """Reason why MLflow was unreachable at the last registration; None if it was reached."""
        self._nodes: dict[str, frozenset[str]] = {}
        self._looked_at_nodes = 0.0

    def drive(self) -> bool:
        """Work until all is done or, after a KeyboardInterrupt, until checkpoints are written. True if interrupted.

        The second KeyboardInterrupt is raised at once. Raises RuntimeError if no lane can work, StoreAway if
        nothing can be written to the store any more.
        """
        try:
            self._until_finished()
        except KeyboardInterrupt:
            self._view.line("stopping after this step; checkpoints are written (Ctrl-C again stops at once)")
            self._until_stopped()
            return True
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
        return False

    def _until_finished(self) -> None:
        deadline: float | None = time.monotonic() + _STARTING_SECONDS
        while True:
            snapshot = self._look()
            if snapshot.finished or self._waits_for_mlflow_alone(snapshot):
                return
            if snapshot.lanes:
                deadline = None
            elif deadline is not None and time.monotonic() > deadline:
                deadline = None
                self._view.line(
                    f"no lane has started for {_STARTING_SECONDS:.0f} s: other work holds the cluster's "
                    f"resources; lanes start when there is room (see `ray status`)"
                )
            settled = snapshot.counts["done"] + snapshot.counts["failed"] + snapshot.counts["trained"]
            if not self._lanes.tend(settled) and not snapshot.trained:
                self._no_lane_left()
            time.sleep(_POLL_SECONDS)

    def _waits_for_mlflow_alone(self, snapshot: Snapshot) -> bool:
        """Whether all is published and only MLflow is unreachable: the same command registers the rest."""
        if not is_trained(snapshot) or self._concluding:
            return False
        if not self._last_words:  # one more try for subjects that found it unreachable
            self._last_words, self.untracked = True, None
            self._away_until = 0.0
            return False
        return self.untracked is not None

    def _until_stopped(self) -> None:
        import ray

        ray.get(self._queue.stop.remote())
        working = self._look().lanes > 0  # else none has started, and there may never be room
        while working:
            lanes_left, snapshot = self._lanes.tend(-1), self._look()
            working = lanes_left or (bool(snapshot.trained) and self.untracked is None)
            time.sleep(_POLL_SECONDS)

    def _look(self) -> Snapshot:
        """Take a snapshot, show it, and do the driver's work."""
        import ray

        self._take_concluded()
        snapshot: Snapshot
        snapshot, messages = ray.get([self._queue.snapshot.remote(), self._queue.messages.remote()])
        if snapshot.halted is not None:
            raise StoreAway(snapshot.halted)
        self._take_lost_nodes(snapshot)
        made = snapshot.class_images if snapshot.class_images[1] else None
        for name, message in messages:
            self._view.message(name, message)
            self._curves.take(self._plans[name], message)
        self._view.update(snapshot.counts, snapshot.running, class_images=made, failures=snapshot.failures)
        self._curves.failed(name for name, _ in snapshot.failures)
        self._line_up(snapshot.trained)
        return snapshot

    def _line_up(self, trained: Sequence[str]) -> None:
        """Hand published subjects to the thread that concludes them, which goes from one to the next by itself."""
        now = time.monotonic()
        for name in trained:
            if name not in self._concluding and now >= max(self._away_until, self._not_before.get(name, 0.0)):
                self._curves.leave(name)
                self._concluding[name] = self._thread.submit(self._conclude_next, self._plans[name])

    def _conclude_next(self, plan: Plan) -> str:
        """Conclude a subject, in the thread, unless one before it in the line found MLflow unreachable."""
        if time.monotonic() < self._away_until:
            raise Away(str(self.untracked))
        try:
            return self._conclude(plan)
        except Away as error:
            self.untracked, self._away_until = str(error), time.monotonic() + _AWAY_SECONDS
            raise

    def _take_lost_nodes(self, snapshot: Snapshot) -> None:
        """Report lanes on lost nodes to the queue, also those it forgot when its own node was lost.

        A preempted node counts as lost after its deadline, whether it has gone by then or not.
        """
        import ray

        self._nodes |= snapshot.nodes
        if time.monotonic() - self._looked_at_nodes < _NODES_SECONDS:
            return
        self._looked_at_nodes = time.monotonic()
        there = nodes_there()
        for lane, nodes in list(self._nodes.items()):
            if not nodes <= there:
                del self._nodes[lane]
                if ray.get(self._queue.nodes_lost.remote(lane, nodes)):
                    self._view.line(f"lane {lane.rpartition('/')[2]} has lost a node: other lanes take over its work")

    def _take_concluded(self) -> None:
        """Report registered subjects to the queue; a failure affects that subject alone."""
        import ray

        reports = []  # together: each call queues behind those of all lanes
        for name in [name for name, future in self._concluding.items() if future.done()]:
            try:
                result = self._concluding.pop(name).result()
            except Away as error:  # no subject's fault
                self.untracked = str(error)
            except StoreAway:
                raise
            except Exception as error:  # noqa: BLE001 - MLflow's, the database's, the store's
                self._not_before[name] = time.monotonic() + _AGAIN_SECONDS
                reports.append(self._queue.unregistered.remote(name, f"{type(error).__name__}: {error}"))
            else:
                self.untracked = None
                reports.append(self._queue.done.remote(name))
                if result:
                    self._view.line(f"{name}: {result}")
        ray.get(reports)

    def _no_lane_left(self) -> None:
        import ray

        if ray.get(self._queue.snapshot.remote()).finished:
            return
        reasons = "\n".join(dict.fromkeys(self._lanes.errors)) or "their workers ended without a word"
        raise RuntimeError(f"no lane can work any more: {reasons}")
