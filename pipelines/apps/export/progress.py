"""Bars that count bytes, shown in megabytes: of all files of a step together, so that each is filled once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.driver.console import RunConsole
from pipelines.driver.relay import Update

_MB = 10**6


def in_megabytes(bar: Update) -> Callable[[int, int], None]:
    """Progress in bytes, as (done, total), for a bar; only the last byte fills it."""

    def told(done: int, total: int) -> None:
        whole = max(1, -(-total // _MB))
        bar(whole if done >= total else done // _MB, whole, "MB")

    return told


class Bytes:
    """Counts bytes up to a total, and moves a bar."""

    def __init__(self, bar: Update, total: int) -> None:
        self._progress, self._total, self._done = in_megabytes(bar), total, 0

    def add(self, count: int) -> None:
        """Count more bytes."""
        self._done += count
        self._progress(self._done, self._total)

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
