"""Build the rings, or become one of the four servers; swift.py starts this inside .venv-s3.

Swift expects its settings in /etc/swift, writable by root alone: here they lie in the store's own folder. Start it with
`python -I`, because the launcher beside this file has the name of the imported package.
"""

import fcntl
import os
import sys
from pathlib import Path


def main() -> int:
    """`server.py FOLDER rings PORT PORT PORT`, or `server.py FOLDER account|container|object|proxy`."""
    folder, kind, *ports = sys.argv[1:]
    settings = Path(folder) / "etc"
    from swift.common import utils

    # Before imports that read it.
    utils.SWIFT_CONF_FILE = str(settings / "swift.conf")
    if kind == "rings":
        for name, port in zip(("account", "container", "object"), ports, strict=True):
            _build_ring(settings / f"{name}.ring.gz", int(port))
        return 0
    # Held for the life of this process: a lock that can't be taken means a running server, with its id in the file.
    with Path(folder, "run", f"{kind}.pid").open("a") as pid_file:
        try:
            fcntl.flock(pid_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"the {kind} server of {folder} runs already")
        pid_file.truncate(0)
        pid_file.write(str(os.getpid()))
        pid_file.flush()
        return _serve(settings / f"{kind}.conf", kind)


def _serve(conf: Path, kind: str) -> int:
    from swift.common import wsgi

    # It would change to a user named swift; here it keeps its user.
    wsgi.drop_privileges = lambda user: None
    # To standard error, the server's log; there may be no syslog.
    return wsgi.run_wsgi(str(conf), f"{kind}-server", verbose=True)


def _build_ring(path: Path, port: int) -> None:
    """Write rings of one copy on one device: Swift finds an object's server by them."""
    from swift.common.ring import RingBuilder

    builder = RingBuilder(4, 1, 0)  # 2^4 partitions, one replica, no hours between moves
    address = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"region": 1, "zone": 1, "device": "disk", "weight": 1.0, **address})
    builder.rebalance(seed="1")
    builder.get_ring().save(str(path))


if __name__ == "__main__":
    sys.exit(main())
