"""Storage against a store that is run in production: signatures, listings and faults as they are, nothing mocked."""

import datetime
import hashlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from s3fs import S3FileSystem
from safetensors.torch import load_file, save_file

from dreambooth.data.images import find_instance_images, open_image
from dreambooth.data.images.states import state_of
from dreambooth.data.inspection import inspect_images
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.low_rank import weights_of
from dreambooth.models.single_file import write_single_file
from pipelines.apps.garbage import find_leftovers, remove_leftovers
from pipelines.plan.subject_list import read_batch
from pipelines.storage import files, publications
from pipelines.storage.streams import streamed
from tests.integration.conftest import forget_open_stores


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


def upload(folder: Path, address: str) -> None:
    fs, root = files.filesystem(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.put_file(str(path), f"{root}/{path.relative_to(folder).as_posix()}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def test_a_base_model_that_is_one_file(s3: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    """Copied and converted once; a file that was written again is another base."""
    file, address = tmp_path / "model.safetensors", f"{s3}/bases/model.safetensors"
    write_single_file(tiny_pipeline, file, metadata={})
    files.write_bytes(address, file.read_bytes())
    first = resolve_base_model(f"{address}#{tiny_pipeline}")
    found, expected = weights_of(first.directory), weights_of(tiny_pipeline)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert resolve_base_model(f"{address}#{tiny_pipeline}").directory == first.directory
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    files.write_bytes(address, file.read_bytes())
    assert resolve_base_model(f"{address}#{tiny_pipeline}").hash != first.hash
    with pytest.raises(InputError, match=r"none\.safetensors.*: there is nothing at that address"):
        resolve_base_model(f"{s3}/bases/none.safetensors#{tiny_pipeline}")


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


def test_a_base_model_is_fetched_once(
    s3: str, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(tiny_pipeline, f"{s3}/base")
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    fetched = []
    get_file = S3FileSystem.get_file

    def get_and_note(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        fetched.append(path)
        return get_file(self, path, *args, **kwargs)

    monkeypatch.setattr(S3FileSystem, "get_file", get_and_note)
    with ThreadPoolExecutor(4) as pool:
        bases = list(pool.map(resolve_base_model, [f"{s3}/base"] * 3 + [f"{s3}/base/"]))
    assert len({base.directory for base in bases}) == 1
    assert contents(bases[0].directory) == contents(tiny_pipeline)
    assert len(fetched) == len(contents(tiny_pipeline)) == len(set(fetched))
    assert bases[0].hash == resolve_base_model(str(tiny_pipeline)).hash
    assert bases[0].resolution == 64

    files.write_bytes(f"{s3}/base/unet/config.json", files.read_bytes(f"{s3}/base/unet/config.json") + b"\n")
    changed = resolve_base_model(f"{s3}/base")
    assert changed.directory != bases[0].directory
    assert changed.hash != bases[0].hash


def test_a_base_model_that_cannot_be_had(
    s3: str, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"base_model 's3://.*/base': there is nothing at that address"):
        resolve_base_model(f"{s3}/base")
    with pytest.raises(InputError, match=r"base_model 's3://nosuchbucket/base'"):
        resolve_base_model("s3://nosuchbucket/base")
    upload(tiny_pipeline, f"{s3}/base")

    def get_a_part(self: Any, path: str, target: str, **kwargs: Any) -> None:
        Path(target).write_bytes(self.cat_file(path)[:-1])

    with monkeypatch.context() as broken:
        forget_open_stores()
        broken.setattr(S3FileSystem, "get_file", get_a_part)
        with pytest.raises(
            InputError, match=r"base_model 's3://.*/base' can't be copied to .* has \d+ bytes, but \d+ arrived"
        ):
            resolve_base_model(f"{s3}/base")
    forget_open_stores()
    assert contents(resolve_base_model(f"{s3}/base").directory) == contents(tiny_pipeline)
    forget_open_stores()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match=r"base_model 's3://.*/base' can't be read: PermissionError"):
        resolve_base_model(f"{s3}/base")
    forget_open_stores()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"base_model 's3://.*/base' can't be read.*127\.0\.0\.1:9"):
        resolve_base_model(f"{s3}/base")


def test_instance_images_from_the_store(s3: str, instance_folder: Path) -> None:
    upload(instance_folder, f"{s3}/red dog")
    files.write_bytes(f"{s3}/red dog/notes.md", b"no image")
    files.write_bytes(f"{s3}/red dog/old/99.png", b"in a folder below")
    images = find_instance_images([f"{s3}/red dog"])
    names = [f"{index:02d}.png" for index in range(5)]
    assert [image.address for image in images] == [f"{s3}/red dog/{name}" for name in names]
    assert {image.caption for image in images} == {None}
    assert find_instance_images([f"{s3}/red dog/"]) == images
    assert find_instance_images([f"{s3}/red dog/*.png"]) == images
    assert find_instance_images([image.address for image in reversed(images)]) == images
    here = find_instance_images([str(instance_folder)])
    hashes = {inspect_images(found, resolution=64, max_pixels=10_000).data_hash for found in (images, here)}
    assert len(hashes) == 1
    opened = open_image(images[0].address, max_pixels=10_000)
    with Image.open(instance_folder / "00.png") as original:
        assert opened.tobytes() == original.tobytes()

    # What was added since is seen.
    files.write_bytes(f"{s3}/red dog/00.txt", "a dog on a Česká street\n".encode())
    upload(instance_folder, f"{s3}/red dog/more")
    files.write_bytes(f"{s3}/red dog/05.png", (instance_folder / "00.png").read_bytes())
    again = find_instance_images([f"{s3}/red dog"])
    assert [image.caption for image in again] == ["a dog on a Česká street", None, None, None, None, None]
    files.write_bytes(f"{s3}/red dog/metadata.csv", b"file_name,text\n01.png,a dog\n")
    assert [image.caption for image in find_instance_images([f"{s3}/red dog/0[01].png"])][1] == "a dog"
    files.write_bytes(f"{s3}/red dog/metadata.csv", b"file_name,text\n01.png,a dog\n99.png,another\n")
    with pytest.raises(InputError, match=r"line 3 of s3://.*/metadata\.csv: it is about 99\.png, which isn't in s3://"):
        find_instance_images([f"{s3}/red dog"])


def test_instance_images_that_cannot_be_read(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=rf"there is nothing at {re.escape(s3)}/nothing"):
        find_instance_images([f"{s3}/nothing"])
    with pytest.raises(InputError, match=r"no file matches s3://.*/\*\.png"):
        find_instance_images([f"{s3}/*.png"])
    files.write_bytes(f"{s3}/empty.png", b"")
    with pytest.raises(InputError, match=r"s3://.*/empty\.png is empty"):
        open_image(f"{s3}/empty.png", max_pixels=10_000)
    forget_open_stores()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match=r"can't read s3://.*/empty\.png: Forbidden"):
        open_image(f"{s3}/empty.png", max_pixels=10_000)
    with pytest.raises(InputError, match=r"can't read s3://"):
        find_instance_images([s3])


def test_a_batch_is_read_from_the_store(s3: str, instance_folder: Path) -> None:
    for name in ("rex", "My Dog"):
        upload(instance_folder, f"{s3}/photos/{name}")
    files.write_bytes(f"{s3}/photos/rex/subject.yaml", b"{class_noun: dog, train.max_train_steps: 7}")
    mine, rex = read_batch(f"{s3}/photos", ("subject.class_noun=dog",))
    assert (mine.name, rex.name) == ("my-dog", "rex")
    assert rex.config is not None
    assert rex.config.subject.instance_images == (f"{s3}/photos/rex",)
    assert rex.config.train.max_train_steps == 7
    files.write_bytes(f"{s3}/pets.csv", b"name,class_noun,instance_images\nrex,dog,photos/rex/*.png\n")
    [rex] = read_batch(f"{s3}/pets.csv")
    assert rex.config is not None
    assert len(find_instance_images(rex.config.subject.instance_images)) == 5


def test_a_batch_that_cannot_be_read_says_why(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes(f"{s3}/pets.csv", b"name,class_noun,instance_images\nrex,dog,photos/rex\n")
    for missing in (f"{s3}/none.csv", "s3://nosuchbucket/pets.csv"):
        with pytest.raises(InputError, match=f"there is nothing at '{missing}'"):
            read_batch(missing)
    forget_open_stores()
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(InputError, match=r"can't read 's3://.*pets\.csv': the store refuses the credentials"):
            read_batch(f"{s3}/pets.csv")
    forget_open_stores()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(InputError, match=r"can't read 's3://.*pets\.csv'.*nothing answers at"):
        read_batch(f"{s3}/pets.csv")
    assert time.monotonic() - began < 20
