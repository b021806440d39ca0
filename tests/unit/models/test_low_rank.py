"""A LoRA of the difference: the nearest of its rank, in names that load on the plain base, and what it can't hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from replicas import REPLICAS
from safetensors.torch import load_file, save_file

from dreambooth.errors import InputError
from dreambooth.models.families import family_of
from dreambooth.models.lora_file import LORA_NAMES, check_lora, write_embedding, write_lora
from dreambooth.models.low_rank import LowRank, factors, low_rank, weights_of, weights_with
from dreambooth.sampling.sampler import load_pipeline

LOADED = ["stable-diffusion-1.5", "stable-diffusion-2.1-v", "stable-diffusion-xl", "stable-diffusion-3.5", "flux-dev"]
MOST = 64
"""Enough for every layer of a replica."""


@pytest.fixture(scope="module", params=LOADED)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and a copy with every tensor of denoiser and text encoders moved a little."""
    folder = tmp_path_factory.mktemp(request.param)
    base, model = folder / "base", folder / "model"
    base.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        REPLICAS[request.param](base)
        shutil.copytree(base, model)
        for path in model.rglob("*.safetensors"):
            if path.parent.name == "vae" or (path.parent.name, request.param) == ("text_encoder_2", "flux-dev"):
                continue
            moved = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
            save_file(moved, path, {"format": "pt"})
    return base, model


@pytest.fixture(scope="module")
def found(pair: tuple[Path, Path]) -> LowRank:
    return low_rank(*pair, rank=MOST, identifier="sks")


