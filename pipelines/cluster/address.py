"""Find the Ray cluster at an address, and check within seconds that it answers.

Ray itself waits more than ten minutes for a cluster that doesn't answer.
"""

import os

from dreambooth.config.addresses import Address, shown
from dreambooth.errors import InputError
from dreambooth.reach import connect, why

_SECONDS, _SECONDS_MORE = 5.0, 2.0
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_EXPECTED = "expected 'auto' on a node of the cluster, or its head's host:port, such as 10.0.0.1:6379"
_CURE = "correct it, start the cluster (ray start --head), or leave it out to start Ray here"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # how gRPC begins; HTTP/1 servers answer in text


def prove_cluster(address: str) -> str:
    """The host:port of the cluster at `cluster.address`. Raises InputError if no Ray cluster answers."""
    what = "cluster.address"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        what, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    place = _find() if address == "auto" else _parse(address, what)
    named = f"{what} {shown(address)!r}"
    if address == "auto":
        named += f" (the cluster that was started here last, at {place.host}:{place.port})"
    assert place.port is not None
    full = f"[{place.host}]:{place.port}" if ":" in place.host else f"{place.host}:{place.port}"
    _check_alive(place, full, named)
    _check_node(full)
    return full


def _parse(address: str, what: str) -> Address:
    if address.startswith("ray://"):
        raise InputError(
            f"{what} is {shown(address)!r}, an address of Ray Client, which can't drive a training; {_EXPECTED}, or "
            f"submit the same command as a job: dreambooth submit --address http://HEAD:8265 …"
        )
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{what} is {shown(address)!r}, a dashboard's; {_EXPECTED}, or submit the same command as a job: "
            f"dreambooth submit --address {shown(address)} …"
        )
    if not address.strip() or "://" in address or "/" in address:
        raise InputError(f"{what} is {shown(address)!r}; {_EXPECTED}")
    place = Address.parse(address, what=what)
    if place.port is None or place.user is not None:
        raise InputError(f"{what} is {shown(address)!r}; {_EXPECTED}")
    return place


def _find() -> Address:
    """Find the cluster of this machine."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if found is None:
        raise InputError(
            "cluster.address is 'auto', but no Ray cluster was started on this machine; run this on a node of the "
            "cluster, give its head's host:port, or leave it out to start Ray here"
        )
    return Address.parse(found, what="cluster.address")


def _check_alive(place: Address, full: str, named: str) -> None:
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    try:
        connect(place.host, int(place.port or 0)).close()
    except OSError as error:
        raise InputError(f"no Ray cluster answers at {named}: {why(error)}; {_CURE}") from None
    channel = init_grpc_channel(full, options=[("grpc.enable_http_proxy", 0)])
    try:
        channel.unary_unary(_ALIVE)(b"", timeout=_SECONDS)
    except grpc.RpcError as error:
        code = error.code()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise InputError(about_token(full)) from None
        raise InputError(f"no Ray cluster answers at {named}: {_what_is_there(place, code.name)}; {_CURE}") from None
    finally:
        channel.close()


def _what_is_there(place: Address, code: str) -> str:
    """Describe the non-cluster service at a port by its first bytes."""
    try:
        with connect(place.host, int(place.port or 0)) as stream:
            stream.settimeout(_SECONDS_MORE)
            stream.sendall(_PREFACE + bytes(3) + b"\x04" + bytes(5))  # an empty frame of settings
            first = stream.recv(16)
    except OSError as error:
        first, code = b"", why(error)
    if first.startswith((b"HTTP/", b"<")):
        return "a web server is there, such as Ray's dashboard, and the cluster's own port is another, mostly 6379"
    if first[3:4] == b"\x04":
        return f"what is there speaks gRPC, but is no head of a Ray cluster ({code})"
    if first.startswith(b"\x15"):
        return "what is there wants TLS; set RAY_USE_TLS=1 and the cluster's certificates"
    if first:
        return "something else than Ray is there"
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return "what is there doesn't take RAY_USE_TLS; do the cluster and RAY_TLS_* go together?"
    return code if code.startswith("it says") else f"what is there ends the connection, or says nothing ({code})"


def _check_node(full: str) -> None:
    from ray._private.services import find_node_ids

    if not find_node_ids():  # type: ignore[no-untyped-call]
        raise InputError(
            f"the Ray cluster at {full} answers, but this machine is none of its nodes, and a driver works on one; run "
            f"this on a node, or submit it as a job: dreambooth submit --address http://HEAD:8265 …"
        )


def about_token(address: str) -> str:
    """Whether the token is missing or wrong; Ray's "missing or incorrect" leaves that open."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return f"the Ray cluster at {address} refuses the token: it is another cluster's; set RAY_AUTH_TOKEN"
    return f"the Ray cluster at {address} requires a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
