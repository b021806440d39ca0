"""Check and repair a process's environment: home, folders, shared memory, loopback.

Containers lack some of them: a passwd entry for the user, a writable home, a TMPDIR that exists. `settle` repairs what
it can, `faults` reports the rest, and `dreambooth doctor` uses both.
"""

import errno
import os
import pwd
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dreambooth.errors import InputError

_LONGEST_SOCKET = 107  # bytes of a Unix socket's path, by the kernel
_SOCKETS = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""Longest path that Ray appends to its temporary folder, with a process id of seven digits."""
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_CACHES = {
    "DREAMBOOTH_CACHE": "dreambooth",
    "MPLCONFIGDIR": "matplotlib",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton",
}
"""Variables of folders that are written, in the home by default."""
_USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
_SHARED_MEMORY = Path("/dev/shm")
_OBJECTS_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class MachineFault:
    """A fault of a machine and its cure; `stops` if it prevents training."""

    found: str
    cure: str
    stops: bool = False


def settle() -> None:
    """Replace a missing home or user name, by a private folder of this user for libraries' files.

    An existing read-only home stays the home, for its models and credentials. Processes started later inherit the
    environment.
    """
    if not any(os.environ.get(name) for name in _USER_VARIABLES) and _user() is None:
        os.environ["LOGNAME"] = f"user{os.getuid()}"
    home = _home()
    if home is not None and _can_write(home):
        return
    private = _private_folder()
    if private is None:
        return  # `faults` reports it
    if home is None or not home.is_dir():
        os.environ["HOME"] = str(private)
        return
    for variable, name in _CACHES.items():
        os.environ.setdefault(variable, str(private / name))
    if not (home / ".ray" / "auth_token").is_file() and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would write one there


def ray_folder() -> str | None:
    """The folder for Ray's files; None if Ray's default is usable.

    Raises InputError if no folder is usable: Ray's sockets need a short path.
    """
    wanted = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or _SHORT_FOLDERS[0]
    if _takes_sockets(wanted):
        return None
    for folder in _SHORT_FOLDERS:
        if _takes_sockets(folder):
            return f"{folder}/ray"
    raise InputError(
        f"no folder takes Ray's sockets: {_about_folder(wanted)}, and {', '.join(_SHORT_FOLDERS)} can't be written; "
        f"set TMPDIR to a folder that can be, with a path of {_LONGEST_SOCKET - len(_SOCKETS)} bytes at most"
    )


def check_loopback() -> None:
    """Raise InputError if processes of this machine can't reach each other."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError as error:
        raise InputError(
            f"the processes of this machine can't reach each other at 127.0.0.1 ({error.strerror or error}), and Ray's "
            f"have to; bring the loopback up: ip link set lo up"
        ) from None


def faults(*, working_folder: bool = True) -> tuple[MachineFault, ...]:
    """Faults of this machine; `working_folder` matters for commands, not for Ray's workers."""
    found = [*_about_home(), *_about_temporary(), *_about_memory(), *_about_network()]
    return (*found, *(_about_working_folder() if working_folder else ()))


def _about_home() -> Iterator[MachineFault]:
    given = os.environ.get("HOME") or "~"
    home = _home()
    if _user() is None:
        yield MachineFault(
            found=f"user {os.getuid()} has no entry in passwd; {os.environ.get('LOGNAME', 'nobody')} is the name used",
            cure="set LOGNAME to a name to be shown in MLflow",
        )
    if home is None or not _can_write(home):
        private = _private_folder()
        yield MachineFault(
            found=f"the home {home or given} can't be written",
            cure=f"caches go to {private}, and don't outlive it; set HOME to a folder that stays"
            if private
            else "set HOME to a folder that can be written",
            stops=private is None,
        )
    elif home == _private_folder():
        yield MachineFault(
            found=f"there is no home that can be written; {home} does for one",
            cure="set HOME to a folder that stays, or models are downloaded again",
        )


def _about_temporary() -> Iterator[MachineFault]:
    wanted = os.environ.get("TMPDIR")
    if wanted and not _can_write(Path(wanted)):
        yield MachineFault(
            found=f"TMPDIR {wanted} can't be written", cure="set it to a folder that is there, or leave it out"
        )
    try:
        folder = ray_folder()
    except InputError as error:
        yield MachineFault(found="Ray can't start", cure=str(error), stops=True)
        return
    if folder is not None and wanted and _can_write(Path(wanted)):
        yield MachineFault(
            found=f"{_about_folder(wanted)}; Ray's files go to {folder}", cure="set TMPDIR to a shorter path"
        )


def _about_memory() -> Iterator[MachineFault]:
    if not _SHARED_MEMORY.is_dir():
        return
    size = os.statvfs(_SHARED_MEMORY)
    free = size.f_bavail * size.f_frsize
    if free < _OBJECTS_BYTES:
        yield MachineFault(
            found=f"{_SHARED_MEMORY} has {free >> 20} MiB free, and Ray's objects have room of {_OBJECTS_BYTES >> 20}; "
            f"they go to a folder on disk, which is slower",
            cure="docker run --shm-size=1g, or an emptyDir of medium Memory in Kubernetes",
        )


def _about_network() -> Iterator[MachineFault]:
    try:
        check_loopback()
    except InputError as error:
        yield MachineFault(found="no network, not even within this machine", cure=str(error), stops=True)


def _about_working_folder() -> Iterator[MachineFault]:
    try:
        folder = Path.cwd()
    except OSError:
        yield MachineFault(found="the working folder is gone", cure="change to one that is there", stops=True)
        return
    if not _can_write(folder):
        yield MachineFault(
            found=f"the working folder {folder} can't be written",
            cure="set storage.root and tracking.uri, which are there by default, to other places",
        )


def _user() -> str | None:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return None


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # neither HOME nor an entry in passwd
        return None


def _private_folder() -> Path | None:
    """A stable private folder of this user; None if none can be made."""
    for parent in dict.fromkeys((_temporary(), *_SHORT_FOLDERS)):
        if parent is None:
            continue
        folder = Path(parent, f"dreambooth-home-{os.getuid()}")
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    return None


def _temporary() -> str | None:
    try:
        return tempfile.gettempdir()
    except OSError:
        return None


def _takes_sockets(folder: str) -> bool:
    return len(os.fsencode(folder)) + len(_SOCKETS) <= _LONGEST_SOCKET and _can_write(Path(folder))


def _about_folder(folder: str) -> str:
    if not _can_write(Path(folder)):
        return f"{folder} can't be written"
    return f"the path {folder} is {len(os.fsencode(folder))} bytes long, and Ray's sockets need it shorter"


def _can_write(folder: Path) -> bool:
    """Whether a file can be created in an existing folder; root ignores its mode."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)  # a full disk is another fault
