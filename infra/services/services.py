"""MLflow on Postgres with artifacts on S3, on this machine, without containers, for a cluster's runs.

    python infra/services/services.py start --folder output/services     # prints its environment variables
    python infra/services/services.py status --folder output/services
    python infra/services/services.py stop --folder output/services      # the data stay; the next start finds them
    python infra/services/services.py env --folder output/services       # only the env file, for compose.yaml

Postgres is the system's (`apt install postgresql`); without one, MLflow gets an SQLite file. S3 is infra/s3. MLflow
asks for a password, uses TLS with its own authority's certificate, and serves artifacts itself, so clients need no key
of the store. All data, logs and secrets lie in one folder, secrets in files readable by their owner alone; all servers
listen on loopback. Needs a Python that has MLflow with passwords (`pip install '.[server]'`). Exit codes: 0 running (or
stopped), 1 not running, 2 failed to start.
"""

import argparse
import base64
import contextlib
import fcntl
import os
import secrets
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from postgres import Postgres, find_postgres

ROOT = Path(__file__).resolve().parents[2]
SWIFT = ROOT / "infra" / "s3" / "swift.py"
BUCKET = "dreambooth"
ADMIN = "admin"
START_SECONDS = 180  # the first start creates MLflow's tables
STOP_SECONDS = 15
NOT_RUNNING, CANNOT = 1, 2


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="MLflow on Postgres and S3, on this machine.")
    parser.add_argument("command", choices=("start", "status", "stop", "env"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of data, logs and secrets")
    options = parser.parse_args()
    folder: Path = options.folder.expanduser().absolute()
    if options.command == "status":
        return status(folder)
    if options.command == "stop":
        return stop(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Root runs Postgres as another user, who needs access to its folder in this one.
    folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    with _lock(folder / "lock"):
        settings = read_settings(folder)
        if options.command == "env":
            sys.stdout.write(f"{folder / 'services.env'}\n")
            return 0
        return start(folder, settings)


def read_settings(folder: Path) -> dict[str, str]:
    """Ports and passwords from services.env; missing ones are drawn at random and written there."""
    path = folder / "services.env"
    known = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line) if path.is_file() else {}
    taken = {int(value) for name, value in known.items() if name.endswith("_PORT")}
    made = {
        "POSTGRES_PASSWORD": secrets.token_hex(24),
        "MLFLOW_ADMIN_PASSWORD": secrets.token_hex(24),
        "MLFLOW_SECRET_KEY": secrets.token_hex(32),
        # For compose.yaml's store; Swift makes its own.
        "S3_ACCESS_KEY": secrets.token_hex(10),
        "S3_SECRET_KEY": secrets.token_hex(20),
    }
    for name in ("POSTGRES_PORT", "MLFLOW_PORT", "S3_PORT"):
        if name not in known:
            port = _free_port(taken)
            taken.add(port)
            made[name] = str(port)
    settings = made | known
    if settings != known:
        _write_private(path, "".join(f"{name}={value}\n" for name, value in sorted(settings.items())))
    return settings


def start(folder: Path, settings: Mapping[str, str]) -> int:
    """Start missing services, wait until all answer, and print the variables."""
    (folder / "log").mkdir(exist_ok=True)
    store = _start_store(folder)
    database = _start_database(folder, settings)
    _certify(folder)
    if not _pid(folder):
        _launch_mlflow(folder, settings, store, database)
    _wait_for_mlflow(folder, settings)
    variables = store | {
        "MLFLOW_TRACKING_URI": _mlflow(settings),
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        "MLFLOW_TRACKING_PASSWORD": settings["MLFLOW_ADMIN_PASSWORD"],
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(_authority(folder)),
    }
    path = folder / "client.env"
    _write_private(path, "".join(f"export {name}={value}\n" for name, value in variables.items()))
    _say(f"MLflow runs at {_mlflow(settings)} as user {ADMIN}, its data in {folder}; the variables that lead there:")
    sys.stdout.write(path.read_text())
    return 0


def status(folder: Path) -> int:
    """Print whether each service runs and answers correctly."""
    if not (folder / "services.env").is_file():
        _say(f"nothing runs in {folder}")
        return NOT_RUNNING
    settings = read_settings(folder)
    rows = [("S3", subprocess.run(_swift("status", folder), check=False, capture_output=True).returncode == 0)]
    if (folder / "postgres").is_dir() and (programs := find_postgres()):
        rows.append(("Postgres", Postgres(programs, folder / "postgres", settings).answers()))
    rows.append(("MLflow", _answer(folder, settings) == 200))
    # An open server would be worse than none.
    rows.append(("MLflow without a password is refused", _answer(folder, settings, password="") == 401))
    for what, good in rows:
        _say(f"{'ok ' if good else 'NO '} {what}")
    return 0 if all(good for _, good in rows) else NOT_RUNNING


def stop(folder: Path) -> int:
    """Stop all services; does nothing if none runs."""
    if not (folder / "services.env").is_file():
        _say(f"nothing runs in {folder}")
        return 0
    with _lock(folder / "lock"):
        settings = read_settings(folder)
        _stop_mlflow(folder)
        if (folder / "postgres").is_dir() and (programs := find_postgres()):
            Postgres(programs, folder / "postgres", settings).stop()
        subprocess.run(_swift("stop", folder), check=False, capture_output=True)
    _say(f"the services in {folder} are stopped; their data are still there")
    return 0


def _start_store(folder: Path) -> dict[str, str]:
    done = subprocess.run(_swift("start", folder), check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        _fail("the object store didn't start (see above)")
    lines = (line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines())
    return dict(lines)


def _swift(command: str, folder: Path) -> list[str | Path]:
    return [
        sys.executable,
        SWIFT,
        command,
        "--folder",
        folder / "s3",
        *(["--bucket", BUCKET] if command == "start" else []),
    ]


def _start_database(folder: Path, settings: Mapping[str, str]) -> str:
    """The address of MLflow's database, without its password."""
    programs = find_postgres()
    if programs is None:
        _say("no Postgres on this machine ('apt install postgresql' brings it): MLflow gets an SQLite file")
        return f"sqlite:///{folder / 'mlflow.db'}"
    database = Postgres(programs, folder / "postgres", settings)
    try:
        database.start(log=folder / "log" / "postgres.log")
    except RuntimeError as error:
        _fail(str(error))
    return database.uri


def _launch_mlflow(folder: Path, settings: Mapping[str, str], store: Mapping[str, str], database: str) -> None:
    users = database if database.startswith("postgres") else f"sqlite:///{folder / 'users.db'}"
    auth = folder / "mlflow-auth.ini"
    auth.write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {users}\nadmin_username = {ADMIN}\n"
        # Comparing a password takes a tenth of a second of CPU, and curves take many calls.
        "auth_cache_ttl_seconds = 60\n"
    )
    environment = (
        os.environ
        | store
        | {
            "MLFLOW_AUTH_CONFIG_PATH": str(auth),
            "MLFLOW_AUTH_ADMIN_PASSWORD": settings["MLFLOW_ADMIN_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": settings["MLFLOW_SECRET_KEY"],
            "MLFLOW_S3_ENDPOINT_URL": store["AWS_ENDPOINT_URL"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # evaluations of language models, in processes of their own
            "PGUSER": "mlflow",
            "PGPASSWORD": settings["POSTGRES_PASSWORD"],
        }
    )
    options = ["--ssl-certfile", str(folder / "tls" / "tls.crt"), "--ssl-keyfile", str(folder / "tls" / "tls.key")]
    # Else an open connection would keep it from ending.
    options += ["--timeout-graceful-shutdown", str(STOP_SECONDS // 3)]
    command = [
        *(Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", settings["MLFLOW_PORT"]),
        *("--app-name", "basic-auth", "--backend-store-uri", database, "--workers", "1"),
        *("--artifacts-destination", f"s3://{BUCKET}/mlflow", "--serve-artifacts"),
        f"--uvicorn-opts={shlex.join(options)}",
    ]
    # All its processes inherit the lock: its holder is MLflow, even if process numbers were reused.
    with (folder / "log" / "mlflow.log").open("ab") as log, (folder / "mlflow.pid").open("w") as pid:
        fcntl.flock(pid, fcntl.LOCK_EX)
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # out of reach of this terminal's Ctrl-C
            pass_fds=[pid.fileno()],
        )
        pid.write(str(server.pid))
        pid.flush()
    server.returncode = 0  # it outlives this process


def _wait_for_mlflow(folder: Path, settings: Mapping[str, str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while (answer := _answer(folder, settings)) != 200:
        if not _pid(folder) or time.monotonic() > deadline:
            _stop_mlflow(folder)
            _fail(f"MLflow answers with {answer or 'nothing'}; its log is {folder / 'log' / 'mlflow.log'}")
        time.sleep(0.3)


def _answer(folder: Path, settings: Mapping[str, str], password: str | None = None) -> int | None:
    """HTTP status of a call that needs the password; None without an answer."""
    if not _authority(folder).exists():
        return None
    trusting = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=_authority(folder)))
    password = settings["MLFLOW_ADMIN_PASSWORD"] if password is None else password
    request = urllib.request.Request(f"{_mlflow(settings)}/api/2.0/mlflow/experiments/search?max_results=1")
    if password:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{ADMIN}:{password}".encode()).decode())
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({}), trusting).open(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _mlflow(settings: Mapping[str, str]) -> str:
    return f"https://127.0.0.1:{settings['MLFLOW_PORT']}"


def _certify(folder: Path) -> None:
    """Make MLflow's certificate and its authority, unless they exist."""
    from pipelines.cluster.certificates import make_authority, make_node_certificate  # `env` runs without packages

    if not _authority(folder).exists():
        if not (folder / "authority" / "ca.key").exists():
            make_authority(folder / "authority")
        make_node_certificate(folder / "authority", folder / "tls", [])


def _authority(folder: Path) -> Path:
    """The certificate that clients verify MLflow by."""
    return folder / "tls" / "ca.crt"


def _stop_mlflow(folder: Path) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        pid, deadline = _pid(folder), time.monotonic() + STOP_SECONDS
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, how)
        while _pid(folder) and time.monotonic() < deadline:
            time.sleep(0.05)


def _pid(folder: Path) -> int | None:
    """MLflow's process group, while one of its processes lives."""
    with contextlib.suppress(FileNotFoundError), (folder / "mlflow.pid").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0) or None
    return None


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


def _fail(text: str) -> NoReturn:
    _say(text)
    sys.exit(CANNOT)


if __name__ == "__main__":
    sys.exit(main())
