"""Detect damaged WebPs. The format has no checksums, and its decoder stops at the last pixel, whatever bytes remain.

Zeros in place of codes yield flat areas, which need fewer bytes than the original. A sound flat area may also hold a
run of zeros, but there the decoder needs the code to its last bytes. So the decoder gets the code without a run of
zeros: if it doesn't miss them, they are damage.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from dreambooth.data.images.errors import Damage
from dreambooth.data.images.zeros import Run, long_run, zeroed_blocks

_CUTS = {b"ALPH": 8, b"VP8 ": 8, b"VP8L": 3}
"""The kinds of code, and the unread bytes allowed at their ends."""


@dataclass(frozen=True, kw_only=True)
class _Code:
    kind: bytes
    start: int
    stop: int


def check_webp(content: bytes) -> None:
    """Raise `Damage` if part of the first picture's code is zeroed."""
    codes = list(_codes(content, 12, len(content)))
    parts = {code.kind: content[code.start : code.stop] for code in codes}
    for code in codes:
        run = zeroed_blocks(content, code.start, code.stop)
        if run is None:
            suspect = long_run(content, code.start, code.stop) or _zero_end(code, parts[code.kind])
            run = suspect if suspect and _decodes(parts | {code.kind: parts[code.kind][: -_CUTS[code.kind]]}) else None
        if run is not None:
            raise Damage(f"{run}, where its codes should be")


def _zero_end(code: _Code, part: bytes) -> Run | None:
    end = part[len(part.rstrip(b"\0")) :]
    return Run(start=code.stop - len(end), length=len(end)) if len(end) > _CUTS[code.kind] else None


def _codes(content: bytes, position: int, stop: int) -> Iterator[_Code]:
    while position + 8 <= stop:
        kind, size = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "little")
        start = position + 8
        if kind == b"ANMF":  # a frame of an animation, behind a header of 16 bytes: the first is the picture
            yield from _codes(content, start + 16, start + size)
            return
        if kind in _CUTS:
            yield _Code(kind=kind, start=start, stop=start + size)
        position = start + size + size % 2


def _decodes(parts: dict[bytes, bytes]) -> bool:
    try:
        Image.open(io.BytesIO(_still(parts)), formats=["WEBP"]).load()
    except Exception:  # noqa: BLE001 - any error means that something is missing
        return False
    return True


def _still(parts: dict[bytes, bytes]) -> bytes:
    """A WebP of one picture alone."""
    body = b"".join(_chunk(kind, part) for kind, part in parts.items())
    if b"ALPH" in parts:
        size = [int.from_bytes(parts[b"VP8 "][at : at + 2], "little") & 0x3FFF for at in (6, 8)]
        canvas = b"".join((side - 1).to_bytes(3, "little") for side in size)
        body = _chunk(b"VP8X", b"\x10\0\0\0" + canvas) + body
    return _chunk(b"RIFF", b"WEBP" + body)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return kind + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)
