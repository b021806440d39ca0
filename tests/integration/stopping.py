"""Commands that are stopped in the middle."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def stop_when(
    ready: Callable[[], Any], how: signal.Signals, command: list[str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command until something is so, and send it a signal."""
    with subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        deadline = time.monotonic() + 300
        while not ready():
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.send_signal(how)
        _, stderr = driver.communicate(timeout=120)
    return subprocess.CompletedProcess(command, driver.returncode, stderr=stderr)
