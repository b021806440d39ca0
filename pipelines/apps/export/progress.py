"""Bars that count bytes, shown in megabytes: of all files of a step together, so that each is filled once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.driver.console import RunConsole

_MB = 10**6


class Bytes:
    """Counts bytes up to a total, and moves a bar."""

    def __init__(self, bar: Callable[[int, int, str], None], total: int) -> None:
        self._bar, self._total, self._done = bar, total, 0

    def add(self, count: int) -> None:
        """Count more bytes."""
        self._done += count
        whole = -(-self._total // _MB)  # rounded up, so that only the last byte fills the bar
        self._bar(whole if self._done >= self._total else self._done // _MB, max(1, whole), "MB")

    def part(self) -> Callable[[int, int], None]:
        """Progress, as (done, total), of a part that begins where the count is now."""
        begin = self._done
        return lambda done, total: self.add(begin + done - self._done)


@contextmanager
def counted_bytes(console: RunConsole, title: str, total: int) -> Iterator[Bytes]:
    """A bar for a total of bytes; none is shown for nothing."""
    if total == 0:
        yield Bytes(lambda done, total, note: None, 0)
        return
    with console.bar(title) as bar:
        yield Bytes(bar, total)
