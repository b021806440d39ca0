"""What SIGTERM does to a process: by its exit code, and what it has said before."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, time
from pipelines.cluster.preemption import answer_sigterm, exit_if_terminated, terminated, while_working

told = []
answer_sigterm()
if {working}:
    with while_working(lambda: told.append("told")):
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        print(*told, terminated(), flush=True)
        if {again}:
            os.kill(os.getpid(), signal.SIGTERM)
        print("goes on", flush=True)
    exit_if_terminated()
else:
    exit_if_terminated()
    os.kill(os.getpid(), signal.SIGTERM)
print("never", flush=True)
"""


@pytest.mark.parametrize(
    ("working", "again", "said"),
    [(False, False, ""), (True, False, "told True\ngoes on\n"), (True, True, "told True\n")],
    ids=["without work", "with work", "twice"],
)
def test_sigterm_waits_for_work_once(working: bool, again: bool, said: str) -> None:
    script = SCRIPT.format(working=working, again=again)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), done.stderr
    assert done.stdout == said
