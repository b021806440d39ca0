"""The look at all instance images before work starts."""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
from gradients import gradient
from PIL import Image

from dreambooth.data.images import InstanceImage, find_instance_images
from dreambooth.data.inspection import inspect_addresses, inspect_images
from dreambooth.errors import InputError

MAX_PIXELS = 1_000_000


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header claims any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def data_hash(images: Sequence[InstanceImage]) -> str:
    return inspect_images(images, resolution=8, max_pixels=MAX_PIXELS).data_hash


class TestInspection:
    def test_sound_images_pass(self, folder: Path) -> None:
        gradient(64, 80).save(folder / "1.png")
        inspect_images(find_instance_images((str(folder),)), resolution=64, max_pixels=MAX_PIXELS)

    def test_all_faults_are_told_at_once(self, folder: Path) -> None:
        gradient(64, 64).save(folder / "good.png")
        gradient(64, 48).save(folder / "small.png")
        (folder / "zero.jpg").touch()
        (folder / "bomb.png").write_bytes(png(2000, 2000))
        images = find_instance_images((str(folder),))
        with pytest.raises(InputError) as caught:
            inspect_images(images, resolution=64, max_pixels=MAX_PIXELS)
        bomb, small, zero = str(caught.value).splitlines()
        assert "bomb.png is 2000 x 2000 = 4000000 pixels, but images.max_pixels is 1000000" in bomb
        assert "small.png is 64 x 48 pixels, but images.resolution is 64" in small
        assert "zero.jpg is empty" in zero

    def test_all_remarks_reach_the_warnings(self, folder: Path) -> None:
        gradient(64, 80).save(folder / "1.png", icc_profile=b"no profile")
        gradient(80, 64).save(folder / "2.gif", save_all=True, append_images=[Image.new("RGB", (80, 64))])
        (folder / "3.cr2").write_bytes(b"x")
        inspection = inspect_addresses((str(folder),), resolution=64, max_pixels=MAX_PIXELS)
        assert inspection.images == find_instance_images((str(folder),))
        unused, profile, frames, *_ = inspection.warnings
        assert "3.cr2" in unused
        assert f"{folder}/1.png its colour profile can't be followed" in profile
        assert f"{folder}/2.gif holds 2 frames or pages, of which only the first is used" in frames

    def test_every_file_is_read_once(self, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = io.BytesIO()
        gradient(64, 64).save(buffer, "JPEG")
        memory.pipe({"/rex/1.jpg": buffer.getvalue(), "/rex/2.cr2": b"x"})
        read: list[str] = []
        cat_file = type(memory).cat_file
        monkeypatch.setattr(type(memory), "cat_file", lambda *a, **k: read.append(a[1]) or cat_file(*a, **k))
        inspect_addresses(("memory://rex",), resolution=64, max_pixels=MAX_PIXELS)
        assert [path.rpartition("/")[2] for path in read] == ["1.jpg"]


class TestDataHash:
    def test_the_same_wherever_it_lies(self, folder: Path, memory: fsspec.AbstractFileSystem) -> None:
        gradient(8, 8).save(folder / "1.png")
        memory.pipe("/other/name.png", (folder / "1.png").read_bytes())
        here, there = (find_instance_images((address,)) for address in (str(folder), "memory://other"))
        assert data_hash(here) == data_hash(there)
        assert len(data_hash(here)) == 16

    def test_images_captions_and_order_count(self, folder: Path) -> None:
        gradient(8, 8).save(folder / "1.png")
        gradient(9, 8).save(folder / "2.png")
        one, two = find_instance_images((str(folder),))
        told = InstanceImage(address=one.address, caption="a photo of sks dog")
        hashes = [data_hash(images) for images in ((one, two), (two, one), (one,), (told, two))]
        assert len(set(hashes)) == 4
