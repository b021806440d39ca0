"""The two banks: what they embed, what their hash names, and what they say when weights aren't there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from dreambooth.errors import InputError
from dreambooth.evaluation.bank import Bank, BankLocations, ImageEmbeddings
from dreambooth.evaluation.banks import default_bank, load_bank
from dreambooth.evaluation.lpips import LPIPS
from dreambooth.miniature import CLIP_DIR, subject_dir

PREPROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


def photographs(name: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(subject_dir(name).glob("*.png"))]


@pytest.fixture(scope="module")
def miniature() -> Bank:
    return load_bank("miniature")


@pytest.fixture(scope="module")
def locations(tmp_path_factory: pytest.TempPathFactory) -> BankLocations:
    """The paper's three encoders with random weights, DINO and CLIP much smaller. Not to be written to."""
    folder = tmp_path_factory.mktemp("bank")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=224, patch_size=32, **sizes)).save_pretrained(folder / "dino")
    text = {**sizes, "vocab_size": 785, "max_position_embeddings": 24, "bos_token_id": 783, "eos_token_id": 784}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CLIP_DIR / name, folder / "clip")
    settings = {**PREPROCESSOR, "size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 32}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    save_lpips(LPIPS(), folder / "lpips")
    return BankLocations(dino=str(folder / "dino"), clip=str(folder / "clip"), lpips=str(folder / "lpips"))


def save_lpips(model: LPIPS, folder: Path) -> None:
    """Under the published files' names and with their keys."""
    folder.mkdir()
    alexnet = {f"features.{name}": weight for name, weight in model.features.state_dict().items()}
    torch.save({**alexnet, "classifier.6.bias": torch.zeros(1000)}, folder / "alexnet-owt-7be5be79.pth")
    linear = {f"lin{i}.model.1.weight": weight.detach()[None, :, None, None] for i, weight in enumerate(model.linear)}
    torch.save(linear, folder / "alex.pth")


class TestMiniature:
    def test_embeddings(self, miniature: Bank) -> None:
        embeddings = miniature.embed_images(photographs("mint-dog"))
        assert (embeddings.dino.shape, embeddings.clip.shape) == ((5, 96), (5, 64))
        for tensor in (embeddings.dino, embeddings.clip, miniature.embed_texts(["a photo of a dog"])):
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.norm(dim=1), torch.ones(len(tensor)))

    def test_nothing_depends_on_the_batch_or_the_order(self, miniature: Bank) -> None:
        images = photographs("mint-dog") * 7  # more than are embedded at once
        texts = ["a photo of a dog in the snow", "a car", "a painting of a red cat at night"]
        together, alone = miniature.embed_images(images), [miniature.embed_images([image]) for image in images]
        torch.testing.assert_close(together.dino, torch.cat([each.dino for each in alone]))
        torch.testing.assert_close(together.clip, torch.cat([each.clip for each in alone]))
        embedded = miniature.embed_texts(texts)
        torch.testing.assert_close(embedded, torch.cat([miniature.embed_texts([text]) for text in texts]))
        torch.testing.assert_close(embedded.flip(0), miniature.embed_texts(texts[::-1]))

    def test_the_clip_tells_which_prompt_an_image_follows(self, miniature: Bank) -> None:
        texts = miniature.embed_texts(["a photo of a dog", "a photo of a car"])
        dog = miniature.embed_images(photographs("mint-dog")).clip @ texts.T
        car = miniature.embed_images(photographs("coral-car")).clip @ texts.T
        assert dog.mean(0).argmax() == 0
        assert car.mean(0).argmax() == 1

    def test_distances(self, miniature: Bank) -> None:
        one, other = photographs("mint-dog")[:2]
        nearly = one.point(lambda level: min(level + 3, 255))
        distances = miniature.perceptual_distances([one, one, nearly, other])
        assert distances.shape == (4, 4)
        assert torch.equal(distances, distances.T)
        assert distances.diagonal().tolist() == [0, 0, 0, 0]
        assert distances[0, 1] < 1e-5
        assert distances[0, 1] < distances[0, 2] < 0.05 < distances[0, 3] < 2
        torch.testing.assert_close(miniature.perceptual_distances([other, one])[0, 1], distances[0, 3])

    def test_the_hash_is_the_same_in_every_load(self, miniature: Bank) -> None:
        assert miniature.name == "miniature"
        assert len(miniature.hash) == 16
        assert load_bank("miniature").hash == miniature.hash


