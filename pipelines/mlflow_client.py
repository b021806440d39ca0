"""Which MLflow, and a quiet connection to it.

MLflow's own client waits for minutes on a server that is away, logs every migration of a new database, prints links and
sends usage figures. Here a connection is proved within seconds, and nothing is printed or sent.
"""

import contextlib
import logging
import os
import re
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

from dreambooth.addresses import Address, check_address, shown, without_credentials
from dreambooth.errors import InputError
from dreambooth.reach import prove_port, prove_server, within
from pipelines.environment import environment

_T = TypeVar("_T")
SQLITE = "sqlite:///"
_DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
_DATABASE_SECONDS = 8.0
_QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


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
    """A client of a resolved tracking address, for its runs and its registered models."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with quietly():
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within, no warning of MLflow or its dependencies is shown: they are for its developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    """Prove within seconds that a resolved tracking address answers; raises InputError that says what is wrong."""
    about = f"no MLflow tracking at {shown(uri)}"
    if uri.startswith(SQLITE):
        _check_folder(uri)
    elif "://" in uri:
        _check_answer(uri, about)
    with environment(_QUICK):
        try:
            client = connect(uri)
            with quietly():
                client.search_experiments(max_results=1)
        except Exception as error:  # MLflow's, SQLAlchemy's, the database driver's, requests'
            raise InputError(f"{about}: {_explain(error)}") from error
    return client


def every(search: Callable[..., PagedList[_T]]) -> Iterator[_T]:
    """All that a search of MLflow's finds, page after page."""
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
        raise InputError(f"{about}: it takes the connection and says nothing for seconds; is it a database?") from None
    except Exception as error:  # noqa: BLE001 - SQLAlchemy's, the driver's, or there is no such driver
        raise InputError(f"{about}: {_explain(error)}") from None


def _check_folder(uri: str) -> None:
    path = Path(uri.removeprefix(SQLITE).partition("?")[0])
    if not path.parent.is_dir():
        raise InputError(f"no MLflow tracking at {uri}: there is no folder {path.parent}; create it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"no MLflow tracking at {uri}: {path} can't be written; name another file in tracking.uri")


def _explain(error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if re.search(r"\b40[13]\b", first):
        return f"it refuses the credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD ({first})"
    if "not a database" in first:
        return "the file isn't an SQLite database; name another one in tracking.uri"
    if "Can't locate revision" in first or "out-of-date database schema" in first:
        return "another version of MLflow made this database; run 'mlflow db upgrade', or name another one"
    return without_credentials(f"{type(error).__name__}: {first}")
