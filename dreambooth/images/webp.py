"""Is a WebP whole? It has no checksums, and its decoder stops when it has all pixels, however many bytes are left.

Zeros in place of codes yield flat areas, for which fewer bytes are needed than for what was there. A sound flat area
may make a run of zeros, too, but a sound code is needed to its last byte. So where there is such a run, the decoder
gets the code without its last few bytes, and if it does not miss them, the zeros are not the encoder's.
"""

import io
from collections.abc import Iterator

from PIL import Image

from dreambooth.images.errors import Damage

_RUN = bytes(32)
_CUT = 8  # bytes: the decoder may read ahead by less
_CODES = (b"ALPH", b"VP8 ", b"VP8L")


def check_webp(content: bytes) -> None:
    """Raise `Damage` if a part of the (first) picture's codes is zeroed."""
    codes = dict(_codes(content, 12, len(content)))
    for kind, code in codes.items():
        place = code.find(_RUN)
        if place >= 0 and _decodes(codes | {kind: code[:-_CUT]}):
            length = len(code) - place - len(code[place:].lstrip(b"\0"))
            raise Damage(f"{length} bytes in a row of its {kind.decode().strip()} part are zeros and mean nothing")


def _codes(content: bytes, position: int, stop: int) -> Iterator[tuple[bytes, bytes]]:
    while position + 8 <= stop:
        kind, size = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "little")
        start = position + 8
        if kind == b"ANMF":  # a frame of an animation, behind a header of 16 bytes: the first is the picture
            yield from _codes(content, start + 16, start + size)
            return
        if kind in _CODES:
            yield kind, content[start : start + size]
        position = start + size + size % 2


def _decodes(codes: dict[bytes, bytes]) -> bool:
    try:
        Image.open(io.BytesIO(_still(codes)), formats=["WEBP"]).load()
    except Exception:  # noqa: BLE001 - whatever it calls it, something is missing
        return False
    return True


def _still(codes: dict[bytes, bytes]) -> bytes:
    """A file of one picture and nothing else."""
    body = b"".join(_chunk(kind, code) for kind, code in codes.items())
    if b"ALPH" in codes:
        size = [int.from_bytes(codes[b"VP8 "][at : at + 2], "little") & 0x3FFF for at in (6, 8)]
        canvas = b"".join((side - 1).to_bytes(3, "little") for side in size)
        body = _chunk(b"VP8X", b"\x10\0\0\0" + canvas) + body
    return _chunk(b"RIFF", b"WEBP" + body)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return kind + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)
