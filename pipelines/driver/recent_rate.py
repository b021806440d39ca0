"""The rate of the last seconds, of pictures that arrive a block at a time."""

from collections import deque

_SECONDS = 10.0


class RecentRate:
    """Pictures per second over the last seconds, as a step's rate is that since the last one logged.

    Of blocks that take longer, over the last one.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, now: float, made: int) -> float:
        """The rate, with `made` pictures there at `now`; 0 before the first one is seen to arrive."""
        if self._seen and made < self._seen[-1][1]:  # of another set
            self._seen.clear()
        if not self._seen or made > self._seen[-1][1]:
            self._seen.append((now, made))
        ended, there = self._seen[-1]
        while len(self._seen) > 2 and ended - self._seen[1][0] >= _SECONDS:
            self._seen.popleft()
        began, before = self._seen[0]
        return (there - before) / (ended - began) if ended > began else 0.0
