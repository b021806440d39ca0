"""Masks of the subject: which file masks which photograph, what is refused, and what training makes of them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from gradients import gradient
from PIL import Image

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.images import InstanceImage, decode, find_instance_images, search_images
from dreambooth.data.images.masks import Mask, find_mask
from dreambooth.data.inspection import Inspection, inspect_addresses
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError

Place = Callable[[dict[str, bytes]], str]
ORIENTATION = 0x0112


def png(picture: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    return out.getvalue()


def disc(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A white box on black."""
    picture = Image.new("L", size)
    picture.paste(255, box)
    return picture


PHOTOGRAPH = png(gradient(80, 72))
MASK = png(disc((80, 72), (30, 20, 60, 60)))


@pytest.fixture(params=["on a disk", "in a store"])
def place(request: pytest.FixtureRequest, folder: Path, memory: fsspec.AbstractFileSystem) -> Place:
    """A function that lays files down and gives the address of their folder."""

    def lay(files: dict[str, bytes]) -> str:
        if request.param == "in a store":
            memory.pipe({f"/rex/{name}": content for name, content in files.items()})
            return "memory:///rex"
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return str(folder)

    return lay


def names(images: tuple[InstanceImage, ...]) -> list[tuple[str, str | None]]:
    return [(image.address.rpartition("/")[2], image.mask and "/".join(image.mask.split("/")[-2:])) for image in images]


class TestFinding:
    @pytest.mark.parametrize(
        "name",
        ["a.mask.png", "a.MASK.jpg", "a_mask.png", "a-masklabel.png", "masks/a.png", "masks/a.jpg"],
    )
    def test_a_mask_is_no_photograph(self, place: Place, name: str) -> None:
        address = place({"a.png": PHOTOGRAPH, "b.png": PHOTOGRAPH, name: MASK})
        found = search_images((address,), masks=True)
        mask = name if "/" in name else f"rex/{name}"
        assert names(found.images) == [("a.png", mask), ("b.png", None)]
        assert found.warnings == ()
        for given in (f"{address}/*.png", f"{address}/a.png"):
            assert names(find_instance_images((given,), masks=True))[0] == ("a.png", mask)

    def test_a_mask_of_no_photograph_is_none_either(self, place: Place) -> None:
        address = place({"a.png": PHOTOGRAPH, "b.mask.png": MASK, "masks/c.png": MASK, "venetian_mask.png": PHOTOGRAPH})
        found = search_images((address,), masks=True)
        assert names(found.images) == [("a.png", None), ("venetian_mask.png", None)]
        (warning,) = found.warnings
        assert warning.startswith(f"not used of {address}: b.mask.png, c.png (it is the mask of no picture")

    def test_two_masks_of_one(self, place: Place) -> None:
        address = place({"a.png": PHOTOGRAPH, "a.mask.png": MASK, "masks/a.png": MASK})
        with pytest.raises(InputError, match=r"a\.png has 2 masks, .*a\.mask\.png, .*masks/a\.png; leave one of them"):
            search_images((address,), masks=True)

    def test_off_is_as_before(self, place: Place) -> None:
        address = place({"a.png": PHOTOGRAPH, "a.mask.png": MASK, "b.mask.png": PHOTOGRAPH, "masks/a.png": MASK})
        found = search_images((address,))
        assert names(found.images) == [("a.png", None), ("b.mask.png", None)]
        mask, folder = found.warnings
        assert "a.mask.png (it looks like a mask of a.png, and images.masks is off)" in mask
        assert "a.png in its folder masks" in folder


def mask_of(photograph: bytes, mask: bytes | None, folder: Path) -> Mask | None:
    address = folder / "a.mask.png"
    if mask is not None:
        address.write_bytes(mask)
    image = InstanceImage(address="rex/a.png", mask=None if mask is None else str(address))
    return find_mask(image, decode(photograph, "rex/a.png", max_pixels=10**6), max_pixels=10**6)


def pixels(mask: Mask | None) -> np.ndarray:
    assert mask is not None
    return np.asarray(mask.picture)


