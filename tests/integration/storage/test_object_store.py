"""Storage against a store that is run in production: signatures, listings and faults as they are, nothing mocked."""

import datetime
import hashlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from folder_contents import contents

from dreambooth.data.images import find_instance_images
from dreambooth.data.images.states import state_of
from dreambooth.errors import InputError
from pipelines.apps.garbage import find_leftovers, remove_leftovers
from pipelines.storage import files, publications
from pipelines.storage.streams import streamed


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A few files; the weights are large enough for an upload in parts."""
    directory = tmp_path / "model"
    (directory / "unet").mkdir(parents=True)
    (directory / "model_index.json").write_text("{}")
    (directory / "unet" / "an état (1).txt").write_text("a name with a space, a letter and brackets")
    (directory / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 4096)
    return directory


def test_a_file_has_another_state_when_it_was_written_again(s3: str) -> None:
    states = []
    for content in (b"one", b"two", b"two"):
        files.write_bytes(f"{s3}/photos/1.png", content)
        find_instance_images([f"{s3}/photos"])  # as a plan does, whose listing may be remembered
        states.append(state_of(f"{s3}/photos/1.png"))
    assert states[0] is not None
    assert states[0] != states[1] == states[2]
    assert state_of(f"{s3}/photos/2.png") is None


def test_a_publication_comes_back_whole(s3: str, model: Path, tmp_path: Path) -> None:
    assert publications.published(f"{s3}/models") is None
    publications.publish(model, f"{s3}/models", metadata={"identifier": "sks", "attempt": 1})
    second = publications.publish(model, f"{s3}/models", metadata={"identifier": "sks", "attempt": 2})
    found = publications.published(f"{s3}/models")
    assert found == second
    assert found is not None
    assert found.uri.startswith(f"{s3}/models/")
    assert publications.read_manifest(found.uri) == publications.read_manifest(f"{found.uri}/manifest.json") == second
    assert contents(publications.fetch(found, tmp_path / "copy")) == contents(model)
    with publications.opened(found) as copy:
        assert contents(copy) == contents(model)


def test_a_file_larger_than_one_part(s3: str, tmp_path: Path) -> None:
    directory = tmp_path / "large"
    directory.mkdir()
    with (directory / "weights.safetensors").open("wb") as file:
        for part in range(102):  # s3fs uploads in parts from 100 MiB on
            file.write(bytes([part]) * (1 << 20))
    published = publications.publish(directory, s3, metadata={})
    copy = publications.fetch(published.uri, tmp_path / "copy")
    assert (copy / "weights.safetensors").stat().st_size == 102 << 20


def test_a_stream_is_sent_in_parts_and_leaves_nothing_when_it_is_cut_short(s3: str) -> None:
    piece, whole, cut = bytes(range(256)) * (1 << 12), f"{s3}/whole", f"{s3}/cut"
    with streamed(whole) as stream:
        for _ in range(60):  # parts are of 50 MiB
            stream.write(piece)
    assert files.read_bytes(whole) == piece * 60
    assert stream.record.sha256 == hashlib.sha256(piece * 60).hexdigest()

    def fail() -> None:
        with streamed(cut) as stream:
            for _ in range(60):
                stream.write(piece)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not files.exists(cut)
    fs, _ = files.filesystem(s3)
    assert not [one for one in fs.list_multipart_uploads(s3.split("/")[2]) if one["Key"].endswith("cut")]


def test_files_are_written_over_and_seen_at_once(s3: str) -> None:
    address = files.join(s3, "deep", "état (1)+=&?.json")
    assert not files.exists(address)
    assert not files.exists(s3)
    for step in range(3):
        files.write_json(address, {"step": step})
        assert files.read_json(address) == {"step": step}
    assert files.exists(address)
    assert files.exists(s3)
    assert not files.exists(files.join(s3, "dee"))
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(s3, "absent"))


def test_an_upload_that_dies_midway_is_no_publication(s3: str, model: Path) -> None:
    first = publications.publish(model, s3, metadata={"attempt": 1})
    script = f"""
import time
from pathlib import Path
from pipelines.storage import files, publications
from pipelines.storage.streams import streamed

hash_of = files.sha256

def stop_before_the_last(path, **progress):
    if path.name == "weights.safetensors":
        print("two are up", flush=True)
        time.sleep(60)
    return hash_of(path, **progress)

