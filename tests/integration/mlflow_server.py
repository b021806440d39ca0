"""`mlflow server` as a test needs it: on a port of its own, killed without warning, and started again."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from local_nodes import free_port


class MlflowServer:
    """A server with its database and artifacts in a folder, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self._port}"

    @property
    def uri(self) -> str:
        """Its address."""
        return f"http://{self.host}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self._process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # six processes that no test needs
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 180
        try:
            while not self._answers():
                assert self._process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