class TestReading:
    def test_a_file(self, folder: Path) -> None:
        mask = mask_of(PHOTOGRAPH, MASK, folder)
        assert mask is not None
        assert mask.warnings == ()
        assert np.array_equal(pixels(mask), np.asarray(disc((80, 72), (30, 20, 60, 60))))

    def test_the_photographs_alpha_channel_and_a_files_own(self, folder: Path) -> None:
        see_through = gradient(80, 72)
        see_through.putalpha(disc((80, 72), (30, 20, 60, 60)))
        for photograph, mask in ((png(see_through), None), (PHOTOGRAPH, png(see_through))):
            assert np.array_equal(pixels(mask_of(photograph, mask, folder)), pixels(mask_of(PHOTOGRAPH, MASK, folder)))

    def test_no_mask(self, folder: Path) -> None:
        opaque = gradient(80, 72)
        opaque.putalpha(255)
        assert mask_of(PHOTOGRAPH, None, folder) is None
        assert mask_of(png(opaque), None, folder) is None

    @pytest.mark.parametrize("orientation", range(2, 9))
    def test_a_mask_turns_as_its_photograph(self, folder: Path, orientation: int) -> None:
        """One of the pixels as they are stored, by a tool that knows no EXIF, and one with the tag of its own."""
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        stored = disc((80, 72), (30, 20, 60, 60))
        photograph = png(stored.convert("RGB"), exif=exif)
        upright = np.asarray(decode(photograph, "a.png", max_pixels=10**6).image)[..., 0]
        assert np.array_equal(pixels(mask_of(photograph, png(stored, exif=exif), folder)), upright)
        assert np.array_equal(pixels(mask_of(photograph, png(Image.fromarray(upright)), folder)), upright)
        untagged = mask_of(photograph, png(stored), folder)
        assert untagged is not None
        if orientation >= 5:  # by a quarter turn: the size tells
            assert np.array_equal(pixels(untagged), upright)
        else:
            assert "has no EXIF orientation, but its photograph has, and is taken as upright" in untagged.warnings[0]

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (disc((40, 36), (9, 9, 20, 20)), r"a\.mask\.png is 40 x 36 pixels, but rex/a\.png, .* is 80 x 72; save"),
            (Image.new("L", (80, 72)), r"a\.mask\.png is empty: its brightest pixel is 0 of 255; the subject has to"),
            (Image.new("L", (80, 72), 1), r"a\.mask\.png is empty: its brightest pixel is 1 of 255"),
        ],
    )
    def test_what_is_refused(self, folder: Path, mask: Image.Image, message: str) -> None:
        with pytest.raises(InputError, match=message):
            mask_of(PHOTOGRAPH, png(mask), folder)

    def test_one_that_is_cut_short(self, folder: Path) -> None:
        with pytest.raises(InputError, match=r"a\.mask\.png is damaged"):
            mask_of(PHOTOGRAPH, MASK[:-20], folder)

    @pytest.mark.parametrize(
        ("mask", "doubt"),
        [
            (disc((80, 72), (30, 20, 60, 60)).point(lambda value: 255 - value), "looks inverted"),
            (Image.new("L", (80, 72), 255), "is white throughout, so it masks nothing"),
        ],
    )
    def test_what_is_doubted(self, folder: Path, mask: Image.Image, doubt: str) -> None:
        found = mask_of(PHOTOGRAPH, png(mask), folder)
        assert found is not None
        (warning,) = found.warnings
        assert warning.startswith(f"{folder}/a.mask.png {doubt}")


@pytest.fixture
def config(tiny_pipeline: Path, folder: Path) -> Callable[..., DreamBoothConfig]:
    def make(*overrides: str) -> DreamBoothConfig:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(folder)}
        plain = {"base_model": str(tiny_pipeline), "subject": subject, "images": {"resolution": 64}}
        return load_config(plain, overrides)

    return make


def inspected(config: DreamBoothConfig) -> Inspection:
    addresses = config.subject.instance_images
    return inspect_addresses(addresses, resolution=64, max_pixels=10**6, masked=config.images.masked)


class TestInspection:
    def test_some_without(self, folder: Path, config: Callable[..., DreamBoothConfig]) -> None:
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(PHOTOGRAPH)
        with pytest.raises(InputError, match="needs masks, but none of 2 photographs has photo"):
            inspected(config("images.masks=weight"))
        (folder / "a.mask.png").write_bytes(MASK)
        warnings = inspected(config("images.masks=weight")).warnings
        assert f"{folder}/b.png: without a mask, so all of it counts as the subject" in warnings

    def test_a_subject_that_the_square_in_the_middle_misses(
        self, folder: Path, config: Callable[..., DreamBoothConfig]
    ) -> None:
        (folder / "a.png").write_bytes(png(gradient(200, 72)))
        (folder / "a.mask.png").write_bytes(png(disc((200, 72), (0, 0, 80, 72))))
        (warning,) = [each for each in inspected(config("images.masks=weight")).warnings if "in the middle" in each]
        assert warning.startswith(f"{folder}/a.png: 20% of the subject lies in the square in the middle")
        for other in (("images.masks=crop",), ("images.masks=weight", "images.crop=random")):
            assert not [each for each in inspected(config(*other)).warnings if "in the middle" in each]

    def test_masks_count_where_they_are_used(self, folder: Path, config: Callable[..., DreamBoothConfig]) -> None:
        (folder / "a.png").write_bytes(PHOTOGRAPH)
        plain = inspected(config()).data_hash
        (folder / "a.mask.png").write_bytes(MASK)
        masked = inspected(config("images.masks=weight")).data_hash
        assert inspected(config()).data_hash == plain != masked
        (folder / "a.mask.png").write_bytes(png(disc((80, 72), (31, 20, 60, 60))))
        assert inspected(config("images.masks=weight")).data_hash not in (plain, masked)


