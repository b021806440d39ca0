"""Aspect buckets: which sizes there are, which a photograph has, and what training makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import gradient
from PIL import Image
from replicas import built

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.buckets import bucket_sizes, describe_sizes, nearest_size, sizes_of
from dreambooth.data.images import cuts, find_instance_images
from dreambooth.data.images.masks import Mask
from dreambooth.data.inspection import Inspection, inspect_addresses
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.families import family_of

ON = ("images.aspect_buckets=true",)


class TestSizes:
    @pytest.mark.parametrize(
        ("resolution", "step"), [(64, 8), (512, 64), (768, 64), (1024, 64), (1024, 128), (520, 64)]
    )
    @pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
    def test_about_as_many_pixels_as_the_square_and_never_more(self, resolution: int, step: int, ratio: float) -> None:
        sizes = bucket_sizes(resolution, step=step, max_aspect_ratio=ratio)
        assert (resolution, resolution) in sizes
        assert len(sizes) == len(set(sizes))
        for height, width in sizes:
            assert (width, height) in sizes
            assert height * width <= resolution**2
            assert height * width > resolution**2 - step * max(height, width)
            assert max(height, width) <= ratio * min(height, width)
            assert (height, width) == (resolution, resolution) or height % step == width % step == 0
        assert len(sizes) % 2 == 1

    def test_only_the_square(self) -> None:
        assert bucket_sizes(512, step=64, max_aspect_ratio=1) == ((512, 512),)

    @pytest.mark.parametrize("picture", [(100, 100), (400, 300), (300, 400), (1600, 900), (3000, 1000), (10, 4000)])
    def test_the_nearest_cuts_off_least(self, picture: tuple[int, int]) -> None:
        sizes = bucket_sizes(1024, step=64, max_aspect_ratio=2)
        width, height = picture

        def kept(size: tuple[int, int]) -> float:
            ratio = (width / height) / (size[1] / size[0])
            return min(ratio, 1 / ratio)

        assert kept(nearest_size(width, height, sizes)) == max(map(kept, sizes))

    def test_turned_pictures_have_turned_sizes(self) -> None:
        sizes = bucket_sizes(512, step=64, max_aspect_ratio=2)
        for width in range(300, 900, 7):
            assert nearest_size(width, 600, sizes) == nearest_size(600, width, sizes)[::-1]

    def test_in_words(self) -> None:
        assert describe_sizes([(512, 512)]) == "1 photograph at 512x512"
        sizes = [(576, 448), (512, 512), (512, 512), (576, 448), (512, 512)]
        assert describe_sizes(sizes) == "3 photographs at 512x512, 2 at 448x576"


class TestCuts:
    def test_the_largest_window_in_the_middle(self) -> None:
        (cut,) = cuts(gradient(90, 60), size=(20, 40), crop="center", crops_per_image=1, flip=False, seed=0)
        assert cut.picture.size == (40, 20)
        assert cut.size == (20, 40)
        assert cut.box == (0, 7.5, 90, 52.5)
        assert cut.corner == (round(7.5 * 20 / 45), 0)
        assert cut.original == (60, 90)

    @pytest.mark.parametrize("size", [(24, 40), (40, 24), (32, 32), (8, 80)])
    def test_every_window_lies_within(self, size: tuple[int, int]) -> None:
        within = (7, 3, 88, 59)
        for seed in range(20):
            for cut in cuts(
                gradient(91, 63), size=size, crop="random", crops_per_image=4, flip=True, seed=seed, within=within
            ):
                left, top, right, bottom = cut.box
                assert 7 <= left < right <= 88
                assert 3 <= top < bottom <= 59
                assert (right - left) / (bottom - top) == pytest.approx(size[1] / size[0])
                assert right - left == pytest.approx(81) or bottom - top == pytest.approx(56)
                assert cut.picture.size == size[::-1]


@pytest.fixture
def config(tiny_pipeline: Path, folder: Path) -> Callable[..., DreamBoothConfig]:
    def make(*overrides: str, base: Path = tiny_pipeline) -> DreamBoothConfig:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(folder)}
        plain = {"base_model": str(base), "subject": subject, "images": {"resolution": 64}}
        return load_config(plain, overrides)

    return make


PHOTOGRAPHS = {"a": (80, 72), "b": (120, 80), "c": (90, 90), "d": (70, 96), "e": (200, 60)}
SIZES = {"a": (64, 64), "b": (48, 80), "c": (64, 64), "d": (72, 56), "e": (48, 80)}


@pytest.fixture
def photographs(folder: Path) -> Path:
    for name, size in PHOTOGRAPHS.items():
        gradient(*size).save(folder / f"{name}.png")
    return folder


def inspected(config: DreamBoothConfig) -> Inspection:
    return inspect_addresses(
        config.subject.instance_images,
        resolution=64,
        max_pixels=10**6,
        masked=config.images.masked,
        buckets=sizes_of(config.images, BaseSettings(Path(config.base_model))),
    )


def prepared(config: DreamBoothConfig, class_images: int = 2) -> TrainingData:
    images = find_instance_images(config.subject.instance_images, masks=config.images.masked is not None)
    classes = [Image.new("RGB", (64, 64), (60 * index, 0, 0)) for index in range(class_images)]
    return prepare_data(Path(config.base_model), config, images, classes)


class TestData:
    def test_photographs_are_where_the_plan_says(self, photographs: Path, config: Any) -> None:
        settings = config(*ON, "images.repeats={b.png: 4}")
        assert inspected(settings).sizes == tuple(SIZES.values())
        data = prepared(settings)
        shapes = [tuple(4 * side for side in images.shape[1:]) for images in data.buckets]
        assert shapes == sorted(set(SIZES.values()))
        assert [len(images) for images in data.buckets] == [2, 2, 1]
        assert [images.turns for images in data.buckets] == [(0, 0, 0, 0, 1), (0, 1), (0,)]
        assert data.class_ is not None
        assert tuple(data.class_.shape[1:]) == (16, 16)

    def test_off_is_one_bucket(self, photographs: Path, config: Any) -> None:
        (photographs / "e.png").unlink()  # is less than 64 pixels high
        settings = config()
        assert inspected(settings).sizes == ((64, 64),) * 4
        data = prepared(settings)
        assert data.other_sizes == ()
        assert not data.halves_apart

    def test_square_photographs_train_as_without(self, folder: Path, config: Any) -> None:
        for index in range(3):
            gradient(80 + index, 81 + index).save(folder / f"{index}.png")
        plain, bucketed = (prepared(config("train.micro_batch_size=2", *on)) for on in ((), ON))
        assert not bucketed.halves_apart
        for start in range(0, 12, 2):
            one, other = (data.batch(range(start, start + 2)) for data in (plain, bucketed))
            assert other.class_half is None
            for name in ("latents", "noise", "timesteps"):
                assert torch.equal(getattr(one, name), getattr(other, name))

    def test_crops_flips_and_captions(self, photographs: Path, config: Any) -> None:
        (photographs / "b.txt").write_text("a photo of [V] dog on a wide beach")
        data = prepared(config(*ON, "images.crop=random", "images.crops_per_image=3", "images.flip=true"))
        assert [len(images.latents) for images in data.buckets] == [12, 12, 6]
        assert [images.crops for images in data.buckets] == [6, 6, 6]
        ids = data.buckets[0].text["text_encoder.input_ids"]
        assert not torch.equal(ids[0], ids[1])  # b has a caption, e hasn't
        assert torch.equal(ids[1], data.buckets[1].text["text_encoder.input_ids"][0])

    def test_class_latents_of_a_subject_without_buckets_serve_one_with(self, photographs: Path, config: Any) -> None:
        settings = config(*ON)
        once = prepared(settings)
        assert once.class_ is not None
        images = find_instance_images(settings.subject.instance_images)
        again = prepare_data(Path(settings.base_model), settings, images, once.class_.latents)
        for pair in range(6):
            one, other = (data.batch(range(pair, pair + 1)) for data in (once, again))
            assert torch.equal(one.latents, other.latents)


class TestMasks:
    @pytest.fixture
    def masked(self, photographs: Path) -> Path:
        """White boxes on black, masked by themselves."""
        for name, (width, height) in PHOTOGRAPHS.items():
            picture = Image.new("L", (width, height))
            picture.paste(255, (width // 4, height // 3, width // 2, height))
            picture.convert("RGB").save(photographs / f"{name}.png")
            picture.save(photographs / f"{name}.mask.png")
        return photographs

    @pytest.mark.parametrize("crop", ["center", "random"])
    def test_weights_lie_where_the_subject_does(
        self, masked: Path, config: Any, monkeypatch: pytest.MonkeyPatch, crop: str
    ) -> None:
        seen: list[list[Image.Image]] = []
        encode = prepare_data.__globals__["_encode"]
        monkeypatch.setitem(prepare_data.__globals__, "_encode", lambda *a: seen.append(a[2]) or encode(*a))
        data = prepared(
            config(*ON, "images.masks=weight", "images.mask_background=0.25", f"images.crop={crop}", "images.flip=true")
        )
        for images, pictures in zip(data.buckets, seen, strict=False):
            assert images.masks is not None
            assert images.masks.shape == (len(images.latents), 1, *images.shape[1:])
            grey = torch.tensor(np.stack([np.asarray(one.convert("L")) for one in pictures])) / 255
            inside = torch.nn.functional.adaptive_avg_pool2d(grey[:, None].float(), tuple(images.shape[1:]))
            expected = 0.25 + 0.75 * inside
            of_image = expected.view(len(images), -1).mean(1).repeat_interleave(images.crops).view(-1, 1, 1, 1)
            torch.testing.assert_close(images.masks, expected / of_image, atol=0.25, rtol=0)
            assert images.masks.max() - images.masks.min() > 1

    def test_crop_cuts_around_the_subject(self, masked: Path, config: Any) -> None:
        """To a square, as far as the photograph reaches."""
        settings = config(*ON, "images.masks=crop")
        with pytest.raises(InputError, match=r"e\.png is 200 x 60 .* is 64 and 64 x 60 of it are cut to 64 x 64; give"):
            inspected(settings)
        (masked / "e.png").unlink()
        assert inspected(settings).sizes == ((64, 64),) * 4

    def test_the_middle_is_that_of_the_size(self, masked: Path, config: Any) -> None:
        picture = Image.new("L", (200, 60))
        picture.paste(255, (40, 0, 70, 60))
        mask = Mask(picture=picture, content=b"", warnings=())
        assert mask.in_the_middle((48, 80)) == pytest.approx(20 / 30)  # pixels 50 to 150 of the width
        assert mask.in_the_middle((64, 64)) == 0
        picture.paste(255, (10, 0, 70, 60))
        picture.save(masked / "e.mask.png")
        warnings = [one for one in inspected(config(*ON, "images.masks=weight")).warnings if "in the middle" in one]
        assert warnings == [
            f"{masked}/e.png: 33% of the subject lies in the rectangle in the middle, which is trained on; set "
            f"images.masks to crop, or images.crop to random"
        ]


class TestRefusals:
    def test_a_picture_that_would_be_scaled_up(self, folder: Path, config: Any) -> None:
        gradient(75, 50).save(folder / "small.png")
        with pytest.raises(
            InputError,
            match=r"small\.png is 75 x 50 pixels, but images\.resolution is 64 and it is cut to 80 x 48; give a larger",
        ):
            inspected(config(*ON))
        with pytest.raises(InputError, match=r"small\.png is 75 x 50 pixels, but images\.resolution is 64; give"):
            inspected(config())
        gradient(80, 48).save(folder / "small.png")  # which squares of 64 pixels would refuse
        assert inspected(config(*ON)).sizes == ((48, 80),)

    def test_a_step_that_the_base_cannot_divide(self, config: Any) -> None:
        settings = config(*ON, "images.bucket_step=6")
        with pytest.raises(InputError, match=r"images\.bucket_step is 6; expected a multiple of 4 for Stable Diff"):
            sizes_of(settings.images, BaseSettings(Path(settings.base_model)))

    @pytest.mark.parametrize("given", ["images.bucket_step=64", "images.bucket_max_aspect_ratio=3"])
    def test_settings_without_buckets(self, config: Any, given: str) -> None:
        with pytest.raises(InputError, match="but aspect_buckets is off, so photographs are cut to squares; set"):
            config(given)

    def test_a_family_of_squares(self, tmp_path: Path, config: Any) -> None:
        base = built("deepfloyd-if", tmp_path / "if")
        with pytest.raises(InputError, match=r"images\.aspect_buckets is on, but DeepFloyd IF, stage I makes pictures"):
            sizes_of(config(*ON, base=base).images, BaseSettings(base))


class TestFamilies:
    """What a denoiser is told of sizes, of photographs of any shape."""

    def test_time_ids_have_the_size_of_the_bucket(self, photographs: Path, tmp_path: Path, config: Any) -> None:
        base = built("stable-diffusion-xl", tmp_path / "xl")
        data = prepared(config(*ON, base=base))
        seen = {}
        for pair in range(5):
            batch = data.batch(range(pair, pair + 1))
            assert batch.class_half is not None
            assert batch.class_half.conditions["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
            height, width, *rest = batch.conditions["time_ids"][0].int().tolist()
            seen[width, height] = tuple(rest)
        scale = 48 / 60  # of e, of which 100 of 200 pixels are cut off
        assert seen[PHOTOGRAPHS["e"]] == (0, round(50 * scale), 48, 80)
        assert seen[PHOTOGRAPHS["b"]] == (round(4 * 48 / 72), 0, 48, 80)
        assert seen[PHOTOGRAPHS["d"]][2:] == (72, 56)
        assert seen[PHOTOGRAPHS["c"]] == (0, 0, 64, 64)

    def test_the_draw_of_a_flow_is_shifted_by_the_size(self, photographs: Path, tmp_path: Path, config: Any) -> None:
        """FLUX's shift grows with the number of tokens."""
        base = built("flux-dev", tmp_path / "flux")
        data = prepared(config(*ON, base=base))
        family = family_of(base)
        for images in data.buckets:
            assert images.process == family.process(base, tuple(images.shape))
        assert len({images.process.shift for images in data.buckets}) > 1  # type: ignore[union-attr]

    def test_positions_end_somewhere(self, tmp_path: Path, config: Any) -> None:
        """SD3 reads the middle of a table of positions."""
        base = BaseSettings(built("stable-diffusion-3.5", tmp_path / "sd3"))
        longest = base.family.largest_side(base)
        assert longest is not None
        sizes = sizes_of(config(*ON, "images.bucket_max_aspect_ratio=8", "images.resolution=128").images, base)
        assert max(map(max, sizes)) <= longest
        assert max(map(max, bucket_sizes(128, step=16, max_aspect_ratio=8))) > longest
