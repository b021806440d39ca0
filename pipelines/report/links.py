"""Links between pages."""

import posixpath
from urllib.parse import quote


def relative_link(target: str, folder: str) -> str:
    """The link of a page in `folder` to the page at `target`: relative, so that copies of a whole output keep it."""
    scheme, separator, path = target.rpartition("://")
    other, _, start = folder.rpartition("://")
    if scheme != other:
        return f"{scheme or 'file'}://{quote(path)}"
    if separator and path.partition("/")[0] != start.partition("/")[0]:  # another bucket
        return f"{scheme}://{quote(path)}"
    return quote(posixpath.relpath(path, start))
