"""The driver's side of a remote view: every update is a marked line of JSON in the log."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Update = Callable[[int, int, str], None]

RELAY_VARIABLE = "DREAMBOOTH_RELAY_VIEW"
MARK = "dreambooth-view "
SECONDS = 2.0


def relays() -> bool:
    """Whether this process should send its view through its log."""
    return os.environ.get(RELAY_VARIABLE) == "1"


def relayed_bar(title: str) -> Update:
    """The driver's side of a bar."""
    sent = -SECONDS

    def update(done: int, total: int, note: str) -> None:
        nonlocal sent
        if done == total or time.monotonic() - sent >= SECONDS:
            sent = time.monotonic()
            send({"bar": title, "done": done, "total": total, "note": note})

    return update


def send(update: dict[str, Any]) -> None:
    """Write an update to the log."""
    sys.stderr.write(f"{MARK}{json.dumps(update)}\n")
    sys.stderr.flush()
