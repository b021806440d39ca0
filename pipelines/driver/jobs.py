"""Runs and batches as jobs on a Ray cluster, submitted from outside through Ray's Jobs API.

A job's name is a hash of its command, arguments and their files' contents. Submitting the same again finds the running
job, or resumes one that was stopped or failed.
"""

import asyncio
import hashlib
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreambooth.config.addresses import Address, holds_credentials, shown
from dreambooth.config.text_files import utf8_fault
from dreambooth.errors import InputError
from pipelines.driver.job_paths import check_reachable, elsewhere, settings_in, settings_of, split
from pipelines.driver.relay import RELAY_VARIABLE

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_DASHBOARD = "http://HEAD:8265"
_PATIENCE_SECONDS = (4.0, 5.0)  # to connect, to answer
_PACKAGES = ("dreambooth", "pipelines")
_VARIABLES = {"PYTHONUNBUFFERED": "1", RELAY_VARIABLE: "1"}
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

Fate = Literal["submitted", "submitted again", "already running", "already done"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command: arguments of `dreambooth`, with local files under their names on the cluster.

    `stored` is True if the command or its files set a folder for results.
    """

    arguments: tuple[str, ...]
    files: Mapping[str, Path]
    stored: bool

    @property
    def id(self) -> str:
        """Id by the command and the contents of its files."""
        digest = hashlib.sha256("\0".join(self.arguments).encode())
        for name, path in sorted(self.files.items()):
            digest.update(f"\0{name}\0".encode() + path.read_bytes())
        return f"dreambooth-{self.arguments[0]}-{digest.hexdigest()[:16]}"

    @property
    def entrypoint(self) -> str:
        """The shell command that Ray runs in the job's working directory."""
        return shlex.join(["python", "-m", "pipelines.cli", *self.arguments, "--set", "cluster.address=auto"])


def make_job(command: str, arguments: Sequence[str]) -> Job:
    """Make a job of a command and its arguments, with the tables and configurations among them.

    Raises InputError for a password in an argument, and for a relative path, meaningless on the job's machine.
    """
    for argument in arguments:
        if "://" in argument and holds_credentials(argument):
            raise InputError(
                f"{shown(argument)} holds a password, which everyone who lists the cluster's jobs could read; "
                f"leave it out and pass it with --env MLFLOW_TRACKING_PASSWORD, or set it on the nodes"
            )
    files: dict[str, Path] = {}
    words: list[str] = []
    settings: list[tuple[str, Any]] = []
    for part in split(arguments):
        path = Path(part.value)
        if part.option:
            settings += (given := settings_of(part))
            check_reachable(given)
        elif path.is_file():
            check_reachable(found := settings_in(command, path), f"{part.value}: ")
            settings += found
            name = f"inputs/{len(files)}/{path.name}"
            files[name] = path
            part = part.renamed(name)
        elif "://" not in part.value and not path.is_absolute():
            if path.is_dir():
                raise elsewhere(part.value)
            raise InputError(f"there is nothing at {part.value!r}; expected a configuration or a table of subjects")
        words += part.words
    stored = any(name in ("storage.root", "storage.run") for name, _ in settings)
    return Job(arguments=(command, *words), files=files, stored=stored)


def environment(names: Sequence[str]) -> dict[str, str]:
    """Variables to pass to the job, with their values here. Raises InputError for one that isn't set."""
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(f"--env {missing[0]}: this variable is not set here; export it, or leave the flag out")
    for name in names:
        if (fault := utf8_fault(os.environ[name])) is not None:
            raise InputError(f"--env {name}: {fault}; set it again")
    return {name: os.environ[name] for name in names}


def submit(client: Any, job: Job, *, with_code: bool, variables: Mapping[str, str]) -> tuple[str, Fate]:
    """Submit a job unless it runs or is done; a failed or stopped one resumes. Returns the id of its attempt.

    `with_code` uploads this project's code; else the cluster's image must contain it.
    """
    attempts = _attempts(client, job.id)
    last = attempts[-1] if attempts else None
    if last is not None and last[1] == "SUCCEEDED":
        return last[0], "already done"
    if last is not None and last[1] not in _ENDED:
        return last[0], "already running"
    # Ray never reuses a job's name, so every attempt has its own.
    job_id = f"{job.id}-{len(attempts) + 1}"
    with tempfile.TemporaryDirectory(prefix="dreambooth-job-") as folder:
        _fill(Path(folder), job, with_code=with_code)
        client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=job_id,
            runtime_env={"working_dir": folder, "env_vars": {**_VARIABLES, **variables}},
            metadata={"dreambooth": " ".join(job.arguments[:2])},
        )
    return job_id, "submitted again" if attempts else "submitted"


