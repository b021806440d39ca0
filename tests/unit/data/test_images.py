"""Instance images, from real files with real faults."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gradients import gradient
from PIL import Image, ImageCms

from dreambooth.data.images import (
    cuts,
    open_image,
    to_pixels,
)
from dreambooth.errors import InputError

MAX_PIXELS = 1_000_000
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(width: int, height: int) -> Image.Image:
    """An image that does not compress, so that a cut file is cut within its pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header claims any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def only(folder: Path, name: str) -> Image.Image:
    return open_image(str(folder / name), max_pixels=MAX_PIXELS)


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return tuple(int(channel) for channel in value)


class TestOpen:
    def test_exif_orientation_is_applied(self, folder: Path) -> None:
        image = Image.new("RGB", (40, 20), RED)
        image.paste(BLUE, (20, 0, 40, 20))
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned by 90 degrees
        image.save(folder / "1.jpg", exif=exif, quality=100)
        upright = only(folder, "1.jpg")
        assert upright.size == (20, 40)
        assert pixel(upright, 10, 5)[0] > 200
        assert pixel(upright, 10, 35)[2] > 200

    def test_broken_exif_is_no_fault(self, folder: Path) -> None:
        gradient(40, 20).save(folder / "1.jpg", exif=b"Exif\x00\x00garbage that is no TIFF header")
        assert only(folder, "1.jpg").size == (40, 20)

    @pytest.mark.parametrize("suffix", ["png", "webp"])
    def test_alpha_lies_on_white(self, folder: Path, suffix: str) -> None:
        image = Image.new("RGBA", (16, 16), (*RED, 255))
        image.paste((0, 0, 0, 0), (8, 0, 16, 16))
        image.save(folder / f"1.{suffix}", lossless=True)
        flat = only(folder, f"1.{suffix}")
        assert flat.mode == "RGB"
        assert (pixel(flat, 2, 8), pixel(flat, 13, 8)) == (RED, WHITE)

    def test_half_transparent_is_half_white(self, folder: Path) -> None:
        Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(folder / "1.png")
        assert pixel(only(folder, "1.png"), 4, 4) == (127, 127, 127)

    def test_grey_with_alpha(self, folder: Path) -> None:
        Image.new("LA", (8, 8), (9, 0)).save(folder / "1.png")
        assert pixel(only(folder, "1.png"), 4, 4) == WHITE

    def test_palette(self, folder: Path) -> None:
        Image.new("RGB", (8, 8), GREEN).convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "1.png")
        assert pixel(only(folder, "1.png"), 4, 4) == GREEN

    def test_palette_with_a_transparent_entry(self, folder: Path) -> None:
        image = Image.new("P", (8, 8), 0)
        image.putpalette([*BLUE, *RED])
        image.paste(1, (4, 0, 8, 8))
        image.save(folder / "1.png", transparency=0)
        flat = only(folder, "1.png")
        assert (pixel(flat, 1, 4), pixel(flat, 6, 4)) == (WHITE, RED)

    def test_16_bit_grey_is_scaled_and_not_cut_off(self, folder: Path) -> None:
        levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
        Image.fromarray(levels).save(folder / "1.png")
        opened = only(folder, "1.png")
        assert [pixel(opened, x, 0)[0] for x in range(4)] == [0, 1, 128, 255]

    def test_cmyk(self, folder: Path) -> None:
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(folder / "1.jpg", quality=100)
        red, green, blue = pixel(only(folder, "1.jpg"), 8, 8)
        assert red > 240
        assert green < 15
        assert blue < 15

    def test_an_embedded_profile_is_followed(self, folder: Path) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        gradient(16, 16).save(folder / "same.png", icc_profile=profile)
        assert np.abs(np.asarray(only(folder, "same.png"), int) - np.asarray(gradient(16, 16), int)).max() <= 1
        gradient(16, 16).save(folder / "broken.png", icc_profile=b"no profile at all")
        assert np.array_equal(np.asarray(only(folder, "broken.png")), np.asarray(gradient(16, 16)))

    def test_zero_bytes(self, folder: Path) -> None:
        (folder / "1.jpg").touch()
        with pytest.raises(InputError, match=r"1\.jpg is empty \(0 bytes\)"):
            only(folder, "1.jpg")

    def test_another_kind_of_file_under_an_image_name(self, folder: Path) -> None:
        (folder / "1.jpg").write_text("<html>404 not found</html>")
        with pytest.raises(InputError, match=r"1\.jpg is no JPEG, PNG, WebP, AVIF, .* or its beginning is damaged"):
            only(folder, "1.jpg")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    def test_truncated(self, folder: Path, suffix: str) -> None:
        path = folder / f"1.{suffix}"
        noise(64, 64).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=rf"1\.{suffix} is .*damaged"):
            only(folder, path.name)

    def test_corrupt(self, folder: Path) -> None:
        path = folder / "1.png"
        noise(64, 64).save(path)
        content = bytearray(path.read_bytes())
        content[200:260] = bytes(60)
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"1\.png is damaged: "):
            only(folder, "1.png")

    @pytest.mark.parametrize("side", [1001, 10_000, 60_000])
    def test_a_bomb_is_refused_by_its_header(self, folder: Path, side: int) -> None:
        (folder / "1.png").write_bytes(png(side, side))
        with pytest.raises(InputError, match=r"1\.png .*(max_pixels is 1000000|before decoding)"):
            only(folder, "1.png")

    def test_gone(self, folder: Path) -> None:
        with pytest.raises(InputError, match=r"nothing at .*1\.png"):
            only(folder, "1.png")


