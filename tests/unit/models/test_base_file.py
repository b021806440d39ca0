"""A base model that is one file: converted once to the folder that it descends from, or refused with a sentence."""

import os
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from replicas import REPLICAS, built
from safetensors.torch import load_file, save_file

from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.low_rank import weights_of
from dreambooth.models.single_file import write_single_file

READ = ["stable-diffusion-1.5", "stable-diffusion-2.1-v", "stable-diffusion-xl"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=READ)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder."""
    return built(request.param, tmp_path_factory.mktemp(request.param) / "whole", seed=4)


@pytest.fixture
def settings(whole: Path, tmp_path: Path) -> Path:
    """The same folder without weights, as its repository is planned with."""
    return Path(
        shutil.copytree(whole, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors", "vae_1_0"))
    )


@pytest.fixture
def file(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_single_file(whole, path, metadata={})
    return path


def bases(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "bases").iterdir() if not path.name.startswith("."))


class TestConverted:
    @pytest.mark.parametrize("place", ["{file}", "memory://bases/model.safetensors"])
    def test_gives_every_tensor_of_the_model_back(
        self, whole: Path, settings: Path, file: Path, place: str, cache: Path
    ) -> None:
        address = place.format(file=file)
        if "memory" in address:
            fsspec.filesystem("memory").put_file(str(file), "/bases/model.safetensors")
        base = resolve_base_model(f"{address}#{settings}")
        assert base.family.name == resolve_base_model(str(whole)).family.name
        expected, found = weights_of(whole), weights_of(base.directory)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        (vae,) = (base.directory / "vae").glob("*.safetensors")
        original = load_file(whole / "vae" / vae.name)
        assert all(torch.equal(original[name], tensor) for name, tensor in load_file(vae).items())

    def test_once_under_its_content_wherever_it_lies(
        self, settings: Path, file: Path, tmp_path: Path, cache: Path
    ) -> None:
        first = resolve_base_model(f"{file}#{settings}")
        made = first.directory.stat().st_ctime_ns
        copy = tmp_path / "renamed.safetensors"
        shutil.copyfile(file, copy)
        second = resolve_base_model(f"{copy}#{settings}")
        assert (second.directory, second.directory.stat().st_ctime_ns) == (first.directory, made)
        assert second.hash == first.hash
        assert len(bases(cache)) == 1

    def test_another_file_of_the_same_name_is_another_base(self, settings: Path, file: Path, cache: Path) -> None:
        first = resolve_base_model(f"{file}#{settings}")
        tensors = load_file(file)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
        second = resolve_base_model(f"{file}#{settings}")
        assert second.hash != first.hash
        assert len(bases(cache)) == 2

    def test_names_and_shapes_of_older_files(self, whole: Path, settings: Path, file: Path) -> None:
        """Text encoders without `text_model.`, the VAE's attention as convolutions or not, and tensors of no part."""
        tensors = {
            name.replace(".transformer.text_model.", ".transformer."): tensor.squeeze()
            if ".attn_1." in name
            else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors | {"model_ema.decay": torch.ones(1)}, file, {"format": "pt"})
        found, expected = weights_of(resolve_base_model(f"{file}#{settings}").directory), weights_of(whole)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class TestRefused:
    def fault(self, address: str) -> str:
        with pytest.raises(InputError) as caught:
            resolve_base_model(address)
        return str(caught.value)

    @pytest.mark.parametrize("name", ["model.ckpt", "s3://bucket/model.ckpt", "a/b/model.pt#c/d", "MODEL.CKPT"])
    def test_a_pickle(self, name: str) -> None:
        assert "is a pickle, which can run anything when it is read; expected a file that ends in" in self.fault(name)

    def test_a_file_without_the_model_that_it_descends_from(self, file: Path) -> None:
        message = self.fault(str(file))
        assert "come from the model that it descends from" in message
        assert f"--base-model '{file}#owner/name'" in message

    def test_a_file_that_is_not_there(self, settings: Path) -> None:
        assert "there is no such file" in self.fault(f"./none.safetensors#{settings}")

    def test_a_file_that_broke_off(self, settings: Path, file: Path, cache: Path) -> None:
        os.truncate(file, file.stat().st_size - 100)
        assert "is damaged" in self.fault(f"{file}#{settings}")
        assert bases(cache) == []

    @pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "cond"])
    def test_a_file_without_a_part(self, settings: Path, file: Path, part: str, cache: Path) -> None:
        tensors = load_file(file)
        save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(part)}, file)
        message = self.fault(f"{file}#{settings}")
        assert f"lacks {part}" in message
        assert "is it a whole checkpoint" in message
        assert bases(cache) == []

    def test_a_file_of_another_width(self, settings: Path, file: Path, cache: Path) -> None:
        tensors = load_file(file)
        name = "model.diffusion_model.out.2.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()
        save_file(tensors, file)
        assert "isn't the model that" in self.fault(f"{file}#{settings}")
        assert bases(cache) == []


def test_a_family_whose_files_hold_less_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sd3"
    folder.mkdir()
    REPLICAS["stable-diffusion-3-without-t5"](folder)
    write_single_file(folder, tmp_path / "model.safetensors", metadata={})
    with pytest.raises(InputError, match=r"don't hold text_encoder\.text_projection\.weight; give the model as"):
        resolve_base_model(f"{tmp_path / 'model.safetensors'}#{folder}")


def test_workers_in_other_folders_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.config.settings import load_config
    from pipelines.plan.local_addresses import local_addresses, with_absolute_addresses

    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").touch()
    Path("sd").mkdir()
    subject = {"name": "rex", "class_noun": "dog", "instance_images": "photos"}
    config = load_config({"subject": subject, "base_model": "model.safetensors#sd"})
    found = with_absolute_addresses(config)
    assert found.base_model == f"{tmp_path}/model.safetensors#{tmp_path}/sd"
    assert {f"{tmp_path}/model.safetensors", f"{tmp_path}/sd"} <= set(local_addresses(found))
    of_hub = load_config({"subject": subject, "base_model": "a/b/model.safetensors#a/b"})
    assert with_absolute_addresses(of_hub).base_model == "a/b/model.safetensors#a/b"
