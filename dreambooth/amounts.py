"""Amounts as a person says them.

>>> counted(1, "image"), counted(12_000, "image"), counted(2, "class", "classes")
('1 image', '12,000 images', '2 classes')
>>> duration(8.4), duration(915), duration(9000), duration(200_000)
('8 s', '15 min', '2.5 h', '2.3 days')
>>> readable_bytes(3 << 29), readable_bytes(700 << 20)
('1.50 GiB', '700 MiB')
"""


def counted(count: int, one: str, several: str | None = None) -> str:
    """A count with its noun; the plural takes an s unless `several` is given."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def readable_bytes(count: int) -> str:
    """A number of bytes in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
