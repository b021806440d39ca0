"""Runs of zero bytes: what a copy leaves that was interrupted, or a disk that was full."""

from dataclasses import dataclass

_LONG = bytes(32)
"""More than any sound file holds of a format that makes no runs of zeros: flat pictures of 9 megapixels held 16."""
_BLOCK = 512
"""Disks, and whatever copies, count in multiples of this."""
_CHANCE = 2
"""So many zeros may stand by chance beside a zeroed block."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """`length` zero bytes from byte `start` on."""

    start: int
    length: int

    def __str__(self) -> str:
        return f"its {self.length} bytes from byte {self.start} on are zeros"


def long_run(content: bytes, start: int, stop: int) -> Run | None:
    """The first run of 32 or more."""
    return _run(content, content.find(_LONG, start, stop), stop)


def zeroed_blocks(content: bytes, start: int, stop: int) -> Run | None:
    """The first run that begins and ends where a disk's blocks do; by chance, one run in some 30,000 does."""
    position = start
    while (run := _run(content, content.find(bytes(_BLOCK), position, stop), stop)) is not None:
        position = run.start + run.length
        if -run.start % _BLOCK <= _CHANCE and position % _BLOCK <= _CHANCE:
            return run
    return None


def _run(content: bytes, start: int, stop: int) -> Run | None:
    return None if start < 0 else Run(start=start, length=stop - start - len(content[start:stop].lstrip(b"\0")))