class TestCuts:
    def test_centre(self) -> None:
        (square,) = cuts(gradient(80, 40), size=(20, 20), crop="center", crops_per_image=8, flip=False, seed=0)
        assert square.picture.size == (20, 20)
        pixels = np.asarray(square.picture, int)
        assert abs(pixels[..., 0].mean() - 127.5) < 2  # the middle half of the width
        assert pixels[0, 0, 0] > 60
        assert pixels[0, -1, 0] < 195
        assert pixels[0, 0, 1] < 10  # the whole height
        assert pixels[-1, 0, 1] > 245

    def test_scaling_down_averages_and_does_not_pick(self) -> None:
        board = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
        (square,) = cuts(board, size=(16, 16), crop="center", crops_per_image=1, flip=False, seed=0)
        assert np.abs(np.asarray(square.picture, float)[2:-2, 2:-2] - 127.5).max() < 16

    def test_random_crops_come_from_the_seed(self) -> None:
        def cut(seed: int) -> list[bytes]:
            image = gradient(90, 40)
            made = cuts(image, size=(32, 32), crop="random", crops_per_image=4, flip=False, seed=seed)
            return [square.picture.tobytes() for square in made]

        assert cut(1) == cut(1)
        assert cut(1) != cut(2)
        assert len(set(cut(1))) == 4

    def test_flip_adds_mirror_images_behind(self) -> None:
        made = cuts(gradient(40, 60), size=(16, 16), crop="random", crops_per_image=3, flip=True, seed=0)
        assert len(made) == 6
        for plain, mirrored in zip(made[:3], made[3:], strict=True):
            assert np.array_equal(np.asarray(plain.picture)[:, ::-1], np.asarray(mirrored.picture))

    def test_where_they_were_cut(self) -> None:
        """As a model with size and crop conditions is trained (arXiv 2307.01952, section 2.2)."""
        (square,) = cuts(gradient(90, 40), size=(20, 20), crop="center", crops_per_image=1, flip=False, seed=0)
        assert (square.original, square.corner) == ((40, 90), (0, 12))  # 25 of 90 pixels cut off, at half the scale
        made = cuts(gradient(40, 60), size=(40, 40), crop="random", crops_per_image=3, flip=True, seed=1)
        for plain, mirrored in zip(made[:3], made[3:], strict=True):
            assert (plain.original, mirrored.original, plain.corner) == ((60, 40), (60, 40), mirrored.corner)
            assert 0 <= plain.corner[0] <= 20
        wide = cuts(gradient(60, 40), size=(40, 40), crop="random", crops_per_image=3, flip=True, seed=1)
        assert all(
            one.corner[1] + other.corner[1] in (19, 20, 21) for one, other in zip(wide[:3], wide[3:], strict=True)
        )

    def test_to_pixels(self) -> None:
        pixels = to_pixels([Image.new("RGB", (6, 4), (0, 255, 51)), Image.new("RGB", (6, 4), "white")])
        assert pixels.shape == (2, 3, 4, 6)
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
