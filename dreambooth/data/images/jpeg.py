"""Detect damaged JPEGs by the warnings of libjpeg-turbo, which Pillow hides and simplejpeg reports.

Decoding to an eighth of the size costs little and reads every bit. Only the first warning is
reported, and warnings about metadata are common on phones, so the decoder gets the picture's own segments alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import simplejpeg

from dreambooth.data.images.errors import Damage
from dreambooth.data.images.zeros import long_run, zeroed_blocks

_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_AFTER_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # zeros and restart markers are within it
_EOI, _SOS, _TABLES, _COMMENT = 0xD9, 0xDA, 0xC4, 0xFE
_APPLICATION = range(0xE0, 0xF0)
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = {0xC0, 0xC1, 0xC9}, {0xC2, 0xCA}
_COEFFICIENTS = 64

_ALARM = re.compile(r"Corrupt JPEG data|Premature end")
_SURPLUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_TOLERATED = 0.01
"""Largest share of unused bytes after the last code: some cameras write a few dozen."""


@dataclass
class _Stream:
    """The picture's own segments and their content."""

    segments: list[bytes] = field(default_factory=lambda: [b"\xff\xd8"])
    frame: int = 0
    ended: bool = False
    scans: list[tuple[int, int]] = field(default_factory=list)
    """Where their codes start and stop."""
    zeros_are_flat: bool = True
    """Whether zeros code a flat block in every Huffman table."""
    missing_bits: dict[int, list[int]] = field(default_factory=dict)
    """Low bits still missing of each component's 64 DCT coefficients; 16 means all."""


def check_jpeg(content: bytes) -> list[str]:
    """Raise `Damage` if codes are missing, zeroed or out of step; remark on a few extra bytes."""
    stream = _parse(content)
    if stream.frame not in _SEQUENTIAL | _PROGRESSIVE:
        return []
    for start, stop in stream.scans:
        run = zeroed_blocks(content, start, stop)
        if stream.frame in _SEQUENTIAL and not stream.zeros_are_flat:
            run = run or long_run(content, start, stop)
        if run is not None:
            raise Damage(f"{run}, where its codes should be")
    codes = b"".join(stream.segments)
    if not stream.ended and codes.endswith(b"\0"):
        raise Damage("it ends in zeros, where its end marker should be")
    if any(any(bits) for bits in stream.missing_bits.values()):
        raise Damage("the last of its scans are missing, and details or colours with them")
    return _decode(codes + b"\xff\xd9", colours=len(stream.missing_bits))


def _decode(codes: bytes, colours: int) -> list[str]:
    try:
        space = "CMYK" if colours == 4 else "GRAY"
        simplejpeg.decode_jpeg(codes, space, min_height=1, min_width=1, strict=True)
    except ValueError as error:
        if not _ALARM.search(str(error)):
            return []  # no fault of its codes: Pillow decodes more than this decoder
        surplus = _SURPLUS.search(str(error))
        if surplus is None or int(surplus[1]) > _TOLERATED * len(codes) or long_run(codes, 0, len(codes)):
            raise Damage(str(error)) from None
        return [f"has {surplus[1]} bytes too many at its end, as some cameras write them, and damage does: look at it"]
    return []


def _parse(content: bytes) -> _Stream:
    stream, position = _Stream(), 2
    while marker := _MARKER.search(content, position):
        kind, position = marker[1][0], marker.end()
        if kind == _EOI:
            stream.ended = True
            break
        if kind == 1 or 0xD0 <= kind <= 0xD8:  # markers that stand alone
            continue
        stop = position + int.from_bytes(content[position : position + 2], "big")
        segment, position = content[position:stop], stop
        if kind in _APPLICATION or kind == _COMMENT:
            continue
        if kind in _FRAMES:
            stream.frame = kind
            stream.missing_bits = {component: [16] * _COEFFICIENTS for component in segment[8::3]}
        if kind == _TABLES:
            stream.zeros_are_flat &= all(first == 0 for first in _first_symbols(segment[2:]))
        if kind == _SOS:
            segment = _scan_header(stream, segment)
            following = _AFTER_SCAN.search(content, position)
            position = following.start() if following else len(content)
            stream.scans.append((stop, position))
        stream.segments.append(bytes((0xFF, kind)) + segment + content[stop:position])
    return stream


def _first_symbols(tables: bytes) -> Iterator[int]:
    """The symbol that zeros code in each table: 0 is no change of the first coefficient, or no others."""
    while len(tables) > 17:
        yield tables[17]
        tables = tables[17 + sum(tables[1:17]) :]


def _scan_header(stream: _Stream, segment: bytes) -> bytes:
    """Record the content of a scan. Returns its header, with fields of progressive JPEGs corrected in others."""
    first, last, bits = segment[-3:]
    if stream.frame in _SEQUENTIAL:
        first, last, bits = 0, _COEFFICIENTS - 1, 0
    for component in segment[3:-3:2]:
        if component in stream.missing_bits:
            stream.missing_bits[component][first : last + 1] = [bits & 15] * (last + 1 - first)
    return segment[:-3] + bytes((first, last, bits))
