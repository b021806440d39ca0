"""Plans of base models without weights: parameters, memory by ZeRO's stage, and the fewest GPUs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from replicas import built

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.families import FAMILIES
from pipelines.cli.main import main
from pipelines.plan import capacity
from pipelines.plan.capacity import fewest_gpus
from pipelines.plan.footprint import Footprint
from pipelines.plan.memory import peak_of
from pipelines.plan.published import published_models, published_plan
from pipelines.plan.run_plan import with_defaults_of
from pipelines.plan.sampling_memory import weights_bytes


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("replicas")
    return {name: built(name, folder / name) for name in ("flux-dev", "pixart-sigma")}


def without_weights(base: Path, copy: Path, *also: str) -> Path:
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json", *also)
    return Path(shutil.copytree(base, copy, ignore=ignored))


@pytest.mark.parametrize("name", ["flux-dev", "pixart-sigma"])
def test_counts_by_configuration_equal_those_of_the_weights(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    base = without_weights(bases[name], tmp_path / "base")
    found, whole = resolve_base_model(str(base), weights=False), resolve_base_model(str(bases[name]))
    assert found.parameter_counts == whole.parameter_counts
    assert (found.has_weights, whole.has_weights) == (False, True)
    with pytest.raises(InputError, match="is the copy complete"):
        resolve_base_model(str(base))


@pytest.mark.parametrize("beside", ["text_encoder/pytorch_model.bin", "transformer/diffusion_pytorch_model.bin"])
def test_weights_that_cannot_be_read_are_refused_even_then(bases: dict[str, Path], tmp_path: Path, beside: str) -> None:
    base = without_weights(bases["flux-dev"], tmp_path / "base")
    (base / beside).write_bytes(b"pickle")
    with pytest.raises(InputError, match="could run anything"):
        resolve_base_model(str(base), weights=False)


@pytest.mark.parametrize("name", ["flux-dev", "pixart-sigma"])
def test_blank_tokens_have_the_shapes_of_real_ones(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    base = without_weights(bases[name], tmp_path / "base", "tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
    family = BaseModel(address="", revision=None, directory=base).family
    real, blank = family.tokenize(bases[name], ["a cat"]), family.blank_tokens(base)
    assert {key: one.shape for key, one in blank.items()} == {key: one.shape for key, one in real.items()}


def test_a_dry_run_needs_no_weights(
    bases: dict[str, Path], instance_folder: Path, mlflow_database: str, tmp_path: Path
) -> None:
    base = without_weights(bases["flux-dev"], tmp_path / "base")
    command = ["run", "--images", str(instance_folder), "--class-noun", "dog", "--base-model", str(base)]
    command += ["--identifier", "xwz", "--set", "images.resolution=64", "--set", f"tracking.uri={mlflow_database}"]
    planned = CliRunner().invoke(main, [*command, "--dry-run", "--verbose"])
    assert planned.exit_code == 0, planned.output
    words = " ".join(planned.output.split())
    for told in (
        "whose weights aren't here",
        "num_inference_steps: 28",
        "guidance_scale: 3.5",
        "peak on 1 GPU ZeRO-0",
        "prompts encoded by text_encoder_2",
        "24 GB GPUs 1 at ZeRO-0, 1 at ZeRO-1",
    ):
        assert told in words
    assert "result key" not in words
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code != 0
    assert "is the copy complete" in str(refused.output) + str(refused.exception)


class TestDefaults:
    def config(self, base: Path, *overrides: str) -> tuple[object, object, object]:
        subject = {"name": "rex", "class_noun": "dog", "instance_images": "photos"}
        config = with_defaults_of(
            load_config({"base_model": str(base), "subject": subject}, overrides), resolve_base_model(str(base))
        )
        return config.evaluation.num_inference_steps, config.evaluation.guidance_scale, config.prior.guidance_scale

    def test_they_take_effect_where_nothing_was_given(self, bases: dict[str, Path]) -> None:
        assert self.config(bases["flux-dev"]) == (28, 3.5, 3.5)
        given = "evaluation.num_inference_steps=25", "prior.guidance_scale=7.5"
        assert self.config(bases["flux-dev"], *given) == (25, 3.5, 7.5)

    def test_those_of_stable_diffusion_are_the_settings_own(self, tiny_pipeline: Path) -> None:
        base, subject = resolve_base_model(str(tiny_pipeline)), {"name": "r", "class_noun": "d", "instance_images": "p"}
        config = load_config({"base_model": str(tiny_pipeline), "subject": subject})
        assert with_defaults_of(config, base) == config

    def test_those_of_the_miniature_stay(self) -> None:
        config = load_config({"subject": {"name": "r", "class_noun": "d", "instance_images": "p"}})
        assert with_defaults_of(config, resolve_base_model("miniature")) == config

    def test_min_snr_is_refused_where_it_has_no_meaning(self, bases: dict[str, Path]) -> None:
        with pytest.raises(InputError, match="in which min-SNR weighting has no meaning"):
            self.config(bases["flux-dev"], "train.min_snr_gamma=5")
        self.config(bases["pixart-sigma"], "train.min_snr_gamma=5")


class TestFewest:
    @pytest.mark.parametrize(("stage", "workers", "each"), [(0, 8, 16), (1, 4, 11), (2, 4, 8), (3, 4, 5)])
    def test_zero_divides_states(self, stage: int, workers: int, each: float) -> None:
        assert Footprint(trained=1000).state_bytes(stage, workers) == each * 1000

    @pytest.mark.parametrize(("stage", "more"), [(0, 0), (1, 0), (2, 0), (3, 8 * 10**9)])
    def test_zero_3_keeps_what_it_gathers_for_two_calls(self, stage: int, more: int) -> None:
        """Three billion parameters instead of the one billion that it keeps otherwise."""
        once, twice = (
            Footprint(trained=3 * 10**9, halves_apart=apart).peak_bytes(stage, 4, lambda keep: 0)
            for apart in (False, True)
        )
        assert twice - once == more

    @pytest.mark.parametrize(
        ("stage", "fp32", "bf16"),
        [
            # Beside weights, sums of gradients, masters and moments: all gradients, or one piece of all, to be sent.
            (1, 4 + 4 + 3 + 1, 2 + 4 + 3 + 4 + 2),
            (2, 4 + 1 + 3, 2 + 1 + 3),
            (3, 1 + 1 + 3 + 4, 0.5 + 1 + 3 + 2),
        ],
    )
    def test_bf16_weights_at_their_peak(self, stage: int, fp32: float, bf16: float) -> None:
        """In bytes a parameter on four workers; ZeRO-3 has all of them gathered."""
        for weight, each in ((4, fp32), (2, bf16)):
            assert Footprint(trained=1000, weight=weight).peak_bytes(stage, 4, lambda keep: 0) == each * 1000

    @pytest.mark.parametrize(("weight", "stage", "each"), [(4, 1, 4), (2, 1, 2 + 1), (2, 2, 2 + 1), (2, 3, 0.5 + 2)])
    def test_offload_at_its_peak(self, weight: int, stage: int, each: float) -> None:
        """For bf16 weights ZeRO-1 and 2 keep a worker's fp32 gradients on the device; ZeRO-3 gathers weights."""
        footprint = Footprint(trained=1000, weight=weight, offload_optimizer=True, bucket=10)
        peak = footprint.peak_bytes(stage, 4, lambda keep: 7000 if keep else 5000)
        assert peak == each * 1000 + 5000 + 10

    def test_micro_steps_leave_gradients_beside_activations(self) -> None:
        one, several = (
            Footprint(trained=1000, accumulates=each).peak_bytes(0, 1, lambda keep: 7000 if keep else 5000)
            for each in (False, True)
        )
        assert (one, several) == (12_000 + 7000, 12_000 + 4000 + 5000)

    def test_a_captured_step_keeps_its_gradients(self) -> None:
        """An eager one has all of them only at the end of its backward pass, when activations are gone."""
        eager, captured = (
            Footprint(trained=1000, captured=each).peak_bytes(0, 1, lambda keep: 7000 if keep else 5000)
            for each in (False, True)
        )
        assert (eager, captured) == (12_000 + 7000, 16_000 + 5000)

    def test_fewest_is_fewest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = published_plan(next(one for one in published_models() if one.address == "flux.1-dev"))
        monkeypatch.setattr("pipelines.plan.memory._step_bytes", lambda *_: 20 * 2**30)
        for size in (80, 141):
            for stage, count in fewest_gpus(plan, size).by_stage.items():
                room = size * capacity._USABLE
                assert peak_of(plan, stage, count) <= room
                assert count == 1 or peak_of(plan, stage, count - 1) > room
        assert not fewest_gpus(plan, 24).by_stage
        offloaded = "zero.offload_optimizer", "zero.offload_parameters"
        assert fewest_gpus(plan, 24).changes == (*offloaded, "train.text_encoders: none")

    def test_changes_are_named_where_they_help(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = published_plan(next(one for one in published_models() if one.address == "stable-diffusion-1.5"))
        train = plan.config.train.model_copy(update={"gradient_checkpointing": False})
        plan = replace(plan, config=plan.config.model_copy(update={"train": train}))

        def step_bytes(plan: object, keep_gradients: bool) -> int:
            return (2 if plan.config.train.gradient_checkpointing else 30) * 2**30  # type: ignore[attr-defined]

        monkeypatch.setattr("pipelines.plan.memory._step_bytes", step_bytes)
        fewest = fewest_gpus(plan, 24)
        assert fewest.changes == ("train.gradient_checkpointing",)
        assert fewest.by_stage


PUBLISHED = {
    "stable-diffusion-1.5": {"unet": 859.5, "text_encoder": 123.1, "vae": 83.7},
    "stable-diffusion-2.1": {"unet": 865.9, "text_encoder": 340.4, "vae": 83.7},
    "stable-diffusion-xl": {"unet": 2567.5, "text_encoder": 123.1, "text_encoder_2": 694.7, "vae": 83.7},
    "stable-diffusion-3-medium": {"transformer": 2028.3, "text_encoder_2": 694.7, "text_encoder_3": 4762.3},
    "stable-diffusion-3.5-medium": {"transformer": 2243.2, "text_encoder_2": 694.7, "text_encoder_3": 4762.3},
    "stable-diffusion-3.5-large": {"transformer": 8056.6, "text_encoder_2": 694.7, "text_encoder_3": 4762.3},
    "flux.1-dev": {"transformer": 11901.4, "text_encoder": 123.1, "text_encoder_2": 4762.3},
    "flux.1-schnell": {"transformer": 11891.2, "text_encoder": 123.1, "text_encoder_2": 4762.3},
    "deepfloyd-if-i-m": {"unet": 371.6, "text_encoder": 4762.3},
    "deepfloyd-if-i-xl": {"unet": 4304.7, "text_encoder": 4762.3},
    "pixart-sigma-1024": {"transformer": 610.9, "text_encoder": 4762.3, "vae": 83.7},
}
"""Millions of parameters, of the published weights."""


@pytest.mark.parametrize("base", published_models(), ids=lambda base: base.address)
def test_published_parameters(base: BaseModel) -> None:
    counts = {part: round(count / 1e6, 1) for part, count in base.parameter_counts.items()}
    expected = PUBLISHED[base.address]
    assert {part: counts[part] for part in expected} == expected


def test_the_page_of_families_has_every_family_and_its_parameters() -> None:
    from pipelines.cli.families_page import families_table

    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    for row in families_table():
        assert row in page, "run: dreambooth families --markdown > docs/families.md"
    for base in published_models():
        counts = "<br>".join(f"`{part}` {count / 1e6:.1f}" for part, count in base.parameter_counts.items())
        assert f"| {base.address} | {base.resolution} | {counts} |" in page
    assert {base.pipeline_class for base in published_models()} <= {family.pipeline_class for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_of_families_is_up_to_date() -> None:
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    result = CliRunner().invoke(main, ["families", "--markdown"])
    assert result.stdout == page, "run: dreambooth families --markdown > docs/families.md"


def test_a_sampler_holds_halves_and_the_vae_whole() -> None:
    plan = published_plan(next(one for one in published_models() if one.address == "stable-diffusion-1.5"))
    counts = plan.base.parameter_counts
    assert weights_bytes(plan.bases) == 2 * (counts["unet"] + counts["text_encoder"]) + 4 * counts["vae"]
