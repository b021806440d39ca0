"""A real object store on this machine, for tests and experiments: OpenStack Swift with its S3 interface.

From pip, without containers and root, in its own virtual environment (.venv-s3, made at the first start), with
settings, credentials, data and logs in one folder.

    python infra/s3/swift.py start --folder output/s3     # prints the AWS variables that s3fs and boto read
    python infra/s3/swift.py status --folder output/s3
    python infra/s3/swift.py stop --folder output/s3      # the data stay; the next start finds them

`eval "$(python infra/s3/swift.py start --folder output/s3)"` sets the variables in this shell. A restarted store has
the same address and credentials. Readers of the folder can read the credentials; servers listen on loopback only. Exit
codes: 0 running (or stopped), 1 not running, 2 failed to start, 3 the folder has no extended attributes.
"""

import argparse
import base64
import contextlib
import email.utils
import fcntl
import hashlib
import hmac
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from settings import KINDS, write_settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REGION = "us-east-1"
START_SECONDS = 120
STOP_SECONDS = 10
NOT_RUNNING, CANNOT, NO_EXTENDED_ATTRIBUTES = 1, 2, 3


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="A local S3 store: OpenStack Swift.")
    parser.add_argument("command", choices=("start", "status", "stop"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of settings, credentials, data and logs")
    parser.add_argument("--port", type=int, help="port of S3; default: the last one, or a free one")
    parser.add_argument("--bucket", default="dreambooth", help="created if missing; default: %(default)s")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-s3", help="default: %(default)s")
    options = parser.parse_args()
    folder: Path = options.folder.expanduser().absolute()
    if options.command == "start":
        return start(folder, port=options.port, bucket=options.bucket, venv=options.venv.expanduser().absolute())
    return stop(folder) if options.command == "stop" else status(folder)


def start(folder: Path, *, port: int | None, bucket: str, venv: Path) -> int:
    """Start missing servers, wait until objects can be written, and print the variables."""
    _make_folders(folder)
    with _lock(folder / "lock"):
        running = [kind for kind in KINDS if _pid(folder, kind)]
        if running and running != list(KINDS):
            _say(f"only {', '.join(running)} of the store in {folder} still run(s): starting all anew")
            _stop(folder)
            running = []
        store = _read_store(folder)
        if running:
            if port not in (None, store["ports"]["proxy"]):
                _fail(f"the store in {folder} runs already, on port {store['ports']['proxy']}; stop it first")
        else:
            _install(venv)
            _prepare(folder, store, port, venv)
        servers = [] if running else [_launch(folder, kind, venv) for kind in KINDS]
        try:
            _wait(folder, store, bucket, servers)
        except BaseException:
            for server in servers:
                server.kill()
            raise
        finally:
            for server in servers:
                server.returncode = 0  # it outlives this process
    variables = _variables(store)
    path = folder / "credentials.env"
    _write_private(path, "".join(f"export {name}={value}\n" for name, value in variables.items()))
    _say(
        f"An S3 store runs at {variables['AWS_ENDPOINT_URL']} with the bucket s3://{bucket}; its data: {folder}\n"
        f"The variables that lead to it (also set by '. {path}'):"
    )
    sys.stdout.write(path.read_text())
    return 0


def status(folder: Path) -> int:
    """Print whether all four servers run and S3 answers."""
    running = [kind for kind in KINDS if _pid(folder, kind)]
    if not running:
        _say(f"no store runs in {folder}")
        return NOT_RUNNING
    store = _read_store(folder)
    missing = sorted({*KINDS} - {*running})
    answer = _request(store, "GET", "/")
    if missing or answer != 200:
        _say(f"the store in {folder} is ill: not running: {', '.join(missing) or 'none'}; S3 answers: {answer}")
        return NOT_RUNNING
    ids = ", ".join(f"{kind} {_pid(folder, kind)}" for kind in KINDS)
    _say(f"the store in {folder} runs at {_variables(store)['AWS_ENDPOINT_URL']} ({ids})")
    return 0


def stop(folder: Path) -> int:
    """Stop the four servers; does nothing if none runs."""
    if not folder.is_dir():
        _say(f"no store runs in {folder}")
        return 0
    with _lock(folder / "lock"):
        stopped = _stop(folder)
    _say(f"the store in {folder} is stopped; its data are still there" if stopped else f"no store runs in {folder}")
    return 0


def _make_folders(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("etc", "log", "run", "data/disk"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not hasattr(os, "setxattr"):
        return  # no Linux: Swift will report it
    try:
        os.setxattr(folder / "data", "user.swift.probe", bytes(1024))
        os.removexattr(folder / "data", "user.swift.probe")
    except OSError as error:
        _fail(
            f"{folder} is on a file system without extended attributes ({error.strerror}), where Swift keeps the names "
            f"of its objects; name a folder on ext4, xfs or btrfs",
            NO_EXTENDED_ATTRIBUTES,
        )


def _read_store(folder: Path) -> dict[str, Any]:
    path = folder / "store.json"
    if path.is_file():
        store: dict[str, Any] = json.loads(path.read_text())
        return store
    # The salt decides every object's place: another one would lose them all.
    return {
        "access_key": "dreambooth:admin",
        "secret_key": secrets.token_hex(20),
        "salt": secrets.token_hex(16),
        "ports": {},
    }


def _install(venv: Path) -> None:
    """Make the virtual environment, once per state of constraints.txt."""
    constraints = HERE / "constraints.txt"
    stamp = venv / ".installed"
    wanted = hashlib.sha256(constraints.read_bytes()).hexdigest()
    venv.mkdir(parents=True, exist_ok=True)
    with _lock(venv.with_name(f"{venv.name}.lock")):
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        _say(f"Installing Swift into {venv} with Python {sys.version.split()[0]} (some 20 seconds, once)")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        quiet: dict[str, Any] = {"env": environment, "stdout": 2}
        if subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=False, **quiet).returncode:
            _fail(f"could not create {venv}; on Debian and Ubuntu, 'apt install python3-venv' brings what is missing")
        pip = [venv / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--prefer-binary"]
        if subprocess.run([*pip, "--constraint", constraints, "swift"], check=False, **quiet).returncode:
            _fail(
                "pip could not install Swift (see above). Linux on x86-64 and ARM64 (glibc) needs nothing but pip's "
                "wheels; elsewhere PyECLib is compiled, which takes a C compiler and the library liberasurecode "
                "('apt install build-essential python3-dev liberasurecode-dev', 'brew install liberasurecode')"
            )
        stamp.write_text(wanted)


def _prepare(folder: Path, store: dict[str, Any], port: int | None, venv: Path) -> None:
    """Choose free ports, if possible the last ones, and write credentials, settings and rings."""
    before = dict(store["ports"])
    if port is not None and not _is_free(port):
        _fail(f"port {port} is taken; name another one, or none to have a free one chosen")
    ports = {"proxy": port} if port is not None else {}
    for kind in KINDS:
        if kind not in ports:
            last = before.get(kind)
            ports[kind] = last if last and _is_free(last) else _free_port({*ports.values()})
    store["ports"] = ports
    _write_private(folder / "store.json", json.dumps(store, indent=2) + "\n")
    write_settings(folder, store, ports)
    if ports != before or not (folder / "etc" / "object.ring.gz").is_file():
        servers = [str(ports[kind]) for kind in KINDS[:3]]
        subprocess.run([*_server(venv), folder, "rings", *servers], check=True, stdout=2, timeout=START_SECONDS)


def _launch(folder: Path, kind: str, venv: Path) -> "subprocess.Popen[bytes]":
    with (folder / "log" / f"{kind}.log").open("ab") as log:
        # In its own session, out of reach of this terminal's Ctrl-C.
        return subprocess.Popen(
            [*_server(venv), folder, kind], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _server(venv: Path) -> list[str | Path]:
    return [venv / "bin/python", "-I", HERE / "server.py"]


def _wait(folder: Path, store: Mapping[str, Any], bucket: str, servers: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Wait until a bucket and an object in it can be written, which takes all four servers."""
    deadline = time.monotonic() + START_SECONDS
    probe = f"/{bucket}/.probe-{secrets.token_hex(8)}"
    steps = [("PUT", f"/{bucket}"), ("PUT", probe), ("DELETE", probe)]
    answer: int | str = "nothing"
    while steps:
        answer = _request(store, *steps[0])
        # 409: the bucket is there.
        if answer in (200, 204, 409):
            steps.pop(0)
            continue
        dead = any(server.poll() is not None for server in servers)
        if dead or time.monotonic() > deadline or answer in (400, 403):
            _fail(f"the store in {folder} answers {steps[0][0]} with {answer}; its logs are in {folder / 'log'}")
        time.sleep(0.1)


def _stop(folder: Path) -> bool:
    pids = {kind: pid for kind in reversed(KINDS) if (pid := _pid(folder, kind))}
    for how, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        for kind, pid in pids.items():
            if _pid(folder, kind) == pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
        deadline = time.monotonic() + seconds
        while any(_pid(folder, kind) for kind in pids) and time.monotonic() < deadline:
            time.sleep(0.02)
    if left := [f"{kind} {pid}" for kind, pid in pids.items() if _pid(folder, kind)]:
        _fail(f"could not stop {', '.join(left)}")
    return bool(pids)


def _pid(folder: Path, kind: str) -> int | None:
    """The process holding a server's lock, so never another with a reused number."""
    try:
        with (folder / "run" / f"{kind}.pid").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
    except FileNotFoundError:
        pass
    return None


def _request(store: Mapping[str, Any], method: str, path: str) -> int | str:
    """Call S3 with the short signature version 2. Returns the answer's status, or the fault."""
    date = email.utils.formatdate(usegmt=True)
    digest = hmac.digest(store["secret_key"].encode(), f"{method}\n\n\n{date}\n{path}".encode(), "sha1")
    signature = base64.b64encode(digest).decode()
    connection = http.client.HTTPConnection("127.0.0.1", store["ports"]["proxy"], timeout=30)
    with contextlib.closing(connection):
        try:
            headers = {"Date": date, "Authorization": f"AWS {store['access_key']}:{signature}", "Content-Length": "0"}
            connection.request(method, path, headers=headers)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__


def _variables(store: Mapping[str, Any]) -> dict[str, str]:
    address = f"http://127.0.0.1:{store['ports']['proxy']}"
    return {
        "AWS_ACCESS_KEY_ID": store["access_key"],
        "AWS_SECRET_ACCESS_KEY": store["secret_key"],
        "AWS_ENDPOINT_URL": address,
        "AWS_ENDPOINT_URL_S3": address,
        "AWS_DEFAULT_REGION": REGION,
    }


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port(taken: set[int]) -> int:
    while True:
        with socket.socket() as candidate:
            candidate.bind(("127.0.0.1", 0))
            port = int(candidate.getsockname()[1])
        if port not in taken:
            return port


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_private(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.replace(path)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _fail(text: str, code: int = CANNOT) -> NoReturn:
    _say(text)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
