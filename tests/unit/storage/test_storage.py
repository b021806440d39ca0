import errno
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dreambooth.errors import InputError
from pipelines.storage import files, publications


@pytest.fixture(params=["memory", "file", "path"])
def parent(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place to publish to, by each kind of address."""
    if request.param == "memory":
        return f"memory://{tmp_path.name}/models"
    return f"file://{tmp_path}/models" if request.param == "file" else str(tmp_path / "models")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "a model"
    (directory / "unet").mkdir(parents=True)
    (directory / "model_index.json").write_text("{}")
    (directory / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 300)
    return directory


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A store that fails at every write, as `fault` says."""

    protocol = "faulty"
    fault: Exception = OSError()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        raise self.fault


@pytest.fixture
def faulty() -> type[FaultyFileSystem]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    return FaultyFileSystem


def test_a_publication_comes_back_whole(parent: str, model: Path, tmp_path: Path) -> None:
    published = publications.publish(model, parent, metadata={"identifier": "sks", "steps": 200})
    found = publications.published(parent)
    assert found == published
    copy = publications.fetch(published.uri, tmp_path / "copy")
    assert (copy / "unet/weights.safetensors").read_bytes() == (model / "unet/weights.safetensors").read_bytes()
    assert found is not None
    assert found.metadata == {"identifier": "sks", "steps": 200}
    content = (model / "model_index.json").read_bytes()
    assert found.files["model_index.json"].size == 2
    assert found.files["model_index.json"].sha256 == hashlib.sha256(content).hexdigest()


def test_the_newest_whole_publication_is_the_one(parent: str, model: Path) -> None:
    assert publications.published(parent) is None
    publications.publish(model, parent, metadata={"attempt": 1})
    second = publications.publish(model, parent, metadata={"attempt": 2})
    files.write_bytes(files.join(parent, "99990101T000000000000Z-00000000", "model_index.json"), b"died here")
    files.write_bytes(files.join(parent, "notes.txt"), b"not a publication")
    assert publications.published(parent) == second


def test_nothing_is_published_when_the_upload_fails(model: Path, faulty: type[FaultyFileSystem]) -> None:
    faulty.fault = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        publications.publish(model, "faulty://full", metadata={})
    assert publications.published("faulty://full") is None


def test_a_damaged_file_is_named_with_what_was_expected_and_got(parent: str, model: Path, tmp_path: Path) -> None:
    published = publications.publish(model, parent, metadata={})
    address = files.join(published.uri, "unet/weights.safetensors")
    files.write_bytes(address, b"\1" + files.read_bytes(address)[1:])
    expected = published.files["unet/weights.safetensors"].sha256
    with pytest.raises(
        InputError, match=rf"unet/weights.safetensors at .*: expected sha256 {expected}, got [0-9a-f]{{64}}"
    ):
        publications.fetch(published, tmp_path / "copy")
    files.write_bytes(address, b"short")
    with pytest.raises(InputError, match=r"unet/weights.safetensors at .*: expected 76800 bytes, got 5"):
        publications.fetch(published, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()] == ["model_index.json"]


def test_a_file_that_is_there_already_is_not_fetched_again(parent: str, model: Path, tmp_path: Path) -> None:
    published = publications.publish(model, parent, metadata={})
    copy = publications.fetch(published, tmp_path / "copy")
    (copy / "model_index.json").write_text("damaged")
    before = (copy / "unet/weights.safetensors").stat().st_mtime_ns
    publications.fetch(published, copy)
    assert (copy / "model_index.json").read_text() == "{}"
    assert (copy / "unet/weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "unet/../../outside", "", "unet//weights", "a\\b", "c:d"]
)
def test_names_that_leave_the_folder_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    published = publications.publish(model, str(tmp_path / "models"), metadata={})
    address = files.join(published.uri, publications.MANIFEST_NAME)
    content = files.read_json(address)
    content["files"][name] = content["files"]["model_index.json"]
    files.write_json(address, content)
    with pytest.raises(InputError, match="plain relative path"):
        publications.fetch(published.uri, tmp_path / "copy")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"format": 2, "files": {}, "metadata": {}}', b'{"format": 1, "files": [], "metadata": {}}'],
)
def test_a_manifest_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    files.write_bytes(str(tmp_path / "model" / publications.MANIFEST_NAME), content)
    with pytest.raises(InputError, match=r"manifest\.json isn't"):
        publications.read_manifest(str(tmp_path / "model"))


def test_a_prefix_without_manifest_is_not_a_publication(model: Path) -> None:
    with pytest.raises(InputError, match="isn't a publication"):
        publications.read_manifest(str(model))


