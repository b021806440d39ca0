"""A hub of models over HTTP, as huggingface_hub speaks to it: accounts, repositories, large files apart, commits.

Large files are stored when they are put, and are part of nothing until a commit names them.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

TOKENS = {"hf_write": "write", "hf_read": "read"}
OWNER = "me"
_LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    """`commits` maps each commit to its files, the last one is `main`."""

    private: bool
    commits: dict[str, dict[str, bytes]]

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def main(self) -> dict[str, bytes]:
        return self.commits[self.head]


@dataclass
class Hub:
    """What it holds; the `drops_at`-th put of a large file loses its connection, the `refuses_at`-th is refused.

    At the first one somebody else commits the files `meanwhile` to every repository, if there are any.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    put: int = 0
    drops_at: int | None = None
    refuses_at: int | None = None
    meanwhile: dict[str, bytes] | None = None

    def make(self, name: str, *, private: bool, files: dict[str, bytes]) -> None:
        self.repositories[name] = Repository(private=private, commits={_commit(files): files})


class _File(NamedTuple):
    """A file of a repository, which is answered as it is."""

    commit: str
    content: bytes

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Repo-Commit": self.commit, "ETag": f'"{_oid(self.content)}"'}


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", url: str = "") -> None:
        self.content = {"error": message, "url": url}
        self.status, self.headers = status, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _commit(files: dict[str, bytes], parent: str = "") -> str:
    return hashlib.sha1(repr((parent, sorted(files.items()))).encode()).hexdigest()


def _answer(hub: Hub, method: str, path: str, role: str | None, body: bytes) -> Any:
    path = unquote(urlsplit(path).path)
    if method == "PUT" and path.startswith("/blobs/"):
        oid = path.removeprefix("/blobs/")
        if hub.put == hub.refuses_at:
            raise _Refused(403, "the store's signature has expired")
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content has another sha256")
        hub.blobs[oid] = body
        if hub.meanwhile is not None:
            for repository in hub.repositories.values():
                repository.commits[_commit(hub.meanwhile, repository.head)] = hub.meanwhile
            hub.meanwhile = None
        return {}
    if role is None:
        raise _Refused(401, "Invalid username or password.")
    if path == "/api/whoami-v2":
        return {"type": "user", "name": OWNER, "auth": {"accessToken": {"role": role}}}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        if role != "write" or not name.startswith(f"{OWNER}/"):
            raise _Refused(403, f"You don't have the rights to create {name}")
        if name in hub.repositories:
            raise _Refused(409, "You already created this model repo", url=f"{hub.url}/{name}")
        hub.make(name, private=asked.get("visibility") == "private", files={".gitattributes": b"*.png filter=lfs\n"})
        return {"url": f"{hub.url}/{name}", "name": name, "id": name}
    found = re.match(r"/(?:api/models/)?([^/]+/[^/.]+(?:\.[^/.]+)*?)(?:\.git)?(/.*)?$", path)
    repository = hub.repositories.get(found[1]) if found else None
    if found is None or repository is None:
        raise _Refused(404, "Repository not found", "RepoNotFound")
    rest = found[2] or ""
    if rest in ("", "/revision/main"):
        siblings = [{"rfilename": name} for name in repository.main]
        return {"id": found[1], "private": repository.private, "sha": repository.head, "siblings": siblings}
    if rest == "/preupload/main":
        return {"files": [_mode(repository, file) for file in json.loads(body)["files"]]}
    if rest == "/info/lfs/objects/batch":
        return {"transfer": "basic", "objects": [_large(hub, one) for one in json.loads(body)["objects"]]}
    if rest == "/commit/main":
        return _committed(hub, found[1], repository, [json.loads(line) for line in body.splitlines()])
    commit = repository.head if rest.split("/")[2] == "main" else rest.split("/")[2]
    if rest.startswith("/tree/"):
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
            for name, content in repository.commits[commit].items()
        ]
    return _File(commit, repository.commits[commit][rest.split("/", 3)[3]])


def _mode(repository: Repository, file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith(_LARGE)
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


def _large(hub: Hub, one: dict[str, Any]) -> dict[str, Any]:
    if one["oid"] in hub.blobs:
        return one
    return one | {"actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}", "header": {}}}}


def _committed(hub: Hub, name: str, repository: Repository, lines: list[dict[str, Any]]) -> dict[str, Any]:
    if (parent := lines[0]["value"].get("parentCommit")) not in (None, repository.head):
        raise _Refused(412, f"A commit has happened since {parent}. Please refresh and try again.")
    files = dict(repository.main)
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
        else:
            del files[value["path"]]
    commit = _commit(files, repository.head)
    repository.commits[commit] = files
    return {"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit}


class Handler(BaseHTTPRequestHandler):
    """Sends what it is given, and logs nothing."""

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(handler: type[Handler], patch: pytest.MonkeyPatch, **constants: object) -> Iterator[str]:
    """The address of a handler that huggingface_hub of this process takes for the hub, with these of its constants."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        **constants,
    }.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)
    yield url
    server.shutdown()
    server.server_close()


@contextmanager
def hub_server(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub of this process speaks to, without Xet."""
    hub = Hub()

    class Answers(Handler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == "PUT":
                hub.put += 1
                if hub.put == hub.drops_at:
                    self.connection.close()
                    return
            role = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            try:
                status, headers, content = 200, {}, _answer(hub, self.command, self.path, role, body)
            except _Refused as refused:
                status, headers, content = refused.status, refused.headers, refused.content
            if isinstance(content, _File):
                self.send(status, content.headers, content.content)
            else:
                self.send(status, headers, json.dumps(content).encode())

        do_HEAD = do_POST = do_PUT = do_GET

    patch.setenv("HF_TOKEN", "hf_write")
    with served(Answers, patch, HF_HUB_DISABLE_XET=True) as hub.url:
        yield hub