class TestBox:
    @pytest.mark.parametrize(
        ("subject", "at_least", "expected"),
        [
            ((40, 40, 80, 80), 8, (36, 36, 84, 84)),  # a tenth of 40 on each side
            ((40, 50, 80, 70), 8, (36, 36, 84, 84)),  # square, so that no crop cuts the subject
            ((0, 0, 20, 20), 8, (0, 0, 24, 24)),
            ((180, 80, 200, 100), 8, (176, 76, 200, 100)),
            ((90, 40, 100, 50), 64, (63, 13, 127, 77)),
            ((10, 10, 190, 90), 8, (0, 0, 200, 100)),
        ],
    )
    def test_a_square_around_the_subject_within_the_photograph(
        self, subject: tuple[int, int, int, int], at_least: int, expected: tuple[int, int, int, int]
    ) -> None:
        mask = Mask(picture=disc((200, 100), subject), content=b"", warnings=())
        assert mask.box(at_least) == expected


class TestTraining:
    """A photograph of a white thing on black, whose mask is the picture itself."""

    @pytest.fixture
    def white(self, folder: Path) -> Path:
        thing = disc((128, 96), (30, 20, 80, 70))
        for name in ("a", "b"):
            (folder / f"{name}.png").write_bytes(png(thing.convert("RGB")))
            (folder / f"{name}.mask.png").write_bytes(png(thing))
        return folder

    def prepared(self, base: Path, config: DreamBoothConfig) -> Any:
        images = find_instance_images(config.subject.instance_images, masks=config.images.masked is not None)
        return prepare_data(base, config, images, [Image.new("RGB", (64, 64))])

    @pytest.mark.parametrize("crop", ["center", "random"])
    def test_weights_lie_where_the_subject_does(
        self,
        tiny_pipeline: Path,
        white: Path,
        config: Callable[..., DreamBoothConfig],
        monkeypatch: pytest.MonkeyPatch,
        crop: str,
    ) -> None:
        """In every crop and mirror image, by area averages of the pixels that are trained on."""
        seen: list[Image.Image] = []
        encode = prepare_data.__globals__["_encode"]
        monkeypatch.setitem(prepare_data.__globals__, "_encode", lambda *a: seen.extend(a[2]) or encode(*a))
        settings = ("images.masks=weight", "images.mask_background=0.25", f"images.crop={crop}", "images.flip=true")
        data = self.prepared(tiny_pipeline, config(*settings, "images.crops_per_image=3"))
        masks, side = data.instance.masks, data.instance.latents.mean.shape[-1]
        assert masks.shape == (len(data.instance.latents), 1, side, side)
        grey = torch.tensor(np.stack([np.asarray(square.convert("L")) for square in seen[: len(masks)]])) / 255
        inside = torch.nn.functional.adaptive_avg_pool2d(grey[:, None].float(), side)
        expected = 0.25 + 0.75 * inside
        of_image = expected.view(2, -1).mean(1).repeat_interleave(data.instance.crops).view(-1, 1, 1, 1)
        # The pictures are scaled by Lanczos, which blurs edges; one position off would be a difference of about 1.
        torch.testing.assert_close(masks, expected / of_image, atol=0.2, rtol=0)
        assert masks.max() - masks.min() > 1
        torch.testing.assert_close(masks.view(2, -1).mean(1), torch.ones(2))

    def test_a_batch_has_those_of_its_crops_for_the_instance_half(
        self, tiny_pipeline: Path, white: Path, config: Callable[..., DreamBoothConfig]
    ) -> None:
        settings = ("images.masks=weight", "images.crop=random", "images.crops_per_image=3")
        data = self.prepared(tiny_pipeline, config(*settings))
        batch = data.batch(range(6))
        assert batch.mask is not None
        assert batch.mask.shape[0] == 6
        for latents, mask in zip(batch.latents[:6], batch.mask, strict=True):
            distances = (data.instance.latents.mean - latents).square().flatten(1).mean(1)
            assert torch.equal(mask, data.instance.masks[int(distances.argmin())])

    def test_off_and_crop_weigh_nothing(
        self, tiny_pipeline: Path, white: Path, config: Callable[..., DreamBoothConfig]
    ) -> None:
        plain, cropped = (self.prepared(tiny_pipeline, config(f"images.masks={masks}")) for masks in ("off", "crop"))
        assert plain.batch(range(2)).mask is None
        assert cropped.batch(range(2)).mask is None
        assert not torch.equal(plain.instance.latents.mean, cropped.instance.latents.mean)

    def test_crop_shows_the_subject_as_large_as_it_can(
        self,
        tiny_pipeline: Path,
        white: Path,
        config: Callable[..., DreamBoothConfig],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen: list[Image.Image] = []
        encode = prepare_data.__globals__["_encode"]
        monkeypatch.setitem(prepare_data.__globals__, "_encode", lambda *a: seen.extend(a[2]) or encode(*a))
        self.prepared(tiny_pipeline, config("images.masks=crop", "images.resolution=64"))
        share = np.asarray(seen[0].convert("L")).mean() / 255
        assert share == pytest.approx((50 / 64) ** 2, abs=0.02)  # 50 pixels, and no less than 64 around them
