"""Find MLflow and connect to it quietly.

MLflow's own client waits minutes for a server that is away, logs every migration of a new database, prints links and
sends usage figures. Here a connection is proved within seconds, and nothing is printed or sent.
"""

import contextlib
import logging
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

# Read by MLflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
from mlflow import MlflowClient
from mlflow.store.entities import PagedList

from dreambooth.config.addresses import Address, check_address, shown, without_credentials
from dreambooth.errors import InputError
from dreambooth.reach import prove_port, prove_server, within
from pipelines.cluster.environment import environment
from pipelines.tracking.database import SQLITE, check_database, database_path, make_database
from pipelines.tracking.line import Away, Line

_T = TypeVar("_T")
_DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
_DATABASE_SECONDS = 8.0
_line: Line | None = None


def resolve_tracking_uri(uri: str | None) -> str:
    """The tracking address: the one given, else MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder.

    A path of SQLite becomes absolute, since other processes work in other folders.
    Raises InputError for a folder, which MLflow no longer writes to.
    """
    what = "tracking.uri" if uri else "MLFLOW_TRACKING_URI"
    uri = (uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db").strip()
    check_address(uri, what=what)
    if uri.startswith(SQLITE):
        path, _, query = uri.removeprefix(SQLITE).partition("?")
        return f"{SQLITE}{Path(path).expanduser().absolute()}{'?' if query else ''}{query}"
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise InputError(
            f"{what} is {shown(uri)!r}, a folder; expected a database such as {SQLITE}mlflow.db or a server such as "
            f"http://127.0.0.1:5000"
        )
    return uri.rstrip("/")


def connect(uri: str) -> MlflowClient:
    """A client of a resolved tracking address, for its runs and its registered models; makes a missing database."""
    # MLflow logs a database that is away as an error, with its traceback, each time.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with quietly():
        if (path := database_path(uri)) is not None:
            make_database(path)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def mlflow_line() -> Line:
    """The line of this process's calls to MLflow; another one where the last one's thread hangs."""
    global _line  # noqa: PLW0603 - one line for the whole process is what it is for
    if _line is None or _line.hangs:
        _line = Line(explain)
    return _line


class _Quiet:
    """Keeps warnings ignored while any thread wants it: each on its own would put back what another has set."""

    def __init__(self) -> None:
        self._lock, self._wanted, self._before = threading.Lock(), 0, warnings.catch_warnings()

    def enter(self) -> None:
        with self._lock:
            if not self._wanted:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
            self._wanted += 1

    def leave(self) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                self._before.__exit__(None, None, None)


_quiet = _Quiet()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide warnings of MLflow and its dependencies within this context: they are for its developers."""
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()


@contextlib.contextmanager
def default_tracking(uri: str) -> Iterator[None]:
    """Within, `models:/…` addresses mean this tracking address; MLflow keeps it in a global and in the environment."""
    before = mlflow.get_tracking_uri()
    with environment({"MLFLOW_TRACKING_URI": uri}):
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)


def check_connection(uri: str) -> MlflowClient:
    """Prove within seconds that a resolved tracking address answers and can be read; makes nothing there.

    Raises InputError that says what is wrong.
    """
    client = prove_connection(uri)
    if client is None:
        raise InputError(
            f"no model is registered here yet: there is no {database_path(uri)}; 'dreambooth run' makes it"
        )
    return client


def prove_connection(uri: str) -> MlflowClient | None:
    """Check the connection as `check_connection`; None for a database's file that can be made but isn't there yet."""
    about = f"no MLflow tracking at {shown(uri)}"
    if (path := database_path(uri)) is not None:
        _check_folder(path)
        check_database(path)
        if not path.exists():
            return None
    elif "://" in uri:
        _check_answer(uri, about)

    def search() -> MlflowClient:
        client = connect(uri)
        with quietly():
            client.search_experiments(max_results=1)
        return client

    line = mlflow_line()
    try:
        return line.wait(line.post(search, once=True))
    except Exception as error:  # MLflow's, SQLAlchemy's, the database driver's, requests'
        raise InputError(f"{about}: {explain(error)}") from error


def every(search: Callable[..., PagedList[_T]]) -> Iterator[_T]:
    """All results of an MLflow search, page by page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _check_answer(uri: str, about: str) -> None:
    """Raise InputError, which begins with `about`, unless a server or a database answers within seconds."""
    server = Address.parse(uri, what="tracking.uri")
    cure = "start the server, correct tracking.uri, or leave it out to use a local database"
    if server.scheme in ("http", "https"):
        prove_server(server, what=about, cure=cure)
    elif (port := _DATABASE_PORTS.get(server.scheme.partition("+")[0])) is not None and server.host:
        prove_port(server.host, server.port or port, what=about, cure=cure)
        _check_database(uri, about)


def _check_database(uri: str, about: str) -> None:
    """Raise InputError unless a database lets us in; MLflow tries again for an hour what it refuses."""
    import sqlalchemy

    def enter() -> None:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
        engine.connect().close()

    try:
        within(_DATABASE_SECONDS, enter)
    except TimeoutError:
        raise InputError(
            f"{about}: it accepts the connection but doesn't answer for seconds; is it a database?"
        ) from None
    except Exception as error:  # noqa: BLE001 - SQLAlchemy's, the driver's, or there is no such driver
        raise InputError(f"{about}: {explain(error)}") from None


def _check_folder(path: Path) -> None:
    """Prove that a database's file can be written, or made: in the nearest folder that is there."""
    folder = next((above for above in path.parents if above.exists()), path.parent)
    try:
        with path.open("r+b") if path.exists() else tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"no MLflow tracking at {SQLITE}{path}: {path} can't be written ({error.strerror}); name another file in "
            f"tracking.uri"
        ) from error


def explain(error: BaseException) -> str:
    """Explain an error of MLflow in a line."""
    if isinstance(error, Away):
        return str(error)
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if re.search(r"\b40[13]\b", first):
        return f"it refuses the credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD ({first})"
    if "not a database" in first:
        return "the file isn't an SQLite database; name another one in tracking.uri"
    if "Can't locate revision" in first or "out-of-date database schema" in first:
        return "another version of MLflow made this database; run 'mlflow db upgrade', or name another one"
    return without_credentials(f"{type(error).__name__}: {first}")