class TestPaper:
    def test_it_embeds_and_measures(self, locations: BankLocations) -> None:
        bank = load_bank("paper", locations=locations)
        images = photographs("mint-dog")
        embeddings = bank.embed_images(images)
        assert (embeddings.dino.shape, embeddings.clip.shape) == ((5, 16), (5, 8))
        assert bank.embed_texts(["a dog", "a car"]).shape == (2, 8)
        distances = bank.perceptual_distances(images)
        assert torch.equal(distances, distances.T)
        assert bool((distances + torch.eye(5) > 0).all())

    def test_encoders_come_from_wherever_fsspec_reaches(
        self, locations: BankLocations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
        memory = fsspec.filesystem("memory")
        for name in ("dino", "clip", "lpips"):
            memory.put(getattr(locations, name) + "/", f"/bank/{name}/", recursive=True)
        try:
            addresses = {name: f"memory://bank/{name}" for name in ("dino", "clip", "lpips")}
            bank = load_bank("paper", locations=BankLocations(**addresses))
        finally:
            memory.rm("/bank", recursive=True)
        assert bank.hash == load_bank("paper", locations=locations).hash

    def test_lpips_is_looked_for_in_the_cache(
        self, locations: BankLocations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path))
        (tmp_path / "lpips").symlink_to(str(locations.lpips))
        assert load_bank("paper", locations=BankLocations(dino=locations.dino, clip=locations.clip)).name == "paper"

    def test_the_hash_names_weights_and_transforms(self, locations: BankLocations, tmp_path: Path) -> None:
        shutil.copytree(locations.clip, tmp_path / "clip")
        path = tmp_path / "clip" / "preprocessor_config.json"
        copied = BankLocations(dino=locations.dino, clip=str(tmp_path / "clip"), lpips=locations.lpips)
        before = load_bank("paper", locations=locations).hash
        assert load_bank("paper", locations=copied).hash == before
        path.write_text(json.dumps({**json.loads(path.read_text()), "resample": 2}))
        assert load_bank("paper", locations=copied).hash != before

    def test_all_that_is_missing_is_said_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
        with pytest.raises(InputError) as caught:
            load_bank("paper")
        message = str(caught.value)
        assert "facebook/dino-vits16" in message
        assert "openai/clip-vit-base-patch32" in message
        assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in message
        assert "lpips/weights/v0.1/alex.pth" in message
        assert str(tmp_path / "cache" / "lpips") in message

    def test_only_what_is_missing_is_said(self, locations: BankLocations, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            load_bank("paper", locations=BankLocations(dino=locations.dino, clip=str(tmp_path), lpips=locations.lpips))
        assert "CLIP ViT-B/32" in str(caught.value)
        assert "DINO" not in str(caught.value)
        assert "LPIPS" not in str(caught.value)

    def test_an_encoder_of_another_kind(self, locations: BankLocations) -> None:
        with pytest.raises(InputError, match="is of the type 'clip'; expected 'vit'"):
            load_bank("paper", locations=BankLocations(dino=locations.clip, clip=locations.clip, lpips=locations.lpips))

    def test_a_copy_without_weights(self, locations: BankLocations, tmp_path: Path) -> None:
        shutil.copy(Path(locations.dino) / "config.json", tmp_path)
        with pytest.raises(InputError, match=r"there are no weights in .*; is the copy complete\?"):
            load_bank("paper", locations=BankLocations(dino=str(tmp_path), clip=locations.clip, lpips=locations.lpips))


class TestBadInput:
    def test_a_bank_of_another_name(self) -> None:
        with pytest.raises(InputError, match="there is no bank 'papper'; expected paper or miniature"):
            load_bank("papper")

    @pytest.mark.parametrize(
        "ask",
        [
            lambda bank: bank.embed_images([]),
            lambda bank: bank.embed_texts([]),
            lambda bank: bank.perceptual_distances([]),
        ],
    )
    def test_nothing_to_embed(
        self, miniature: Bank, locations: BankLocations, ask: Callable[[Bank], ImageEmbeddings | torch.Tensor]
    ) -> None:
        for bank in (miniature, load_bank("paper", locations=locations)):
            with pytest.raises(InputError, match=r"expected at least one (image|text)"):
                ask(bank)

    def test_images_of_another_size(self, miniature: Bank, locations: BankLocations) -> None:
        images = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64)), Image.new("RGB", (64, 48))]
        for bank in (miniature, load_bank("paper", locations=locations)):
            with pytest.raises(InputError, match="image 2 is 64 x 48 pixels and image 0 64 x 64; sample or crop"):
                bank.perceptual_distances(images)

    def test_embeddings_of_different_images(self) -> None:
        with pytest.raises(ValueError, match=r"got \(2, 4\) and \(3, 4\)"):
            ImageEmbeddings(dino=torch.ones(2, 4), clip=torch.ones(3, 4))


def test_the_bank_that_fits_a_base_model() -> None:
    assert default_bank("miniature") == "miniature"
    assert default_bank("stable-diffusion-v1-5/stable-diffusion-v1-5") == "paper"
