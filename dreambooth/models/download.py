"""Fetch model directories from the hub or any fsspec address to a cache on this machine."""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fsspec

from dreambooth.config.addresses import Address, shown, without_credentials
from dreambooth.errors import InputError
from dreambooth.reach import prove_server, prove_store

_VERSIONS = (
    "ETag",
    "etag",
    "LastModified",
    "updated",
    "mtime",
    "created",
)  # fields by which stores identify a file's content


def cache_directory() -> Path:
    """Folder of downloaded models: $DREAMBOOTH_CACHE, else ~/.cache/dreambooth."""
    return Path(os.environ.get("DREAMBOOTH_CACHE", "~/.cache/dreambooth")).expanduser()


def is_remote(address: str) -> bool:
    """Whether an address is remote and served by fsspec."""
    return "://" in address and not address.startswith("file://")


def is_hub_id(address: str) -> bool:
    """Whether an address reads as owner/name."""
    return "://" not in address and not address.startswith((".", "/", "~")) and address.count("/") == 1


def from_hub(
    hub_id: str,
    *,
    what: str,
    allow: Sequence[str],
    ignore: Sequence[str] = (),
    revision: str | None = None,
) -> Path:
    """The folder of a hub model's snapshot, downloaded once: files that match `allow` and not `ignore`.

    Raises InputError, starting with `what`, if it isn't available.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = f"{what} {hub_id!r}{f' at {revision!r}' if revision else ''}"
    fault = hub_fault()
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(allow),
                ignore_patterns=list(ignore),
                local_files_only=fault is not None,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if (refusal := _refusal(error, hub_id)) is not None:
            raise InputError(f"{wanted} {refusal}") from None
        reason = fault or (str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise InputError(
            f"{wanted} is neither a folder here nor available from the hub ({type(error).__name__}: {reason}); check "
            f"the name and the network, or download it and give its folder"
        ) from None


def hub_files(hub_id: str, revision: str | None) -> list[str]:
    """Names of all files of a hub model; none where the hub can't be asked, or doesn't say."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or hub_fault() is not None:
        return []
    try:
        return HfApi().list_repo_files(hub_id, revision=revision)
    except Exception:  # noqa: BLE001 - of several libraries; what is missing shows in the download, too
        return []


def _refusal(error: Exception, hub_id: str) -> str | None:
    """Why the hub keeps a repository from this account, and the cure; None if that isn't it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    error = error if isinstance(error, HfHubHTTPError) else error.__cause__  # type: ignore[assignment]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    hub = shown(constants.ENDPOINT)
    token = f"HF_TOKEN to a token of that account ({hub}/settings/tokens)"
    if isinstance(error, GatedRepoError):
        if status == 401:
            return f"is gated ({status}): accept the licence at {hub}/{hub_id}, and set {token}"
        return (
            f"is gated, and the account of the token hasn't got access ({status}): accept the licence at "
            f"{hub}/{hub_id} with it, or set {token} that has; a fine-grained token also needs the right to read gated "
            f"repositories"
        )
    if status == 401 and get_token() is None:  # so it answers for what doesn't exist, too
        return (
            f"is not on the hub, or private or gated ({status}): check the name; if it is right, ask for access at "
            f"{hub}/{hub_id}, and set {token}"
        )
    if status in (401, 403):
        return f"is refused by the hub to the token that was sent ({status}): set {token} that may read {hub_id}"
    return None


def hub_fault() -> str | None:
    """Reason why the hub can't be reached, within seconds, or None. Raises InputError for a bad HF_ENDPOINT."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    hub = Address.parse(constants.ENDPOINT, what="HF_ENDPOINT")
    if hub.scheme not in ("http", "https"):
        raise InputError(f"HF_ENDPOINT is {shown(constants.ENDPOINT)!r}; expected an address such as https://host")
    try:
        prove_server(hub, what="the hub", cure="is there a network?")
    except InputError as error:
        return str(error)
    return None


def from_store(address: str, *, what: str) -> Path:
    """Copy a remote directory, or a file, to the cache, once; an interrupted copy is never taken for a whole one.

    Raises InputError, starting with `what`, if it can't be read or copied.
    """
    address = address.rstrip("/")
    prove_store(address, what=f"{what} {shown(address)!r} can't be read")
    try:
        filesystem, path = fsspec.url_to_fs(address)
        filesystem.invalidate_cache()  # some remember a listing for as long as the process lives
        listing = {name: info for name, info in filesystem.find(path, detail=True).items() if info["type"] == "file"}
    except Exception as error:  # noqa: BLE001 - every fsspec backend has exceptions of its own
        raise InputError(
            f"{what} {shown(address)!r} can't be read: {type(error).__name__}: {without_credentials(str(error))}"
        ) from None
    if not listing:
        raise InputError(f"{what} {shown(address)!r}: there is nothing at that address")
    files = [(name, info["size"], *(str(info.get(key)) for key in _VERSIONS)) for name, info in listing.items()]
    stamp = hashlib.sha256(repr([address, sorted(files)]).encode()).hexdigest()[:16]
    target = cache_directory() / "bases" / stamp
    target.parent.mkdir(parents=True, exist_ok=True)
    # All workers of a machine ask at once: one of them fetches, and the others wait.
    with target.with_name(f".{stamp}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{stamp}-") as partial:
                whole = Path(partial) / "base"
                try:
                    for name, info in listing.items():
                        local = whole / Path(name).relative_to(path.rstrip("/"))
                        local.parent.mkdir(parents=True, exist_ok=True)
                        filesystem.get_file(name, str(local))
                        if info["size"] not in (None, size := local.stat().st_size):
                            raise OSError(errno.EIO, f"{name} has {info['size']} bytes, but {size} arrived")
                    whole.rename(target)
                except Exception as error:
                    raise InputError(
                        f"{what} {shown(address)!r} can't be copied to {target.parent}: "
                        f"{without_credentials(repr(error))}"
                    ) from error
    return target
