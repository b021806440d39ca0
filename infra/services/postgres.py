"""A private Postgres in a folder, by the system's programs, on loopback with a password."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

USER = "mlflow"
_SECONDS = 60


def find_postgres() -> Path | None:
    """The folder of the newest initdb and pg_ctl; Debian keeps them out of PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    if (found := shutil.which("initdb")) is not None:
        folders.append(Path(found).resolve().parent)
    return next((folder for folder in folders if (folder / "initdb").is_file()), None)


class Postgres:
    """One database cluster."""

    def __init__(self, programs: Path, folder: Path, settings: Mapping[str, str]) -> None:
        """`settings` has POSTGRES_PORT and POSTGRES_PASSWORD."""
        self._programs, self._folder = programs, folder
        self._port, self._password = settings["POSTGRES_PORT"], settings["POSTGRES_PASSWORD"]

    @property
    def uri(self) -> str:
        """SQLAlchemy's address of the database; the password comes from PGPASSWORD."""
        return f"postgresql+psycopg://127.0.0.1:{self._port}/{USER}"

    def start(self, log: Path) -> None:
        """Create the database if missing, and start it unless it runs. Raises RuntimeError on failure."""
        if not (self._folder / "PG_VERSION").is_file():
            self._make()
        if not self._runs():
            log.touch()
            self._give(log)
            # No socket: its path could be too long, and loopback asks for the password.
            options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
            self._call("pg_ctl", "start", "-w", "-D", self._folder, "-l", log, "-o", options, "-t", str(_SECONDS))
        made = self._call(
            "psql", *self._client("postgres"), "-tAc", f"select 1 from pg_database where datname = '{USER}'"
        )
        if not made.strip():
            self._call("createdb", *self._client("postgres")[:-2], USER)

    def answers(self) -> bool:
        """Whether it runs and accepts the password."""
        try:
            return self._call("psql", *self._client(USER), "-tAc", "select 1").strip() == "1"
        except RuntimeError:
            return False

    def stop(self) -> None:
        """Stop it, if it runs, after finishing its writes."""
        if self._runs():
            self._call("pg_ctl", "stop", "-w", "-D", self._folder, "-m", "fast", "-t", str(_SECONDS))

    def _make(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._give(self._folder)
        password = self._folder.with_name(".postgres-password")
        password.touch(mode=0o600)
        self._give(password)
        try:
            password.write_text(self._password)
            self._call(
                *("initdb", "-D", self._folder, "-U", USER, "--pwfile", password, "--auth=scram-sha-256"),
                *("--encoding=UTF8", "--locale=C"),
            )
        finally:
            password.unlink()

    def _runs(self) -> bool:
        try:
            self._call("pg_ctl", "status", "-D", self._folder)
        except RuntimeError:
            return False
        return True

    def _client(self, database: str) -> list[str]:
        return ["-h", "127.0.0.1", "-p", self._port, "-U", USER, "-w", "-d", database]

    def _call(self, program: str, *arguments: str | Path) -> str:
        environment = os.environ | {"PGPASSWORD": self._password}
        # pg_ctl's server inherits its streams, so a pipe would never end.
        done = subprocess.run(
            [self._programs / program, *arguments],
            check=False,
            capture_output=program != "pg_ctl",
            **({"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if program == "pg_ctl" else {}),
            text=True,
            env=environment,
            cwd="/",
            timeout=2 * _SECONDS,
            **self._as_another(),
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed in {self._folder}: {(done.stderr or 'see its log').strip()}")
        return done.stdout or ""

    def _as_another(self) -> dict[str, Any]:
        """Postgres refuses to run as root, so root runs it as its package's user."""
        if os.geteuid() != 0:
            return {}
        return {"user": "postgres", "group": pwd.getpwnam("postgres").pw_gid, "extra_groups": []}

    def _give(self, path: Path) -> None:
        if os.geteuid() == 0:
            shutil.chown(path, "postgres")