class TestFactors:
    @pytest.mark.parametrize("shape", [(20, 30), (30, 20), (12, 6, 3, 3), (700, 600)])
    def test_their_product_is_the_nearest_matrix_of_a_rank(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, columns = shape[0], int(torch.tensor(shape[1:]).prod())
        decay = torch.diag(0.5 ** torch.arange(8.0))
        change = torch.randn(rows, 8, generator=generator) @ decay @ torch.randn(8, columns, generator=generator)
        values = torch.linalg.svdvals(change)
        up, down = factors(change.reshape(shape), 5)
        assert (up.shape, down.shape) == ((rows, 5), (5, *shape[1:]))
        error = (change - up @ down.flatten(1)).square().sum()
        assert error == pytest.approx(float(values[5:].square().sum()), rel=1e-3)

    def test_a_matrix_that_can_have_no_such_rank_has_its_own(self) -> None:
        change = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
        up, down = factors(change, 32)
        assert up.shape == (4, 4)
        assert torch.allclose(up @ down, change, atol=1e-5)


class TestLowRank:
    def test_at_full_rank_layers_are_those_of_the_model_and_all_else_is_the_base(
        self, pair: tuple[Path, Path], found: LowRank
    ) -> None:
        base, after, state = (
            weights_of(pair[0]),
            weights_of(pair[1]),
            weights_with(pair[0], found, MOST, embeddings=False),
        )
        held = {(layer.folder, layer.module) for layer in found.layers}
        folder = family_of(pair[0]).denoiser.folder
        for name, weight in state.items():
            owner, _, rest = name.partition(".")
            layer = (folder if owner == "denoiser" else owner, rest.removesuffix(".weight"))
            expected = after if layer in held and rest.endswith(".weight") else base
            assert torch.allclose(weight, expected[name], atol=1e-4), name
        layers = sum(weight.ndim in (2, 4) and "embed" not in name for name, weight in state.items())
        assert len(held) > 0.7 * layers

    def test_the_share_held_grows_with_the_rank_to_that_of_all_layers(
        self, pair: tuple[Path, Path], found: LowRank
    ) -> None:
        held = [found.held(rank) for rank in (1, 4, 16, MOST)]
        assert held == sorted(held)
        total = sum(found.squares.values())
        layers = found.squares["linear layers"] + found.squares.get("convolutions", 0)
        assert held[-1] == pytest.approx(layers / total, rel=1e-4)
        assert {"embeddings", "norms", "biases"} <= set(found.squares)

    def test_the_identifiers_rows_are_the_models(self, pair: tuple[Path, Path], found: LowRank) -> None:
        after, state = weights_of(pair[1]), weights_with(pair[0], found, 1, embeddings=True)
        rows = found.embeddings["text_encoder"]
        name = next(name for name in state if name.startswith("text_encoder.") and "token_embedding" in name)
        assert torch.equal(rows.rows, after[name][list(rows.token_ids)])
        assert torch.equal(state[name][list(rows.token_ids)], rows.rows)

    def test_a_model_that_is_its_base_has_no_layers(self, pair: tuple[Path, Path]) -> None:
        same = low_rank(pair[0], pair[0], rank=4, identifier="sks")
        assert (same.layers, same.embeddings, same.held(1)) == ((), {}, 1.0)


class TestFile:
    @pytest.mark.extras("peft")
    @pytest.mark.parametrize(("rank", "dtype"), [(2, torch.bfloat16), (MOST, torch.float32)])
    def test_loads_on_the_plain_base(
        self, pair: tuple[Path, Path], found: LowRank, rank: int, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        """Its weights, merged by diffusers and peft, are those that were measured, by each family's names."""
        family = family_of(pair[0])
        expected = weights_with(pair[0], found, rank, embeddings=False, dtype=dtype)
        assert len(expected) > 100
        for names in LORA_NAMES if family.kohya_prefixes else LORA_NAMES[:1]:
            file = tmp_path / f"{names}.safetensors"
            write_lora(pair[0], found, file, rank=rank, names=names, dtype=dtype, metadata={})
            pipeline = load_pipeline(pair[0])
            pipeline.load_lora_weights(str(file))
            pipeline.fuse_lora(components=list(family.lora_folders))
            pipeline.unload_lora_weights()
            for name, weight in expected.items():
                owner, _, rest = name.partition(".")
                component = getattr(pipeline, family.denoiser.folder if owner == "denoiser" else owner)
                got = dict(component.named_parameters())[rest]
                assert torch.allclose(got, weight, atol=1e-5), (names, name)

    def test_names_of_diffusers_are_folder_and_module(
        self, pair: tuple[Path, Path], found: LowRank, tmp_path: Path
    ) -> None:
        digest = write_lora(pair[0], found, tmp_path / "a.safetensors", rank=3, metadata={"identifier": "sks"})
        tensors = load_file(tmp_path / "a.safetensors")
        assert len(tensors) == 2 * len(found.layers)
        assert len(digest) == 64
        for layer in found.layers:
            ending = f"{layer.module}.lora_A.weight"
            named = [name for name in tensors if name.startswith(f"{layer.folder}.") and name.endswith(ending)]
            assert (3, *layer.down.shape[1:]) in {tuple(tensors[name].shape) for name in named}

    def test_kohyas_names_have_prefix_and_alpha(self, pair: tuple[Path, Path], found: LowRank, tmp_path: Path) -> None:
        family = family_of(pair[0])
        if not family.kohya_prefixes:
            with pytest.raises(InputError, match="leave --names at 'diffusers'"):
                check_lora(family, "kohya")
            return
        write_lora(pair[0], found, tmp_path / "a.safetensors", rank=3, names="kohya", metadata={})
        tensors = load_file(tmp_path / "a.safetensors")
        assert len(tensors) == 3 * len(found.layers)
        assert all(tensor == 3 for name, tensor in tensors.items() if name.endswith(".alpha"))
        text = next(value for key, value in family.kohya_prefixes.items() if key == "text_encoder")
        assert f"{text}text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
        own = "middle_block_1" if "unet" in family.kohya_original else "mid_block_attentions_0"
        assert f"lora_unet_{own}_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in tensors

    def test_the_embedding_loads_beside_it(self, pair: tuple[Path, Path], found: LowRank, tmp_path: Path) -> None:
        write_embedding(family_of(pair[0]), found, tmp_path / "sks.safetensors")
        tensors = load_file(tmp_path / "sks.safetensors")
        clips = [folder for folder in found.embeddings if folder in ("text_encoder", "text_encoder_2")]
        assert len(tensors) == len(clips)
        if len(clips) > 1:
            assert torch.equal(tensors["clip_g"], found.embeddings["text_encoder_2"].rows)
            return
        pipeline = load_pipeline(pair[0])
        if not hasattr(pipeline, "load_textual_inversion"):
            return
        pipeline.load_textual_inversion(str(tmp_path / "sks.safetensors"), token="<rex>")
        ids = pipeline.tokenizer(pipeline.maybe_convert_prompt("<rex>", pipeline.tokenizer), add_special_tokens=False)
        table = pipeline.text_encoder.get_input_embeddings().weight
        assert torch.equal(table[ids.input_ids], found.embeddings["text_encoder"].rows)


def test_families_whose_pipelines_read_no_lora_are_refused(tmp_path: Path) -> None:
    REPLICAS["pixart-sigma"](tmp_path)
    with pytest.raises(InputError, match="has no load_lora_weights"):
        check_lora(family_of(tmp_path), "diffusers")


def test_lora_folders_are_read_by_the_pipelines(tmp_path: Path) -> None:
    import diffusers

    from dreambooth.models.families import FAMILIES

    for family in FAMILIES:
        kind = getattr(diffusers, family.pipeline_class)
        read = set(getattr(kind, "_lora_loadable_modules", [])) if hasattr(kind, "load_lora_weights") else set()
        assert set(family.lora_folders) <= read, json.dumps([family.name, sorted(read)])
        assert bool(family.lora_folders) == bool(read)