def test_local_publications_are_read_in_place(model: Path, tmp_path: Path) -> None:
    published = publications.publish(model, str(tmp_path / "models"), metadata={})
    with publications.opened(published) as directory:
        assert str(directory) == published.uri
        assert (directory / "model_index.json").read_text() == "{}"
    (directory / "model_index.json").unlink()
    with (
        pytest.raises(InputError, match=r"model_index.json at .* is missing, and its manifest says 2 bytes"),
        publications.opened(published),
    ):
        pass


def test_others_are_read_from_a_copy_that_goes(model: Path) -> None:
    published = publications.publish(model, "memory://elsewhere", metadata={})
    with publications.opened(published.uri) as directory:
        assert (directory / "model_index.json").read_text() == "{}"
    assert not directory.exists()


def test_what_cannot_be_published_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to publish"):
        publications.publish(tmp_path / "empty", "memory://x", metadata={})
    (model / publications.MANIFEST_NAME).write_text("{}")
    with pytest.raises(ValueError, match="would be hidden"):
        publications.publish(model, "memory://x", metadata={})


def test_addresses(working_folder: Path) -> None:
    assert files.absolute("output/rex") == str(working_folder / "output/rex")
    assert files.absolute("file:///data/rex/") == "/data/rex"
    assert files.absolute("s3://bucket/rex") == "s3://bucket/rex"
    assert files.join("s3://bucket/", "rex", "model") == "s3://bucket/rex/model"
    assert files.join("memory://", "rex") == "memory://rex"
    assert files.join("/", "rex") == "/rex"
    assert files.join("output", "rex") == "output/rex"
    assert files.is_local("output")
    assert not files.is_local("memory://output")
    with pytest.raises(InputError, match="'nosuch://bucket' can't be used: Protocol not known: nosuch"):
        files.filesystem("nosuch://bucket")


def test_json_and_bytes(parent: str) -> None:
    address = files.join(parent, "deep", "état.json")
    assert not files.exists(address)
    files.write_json(address, {"identifier": "žř", "step": 3})
    assert files.exists(address)
    assert files.read_json(address) == {"identifier": "žř", "step": 3}
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(parent, "absent"))


def test_a_writable_address_passes_and_keeps_nothing(parent: str) -> None:
    fs, path = files.filesystem(parent)
    above = path.rpartition("/")[0]
    before = fs.ls(above) if fs.exists(above) else None
    files.check_writable(parent)
    files.check_writable(files.join(parent, "not", "there", "yet"))
    assert not fs.exists(path)
    assert (fs.ls(above) if fs.exists(above) else None) == before


def test_a_folder_with_too_little_space(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"GB free, and 1000000000\.0 GB will be written"):
        files.check_writable(str(tmp_path), need_bytes=10**18)


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a file")
    with pytest.raises(InputError, match="a part of the path is a file, not a folder"):
        files.check_writable(str(tmp_path / "notes" / "output"))


def _from_service(kind: type[OSError], code: str) -> OSError:
    """An error as s3fs raises it: Python's own, caused by the service's."""
    cause = Exception(code)
    cause.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
    error = kind(code)
    error.__cause__ = cause
    return error


class EndpointConnectionError(Exception):
    """Stands for botocore's, which is known by its name."""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left there"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space is left there"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied"), "this user may not write there"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "the path is too long"),
        (_from_service(FileNotFoundError, "NoSuchBucket"), "no such bucket"),
        (_from_service(PermissionError, "SignatureDoesNotMatch"), "refuses the credentials"),
        (_from_service(PermissionError, "AccessDenied"), "doesn't allow them to write"),
        (EndpointConnectionError("Could not connect"), "can't be reached"),
        (TimeoutError("timed out"), "can't be reached"),
        (RuntimeError("something else"), "RuntimeError: something else"),
    ],
)
def test_what_is_wrong_with_an_address_is_said(fault: Exception, message: str, faulty: type[FaultyFileSystem]) -> None:
    faulty.fault = fault
    with pytest.raises(InputError, match=f"can't write to 'faulty://bucket': .*{message}"):
        files.check_writable("faulty://bucket")


def test_a_store_that_is_not_there_is_noticed_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    with pytest.raises(InputError, match="can't be reached"):
        files.check_writable("s3://bucket/output")
    assert time.monotonic() - begin < 10


def test_pyarrow_reads_what_was_written(parent: str) -> None:
    files.write_json(files.join(parent, "state.json"), {"step": 3})
    fs, path = files.pyarrow_filesystem(parent)
    with fs.open_input_stream(f"{path}/state.json") as stream:
        assert json.loads(stream.read()) == {"step": 3}


def test_a_write_is_whole_or_leaves_nothing(tmp_path: Path) -> None:
    uri, large = str(tmp_path / "new" / "record.json"), bytes(range(256)) * 20_000
    for content in (b"", b"one", large):
        files.write_bytes(uri, content)
        assert files.read_bytes(uri) == content
    (tmp_path / "new" / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_bytes(str(tmp_path / "new" / "folder"), b"one")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["folder", "record.json"]
