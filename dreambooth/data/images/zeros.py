"""Find runs of zero bytes, as left by an interrupted copy or a full disk."""

from dataclasses import dataclass

_LONG = bytes(32)
"""Shortest suspicious run in a format without runs of zeros: flat pictures of 9 megapixels held 16."""
_BLOCK = 512
"""Block size in bytes: disks and copies work in multiples of it."""
_CHANCE = 2
"""Zeros that may lie beside a zeroed block by chance."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of `length` zero bytes from byte `start`."""

    start: int
    length: int

    def __str__(self) -> str:
        return f"its {self.length} bytes from byte {self.start} on are zeros"


def long_run(content: bytes, start: int, stop: int) -> Run | None:
    """The first run of at least 32 zeros."""
    return _run(content, content.find(_LONG, start, stop), stop)


def zeroed_blocks(content: bytes, start: int, stop: int) -> Run | None:
    """The first run that begins and ends at block boundaries; by chance, about one run in 30,000 does."""
    position = start
    while (run := _run(content, content.find(bytes(_BLOCK), position, stop), stop)) is not None:
        position = run.start + run.length
        if -run.start % _BLOCK <= _CHANCE and position % _BLOCK <= _CHANCE:
            return run
    return None


def _run(content: bytes, start: int, stop: int) -> Run | None:
    return None if start < 0 else Run(start=start, length=stop - start - len(content[start:stop].lstrip(b"\0")))
