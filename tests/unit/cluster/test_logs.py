"""Lines of workers: JSON, with what they are about."""

import json
import subprocess
import sys

SCRIPT = """
import threading
from pipelines.cluster.logs import about, log, to_stderr

log("nobody listens yet")
to_stderr()
to_stderr()
with about(lane="0"):
    log("waiting")
    with about(subject="rex"):
        log("checkpoint", step=200)
        thread = threading.Thread(target=log, args=("from a thread of its own",))
        thread.start()
        thread.join()
    log("a line\\nthat breaks, and an émigré")
"""


def test_every_line_says_lane_and_subject() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    about = [{key: line[key] for key in line if key not in ("time", "level")} for line in lines]
    assert about == [
        {"event": "waiting", "lane": "0"},
        {"event": "checkpoint", "lane": "0", "subject": "rex", "step": 200},
        {"event": "from a thread of its own"},
        {"event": "a line\nthat breaks, and an émigré", "lane": "0"},
    ]
    assert {line["level"] for line in lines} == {"INFO"}
