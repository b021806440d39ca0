"""Read many pictures at once."""

from collections.abc import Iterable

from pipelines.storage.files import filesystem


def read_pictures(addresses: Iterable[str]) -> dict[str, bytes]:
    """Pictures by their addresses, in parallel if the store allows; missing ones are left out."""
    found: dict[str, bytes] = {}
    wanted: dict[str, list[str]] = {}
    for address in dict.fromkeys(addresses):
        wanted.setdefault(address.partition("://")[0] if "://" in address else "", []).append(address)
    for group in wanted.values():
        fs = filesystem(group[0])[0]
        paths = {filesystem(address)[1]: address for address in group}
        found |= {paths[path]: content for path, content in fs.cat(list(paths), on_error="omit").items()}
    return found
