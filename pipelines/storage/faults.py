"""Explain errors of storage drivers, with a cure."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNREACHABLE = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ProxyConnectionError",
    "FSTimeoutError",
    "ClientConnectorError",
    "HTTPClientError",
    "ClientPayloadError",
    "IncompleteRead",
    "ServerDisconnectedError",
    "gaierror",
)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_SERVICE = ("QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "507")
_BUSY = ("SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError")
_WRONG_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity")


class StorageFull(RuntimeError):
    """No room to write, or no permission: retrying doesn't help."""


class StoreAway(RuntimeError):
    """The store could not be reached for as long as a process waits: whatever else it is asked will fail, too."""


def is_away(error: BaseException) -> bool:
    """Whether an error means that the store can't be reached, is busy or says nothing: later it may be otherwise."""
    causes = _chain(error)
    if any(isinstance(cause, StoreAway | TimeoutError | ConnectionError) for cause in causes):
        return True
    if any(name in _UNREACHABLE for cause in causes for name in _class_names(cause)):
        return True
    return any(_is_busy(cause) for cause in causes)


def is_missing_bucket(error: BaseException) -> bool:
    """Whether an error means that the store has no such bucket."""
    return any(_service_code(cause) == "NoSuchBucket" for cause in _chain(error))


def _is_busy(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    if not isinstance(response, dict) or _service_code(error) in _FULL_SERVICE:
        return False
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
    return status == 429 or status >= 500 or _service_code(error) in _BUSY


@contextmanager
def room_for(what: str, place: str) -> Iterator[None]:
    """Turn errors for lack of room into StorageFull, with what was written, where, why, and the free space."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageFull) or (reason := no_room(error)) is None:
            raise
        raise StorageFull(f"can't write {what} to {place}{_free(place)}: {reason}") from error


def _free(place: str) -> str:
    folder = next((one for one in (Path(place), *Path(place).parents) if one.exists()), None)
    if "://" in place or folder is None:
        return ""
    return f" ({readable_size(shutil.disk_usage(folder).free)} free)"


def readable_size(count: int) -> str:
    """A number of bytes in GB or MB of a million, as `df -H` has them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def no_room(error: BaseException) -> str | None:
    """The explanation of an error that retrying can't cure (full or read-only disk, quota), else None."""
    if isinstance(error, StorageFull):
        return str(error)
    for cause in _chain(error):
        if _error_number(cause) in (*_FULL, errno.EROFS) or _service_code(cause) in _FULL_SERVICE:
            return explain(error)
    return None


def explain(error: BaseException) -> str:
    """Explain an error of writing: full, read-only, forbidden, unreachable, no bucket, wrong credentials."""
    if isinstance(error, StoreAway):
        return str(error)
    causes = _chain(error)
    numbers = {_error_number(cause) for cause in causes}
    names = {name for cause in causes for name in _class_names(cause)}
    code = next((code for cause in causes if (code := _service_code(cause))), None)
    if code in _FULL_SERVICE or numbers & set(_FULL):
        return "no space is left there; free some, or name another folder"
    if errno.EROFS in numbers:
        return "it is on a read-only file system; name another folder"
    if names & set(_NO_CREDENTIALS):
        return f"{error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if code in _WRONG_KEYS:
        return (
            f"the store refuses the credentials ({code}); look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE"
        )
    if code == "NoSuchBucket" or (code is not None and isinstance(error, FileNotFoundError)):
        return "there is no such bucket; create it, or name another one"
    if code is not None and isinstance(error, PermissionError):
        return f"the store knows the credentials but doesn't allow them to write there ({code}); ask for that right"
    if names & set(_UNREACHABLE) or isinstance(error, TimeoutError | ConnectionError):
        return f"it can't be reached ({first_line(error)}); is the address right (AWS_ENDPOINT_URL) and the store up?"
    if isinstance(error, OSError) and code is None:
        return _explain_local(error)
    return f"{type(error).__name__}: {first_line(error)}"


def _explain_local(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "this user may not write there; change its permissions, or name another folder"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"a part of the path is a file, not a folder ({error.filename}); name another folder"
    if error.errno == errno.ENAMETOOLONG:
        return "the path is too long; name a shorter one"
    return f"{type(error).__name__}: {first_line(error)}"


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _error_number(error: BaseException) -> int | None:
    """The system's error number; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _class_names(error: BaseException) -> list[str]:
    # By name, so that botocore isn't needed where nothing is stored on S3.
    return [kind.__name__ for kind in type(error).__mro__]


def _service_code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    code = response.get("Error", {}).get("Code")
    return str(code) if code else None


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
