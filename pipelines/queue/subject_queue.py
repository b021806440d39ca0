"""The queue of a batch: hands out work to lanes, and survives crashes.

One actor on the cluster hands out work. It stores its state, one small JSON per subject, before anybody acts on it, so
it can be restarted by Ray in mid-run, or by the same command a day later, and only missing work is done. A subject can
start when its class's set is complete; a lane without such a subject makes class images.

    queue.next(lane) -> TrainSubject | MakeClassImages | Wait | None
"""

import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dreambooth.config.addresses import without_credentials
from dreambooth.sampling.class_images import PriorPlan
from pipelines.cluster.metrics import record as record_metric
from pipelines.queue.class_image_sets import ClassImageSets, WantedSet
from pipelines.queue.subject_record import read_records, taken_up
from pipelines.storage.faults import StoreAway, explain, no_room
from pipelines.storage.files import join, write_json
from pipelines.tasks import (
    STATES,
    Message,
    Progress,
    State,
    SubjectRecord,
    TrainSubject,
    TrainTask,
    Wait,
    Work,
    base_source,
)

_SHORTEST_WAIT_SECONDS = 0.2
_ASKED_PER_SECOND = 100
"""Requests for work per second, of all idle lanes together."""
_MOST_MESSAGES = 2000


@dataclass(frozen=True, kw_only=True)
class QueuedSubject:
    """A subject's initial state, its lane's task, and the class images it needs."""

    record: SubjectRecord
    task: TrainTask
    prior: PriorPlan | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """State of a batch: subjects by state, those in lanes, class images (made, to make), and what needs the driver.

    `trained`: names of subjects to register; `failures`: (name, reason) of those set aside; `lanes`: number that asked
    for work; `nodes`: ids of a lane's nodes; `halted`: the reason if the store can't be written any more.
    """

    counts: Mapping[State, int]
    running: Mapping[str, Progress]
    class_images: tuple[int, int]
    trained: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]
    lanes: int
    nodes: Mapping[str, frozenset[str]]
    finished: bool
    halted: str | None = None


