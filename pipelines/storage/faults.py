"""What a storage driver's error means, in words that say what to do."""

import errno

_UNREACHABLE = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ProxyConnectionError",
    "FSTimeoutError",
    "ClientConnectorError",
    "gaierror",
)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
_WRONG_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity")


def explain(error: BaseException) -> str:
    """Say what an error of writing means: full, read-only, forbidden, unreachable, no bucket, wrong credentials."""
    causes = _chain(error)
    names = {name for cause in causes for name in _class_names(cause)}
    code = next((code for cause in causes if (code := _service_code(cause))), None)
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
        return f"it can't be reached ({_first_line(error)}); is the address right (AWS_ENDPOINT_URL) and the store up?"
    if isinstance(error, OSError) and code is None:
        return _explain_local(error)
    return f"{type(error).__name__}: {_first_line(error)}"


def _explain_local(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left there; free some, or name another folder"
    if error.errno == errno.EROFS:
        return "it is on a read-only file system; name another folder"
    if isinstance(error, PermissionError):
        return "this user may not write there; change its permissions, or name another folder"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"a part of the path is a file, not a folder ({error.filename}); name another folder"
    if error.errno == errno.ENAMETOOLONG:
        return "the path is too long; name a shorter one"
    return f"{type(error).__name__}: {_first_line(error)}"


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _class_names(error: BaseException) -> list[str]:
    # By name, so that botocore isn't needed where nothing is stored on S3.
    return [kind.__name__ for kind in type(error).__mro__]


def _service_code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    code = response.get("Error", {}).get("Code")
    return str(code) if code else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
