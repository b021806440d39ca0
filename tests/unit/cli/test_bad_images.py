"""Instance images that can't be trained on: refused before any work, as in test_bad_input.py."""

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from refusing import Refused, save


def bomb(path: Path, side: int) -> None:
    """A small PNG whose header claims side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


class TestInstanceImages:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Two sound pictures, to add a bad one to."""
        save(tmp_path / "rex" / "1.png")
        save(tmp_path / "rex" / "2.jpg")
        return tmp_path / "rex"

    def test_a_missing_folder(self, refused: Refused, tmp_path: Path) -> None:
        message = refused(images=tmp_path / "nowhere")
        assert message.startswith(
            f"there is nothing at {tmp_path}/nowhere; expected a folder, a glob or a list of .jpg"
        )

    def test_an_empty_folder(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "rex").mkdir()
        assert f"the folder {tmp_path}/rex holds no files" in refused(images=tmp_path / "rex")

    def test_no_image_among_the_files(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "rex").mkdir()
        (tmp_path / "rex" / "notes.txt").write_text("words")
        (tmp_path / "rex" / "film.mp4").write_bytes(b"film")
        message = refused(images=tmp_path / "rex")
        assert message.startswith(f"no image among 2 files at {tmp_path}/rex (film.mp4, notes.txt)")

    def test_a_glob_that_matches_nothing(self, refused: Refused, folder: Path) -> None:
        assert f"no file matches {folder}/*.webp" in refused(images=f"{folder}/*.webp")

    def test_a_corrupt_image(self, refused: Refused, folder: Path) -> None:
        content = bytearray(save(folder / "bad.png").read_bytes())
        content[3000:3100] = bytes(100)
        (folder / "bad.png").write_bytes(content)
        assert f"{folder}/bad.png is damaged" in refused(images=folder)

    @pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "bad.webp"])
    def test_a_truncated_image(self, refused: Refused, folder: Path, name: str) -> None:
        path = save(folder / name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert f"{path} is damaged" in refused(images=folder)

    def test_a_zero_byte_image(self, refused: Refused, folder: Path) -> None:
        (folder / "bad.png").touch()
        assert refused(images=folder).startswith(f"{folder}/bad.png is empty (0 bytes); replace it")

    def test_something_else_under_an_images_name(self, refused: Refused, folder: Path) -> None:
        (folder / "bad.jpg").write_text("<html>404</html>")
        assert f"{folder}/bad.jpg is no JPEG, PNG, WebP, AVIF" in refused(images=folder)

    def test_an_image_bomb(self, refused: Refused, folder: Path) -> None:
        bomb(folder / "bomb.png", 10_000)
        message = refused(images=folder)
        assert message.startswith(f"{folder}/bomb.png is 10000 x 10000 = 100000000 pixels, but images.max_pixels is ")
        bomb(folder / "bomb.png", 60_000)
        assert f"{folder}/bomb.png is" in refused(images=folder)

    def test_the_limit_is_a_setting(self, refused: Refused, folder: Path) -> None:
        assert "80 x 72 = 5760 pixels, but images.max_pixels is 5759" in refused(
            "--set", "images.max_pixels=5759", images=folder
        )

    def test_an_image_smaller_than_the_resolution(self, refused: Refused, folder: Path) -> None:
        save(folder / "small.png", width=90, height=40)
        message = refused(images=folder)
        assert message.startswith(f"{folder}/small.png is 90 x 40 pixels, but images.resolution is 64")
        assert "1.png" not in message

    def test_all_faults_are_told_at_once(self, refused: Refused, folder: Path) -> None:
        save(folder / "small.png", width=90, height=40)
        (folder / "empty.png").touch()
        assert len(refused(images=folder).splitlines()) == 2

    @pytest.mark.parametrize(
        ("repeats", "message"),
        [
            ("{2.JPG: 2}", "images.repeats: 2.JPG is the name of none of 2 photographs; did you mean 2.jpg?"),
            ("{rex: 2}", "images.repeats: rex is the name of none of 2 photographs; they are 1.png, 2.jpg"),
            ("{1.png: 0}", "images.repeats.1.png: must be at least 1; got 0"),
        ],
    )
    def test_repeats_of_what_is_not_there(self, refused: Refused, folder: Path, repeats: str, message: str) -> None:
        assert refused("--set", f"images.repeats={repeats}", images=folder) == message

    def test_masks_that_are_none(self, refused: Refused, folder: Path) -> None:
        masks = ("--set", "images.masks=weight")
        assert "needs masks, but none of 2 photographs has" in refused(*masks, images=folder)
        save(folder / "1.mask.png", width=40)
        Image.new("L", (80, 72)).save(folder / "2.mask.png")
        size, empty = refused(*masks, images=folder).splitlines()
        assert size.startswith(f"{folder}/1.mask.png is 40 x 72 pixels, but {folder}/1.png, which it masks, is 80 x 72")
        assert empty.startswith(f"{folder}/2.mask.png is empty: its brightest pixel is 0 of 255")

    def test_a_metadata_file_that_breaks_off(self, refused: Refused, folder: Path) -> None:
        (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a photo of [V]"}\n{"file_na')
        assert refused(images=folder).startswith(f"{folder}/metadata.jsonl: line 2 is not JSON")

    def test_a_store_that_nobody_knows(self, refused: Refused) -> None:
        assert "nosuch://bucket/rex" in refused(images="nosuch://bucket/rex")
