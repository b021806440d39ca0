"""Placeholders in texts, and their common misspellings.

`[V]` stands for the identifier in captions and prompts, `{identifier}` in the templates of the settings. Anything
that looks like a placeholder but isn't one would be taken literally, so it is refused with the right spelling:

>>> check_wording("a photo of [V] dog", what="the prompt")
>>> check_wording("a photo of {identifier} dog", what="the prompt")
Traceback (most recent call last):
dreambooth.errors.InputError: the prompt: '{identifier}' is no placeholder here; write [V] where the identifier goes
"""

import re
import unicodedata
from collections.abc import Sequence

from dreambooth.errors import InputError

IDENTIFIER_PLACEHOLDER = "[V]"
CLASS_NOUN_PLACEHOLDER = "{class_noun}"
PROMPT_FIELDS = (IDENTIFIER_PLACEHOLDER, CLASS_NOUN_PLACEHOLDER)
TEMPLATE_FIELDS = ("{identifier}", "{class_noun}", "{article}")

_IDENTIFIER = re.compile(
    r"(unique_)?identifier|id|(rare_)?token|subject(_name)?|instance|trigger|concept|placeholder|[^\W\d_][*\d]?"
)  # the last is a letter, as in [v], <V>, {V*}, [X] and the Cyrillic [В]
_CLASS_NOUN = re.compile(r"(class_?)?noun|class(_name|_token)?|object|category")
_BRACKETED = re.compile(r"\\?([\[{<【〔〈])([^\[\]{}<>【】〔〕〈〉]*)([\]}>】〕〉])")
_NUMBER = re.compile(r"\d*")  # {} and {0}
_BARE = re.compile(r"(?<!\w)(?:[SV]\*(?!\w)|\([vV]\*?\)|[$%@]\{?(?:identifier|class_noun)\b|class_noun\b)")
_HALF = re.compile(r"[\[{<]\s*v\b|\bv\s*[\]}>]", re.IGNORECASE)


def visible(words: str) -> str:
    """Words with one space between them.

    Raises ValueError for text that can't be a prompt: empty, or with control or other invisible characters.
    """
    hidden = [f"U+{ord(char):04X}" for char in words if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn")]
    if hidden:
        raise ValueError(f"expected visible characters, got the control character {hidden[0]} in {words!r}")
    if not words.strip():
        raise ValueError("expected at least one visible character, got an empty text")
    return " ".join(words.split())


def one_line(text: str) -> str:
    """`visible` for text written on several lines."""
    return visible(" ".join(text.split()))


def check_wording(
    text: str, *, what: str, known: Sequence[str] = (IDENTIFIER_PLACEHOLDER,), identifier: str | None = None
) -> None:
    """Raise InputError, starting with `what`, for text with a false placeholder.

    `known` placeholders will be filled; an `identifier` such as <rex> is allowed literally.
    """
    if fault := misplaced(text, known=known, identifier=identifier):
        raise InputError(f"{what}: {fault}")


def misplaced(text: str, *, known: Sequence[str], identifier: str | None = None) -> str | None:
    """The first false placeholder of a text and its right spelling, or None."""
    rest = text
    for filled in known:
        rest = rest.replace(filled, "")
    if identifier is not None and not identifier.isalnum():
        rest = rest.replace(identifier, "")
    rest = unicodedata.normalize("NFKC", rest)  # full-width brackets and letters are still meant
    braces = any(filled.startswith("{") for filled in known)  # of any kind are placeholders, then
    for match in _BRACKETED.finditer(rest):
        name = re.sub(r"[\s-]+", "_", match[2].strip("\\ ").casefold())
        if _means(name, match[1]) or (braces and match[1] == "{"):
            return f"{match[0]!r} is no placeholder here; {_instead(_means(name, match[1]), known)}"
    plain = _BRACKETED.sub("", rest)
    if half := _HALF.search(plain) or (re.search("[{}]", plain) if braces else None):
        return f"the bracket in {half[0]!r} has no partner; {_instead('', known)}"
    if bare := _BARE.search(rest):
        meant = "class noun" if "class_noun" in bare[0] else "identifier"
        return f"{bare[0]!r} is no placeholder here; {_instead(meant, known)}"
    return None


def _means(name: str, bracket: str) -> str:
    """The intended placeholder of a name in brackets; empty if it may be literal."""
    if _CLASS_NOUN.fullmatch(name):
        return "class noun"
    if _IDENTIFIER.fullmatch(name):
        return "identifier"
    return "something" if bracket == "{" and _NUMBER.fullmatch(name) else ""


def _instead(meant: str, known: Sequence[str]) -> str:
    own = next((each for each in known if each in (IDENTIFIER_PLACEHOLDER, "{identifier}")), None)
    if meant == "identifier":
        return f"write {own} where the identifier goes" if own else "leave it out: this text describes the class alone"
    if meant == "class noun":
        has = CLASS_NOUN_PLACEHOLDER in known
        return f"write {CLASS_NOUN_PLACEHOLDER}" if has else "write the class noun itself, such as dog"
    if not known:
        return "write the word itself"
    return f"known {'are' if len(known) > 1 else 'is'} {' and '.join(known)}"
