"""Base models, photographs and tables that are read from a real object store."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_contents import contents
from PIL import Image
from s3fs import S3FileSystem
from safetensors.torch import load_file, save_file

from dreambooth.data.images import find_instance_images, open_image
from dreambooth.data.inspection import inspect_images
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.low_rank import weights_of
from dreambooth.models.single_file import write_single_file
from pipelines.plan.subject_list import read_batch
from pipelines.storage import files
from tests.integration.conftest import forget_open_stores


def upload(folder: Path, address: str) -> None:
    fs, root = files.filesystem(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.put_file(str(path), f"{root}/{path.relative_to(folder).as_posix()}")


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
