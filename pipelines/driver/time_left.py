"""Estimate the time left of a batch from the pace of its lanes: seconds per step, per picture, and per subject.

A subject counts from its first step on, earlier attempts don't count, and the last subjects are not divided over idle
lanes.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.tasks import Progress, State

_LANES_SECONDS = 60.0
"""Seconds for which a lane between two subjects still counts as a lane."""
_STEADY_SECONDS = 20.0
_ENOUGH_PICTURES, _ENOUGH_PART = 10, 0.3
"""Pictures, or the share of all, needed to estimate the rest."""


@dataclass
class _Rate:
    """Lane seconds and the work done in them: share of a subject's steps or pictures, or class images."""

    seconds: float = 0.0
    work: float = 0.0

    def take(self, seconds: float, work: float) -> None:
        self.seconds += seconds
        self.work += work

    @property
    def each(self) -> float:
        return self.seconds / self.work if self.work > 0 else 0.0


@dataclass(frozen=True)
class _Look:
    now: float
    counts: Mapping[State, int]
    running: Mapping[str, Progress]
    made: int

    @property
    def in_lanes(self) -> int:
        return max(self.counts["training"], len(self.running))

    @property
    def settled(self) -> int:
        """Subjects finished with lanes."""
        return self.counts["done"] + self.counts["failed"] + self.counts["trained"]


class TimeLeft:
    """Estimates the seconds left of a batch of `total` subjects from snapshots of its progress."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._lanes, self._lanes_at = 0, 0.0
        self._steps, self._pictures, self._making = _Rate(), _Rate(), _Rate()
        self._around = _Rate()  # a subject: loading, encoding, exporting
        self._pending = 0.0  # seconds around subjects whose next one has not been seen
        self._since: dict[str, tuple[float, float]] = {}  # time and progress when a subject last moved on
        self._knows_pictures = False
        self._end: tuple[float, float] | None = None  # last estimate, and its time
        self._whole = _Rate()  # a subject, for lanes that don't report their progress
        self._last: _Look | None = None

    def update(
        self,
        now: float,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        class_images: tuple[int, int] | None,
    ) -> float | None:
        """Seconds left at `now`; None until a whole subject's pace is known."""
        made, to_make = class_images or (0, 0)
        look = _Look(now, dict(counts), dict(running), made)
        if self._last is not None:
            self._take(self._last, look)
        self._note_phases(look)
        if look.in_lanes >= self._lanes or now - self._lanes_at > _LANES_SECONDS:
            self._lanes, self._lanes_at = look.in_lanes, now
        if not self._knows_pictures and not self._whole.work:
            return None
        each = self._steps.each + self._pictures.each + self._around.each if self._steps.work else self._whole.each
        left = [self._left(progress, each) for progress in running.values()]
        left += [each] * (look.in_lanes - len(left))
        left += [0.0] * (self._lanes - len(left))
        waiting = self.total - look.settled - look.in_lanes
        return self._steady(now, _finished(left, each, waiting) + max(0, to_make - made) * self._making.each)

    def _steady(self, now: float, left: float) -> float:
        """Delay the end gradually: pictures arrive in whole numbers, so a pace may only look slower."""
        end = now + left
        if self._end is not None and end > self._end[1]:
            end = self._end[1] + (end - self._end[1]) * min(1.0, (now - self._end[0]) / _STEADY_SECONDS)
        self._end = now, end
        return max(0.0, end - now)

    def _note_phases(self, look: _Look) -> None:
        """Note when each subject was first seen in its phase."""
        last = self._last.running if self._last is not None else {}
        for name, progress in look.running.items():
            was = last.get(name)
            if was is None or (was.pictures is None) != (progress.pictures is None):
                self._since[name] = look.now, _fraction(progress)
            made, total = progress.pictures or (0, 1)
            self._knows_pictures |= made >= _ENOUGH_PICTURES or made / total >= _ENOUGH_PART
        self._since = {name: self._since[name] for name in look.running}
        self._last = look

    def _left(self, progress: Progress, each: float) -> float:
        rest = 1 - _fraction(progress)
        if not self._steps.work:
            return each * rest
        return (
            rest * self._steps.each + self._pictures.each if progress.pictures is None else rest * self._pictures.each
        )

    def _take(self, last: _Look, look: _Look) -> None:
        """Count the work between two snapshots.

        Only subjects seen twice in the same phase measure its pace. For the others, the expected time of their phases
        is subtracted from the time around subjects.
        """
        seconds = look.now - last.now
        if look.made > last.made:
            self._making.take(seconds, look.made - last.made)
        around = seconds * last.in_lanes
        self._whole.take(around, max(0, look.settled - last.settled))
        for name, was in last.running.items():
            rate, now = (self._steps if was.pictures is None else self._pictures), look.running.get(name)
            if now is not None and (was.pictures is None) == (now.pictures is None):
                since, done = self._since[name]
                if (fraction := _fraction(now)) > done:
                    rate.take(look.now - since, fraction - done)
                    self._since[name] = look.now, fraction
                around -= seconds
            else:
                around -= seconds if now is not None else min(seconds, (1 - _fraction(was)) * rate.each)
        for name in look.running.keys() - last.running.keys():
            around -= min(seconds, _fraction(look.running[name]) * self._steps.each)
        self._pending += max(0.0, around)
        if entered := len(look.running.keys() - last.running.keys()):
            self._around.take(self._pending, entered)
            self._pending = 0.0


def _fraction(progress: Progress) -> float:
    done, total = (progress.step, progress.steps) if progress.pictures is None else progress.pictures
    return min(1.0, done / total) if total else 1.0


def _finished(lanes: list[float], each: float, waiting: int) -> float:
    """Seconds until the last lane is done: `lanes` are free after these seconds, waiting subjects take `each`."""
    if not lanes:
        return each * max(0, waiting)
    heapq.heapify(lanes)
    for _ in range(waiting):
        heapq.heapreplace(lanes, lanes[0] + each)
    return max(lanes)
