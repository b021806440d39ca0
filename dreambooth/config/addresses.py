"""Parse, check and redact the addresses of stores, servers and clusters.

    Address.parse("http://me:secret@mlflow:5000/x", what="tracking.uri").port == 5000
    shown("postgresql://me:secret@db/mlflow") == "postgresql://me:***@db/mlflow"
    without_credentials(text)                   # any text, such as another library's error

In a malformed address the password has to be guessed, so too much is hidden rather than too little: everything between
`//` and the last `@`, a port that isn't a number, and every query parameter not known to be harmless.
"""

import ipaddress
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from dreambooth.errors import InputError

_HIDDEN = "***"
_LAST_PORT = 65535
_SCHEME = re.compile(r"[a-z][a-z0-9+.\-]*", re.IGNORECASE)
_LAST_OF_CHAIN = re.compile(r"::(?=[a-z][a-z0-9+.\-]*://)", re.IGNORECASE)  # fsspec's simplecache::s3://bucket/x
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_A_HOST = re.compile(r"[\s\x80-\x9f\u200b-\u200f\u202a-\u202e\u2060\ufeff]")  # a path may hold joined emoji
_WITH_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_WITHOUT_USERS = {"hf", "memory", "file", *_WITH_BUCKETS}
_WITH_HOSTS = {"http", "https", "ftp", "sftp", "ssh", "smb"}
_WITH_NAMES = {"sftp", "ssh", "smb", "hdfs", "webhdfs", "postgresql", "postgres", "mysql", "mssql"}
_HARMLESS = {
    "sslmode",
    "charset",
    "versionid",
    "timeout",
    "connect_timeout",
    "application_name",
    "mode",
    "cache",
    "uri",
}
_SECRET_VARIABLE = re.compile(r"(PASSWORD|PASSWD|SECRET|SECRET_KEY|TOKEN|API_KEY|SECRET_ACCESS_KEY)$", re.IGNORECASE)
_SHORTEST = 5
"""Shortest secret to look for in other text: shorter ones occur in ordinary words."""
_seen: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Address:
    """The parts of an address; `host` is a bucket's name for an object store, "" where there is none (file:///x)."""

    scheme: str
    host: str
    port: int | None
    user: str | None
    password: str | None
    rest: str

    @classmethod
    def parse(cls, text: str, *, what: str) -> "Address":
        """Parse `scheme://[user[:password]@]host[:port][/…]` or `host:port`.

        Raises InputError, starting with `what` and without credentials, for anything else.
        """
        _seen.update(_credentials(text))
        if (control := _CONTROL.search(text)) is not None:
            raise InputError(f"{what} holds the control character U+{ord(control.group()):04X}; write it without")
        scheme, separator, rest = _LAST_OF_CHAIN.split(text)[-1].partition("://")
        if not separator:
            scheme, rest = "", text
        elif not _SCHEME.fullmatch(scheme):
            raise InputError(f"{what} is {shown(text)!r}; expected an address such as scheme://host:port/path")
        authority, path = _split(rest)
        if "@" in authority.rpartition("@")[0] or (scheme.lower() not in _WITHOUT_USERS and _cut(authority, path)):
            raise InputError(
                f"{what} is {shown(text)!r}, and before its last @ there is one of / ? # @, which end a password or a "
                f"host; write it as %2F, %3F, %23 or %40"
            )
        userinfo, at, place = authority.rpartition("@")
        user, colon, password = userinfo.partition(":")
        host, port = _host_and_port(place, f"{what} is {shown(text)!r}")
        needed = {**dict.fromkeys(_WITH_BUCKETS, "bucket"), **dict.fromkeys(_WITH_HOSTS, "host")}.get(scheme.lower())
        if needed and not host:
            raise InputError(f"{what} is {shown(text)!r}; expected the name of a {needed} behind {scheme}://")
        return cls(
            scheme=scheme.lower(),
            host=host,
            port=port,
            user=unquote(user) if at else None,
            password=unquote(password) if colon else None,
            rest=path,
        )


def check_address(text: str, *, what: str) -> str:
    """Return an address unchanged. Raises InputError for a malformed one; local paths pass."""
    if (control := _CONTROL.search(text)) is not None:
        raise InputError(f"{what} holds the control character U+{ord(control.group()):04X}; write it without")
    if "://" in text and not text.startswith(("sqlite:", "file:")):
        Address.parse(text, what=what)
    elif (scheme := text.partition(":")[0]) != text and scheme.lower() in _WITH_BUCKETS | _WITH_HOSTS:
        meant = shown(f"{scheme}://{text[len(scheme) + 1 :].lstrip('/')}")
        raise InputError(f"{what} is {shown(text)!r}, a path of this machine; write {meant}, or ./{shown(text)}")
    return text


