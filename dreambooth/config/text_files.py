"""Read every text file a user gives the same way: settings, tables, captions, lists of prompts.

Spreadsheets and editors save text in many encodings. A byte-order mark names it; without one it is UTF-8, or refused:
single-byte encodings can't be distinguished, and a wrong guess would be trained on silently.
"""

import codecs
import re
from pathlib import Path

from dreambooth.errors import InputError

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16's, which its mark begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
_SAVE = "save it as UTF-8 (a spreadsheet's 'CSV UTF-8', an editor's 'Save with encoding')"


def read_text(path: Path, *, what: str) -> str:
    """Read a text file. Raises InputError, naming `what` it should be, if it can't be read or isn't text."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that holds a NUL
        raise InputError(f"can't read {what} {path}: {getattr(error, 'strerror', None) or error}") from None
    return decode_text(content, str(path))


def decode_text(content: bytes, name: str) -> str:
    """Decode the bytes of a text file, without its byte-order mark.

    Raises InputError, with the place and what to do, if it isn't text or its encoding can't be known.
    """
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = content.removeprefix(mark).decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{name} {_fault(content, error)}; {_SAVE}") from None
    if "\0" in text:
        likely = (
            "looks like UTF-16 without its byte-order mark" if _pairs(content) else "holds the control character U+0000"
        )
        raise InputError(f"{name} {likely}, so it can't be read as text; {_SAVE}")
    return text


def utf8_fault(text: str) -> str | None:
    """The fault of a name or argument from the system that isn't UTF-8, or None."""
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "surrogateescape" if re.search("[\udc80-\udcff]", text) else "surrogatepass")
        return f"{shown!r}, holds bytes that aren't UTF-8"
    return None


def _fault(content: bytes, error: UnicodeDecodeError) -> str:
    """The fault, and the line as it reads in the most likely encoding."""
    if error.encoding != "utf-8":
        return f"begins as {error.encoding.upper()} and breaks off ({error.reason})"
    line = content.count(b"\n", 0, error.start) + 1
    start = content.rfind(b"\n", 0, error.start) + 1
    shown = content[start : error.start + 20].partition(b"\n")[0].strip()[-40:]
    try:
        reading = f"in Windows-1252 the line would read {shown.decode('cp1252')!r}"
    except UnicodeDecodeError:
        reading = "it may be no text at all"
    return f"is not UTF-8: line {line} holds the byte 0x{content[error.start]:02X} ({reading})"


def _pairs(content: bytes) -> bool:
    """Whether every other byte is zero, as in UTF-16 of most languages."""
    return any(content[start::2].count(0) > len(content) // 3 for start in (0, 1))
