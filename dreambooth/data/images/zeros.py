"""Find runs of one byte: zeros, as a full disk leaves them, or 0xFF, as erased flash memory reads."""

from dataclasses import dataclass

_LONG = 32
"""Shortest suspicious run in a format without runs of zeros: flat pictures of 9 megapixels held 16."""
_BLOCK = 512
"""Block size in bytes: disks and copies work in multiples of it."""
_CHANCE = 2
"""Zeros that may lie beside a zeroed block by chance."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of `length` bytes from byte `start`, all of the value `fill`."""

    start: int
    length: int
    fill: int = 0

    def __str__(self) -> str:
        return f"its {self.length} bytes from byte {self.start} on are {f'0x{self.fill:02X}' if self.fill else 'zeros'}"


def long_run(content: bytes, start: int, stop: int, *, fill: int = 0) -> Run | None:
    """The first run of at least 32 bytes of the value `fill`."""
    return _run(content, content.find(bytes([fill]) * _LONG, start, stop), stop, fill)


def zeroed_blocks(content: bytes, start: int, stop: int) -> Run | None:
    """The first run that begins and ends at block boundaries; by chance, about one run in 30,000 does."""
    position = start
    while (run := _run(content, content.find(bytes(_BLOCK), position, stop), stop)) is not None:
        position = run.start + run.length
        if -run.start % _BLOCK <= _CHANCE and position % _BLOCK <= _CHANCE:
            return run
    return None


def _run(content: bytes, start: int, stop: int, fill: int = 0) -> Run | None:
    if start < 0:
        return None
    return Run(start=start, length=stop - start - len(content[start:stop].lstrip(bytes([fill]))), fill=fill)
