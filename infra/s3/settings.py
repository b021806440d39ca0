"""The settings of a Swift for one machine: one copy of everything, four servers on loopback, S3 in front."""

from collections.abc import Mapping
from pathlib import Path

KINDS = ("account", "container", "object", "proxy")

# One server of each kind, so a slow one must not be given up: Swift's own limits assume others, and without the
# background updaters a bucket would never list an object whose entry was given up.
_PATIENCE = """conn_timeout = 30
node_timeout = 60
container_update_timeout = 60
error_suppression_limit = 1000000000
"""

_COMMON = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
bind_timeout = 1
workers = 0
swift_dir = {etc}
devices = {data}
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
log_level = WARNING
log_udp_host = 127.0.0.1
log_udp_port = 9

"""

_STORAGE = """[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""

_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "s3api", "tempauth", "copy", "slo")
_FILTERS += ("dlo", "versioned_writes", "symlink")

_FILTER_SETTINGS = {
    "s3api": "location = us-east-1\n",
    "tempauth": "user_{account}_{user} = {secret_key} .admin\n",
}


def write_settings(folder: Path, store: Mapping[str, str], ports: Mapping[str, int]) -> None:
    """Write the four servers' settings to FOLDER/etc; `store` has access_key (account:user), secret_key and salt."""
    etc = folder / "etc"
    account, _, user = store["access_key"].partition(":")
    names = {"account": account, "user": user, "secret_key": store["secret_key"]}
    (etc / "swift.conf").write_text(
        f"[swift-hash]\nswift_hash_path_suffix = {store['salt']}\n\n[storage-policy:0]\nname = default\ndefault = yes\n"
    )
    for kind in KINDS:
        text = _COMMON.format(port=ports[kind], etc=etc, data=folder / "data")
        if kind == "proxy":
            text += f"[pipeline:main]\npipeline = {' '.join(_FILTERS)} proxy-server\n\n"
            for name in _FILTERS:
                text += f"[filter:{name}]\nuse = egg:swift#{name}\n{_FILTER_SETTINGS.get(name, '').format(**names)}\n"
            text += "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
        else:
            text += _STORAGE.format(kind=kind)
        path = etc / f"{kind}.conf"
        path.touch(mode=0o600)
        path.write_text(text + _PATIENCE)
