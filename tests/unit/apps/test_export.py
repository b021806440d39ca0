"""`dreambooth export` through the command line: files that are whole, or none; and what is refused before any work."""

import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from changed_models import publish_changed
from click.testing import CliRunner, Result
from replicas import REPLICAS
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth.errors import InputError
from dreambooth.models.low_rank import LowRank, low_rank
from dreambooth.training.best_checkpoint import Score
from pipelines.apps.export.rank import choose_rank
from pipelines.cli import main
from pipelines.storage.publications import publish

WHOLE = {"dino": 0.6, "clip_t": 0.3}


@pytest.fixture(scope="module")
def published(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = torch.Generator().manual_seed(3)
    return publish_changed(
        tiny_pipeline,
        tmp_path_factory.mktemp("published"),
        lambda name, tensor: tensor + 0.02 * torch.randn(tensor.shape, generator=generator),
    )


def export(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", *arguments, "--quiet"])


def done(*arguments: str) -> str:
    result = export(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


class TestWhole:
    @pytest.mark.parametrize("place", ["{folder}/deep/rex.safetensors", "memory://exports/rex.safetensors"])
    def test_one_file_with_its_sha256_and_nothing_beside(self, published: str, place: str, tmp_path: Path) -> None:
        to = place.format(folder=tmp_path)
        output = done(published, "--format", "single-file", "--to", to)
        content = fsspec.open(to).open().read()
        assert output.split() == [hashlib.sha256(content).hexdigest(), to]
        filesystem, path = fsspec.url_to_fs(to)
        assert [name.rpartition("/")[2] for name in filesystem.find(path.rpartition("/")[0])] == ["rex.safetensors"]
        (tmp_path / "read.safetensors").write_bytes(content)
        with safe_open(tmp_path / "read.safetensors", framework="pt") as stored:
            assert stored.metadata()["identifier"] == "tfz"
            assert "model.diffusion_model.input_blocks.0.0.weight" in stored.keys()  # noqa: SIM118
        filesystem.rm(path)

    @pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
    @pytest.mark.parametrize("place", ["{folder}/out", "memory://exports/out"])
    def test_a_folder_that_diffusers_reads(self, published: str, place: str, dtype: str, tmp_path: Path) -> None:
        from diffusers import DiffusionPipeline

        to = place.format(folder=tmp_path)
        output = done(published, "--format", "diffusers", "--to", to, "--dtype", dtype)
        assert output.splitlines()[-1].endswith("/model_index.json")  # what a reader opens first was there last
        assert any(line.endswith("/README.md") for line in output.splitlines())
        filesystem, path = fsspec.url_to_fs(to)
        filesystem.get(path, str(tmp_path / "copy"), recursive=True)
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "copy", dtype=torch.float32, local_files_only=True)
        expected = load_file(Path(published) / "unet" / "diffusion_pytorch_model.safetensors")
        for name, tensor in pipeline.unet.state_dict().items():
            assert torch.equal(tensor, expected[name] if dtype == "auto" else expected[name].bfloat16().float())
        filesystem.rm(path, recursive=True)

    @pytest.mark.parametrize("to", ["rex.safetensors", "memory://exports/rex.safetensors"])
    def test_nothing_is_left_of_an_export_that_fails(self, tiny_pipeline: Path, to: str, tmp_path: Path) -> None:
        """The last tensor's numbers are beyond float16's, which shows while the file is written."""
        model = publish_changed(
            tiny_pipeline, tmp_path, lambda name, tensor: 1e6 * tensor if "up_blocks.1.resnets.0" in name else tensor
        )
        result = export(model, "--format", "single-file", "--to", to, "--dtype", "float16")
        assert result.exit_code == 2
        assert "beyond the range of float16; choose bfloat16 or float32" in result.stderr
        assert list(Path().iterdir()) == []
        assert not fsspec.url_to_fs(to)[0].exists(to)


class TestLora:
    def test_of_a_given_rank_with_the_embeddings_beside(self, published: str, tmp_path: Path) -> None:
        to = tmp_path / "rex.safetensors"
        output = done(published, "--format", "lora", "--rank", "3", "--to", str(to), "--dtype", "float16")
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
            "rex.embedding.safetensors",
            "rex.safetensors",
        ]
        tensors = load_file(to)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A.weight")} == {3}
        assert output.startswith("rank 3 holds ")
        for kind in ("biases", "embeddings", "norms"):
            assert f"{kind} " in output

    def test_rank_auto_measures_until_it_is_within(self, published: str, instance_folder: Path, tmp_path: Path) -> None:
        to = tmp_path / "rex.safetensors"
        given = ["--set", "evaluation.bank=miniature", "--set", "evaluation.score_images=1"]
        given += ["--instance-images", str(instance_folder), "--within", "1"]
        output = done(published, "--format", "lora", "--to", str(to), *given)
        curve = json.loads((tmp_path / "rex.curve.json").read_text())
        assert curve["rank"] == 1
        assert curve["points"][0]["size"] <= to.stat().st_size
        assert (tmp_path / "rex.curve.png").read_bytes().startswith(b"\x89PNG")
        assert "<- chosen" in output
        for figure in (curve["whole"]["dino"], curve["points"][0]["clip_t"]):
            assert f"{figure:6.3f}" in output

    def test_of_a_model_that_is_its_base(self, tiny_pipeline: Path, tmp_path: Path) -> None:
        model = publish_changed(tiny_pipeline, tmp_path, lambda name, tensor: tensor)
        result = export(model, "--format", "lora", "--rank", "3", "--to", "rex.safetensors")
        assert (result.exit_code, "differs from its base in no layer" in result.stderr) == (2, True)
        assert list(Path().iterdir()) == []


REFUSED: dict[str, tuple[list[str], str]] = {
    "a folder for one file": (["--format", "single-file", "--to", "out"], "ends in .safetensors"),
    "a file for a folder": (["--format", "diffusers", "--to", "out.safetensors"], "expected a folder"),
    "a place that is taken": (["--format", "diffusers", "--to", "taken"], "there is something at"),
    "auto without images": (["--format", "lora", "--to", "a.safetensors"], "give them with --instance-images"),
    "another base": (
        ["--format", "lora", "--to", "a.safetensors", "--rank", "2", "--set", "base_model=miniature"],
        "name the one it was made from with --set base_model=",
    ),
    "rank 0": (["--format", "lora", "--to", "a.safetensors", "--rank", "0"], "0 is not in the range"),
    "a rank that is no number": (
        ["--format", "lora", "--to", "a.safetensors", "--rank", "some"],
        "not a valid integer",
    ),
    "a dtype of no floats": (["--format", "diffusers", "--to", "out", "--dtype", "int8"], "'int8' is not one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case: str, published: str, tmp_path: Path) -> None:
    Path("taken").mkdir()
    arguments, sentence = REFUSED[case]
    result = export(published, *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert [path.name for path in Path().iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("average", "given", "sentence"),
    [
        ({"ema_decay": None}, "--ema", "trained without a moving average, so there is none to export"),
        ({"ema_decay": 0.9}, "--no-ema", "are kept by a run with --set train.keep_unaveraged=true"),
        ({}, "--ema", "doesn't say whether its weights are a moving average; leave --ema out"),
        ({}, "--no-ema", "doesn't say whether its weights are a moving average; leave --no-ema out"),
    ],
)
@pytest.mark.parametrize("form", [["single-file"], ["lora", "--rank", "2"]])
def test_weights_that_a_model_does_not_have_are_refused(
    tiny_pipeline: Path, average: dict[str, Any], given: str, sentence: str, form: list[str], tmp_path: Path
) -> None:
    model = publish_changed(tiny_pipeline, tmp_path, lambda name, tensor: tensor, **average)
    result = export(model, "--to", "a.safetensors", given, "--format", *form)
    assert (result.exit_code, sentence in result.stderr) == (2, True), result.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("replica", "form", "sentence"),
    [
        ("deepfloyd-if", ["single-file"], "no layout of one file"),
        ("pixart-sigma", ["single-file"], "no layout of one file"),
        ("pixart-sigma", ["lora", "--rank", "2"], "no load_lora_weights"),
        ("flux-dev", ["lora", "--rank", "2", "--names", "kohya"], "leave --names at 'diffusers'"),
    ],
)
def test_a_family_that_has_no_such_form_is_refused(
    replica: str, form: list[str], sentence: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    REPLICAS[replica](base)
    model = publish(base, str(tmp_path / "model"), metadata={"key": "k"}).uri
    result = export(model, "--to", "a.safetensors", "--format", *form)
    assert (result.exit_code, sentence in result.stderr) == (2, True), result.stderr


def test_both_stages_of_a_cascade_are_in_the_folder_and_no_lora_is_made_of_it(tmp_path: Path) -> None:
    from replicas import deepfloyd

    model = tmp_path / "made"
    (model / "super_resolution").mkdir(parents=True)
    deepfloyd.build(model)
    deepfloyd.build_super_resolution(model / "super_resolution")
    metadata = {"key": "k", "base_model": "x", "super_resolution": {"base_model": "y"}}
    address = publish(model, str(tmp_path / "model"), metadata=metadata).uri
    done(address, "--format", "diffusers", "--to", str(tmp_path / "out"), "--dtype", "bfloat16")
    for stage in (".", "super_resolution"):
        weights = load_file(tmp_path / "out" / stage / "unet" / "diffusion_pytorch_model.safetensors")
        original = load_file(model / stage / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in original.items())
    result = export(address, "--format", "lora", "--rank", "2", "--to", "a.safetensors")
    assert (result.exit_code, "a cascade of two stages" in result.stderr) == (2, True)


@pytest.fixture(scope="module")
def found(tiny_pipeline: Path, published: str) -> LowRank:
    return low_rank(tiny_pipeline, Path(published), rank=128, identifier="tfz")


class TestChoice:
    """The choice by figures that are given: a rank loses 0.3 / rank of DINO, and 0.1 more without the embedding."""

    def choose(self, found: LowRank, *, within: float, embedding_matters: bool) -> Any:
        asked: list[tuple[int | None, bool]] = []

        def score(rank: int | None, embedding: bool) -> Score:
            asked.append((rank, embedding))
            lost = 0.0 if rank is None else 0.3 / rank + 0.1 * (embedding_matters and not embedding)
            return Score(step=0, dino=WHOLE["dino"] - lost, clip_t=WHOLE["clip_t"])

        curve = choose_rank(found, within=within, bank="b", score=score, size_of=lambda rank: 10 * rank)
        return curve, asked

    @pytest.mark.parametrize(("within", "rank"), [(0.5, 1), (0.16, 2), (0.11, 3), (0.055, 6), (0.021, 15)])
    def test_the_smallest_rank_within_the_bound(self, found: LowRank, within: float, rank: int) -> None:
        curve, asked = self.choose(found, within=within, embedding_matters=False)
        assert (curve.rank, curve.embedding) == (rank, False)
        ranks = [point.rank for point in curve.points]
        assert ranks == sorted(set(ranks))
        assert {2**place for place in range(rank.bit_length())} | {rank - 1 or 1, rank} <= set(ranks)
        assert len(asked) == len(set(asked))

    def test_the_embedding_is_put_in_where_the_lora_alone_loses_more(self, found: LowRank) -> None:
        curve, _ = self.choose(found, within=0.055, embedding_matters=True)
        assert (curve.rank, curve.embedding) == (6, True)

    def test_a_bound_that_no_rank_keeps_is_told_with_both_figures(self, found: LowRank) -> None:
        with pytest.raises(InputError, match=r"up to rank .* DINO 0\.\d+ against 0\.600 .* allow --within 0\.0"):
            self.choose(found, within=0.0001, embedding_matters=False)
