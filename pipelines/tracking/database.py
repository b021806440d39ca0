"""Create an SQLite database for MLflow safely beside other processes.

MLflow makes its tables in some forty migrations. Two processes that do so in one file leave it half made for good. Here
each makes a file of its own and links it into place, which only one can do; the others use that one's. No lock is
needed to make it (to write into it, SQLite needs a file system that has locks).
"""

import contextlib
import secrets
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

from dreambooth.errors import InputError

SQLITE = "sqlite:///"
_CLAIM_SECONDS = 10.0
_LOCK_SECONDS = 5.0
MAKING_SECONDS = 120.0
"""Most seconds to make one: about three, and more while others make theirs."""


def database_path(uri: str) -> Path | None:
    """The file of an SQLite address; None for other addresses."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def make_database(path: Path) -> None:
    """Make an empty MLflow database and its folder, unless there is one; artifacts will lie in `mlruns` beside it.

    Raises InputError for what can't be made there.
    """
    if path.exists():
        return
    with tempfile.TemporaryDirectory(prefix="dreambooth-mlflow-") as folder:
        made = Path(folder, "mlflow.db")
        _migrate(made, artifacts=path.absolute().parent / "mlruns")
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, partial)
            _put(partial, path)
        except OSError as error:
            raise InputError(f"no MLflow tracking at {SQLITE}{path}: it can't be made there ({error})") from error
        finally:
            partial.unlink(missing_ok=True)


def check_database(path: Path) -> None:
    """Look at a database's file without changing it; InputError for one that was left half made, or can't be locked."""
    if not path.exists():
        return
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_LOCK_SECONDS)
        ) as opened:
            tables = {name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            used = "experiments" in tables and opened.execute("SELECT count(*) FROM experiments").fetchone() != (0,)
            opened.execute("BEGIN IMMEDIATE")
            opened.rollback()
    except sqlite3.OperationalError as error:
        raise InputError(
            f"no MLflow tracking at {SQLITE}{path}: {error}. Another process holds it, or its file system can't lock "
            f"files, as some network folders can't; try again, or set tracking.uri to a file on a local disk "
            f"({SQLITE}/home/me/mlflow.db) or to a server (http://HOST:5000)"
        ) from error
    except sqlite3.DatabaseError:
        return  # no SQLite file: MLflow's own words are explained
    if not used:
        raise InputError(
            f"no MLflow tracking at {SQLITE}{path}: the file is empty, incomplete or another program's, and holds no "
            f"run; move it away (mv {path} {path}.half) and run the command again, which creates a new one"
        )


def _migrate(path: Path, *, artifacts: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"{SQLITE}{path}", artifacts.as_uri())  # type: ignore[no-untyped-call]
    store.engine.dispose()


def _put(partial: Path, path: Path) -> None:
    """Give a finished file its name, unless another file has it."""
    with contextlib.suppress(FileExistsError):
        try:
            path.hardlink_to(partial)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            _put_without_links(partial, path)


def _put_without_links(partial: Path, path: Path) -> None:
    claim = path.with_name(f".{path.name}.claim")
    deadline = time.monotonic() + _CLAIM_SECONDS
    while True:
        try:
            claim.mkdir()
            break
        except FileExistsError:
            if time.monotonic() > deadline:
                raise OSError(
                    f"{claim} is there: another process makes the database, or died of it; remove it"
                ) from None
            time.sleep(0.1)
    try:
        if not path.exists():
            partial.replace(path)
    finally:
        claim.rmdir()
