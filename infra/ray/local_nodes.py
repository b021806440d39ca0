"""Real Ray clusters on this machine: `ray start` in separate processes, on their own ports, with token and TLS.

For `make cluster-demo` and the integration tests; infra/ray/machines.yaml is for several machines.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray.util

from pipelines.cluster.certificates import make_authority, make_node_certificate, tls_environment
from pipelines.storage import files

_OBJECT_STORE_BYTES = 200 << 20


class Cluster:
    """A head and the nodes that joined it; `cpus` of each, the head first."""

    def __init__(self, folder: Path, cpus: tuple[int, ...]) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.token = secrets.token_hex(32)
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
        authority, tls = folder / "authority", folder / "tls"
        make_authority(authority)
        make_node_certificate(authority, tls, [ray.util.get_node_ip_address()])
        self.environment |= tls_environment(tls)
        self._temporary: list[str] = []
        self._bin = Path(sys.executable).parent
        # A job's `python` is found on its node's PATH.
        self.environment["PATH"] = f"{self._bin}{os.pathsep}{os.environ['PATH']}"
        port = str(free_port())
        self.gcs = f"127.0.0.1:{port}"
        dashboard = ("--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.port))
        self.nodes = [self._start("--head", "--port", port, *dashboard, "--num-cpus", str(cpus[0]))]
        try:
            self.wait()
            for count in cpus[1:]:
                self.add_node(count)
            self.wait(nodes=len(cpus))
        except BaseException:
            self.stop()
            raise

    def ask(self, token: str | None) -> int | None:
        """HTTP status of a plain call to the Jobs API; None without an answer."""
        try:
            with self._get("/api/jobs/", token) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def nodes_there(self) -> int:
        """Number of nodes alive, by the head."""
        with self._get("/nodes?view=summary", self.token) as answer:
            nodes = json.load(answer)["data"]["summary"]
        return sum(node["raylet"]["state"] == "ALIVE" for node in nodes)

    def _get(self, path: str, token: str | None) -> Any:
        request = urllib.request.Request(f"{self.address}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        return urllib.request.urlopen(request, timeout=10)

    def command(self, *arguments: str) -> list[str]:
        """Start the command line as a user outside the cluster does."""
        return [sys.executable, "-m", "pipelines.cli", *arguments, "--address", self.address]

    def dreambooth(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run it to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def add_node(self, cpus: int) -> "subprocess.Popen[str]":
        """Add a node."""
        self.nodes.append(self._start("--address", self.gcs, "--num-cpus", str(cpus)))
        return self.nodes[-1]

    def log(self) -> str:
        """The nodes' output."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("node-*.log")))

    def stop(self) -> None:
        """Stop the processes started here, and no others."""
        for node in reversed(self.nodes):
            kill_node(node)
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, *options: str) -> "subprocess.Popen[str]":
        number = len(list(self.folder.glob("node-*.log")))
        agent = ("--dashboard-agent-listen-port", str(free_port()))
        memory = ("--object-store-memory", str(_OBJECT_STORE_BYTES))
        command = [str(self._bin / "ray"), "start", "--block", *options, *agent, *memory]
        if number:
            # Jobs' files lie there, and nodes sharing it would remove each other's. Sockets lie there too, and
            # their paths have to be short.
            self._temporary.append(tempfile.mkdtemp(prefix="ray-node-"))
            command += ["--temp-dir", self._temporary[-1]]
        with (self.folder / f"node-{number}.log").open("w") as log:
            return subprocess.Popen(
                command,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def wait(self, nodes: int = 0) -> None:
        """Wait until the dashboard answers and so many nodes have joined."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if self.nodes[0].poll() is not None:
                break
            with suppress(TimeoutError):  # a busy machine's head takes its time
                if self.ask(self.token) == 200 and self.nodes_there() >= nodes:
                    return
            time.sleep(0.5)
        raise RuntimeError(f"Ray's head doesn't answer, or not all nodes have joined:\n{self.log()}")


@contextmanager
def started(folder: Path, cpus: tuple[int, ...]) -> Iterator[Cluster]:
    """A running cluster, within this context."""
    cluster = Cluster(folder, cpus)
    try:
        yield cluster
    finally:
        cluster.stop()


def processes_of(node: "subprocess.Popen[str]") -> list[psutil.Process]:
    """All processes of a node, its own last."""
    try:
        top = psutil.Process(node.pid)
        return [*reversed(top.children(recursive=True)), top]
    except psutil.NoSuchProcess:
        return []


def running_a_lane(cluster: Cluster) -> list["subprocess.Popen[str]"]:
    """Nodes with a training worker."""
    return [
        node
        for node in cluster.nodes[1:]
        if any("RayTrainWorker" in " ".join(process.cmdline()) for process in processes_of(node))
    ]


def in_the_middle(results: str) -> bool:
    """Whether a batch's results hold a published model and another subject's checkpoint."""
    fs, root = files.filesystem(results)
    try:
        return bool(fs.glob(f"{root}/*/model/*/manifest.json") and fs.glob(f"{root}/*/checkpoints/*/*/manifest.json"))
    except FileNotFoundError:  # s3fs, before anything is written
        return False


def kill_node(node: "subprocess.Popen[str]") -> None:
    """Kill a node, as by a power cut."""
    for process in processes_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait(30)


def free_port() -> int:
    """A free port."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
