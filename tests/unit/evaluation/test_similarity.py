import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from dreambooth.errors import InputError
from dreambooth.evaluation.encoder_files import find_image_encoder
from dreambooth.evaluation.encoders import (
    DINO_TRANSFORM,
    Transform,
    ViTEncoder,
    read_transform,
)
from dreambooth.evaluation.similarity import mean_pairwise_similarity, mean_self_similarity

EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
NORTH_EAST = [math.sqrt(0.5), math.sqrt(0.5)]


def test_pairs_of_two_sets() -> None:
    samples, images = torch.tensor([EAST, NORTH_EAST]), torch.tensor([EAST, NORTH, WEST])
    # 1, 0, -1 for the first sample; cos 45°, cos 45°, -cos 45° for the second.
    assert mean_pairwise_similarity(samples, images) == pytest.approx(math.sqrt(0.5) / 6)
    assert mean_pairwise_similarity(samples, samples) == pytest.approx((2 + 2 * math.sqrt(0.5)) / 4)
    assert mean_pairwise_similarity(torch.tensor([EAST]), torch.tensor([WEST])) == pytest.approx(-1)


def test_pairs_within_one_set_are_counted_once_and_never_with_themselves() -> None:
    assert mean_self_similarity(torch.tensor([EAST, NORTH, WEST])) == pytest.approx(-1 / 3)
    assert mean_self_similarity(torch.tensor([EAST, EAST])) == pytest.approx(1)


def test_neither_order_nor_scale_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, images = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator)
    expected = mean_pairwise_similarity(samples, images)
    assert mean_pairwise_similarity(images, samples) == pytest.approx(expected)
    assert mean_pairwise_similarity(samples.flip(0) * 3, images) == pytest.approx(expected)
    assert mean_self_similarity(images.flip(0) * 3) == pytest.approx(mean_self_similarity(images))


@pytest.mark.parametrize(
    ("samples", "images", "message"),
    [
        (torch.empty(0, 2), torch.tensor([EAST]), "at least one embedding"),
        (torch.tensor([EAST]), torch.empty(0, 2), "at least one embedding"),
        (torch.tensor([EAST, [math.nan, 0]]), torch.tensor([EAST]), "embedding at 1 isn't finite"),
        (torch.tensor([EAST]), torch.tensor([[math.inf, 0]]), "embedding at 0 isn't finite"),
        (torch.tensor([EAST]), torch.tensor([[0.0, 0.0]]), "embedding at 0 is zero"),
        (torch.tensor([EAST]), torch.tensor([[1.0, 0.0, 0.0]]), "width 2 and 3"),
        (torch.tensor(EAST), torch.tensor([EAST]), r"expected embeddings \(N, D\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(samples: torch.Tensor, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_pairwise_similarity(samples, images)


def test_one_image_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="at least 2 embeddings"):
        mean_self_similarity(torch.tensor([EAST]))


@pytest.fixture
def encoder_directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    return tmp_path / "vit"


def _pictures(count: int) -> list[Image.Image]:
    return [Image.linear_gradient("L").rotate(40 * index).convert("RGB").resize((48, 40)) for index in range(count)]


def test_embeddings_have_unit_norm_and_do_not_depend_on_the_batch(encoder_directory: Path) -> None:
    encoder = ViTEncoder(find_image_encoder(encoder_directory), device="cpu")
    pictures = _pictures(35)
    together = encoder.encode(pictures)
    assert together.shape == (35, 16)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(35))
    torch.testing.assert_close(torch.cat([encoder.encode([picture]) for picture in pictures]), together)
    with pytest.raises(ValueError, match="at least one image"):
        encoder.encode([])


def test_the_embedding_is_the_class_token_of_the_whole_model(encoder_directory: Path) -> None:
    picture = _pictures(1)[0].resize((32, 32))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(1, 32, 32, 3)
    with torch.no_grad():
        model = ViTModel.from_pretrained(encoder_directory).eval()
        hidden = model((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).last_hidden_state
    expected = torch.nn.functional.normalize(hidden[:, 0], dim=-1)
    torch.testing.assert_close(
        ViTEncoder(find_image_encoder(encoder_directory), device="cpu").encode([picture]), expected
    )


def test_dino_sees_what_it_saw_in_the_paper(tmp_path: Path) -> None:
    published = {"do_resize": True, "size": 224, "resample": 2}
    published |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    assert read_transform(tmp_path) == DINO_TRANSFORM
    assert read_transform(tmp_path / "absent") == DINO_TRANSFORM
    # Twice as wide as high, red in the middle third: the squares at the ends are cut away.
    picture = Image.new("RGB", (600, 300), "blue")
    picture.paste("red", (150, 0, 450, 300))
    pixels = DINO_TRANSFORM(picture)
    assert pixels.shape == (3, 224, 224)
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels, red[:, None, None].expand(3, 224, 224))


def test_other_encoders_see_what_their_file_says(tmp_path: Path) -> None:
    clip = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    clip |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip))
    expected = Transform(resize=224, crop=224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    assert read_transform(tmp_path) == expected
    assert expected(Image.new("RGB", (301, 517))).shape == (3, 224, 224)
    published = clip | {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    assert read_transform(tmp_path) == expected  # the file of openai/clip-vit-base-patch32 has plain numbers
    squeezed = Transform(resize=(64, 48), crop=None)
    assert squeezed(Image.new("L", (100, 100))).shape == (3, 64, 48)


def test_an_encoder_that_cannot_be_had_is_said(tmp_path: Path, encoder_directory: Path) -> None:
    assert find_image_encoder(encoder_directory) == encoder_directory
    with pytest.raises(InputError, match="expected a folder, an address or a hub id"):
        find_image_encoder("/absent/vit")
    with pytest.raises(InputError, match="neither a folder here nor available from the hub"):
        find_image_encoder("nobody/no-such-encoder")
    with pytest.raises(InputError, match=r"there is no config\.json"):
        find_image_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="of the type 'clip'; expected 'vit'"):
        find_image_encoder(tmp_path)