class SubjectQueue:
    """The subjects of one batch; `uri` is its folder. Lanes are named `<driver>/<number>`.

    A subject that fails, or loses a worker, is retried `retries` times and then set aside.
    """

    def __init__(self, uri: str, driver: str, subjects: Sequence[QueuedSubject], *, retries: int) -> None:
        self._uri = join(uri, "subjects")
        self._batch = uri.rstrip("/").rsplit("/", 1)[-1]
        self._retries = retries
        self._subjects = {subject.record.name: subject for subject in subjects}
        self._ready: deque[tuple[str, float]] = deque()  # with the time it became ready
        self._sets = ClassImageSets([_wanted_set(subject.prior, subject.task) for subject in subjects if subject.prior])
        self._progress: dict[str, Progress] = {}
        self._messages: deque[tuple[str, Message]] = deque(maxlen=_MOST_MESSAGES)
        self._claims: dict[str, list[str]] = {}
        self._lanes: set[str] = set()
        self._nodes: dict[str, frozenset[str]] = {}
        self._workers: dict[str, int] = {}
        self._terminated: set[str] = set()
        self._trained: dict[str, None] = {}
        self._failures: dict[str, str] = {}
        self._broken: dict[str, tuple[str, str]] = {}
        self._stopping = False
        self._halted: str | None = None
        self._records = {name: subject.record for name, subject in self._subjects.items()}
        try:
            self._take_up(read_records(self._uri), driver)
        except Exception as error:  # noqa: BLE001 - each driver's own, and Ray would show a constructor's traceback
            said = f"can't read {self._uri}: {explain(error)}; fix that and run the same command again"
            self.halt(str(error) if isinstance(error, StoreAway) else said)
        self._counts = Counter(record.state for record in self._records.values())
        self._record_counts(*STATES)

    def next(
        self,
        lane: str,
        *,
        count: int = 1,
        holding: Collection[str] = (),
        fresh: bool = False,
        nodes: frozenset[str] = frozenset(),
    ) -> Work | None:
        """Work for a lane of `count` workers on `nodes`; None if there will be no more.

        `holding` names the lane's subjects still being published. `fresh` workers hold nothing: earlier work was lost
        with earlier workers. That is a failure of its subject, unless the nodes or the number of workers changed, or
        one of them got SIGTERM.
        """
        self._lanes.add(lane)
        if self._halted:
            return None
        same = (self._nodes.get(lane, nodes), self._workers.get(lane, count)) == (nodes, count)
        self._nodes[lane], self._workers[lane] = nodes, count
        for name in reversed([name for name in self._claims.get(lane, ()) if name not in holding]):
            self._lost(name, counts=fresh and same and lane not in self._terminated)
        if fresh:
            self._terminated.discard(lane)
        self._sets.give_back(lane)
        if self._stopping:
            return None
        if self._ready:
            name, since = self._ready.popleft()
            record_metric("dreambooth_queue_wait_seconds", time.time() - since)
            self._change(
                name, state="training", lane=lane, attempts=self._records[name].attempts + 1, began=time.time()
            )
            self._claims.setdefault(lane, []).append(name)
            return TrainSubject(task=self._subjects[name].task)
        if (work := self._sets.hand_out(lane, count, lanes=len(self._lanes))) is not None:
            return work
        if not self._counts["waiting"] and not self._counts["training"]:
            return None
        return Wait(seconds=max(_SHORTEST_WAIT_SECONDS, len(self._lanes) / _ASKED_PER_SECOND))

    def made(self, lane: str, key: str, indices: Collection[int]) -> bool:
        """Count class images of a block, which a lane has written. Returns whether to stop."""
        self._sets.written(lane, key, indices)
        return self._stopping or self._halted is not None

    def sealed(self, lane: str, key: str) -> None:
        """Note a set's manifest: its subjects can start."""
        self._ready.extend((name, time.time()) for name in self._sets.sealed(lane, key))

    def progress(self, name: str, progress: Progress, messages: Sequence[Message] = ()) -> bool:
        """Store a subject's progress and messages for the driver. Returns whether to stop."""
        if self._records[name].state == "training":
            self._progress[name] = progress
        self._messages.extend((name, message) for message in messages)
        return self._stopping

    def messages(self) -> tuple[tuple[str, Message], ...]:
        """Lanes' messages since the last call, with the subject's name; only the newest if too many."""
        taken = tuple(self._messages)
        self._messages.clear()
        return taken

    def trained(self, name: str) -> None:
        """Mark a subject trained: its model is published, its samples are stored."""
        self._leave_lane(name)
        self._change(name, state="trained", ended=time.time())
        self._trained[name] = None

    def done(self, name: str) -> None:
        """Mark a trained subject done: it is registered and has its summary."""
        self._trained.pop(name, None)
        self._change(name, state="done", reason=None, traceback=None)

    def failed(self, name: str, reason: str, traceback: str | None = None, *, final: bool = False) -> None:
        """Move a failed subject to the end of the queue, or set it aside, at once if the failure is `final`."""
        self._leave_lane(name)
        self._trained.pop(name, None)
        failures = self._records[name].failures + 1
        state: State = "waiting" if failures <= self._retries and not final else "failed"
        if state == "waiting":
            record_metric("dreambooth_retries_total", 1, batch=self._batch)
        self._change(
            name,
            state=state,
            lane=None,
            failures=failures,
            reason=without_credentials(reason),
            traceback=None if traceback is None else without_credentials(traceback),
            ended=time.time(),
        )
        self._place(self._records[name])

    def unregistered(self, name: str, reason: str) -> None:
        """Count a failed registration; only the registration is retried."""
        reason = without_credentials(reason)
        failures = self._records[name].failures + 1
        if failures <= self._retries:
            record_metric("dreambooth_retries_total", 1, batch=self._batch)
            self._change(name, failures=failures, reason=reason)
            return
        self._trained.pop(name, None)
        self._change(name, state="failed", failures=failures, reason=reason)
        self._failures[name] = reason

    def broke_off(self, lane: str, name: str, reason: str, traceback: str) -> None:
        """Note the first error of workers that give up a subject: their successors show whether it counts.

        A rank that loses another one fails in a collective, which is no subject's fault.
        """
        if self._records[name].lane == lane:
            self._broken.setdefault(name, (reason, traceback))

    def released(self, name: str) -> None:
        """Return a stopped lane's subject, with its checkpoint, to the queue."""
        self._lost(name, counts=False)

    def terminated(self, lane: str) -> None:
        """Note that one of a lane's workers got SIGTERM: whatever they lose is no failure of its subject."""
        self._terminated.add(lane)

    def left(self, lane: str) -> None:
        """Give the work of a lane whose workers have got SIGTERM to others."""
        self._give_back(lane, counts=False)

    def lane_ended(self, lane: str, there: frozenset[str] | None = None) -> int:
        """Give an ended lane's work to others. Returns the number of subjects set aside instead.

        None is to blame if the lane had a node that isn't `there` (ids; None: all are), or SIGTERM ended a worker.
        """
        before = self._counts["failed"]
        self._lanes.discard(lane)
        nodes = self._nodes.pop(lane, frozenset())
        lost = there is not None and not nodes <= there
        self._give_back(lane, counts=not lost and lane not in self._terminated)
        return self._counts["failed"] - before

    def nodes_lost(self, lane: str, nodes: frozenset[str]) -> bool:
        """Give the work of a lane that lost one of `nodes` to others, before it has workers again.

        No failure of its subjects. Returns whether it had any.
        """
        if self._nodes.get(lane, nodes) != nodes:
            return False  # it has new workers already
        self._nodes.pop(lane, None)
        return self._give_back(lane, counts=False)

    def stop(self) -> None:
        """Hand out no more work, and ask lanes to stop after their current step."""
        self._stopping = True

    def halt(self, reason: str) -> None:
        """Hand out no more work: the store is unreachable. No subject fails; the next driver resumes."""
        self._halted = self._halted or without_credentials(reason)

    def snapshot(self) -> Snapshot:
        """The state of the batch."""
        return Snapshot(
            counts={state: self._counts[state] for state in STATES},
            running=dict(self._progress),
            class_images=(self._sets.made, self._sets.to_make),
            trained=tuple(self._trained),
            failures=tuple(self._failures.items()),
            lanes=len(self._lanes),
            nodes=dict(self._nodes),
            finished=not (self._counts["waiting"] or self._counts["training"] or self._counts["trained"]),
            halted=self._halted,
        )

    def records(self) -> tuple[SubjectRecord, ...]:
        """All subjects, in the order of the batch."""
        return tuple(self._records.values())

    def _take_up(self, stored: Mapping[str, SubjectRecord], driver: str) -> None:
        """Go on with what earlier attempts left."""
        for name, subject in self._subjects.items():
            self._records[name] = taken_up(stored.get(name), subject.record, subject.task, driver)
            self._place(self._records[name])

    def _place(self, record: SubjectRecord) -> None:
        """Index a subject by its state."""
        if record.state == "failed":
            self._failures[record.name] = str(record.reason)
        elif record.state == "trained":
            self._trained[record.name] = None
        elif record.state == "training":
            self._claims.setdefault(str(record.lane), []).append(record.name)
        elif record.state == "waiting":
            prior = self._subjects[record.name].prior
            if prior is None or not self._sets.waits(record.name, prior.key):
                self._ready.append((record.name, time.time()))

    def _give_back(self, lane: str, *, counts: bool) -> bool:
        """Give a lane's work to others. Returns whether it had any."""
        names = list(self._claims.get(lane, ()))
        for name in reversed(names):
            self._lost(name, counts=counts)
        return self._sets.give_back(lane) or bool(names)

    def _lost(self, name: str, *, counts: bool) -> None:
        if counts:
            self.failed(name, *self._broken.get(name, ("its worker died: out of memory, or its node was lost", None)))
            return
        self._leave_lane(name)
        self._change(name, state="waiting", lane=None)
        self._ready.appendleft((name, time.time()))  # what is half done goes first

    def _leave_lane(self, name: str) -> None:
        claims = self._claims.get(str(self._records[name].lane), [])
        if name in claims:
            claims.remove(name)
        self._progress.pop(name, None)
        self._broken.pop(name, None)

    def _change(self, name: str, **changes: object) -> None:
        before = self._records[name]
        after = before.changed(**changes)
        address = join(self._uri, f"{name}.json")
        try:
            write_json(address, after.as_dict())
        except StoreAway as error:
            self.halt(str(error))
            raise
        except Exception as error:  # each driver raises its own
            if not isinstance(error, OSError) or no_room(error) is None:
                self.halt(f"can't write {address}: {explain(error)}; fix that, then run the same command to continue")
                raise StoreAway(str(self._halted)) from error
            # A full disk stops everything: kept in memory until the driver reports it.
        self._counts[before.state] -= 1
        self._counts[after.state] += 1
        self._records[name] = after
        self._record_counts(before.state, after.state)

    def _record_counts(self, *states: State) -> None:
        for state in dict.fromkeys(states):
            record_metric("dreambooth_subjects", self._counts[state], batch=self._batch, state=state)


def _wanted_set(plan: PriorPlan, task: TrainTask) -> WantedSet:
    return WantedSet(plan=plan, source=base_source(task.config, task.base_hash), parent_uri=task.config.prior_uri)