def _attempts(client: Any, job_id: str) -> list[tuple[str, str]]:
    """(id, status) of a job's attempts, oldest first."""
    known = {str(info.submission_id): str(info.status.value) for info in client.list_jobs()}
    numbers = (int(name.rpartition("-")[2]) for name in known if re.fullmatch(rf"{job_id}-\d+", name))
    return [(f"{job_id}-{number}", known[f"{job_id}-{number}"]) for number in sorted(numbers)]


def follow(client: Any, job_id: str, show: Callable[[str], None]) -> str:
    """Show a job's log until it ends; returns its status."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job_id):
            show(lines)

    asyncio.run(tail())
    return status(client, job_id)


def status(client: Any, job_id: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. Raises InputError for an unknown job."""
    return str(_details(client, job_id).status.value)


def exit_code(client: Any, job_id: str) -> int:
    """The exit code of a job's command; 1 if it has none (stopped, node lost)."""
    details = _details(client, job_id)
    if details.status.value == "SUCCEEDED":
        return 0
    return int(details.driver_exit_code or 1)


def _details(client: Any, job_id: str) -> Any:
    known = {info.submission_id: info for info in client.list_jobs()}
    if job_id not in known:
        ours = [name for name in known if name and name.startswith("dreambooth-")]
        raise InputError(f"the cluster has no job {job_id!r}; it has {', '.join(ours) or 'none of dreambooth'}")
    return known[job_id]


def connect(address: str | None) -> Any:
    """A client of a cluster's Jobs API. Raises InputError for a wrong address or token."""
    variable = os.environ.get("RAY_API_SERVER_ADDRESS")
    what = "RAY_API_SERVER_ADDRESS" if variable and not address else "--address"
    address = address or variable or DEFAULT_ADDRESS
    _prove_dashboard(address, what)
    if (
        "RAY_AUTH_TOKEN" in os.environ
        or "RAY_AUTH_TOKEN_PATH" in os.environ
        or Path("~/.ray/auth_token").expanduser().exists()
    ):
        # Read by Ray when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray prefers this variable, or else RAY_ADDRESS, to the given address.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.job_submission import JobSubmissionClient

    for chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
    with explained(shown(address)):
        return JobSubmissionClient(address)


def _prove_dashboard(address: str, what: str) -> None:
    """Raise InputError unless a Ray dashboard answers within seconds; Ray's own client waits forever."""
    import requests

    if not address.startswith(("http://", "https://")) or not Address.parse(address, what=what).host:
        raise InputError(f"{what} is {shown(address)!r}; expected the dashboard's, such as {_DASHBOARD}")
    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=_PATIENCE_SECONDS)
    except requests.Timeout:
        fault = "it doesn't answer for seconds"
    except requests.exceptions.SSLError:
        fault = "its certificate isn't trusted here, or it doesn't speak https"
    except requests.RequestException as error:
        unknown = "NameResolutionError" in str(error) or "resolve" in str(error)
        fault = "there is no host of that name" if unknown else "nothing listens there, or something else than http"
    else:
        if answer.status_code in (401, 403) or "ray_version" in answer.text:
            return
        fault = f"a web server is there, but no Ray dashboard (/api/version gives {answer.status_code})"
    raise InputError(
        f"nothing answers at {shown(address)} as Ray's dashboard: {fault}; expected its address, such as {_DASHBOARD}"
    )


@contextmanager
def explained(address: str) -> Any:
    """Turn a cluster's refusals within this context into InputErrors with a cure."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        if "403" in str(error) or "invalid" in str(error).lower():
            raise InputError(
                f"{address} refuses the token (403): it is another cluster's; set RAY_AUTH_TOKEN"
            ) from None
        raise InputError(f"{address} requires a token (401): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN") from None
    except ConnectionError:
        raise InputError(
            f"nothing answers at {address}; expected the dashboard's address, such as {_DASHBOARD}"
        ) from None


def _fill(folder: Path, job: Job, *, with_code: bool) -> None:
    """Copy the job's files into a folder."""
    root = Path(__file__).parents[2]
    for package in _PACKAGES if with_code else ():
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name, path in job.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