files.sha256 = stop_before_the_last
publications.publish(Path({str(model)!r}), {s3!r}, metadata={{"attempt": 2}})
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "two are up\n"
        process.send_signal(signal.SIGKILL)
    fs, root = files.filesystem(s3)
    names = sorted(Path(path).name for path in fs.ls(root, detail=False))
    assert len(names) == 2
    left = sorted(path.removeprefix(f"{root}/{names[1]}/") for path in fs.find(f"{root}/{names[1]}"))
    assert left == ["model_index.json", "unet/an état (1).txt"]
    assert publications.published(s3) == first
    with pytest.raises(InputError, match="isn't a publication"):
        publications.read_manifest(f"{s3}/{names[1]}")
    [leftover] = find_leftovers(s3, older_than=datetime.timedelta(0))
    assert leftover.uri == f"{s3}/{names[1]}"
    remove_leftovers((leftover,))
    assert [Path(path).name for path in fs.ls(root, detail=False)] == [names[0]]


def test_a_byte_changed_in_the_store_is_found(s3: str, model: Path, tmp_path: Path) -> None:
    published = publications.publish(model, s3, metadata={})
    address = f"{published.uri}/unet/weights.safetensors"
    content = files.read_bytes(address)
    files.write_bytes(address, content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(InputError, match=r"unet/weights\.safetensors at s3://.*: expected sha256 \w{64}, got \w{64}"):
        publications.fetch(published, tmp_path / "copy")
    files.write_bytes(address, content[:1000])
    with pytest.raises(InputError, match=r"unet/weights\.safetensors at s3://.*: expected 1048576 bytes, got 1000"):
        publications.fetch(published, tmp_path / "copy")
    fs, path = files.filesystem(address)
    fs.rm_file(path)
    with pytest.raises(InputError, match=r"unet/weights\.safetensors is in the manifest .* missing there"):
        publications.fetch(published, tmp_path / "copy")
    assert not list((tmp_path / "copy").rglob("*.part"))
    assert not list((tmp_path / "copy").rglob("weights*"))


def test_a_writable_address_passes_and_keeps_nothing(s3: str) -> None:
    files.check_writable(s3)
    assert not files.exists(s3)


def test_a_wrong_secret_key_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match=r"can't write to 's3://.*': the store refuses the credentials \(Signature"):
        files.check_writable(s3)


def test_an_unknown_access_key_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "dreambooth:nobody")
    with pytest.raises(InputError, match=r"can't write to 's3://.*': the store refuses the credentials"):
        files.check_writable(s3)


def test_no_credentials_at_all(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"can't write to 's3://.*': .*set AWS_ACCESS_KEY_ID and"):
        files.check_writable(s3)


def test_a_bucket_that_is_missing_is_said_and_not_made(s3: str) -> None:
    for address in ("s3://nosuchbucket/results", "s3://nosuchbucket"):
        with pytest.raises(InputError, match=f"can't write to '{address}': there is no such bucket; create it"):
            files.check_writable(address)
    assert not files.exists("s3://nosuchbucket")


def test_a_store_that_never_answers_is_given_up_in_seconds(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"can't write to 's3://.*': it can't be reached"):
            files.check_writable(s3)
        assert time.monotonic() - begin < 20


def test_a_store_that_is_away_for_a_while(object_store: Any, s3: str, model: Path, tmp_path: Path) -> None:
    publications.publish(model, s3, metadata={"attempt": 1})
    object_store.stop()
    back = threading.Timer(5, object_store.start)
    try:
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"can't write to 's3://.*': it can't be reached .*AWS_ENDPOINT_URL"):
            files.check_writable(s3)
        assert time.monotonic() - begin < 10
    finally:
        back.start()
    try:
        # The results of hours of training wait for it.
        second = publications.publish(model, s3, metadata={"attempt": 2})
    finally:
        back.join()
    assert publications.published(s3) == second
    assert contents(publications.fetch(second, tmp_path / "copy")) == contents(model)


def test_pyarrow_goes_through_the_same_door(s3: str) -> None:
    files.write_json(files.join(s3, "state.json"), {"step": 3})
    fs, path = files.pyarrow_filesystem(s3)
    with fs.open_input_stream(f"{path}/state.json") as stream:
        assert stream.read() == files.read_bytes(files.join(s3, "state.json"))
    fs.create_dir(f"{path}/run/checkpoint", recursive=True)
    with fs.open_output_stream(f"{path}/run/checkpoint/weights") as stream:
        stream.write(b"weights")
    assert files.read_bytes(files.join(s3, "run/checkpoint/weights")) == b"weights"
    fs.delete_dir(f"{path}/run")
    assert not files.exists(files.join(s3, "run/checkpoint/weights"))
