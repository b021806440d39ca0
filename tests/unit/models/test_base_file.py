"""A base model that is one file: converted once to the folder that it descends from, or refused with a sentence."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from hub_server import Hub, hub_server
from replicas import REPLICAS, built
from safetensors.torch import load_file, save_file

from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.families.origins import origin_of
from dreambooth.models.low_rank import weights_of
from dreambooth.models.single_file import write_single_file

READ = ["stable-diffusion-1.5", "stable-diffusion-2.1-v", "stable-diffusion-xl"]
TOLD = {
    "stable-diffusion-1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", {}),
    "stable-diffusion-2.1-v": ("stabilityai/stable-diffusion-2-1", {"modelspec.prediction_type": "v"}),
    "stable-diffusion-xl": ("stabilityai/stable-diffusion-xl-base-1.0", {}),
}
"""Repositories whose configurations a file takes by its header, and the metadata by which it is told."""


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server(monkeypatch) as made:
        yield made


def put(hub: Hub, name: str, folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.make(name, private=False, files=files)


class TestByItsHeader:
    """Without `#`: the header tells whose configurations it takes, and they come from the hub."""

    @pytest.mark.parametrize("whole", READ, indirect=True)
    def test_configurations_come_from_the_hub_without_weights(
        self, whole: Path, file: Path, hub: Hub, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        name, metadata = TOLD[request.node.callspec.params["whole"]]
        write_single_file(whole, file, metadata=metadata)
        put(hub, name, whole)
        found, expected = weights_of(resolve_base_model(str(file)).directory), weights_of(whole)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not list((tmp_path / "hub").rglob("*.safetensors"))
        assert resolve_base_model(str(file)).hash == resolve_base_model(f"{file}#{whole}").hash

    @pytest.mark.parametrize("whole", READ[:1], indirect=True)
    def test_a_cached_repository_will_do(
        self, whole: Path, file: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path
    ) -> None:
        put(hub, TOLD[READ[0]][0], whole)
        first = resolve_base_model(TOLD[READ[0]][0])
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert resolve_base_model(str(file)).parameter_counts == first.parameter_counts

    @pytest.mark.parametrize("whole", READ[:1], indirect=True)
    def test_a_file_of_the_hub(self, whole: Path, file: Path, hub: Hub) -> None:
        put(hub, TOLD[READ[0]][0], whole)
        hub.make("owner/name", private=False, files={"a/model.safetensors": file.read_bytes(), "b.txt": b"other"})
        assert resolve_base_model("owner/name/a/model.safetensors").hash == resolve_base_model(str(file)).hash
        with pytest.raises(InputError, match=r"the hub's owner/name has no file none\.safetensors"):
            resolve_base_model("owner/name/none.safetensors")
        with pytest.raises(InputError, match=r"^base_model 'owner/none' is neither a folder here nor available"):
            resolve_base_model("owner/none/model.safetensors")

    @pytest.mark.parametrize("whole", READ[:1], indirect=True)
    def test_a_repository_that_cannot_be_had(self, file: Path, hub: Hub) -> None:
        with pytest.raises(InputError) as caught:
            resolve_base_model(str(file))
        message = str(caught.value)
        assert f"base_model '{file}' takes the configurations of {TOLD[READ[0]][0]}, but" in message
        assert "neither a folder here nor available from the hub" in message
        assert f"--base-model '{file}#owner/name'" in message

    @pytest.mark.parametrize("whole", READ[1:2], indirect=True)
    def test_a_header_that_does_not_tell_how_it_predicts(self, file: Path) -> None:
        with pytest.raises(InputError) as caught:
            resolve_base_model(str(file))
        message = str(caught.value)
        assert "is Stable Diffusion 2, and its header doesn't say which" in message
        assert f"--base-model '{file}#stabilityai/stable-diffusion-2-1' (predicts velocity, 768 pixels)" in message
        assert f"--base-model '{file}#stabilityai/stable-diffusion-2-1-base' (predicts noise, 512 pixels)" in message

    @pytest.mark.parametrize(
        ("whole", "changed", "told"),
        [
            (READ[0], {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 9, 3, 3)}, "takes 9 channels"),
            (READ[2], {"v_pred": torch.zeros(0)}, r"doesn't predict noise as XL does \(v_pred\)"),
            (
                READ[0],
                {"model.diffusion_model.input_blocks.0.0.weight": None},
                "is no checkpoint of Stable Diffusion 1",
            ),
            (READ[0], {"cond_stage_model.": None}, "without the text encoders of Stable Diffusion 1, 2 or XL"),
        ],
        indirect=["whole"],
    )
    def test_a_file_of_none_of_them(self, file: Path, changed: dict[str, torch.Tensor | None], told: str) -> None:
        gone = tuple(name for name, tensor in changed.items() if tensor is None)
        tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(gone or ("-",))}
        save_file(tensors | {name: tensor for name, tensor in changed.items() if tensor is not None}, file)
        with pytest.raises(InputError, match=rf"{told}.* If it descends from another .*#owner/name'"):
            resolve_base_model(str(file))

    def test_predictions_in_metadata(self) -> None:
        encoder = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
        velocity = {"modelspec.prediction_type": "v"}
        for prefix in ("cond_stage_model.transformer.", "conditioner.embedders.1.model."):
            shapes = encoder | {f"{prefix}x": (1,)}
            assert len(origin_of(shapes, {}).choices) == 1
            assert not origin_of(shapes, velocity).choices
        noise = origin_of(encoder | {"cond_stage_model.model.x": (1,)}, {"modelspec.prediction_type": "epsilon"})
        assert list(noise.choices) == ["stabilityai/stable-diffusion-2-1-base"]
        refiner = encoder | {"conditioner.embedders.0.model.x": (1,)}
        assert not origin_of(refiner, {}).choices


class TestRefused:
    def fault(self, address: str) -> str:
        with pytest.raises(InputError) as caught:
            resolve_base_model(address)
        return str(caught.value)

    @pytest.mark.parametrize("name", ["model.ckpt", "s3://bucket/model.ckpt", "a/b/model.pt#c/d", "MODEL.CKPT"])
    def test_a_pickle(self, name: str) -> None:
        assert "is a pickle, which can run anything when it is read; expected a file that ends in" in self.fault(name)

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
    alone = load_config({"subject": subject, "base_model": "model.safetensors"})
    assert with_absolute_addresses(alone).base_model == f"{tmp_path}/model.safetensors"
    for address in ("a/b/model.safetensors#a/b", "a/b/model.safetensors"):
        of_hub = load_config({"subject": subject, "base_model": address})
        assert with_absolute_addresses(of_hub).base_model == address