def shown(address: str) -> str:
    """An address for display, without password, token, or user without a password.

    >>> shown("https://me:secret@host/model?token=abc")
    'https://me:***@host/model?token=***'
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        if address.startswith(("models:", "runs:")) or not re.match(r"[^/\s]*:[^@]*@", address):
            return address
        scheme, rest = "", address
    elif rest.startswith("/"):
        return f"{scheme}://{_without_values(rest)}"
    before, at, after = rest.rpartition("@")
    if ":" not in before and scheme.lower() in _WITHOUT_USERS:
        before, at, after = "", "", rest  # an object's key may hold an @
    user, colon, _ = before.partition(":")
    if colon or not _is_name(user, scheme):
        user = f"{user}:{_HIDDEN}" if colon and not re.search(r"[/?#@\s]", user) else _HIDDEN
    authority, path = _split(after)
    return f"{scheme}{separator}{f'{user}@' if at else ''}{_without_values(_shown_host(authority) + path)}"


def named_place(address: str) -> str:
    """Bucket or host, and path of an address, without credentials and query, to make names from.

    >>> named_place("https://me:secret@host/photos/rex.zip?token=abc")
    'host/photos/rex.zip'
    """
    if "://" not in address or address.startswith("file:"):
        return address
    parts = Address.parse(address, what="the address")
    rest = re.split("[?#]", parts.rest)[0] if parts.scheme in ("http", "https") else parts.rest
    return f"{parts.host}{rest}"


def holds_credentials(address: str) -> bool:
    """Whether an address contains credentials."""
    return shown(address) != address


def without_credentials(text: str) -> str:
    """Hide the credentials of every address in a text, and every secret known to this process."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return re.sub(r"[\w+.:\-]*://\S+", _shown_word, text)


def _is_name(user: str, scheme: str) -> bool:
    """Whether a user without a password is only a name: for a web server it may be a token."""
    return scheme.lower().partition("+")[0] in _WITH_NAMES and re.fullmatch(r"[\w.\-]+", user) is not None


def _shown_word(found: "re.Match[str]") -> str:
    word = found.group()
    address = word.rstrip("'\"`)]}>,;:.…")
    return shown(address) + word[len(address) :]


def _shown_host(authority: str) -> str:
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]") or _is_port(port):
        return authority
    return f"{host}:{_HIDDEN}"  # it may be the password of a user whose host was forgotten


def _without_values(text: str) -> str:
    def value(found: "re.Match[str]") -> str:
        return found.group() if found[2].lower() in _HARMLESS else f"{found[1]}{found[2]}={_HIDDEN}"

    return re.sub(r"([?&;#])([^=&;#?\s]+)=[^&;#\s]*", value, text)


def _secrets() -> Iterator[str]:
    candidates = set(_seen)
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name):
            candidates.add(value)
        elif _SCHEME.fullmatch(value.partition("://")[0]):
            candidates.update(_credentials(value))
    return (secret for secret in candidates if len(secret) >= _SHORTEST)


def _credentials(text: str) -> Iterator[str]:
    """Possible passwords in an address, raw and decoded, however malformed the address is."""
    scheme, separator, rest = text.partition("://")
    before, at, _ = (rest if separator else text).rpartition("@")
    user, colon, password = before.partition(":")
    if not at or rest.startswith("/") or shown(text) == text or (not colon and _is_name(user, scheme)):
        return
    for secret in (password if colon else user, *re.split(r"[/?#@\s]", password)):
        yield from {secret, unquote(secret)} - {""}


def _split(rest: str) -> tuple[str, str]:
    """Split at the first of / ? #."""
    end = next((index for index, letter in enumerate(rest) if letter in "/?#"), len(rest))
    return rest[:end], rest[end:]


def _cut(authority: str, path: str) -> bool:
    """Whether an apparent host and port may be a user and the start of a password."""
    return "@" in path and "@" not in authority and ":" in authority and not authority.startswith("[")


def _host_and_port(text: str, so_far: str) -> tuple[str, int | None]:
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    if bracketed is not None:
        host, port = bracketed[1], bracketed[2]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise InputError(f"{so_far}; expected an IPv6 address in the brackets, such as [::1]:6379") from None
    elif text.count(":") > 1:
        raise InputError(f"{so_far}; an IPv6 address goes in brackets, such as [::1]:6379")
    else:
        host, colon, after = text.partition(":")
        port = after if colon else None
    if _NOT_IN_A_HOST.search(host) or (port is not None and not host):
        raise InputError(f"{so_far}; expected the name of a host, without blanks")
    if port is None:
        return host, None
    if not _is_port(port):
        raise InputError(f"{so_far}; expected a port from 1 to {_LAST_PORT} after the host")
    return host, int(port)


def _is_port(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None and 1 <= int(text) <= _LAST_PORT
