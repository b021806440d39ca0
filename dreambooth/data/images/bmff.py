"""Locate the coded data of an AVIF or HEIC: the boxes of the ISO base media file format (ISO/IEC 14496-12, 8.11)."""

from collections.abc import Iterator
from dataclasses import dataclass

_CODED = (b"av01", b"hvc1", b"hev1", b"avc1")
"""Types of items that are pictures; others are grids and metadata, which may hold zeros."""


def coded_items(content: bytes) -> Iterator[tuple[int, int]]:
    """(start, stop) in bytes of every coded picture, tile, thumbnail and auxiliary picture of the file."""
    meta = _boxes(content, 0, len(content)).get(b"meta")
    if meta is None:  # a sequence without a still picture
        return
    boxes = _boxes(content, meta[0] + 4, meta[1])
    if not {b"iinf", b"iloc"} <= boxes.keys():
        return
    kinds = dict(_item_kinds(content, *boxes[b"iinf"]))
    for item, start, stop in _extents(_Reader(content, boxes[b"iloc"][0])):
        if kinds.get(item) in _CODED:
            yield start, stop


def _boxes(content: bytes, position: int, stop: int) -> dict[bytes, tuple[int, int]]:
    """Start and stop of the first box of each type."""
    boxes: dict[bytes, tuple[int, int]] = {}
    for kind, start, end in _each_box(content, position, stop):
        boxes.setdefault(kind, (start, end))
    return boxes


def _each_box(content: bytes, position: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    while position + 8 <= stop:
        reader = _Reader(content, position)
        size, kind, header = reader.number(4), content[position + 4 : position + 8], 8
        if size == 1:
            reader.position += 4
            size, header = reader.number(8), 16
        end = position + size if size else stop
        if end < position + header:
            return
        yield kind, position + header, min(end, stop)
        position = end


def _item_kinds(content: bytes, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    first_entry = start + (6 if content[start] == 0 else 8)
    for kind, entry, _ in _each_box(content, first_entry, stop):
        version = content[entry]
        if kind == b"infe" and version in (2, 3):
            width = 2 if version == 2 else 4
            item = int.from_bytes(content[entry + 4 : entry + 4 + width], "big")
            yield item, content[entry + 6 + width : entry + 10 + width]


@dataclass
class _Reader:
    content: bytes
    position: int

    def number(self, width: int) -> int:
        """The next `width` bytes, the highest first."""
        self.position += width
        return int.from_bytes(self.content[self.position - width : self.position], "big")


def _extents(reader: _Reader) -> Iterator[tuple[int, int, int]]:
    """Items with their start and size, for those located in the file itself."""
    version = reader.number(4) >> 24
    widths = reader.number(2)
    offset_width, length_width, base_width = widths >> 12, widths >> 8 & 15, widths >> 4 & 15
    index_width = widths & 15 if version else 0
    id_width = 4 if version == 2 else 2
    for _ in range(reader.number(id_width)):
        item = reader.number(id_width)
        in_file = not version or not reader.number(2) & 15
        reader.number(2)  # which file: this one
        base = reader.number(base_width)
        for _ in range(reader.number(2)):
            reader.number(index_width)
            start = base + reader.number(offset_width)
            length = reader.number(length_width)
            if in_file:
                yield item, start, start + length if length else len(reader.content)
