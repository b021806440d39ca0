"""Both stages of a cascade in a lane's hands: trained, struck, gone on with, published as one, sampled."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from replicas import cascade
from safetensors.torch import load_file

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.evaluation.banks import load_bank
from dreambooth.evaluation.metrics import clip_t
from dreambooth.evaluation.prompts import sample_seed
from dreambooth.evaluation.similarity import mean_pairwise_similarity
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.weight_files import weight_files
from dreambooth.sampling.sampler import load_pipeline, sample
from pipelines.cli import main
from pipelines.cluster.preemption import WATCHER_SWITCH
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import find_result, train_task
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.stages.photographs import read_photographs
from pipelines.storage.files import join, read_json
from pipelines.storage.publications import Manifest, read_manifest
from pipelines.tasks import SampleRequest, Source
from pipelines.worker.lane_reports import Reports
from pipelines.worker.publish import TrainedStage, publish_result, published_weights
from pipelines.worker.samplers import ImageSampler
from pipelines.worker.stage_training import StageTraining

FIRST, SECOND = 3, 5
PROMPTS = ("a photo of sks dog", "a photo of a dog")


class Killed(Exception):
    """Stands for whatever ends a process in the middle of a training."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cascade.build(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for place in range(2):
        Image.radial_gradient("L").rotate(90 * place).convert("RGB").save(folder / f"{place}.png")
    return folder


@pytest.fixture(scope="module")
def make(bases: tuple[Path, Path], photographs: Path) -> Callable[..., Plan]:
    def planned(folder: Path, *overrides: str) -> Plan:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(photographs)}
        plain: dict[str, Any] = {
            "base_model": str(bases[0]),
            "super_resolution": {"base_model": str(bases[1]), "max_train_steps": SECOND, "learning_rate": 1e-3},
            "subject": subject,
            "prior": {"prior_loss_weight": 0},
            "train": {"max_train_steps": FIRST, "learning_rate": 1e-3, "checkpoint_every": 2, "ema_decay": 0.5},
            "evaluation": {"enabled": False},
            "storage": {"root": str(folder)},
        }
        return make_plan(load_config(plain, overrides), Resources(cpus=2, gpus=0))

    return planned


def trained(plan: Plan, *, until: tuple[int, int] | None = None) -> list[TrainedStage]:
    """Train as a new worker does; `until` ends it after a step of a stage."""
    stages: list[TrainedStage] = []
    for place, task in enumerate(train_task(plan, None).stages):

        def tell(message: dict[str, Any], place: int = place) -> None:
            if message["kind"] == "step" and (place, message["metrics"]["step"]) == until:
                raise Killed

        stage = StageTraining("cpu", 0, scales_up=place == 1)
        stages.append(stage.train(task, tell, lambda: False, stages[0] if place else None))
    return stages


@pytest.fixture(autouse=True)
def _no_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WATCHER_SWITCH, "0")


@pytest.fixture(scope="module")
def calm(make: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[TrainedStage]]:
    """A cascade that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WATCHER_SWITCH, "0")
        plan = make(tmp_path_factory.mktemp("calm"))
        return plan, trained(plan)


def losses(stage: TrainedStage) -> list[float]:
    return [step["loss"] for step in stage.tuned.record["history"]]


def assert_same(one: TrainedStage, other: TrainedStage) -> None:
    assert losses(one) == losses(other)
    assert one.tuned.state.keys() == other.tuned.state.keys()
    assert [name for name, tensor in one.tuned.state.items() if not torch.equal(tensor, other.tuned.state[name])] == []


@pytest.mark.parametrize(
    ("strikes", "resumed"),
    [
        ([(0, 3)], [2, 0]),
        ([(1, 1)], [FIRST, 0]),
        ([(1, 4)], [FIRST, 2]),
        ([(0, 3), (1, 3), (1, 5)], [FIRST, 4]),
    ],
)
def test_a_struck_cascade_ends_as_if_nothing_had_happened(
    calm: tuple[Plan, list[TrainedStage]],
    make: Callable[..., Plan],
    tmp_path: Path,
    strikes: list[tuple[int, int]],
    resumed: list[int],
) -> None:
    plan = make(tmp_path)
    assert plan.key == calm[0].key
    for strike in strikes:
        with pytest.raises(Killed):
            trained(plan, until=strike)
    found = trained(plan)
    assert [stage.tuned.record["resumed_from"] for stage in found] == resumed
    for one, other in zip(found, calm[1], strict=True):
        assert_same(one, other)
    publish_result(found)
    result = find_result(plan)
    assert result is not None
    assert result.second is not None
    assert result.seconds > 0
    assert (result.steps, result.second.steps) == (FIRST, SECOND)


SCORED = (
    "evaluation.every=2",
    "evaluation.bank=miniature",
    "evaluation.prompts=['a [V] {class_noun}', '[V] at night']",
    "evaluation.num_inference_steps=2",
    "storage.dtype=float32",
)


def test_scores_of_the_second_stage_are_those_of_the_cascades_pictures_and_change_nothing(
    calm: tuple[Plan, list[TrainedStage]], make: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = make(tmp_path, *SCORED)
    task, found = train_task(plan, None), trained(plan)
    for one, other in zip(found, calm[1], strict=True):
        assert_same(one, other)
    first, second = (stage.tuned.record["scores"] for stage in found)
    assert [score["step"] for score in first] == [2, 3]
    assert [score["step"] for score in second] == [2, 4, 5]
    sampler, source = ImageSampler(use_gpu=False), Source(address="trained:rex")
    sampler.give_weights(source, task.tuned_base, published_weights(found))
    settings = plan.config.evaluation
    prompts = [prompt for prompt in settings.prompts_of(plan.config.subject, plan.config.prompts) for _ in range(2)]
    request = SampleRequest(
        prompts=tuple(prompts),
        seeds=tuple(sample_seed(settings.seed, prompt, place % 2) for place, prompt in enumerate(prompts)),
        num_inference_steps=2,
        guidance_scale=settings.guidance_scale,
        resolution=16,
        dtype=plan.sampling_dtype,
    )
    bank = load_bank("miniature")
    seen = bank.embed_images([Image.open(io.BytesIO(one)) for one in sampler.samples(source, request)])
    real = [Image.open(io.BytesIO(one)) for one in read_photographs(plan.config, plan.images, 64).squares]
    similarity = mean_pairwise_similarity(seen.dino, bank.embed_images(real).dino)
    assert second[-1]["dino"] == pytest.approx(similarity, abs=1e-6)
    assert second[-1]["clip_t"] == pytest.approx(clip_t(seen.clip, bank.embed_texts(prompts)), abs=1e-6)


def test_the_second_stages_best_weights_are_published_and_a_resume_is_exact(
    make: Callable[..., Plan], tmp_path: Path
) -> None:
    best = (*SCORED, "train.keep=best", "evaluation.score_images=1")
    whole, struck = make(tmp_path / "whole", *best), make(tmp_path / "struck", *best)
    expected = trained(whole)
    scores = {int(score["step"]): score["score"] for score in expected[1].tuned.record["scores"]}
    step = max(scores, key=lambda step: scores[step])
    assert expected[1].tuned.record["exported_step"] == step
    with pytest.raises(Killed):
        trained(struck, until=(1, SECOND))
    found = trained(struck)
    assert [stage.tuned.record["resumed_from"] for stage in found] == [FIRST, 4]
    for name in ("scores", "exported_step"):
        assert [one.tuned.record[name] for one in found] == [one.tuned.record[name] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    model = publish_result(found)
    assert model.metadata["super_resolution"]["step"] == step
    result = find_result(struck)
    assert result is not None
    assert result.second is not None
    assert (result.second.exported_step, len(result.second.scores)) == (step, 3)
    # What is published is what a training of as many steps ends with.
    shorter = make(tmp_path / "shorter", f"super_resolution.max_train_steps={step}")
    state, ended = found[1].tuned.state, trained(shorter)[1].tuned.state
    assert [name for name, tensor in state.items() if not torch.equal(tensor, ended[name])] == []


def test_a_stage_that_ended_early_is_not_trained_on(
    calm: tuple[Plan, list[TrainedStage]], make: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.worker.fidelity.FidelityScorer", Falling)
    plan = make(tmp_path, "evaluation.every=1", "train.stop_after=1", "evaluation.bank=miniature")
    with pytest.raises(Killed):
        trained(plan, until=(1, 2))
    for stage, other in zip(trained(plan), calm[1], strict=True):
        assert stage.tuned.record["steps"] == 2
        assert losses(stage) == losses(other)[:2]
    assert trained(plan)[0].tuned.record["resumed_from"] == 2


class Falling:
    """Scores that fall: the second one ends the training."""

    def __init__(self, config: DreamBoothConfig, images: Any, **of_the_run: Any) -> None:
        pass

    def score(self, step: int, state: dict[str, Any]) -> Any:
        from dreambooth.training.best_checkpoint import Score

        return Score(step=step, dino=-step, clip_t=0.0)


def test_without_a_second_stage_no_checkpoint_is_added(make: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make(tmp_path, "super_resolution.base_model=null", "train.checkpoint_every=100")
    assert plan.stages == (plan,)
    [alone] = trained(plan)
    assert losses(alone)
    assert not Path(plan.config.run_uri, "checkpoints").exists()


def test_the_last_steps_weights_are_kept_beside_the_average_and_exported(
    make: Callable[..., Plan], calm: tuple[Plan, list[TrainedStage]], tmp_path: Path
) -> None:
    averaged, plain = make(tmp_path / "a", "train.keep_unaveraged=true"), make(tmp_path / "p", "train.ema_decay=null")
    assert averaged.key != calm[0].key  # a result without them isn't taken for one with them
    models = [publish_result(trained(plan)) for plan in (averaged, plain)]
    assert [model.metadata["ema_decay"] for model in models] == [0.5, None]
    found = {}
    for name, model, average in (
        ("ema", models[0], "--ema"),
        ("no-ema", models[0], "--no-ema"),
        ("plain", models[1], "--no-ema"),
    ):
        to = tmp_path / name
        result = CliRunner().invoke(
            main, ["export", model.uri, "--format", "diffusers", "--to", str(to), average, "--quiet"]
        )
        assert result.exit_code == 0, result.output
        found[name] = {
            path.relative_to(to): path.read_bytes() for path in to.rglob("*.safetensors") if "unet" in path.parts
        }
        assert "moving average, decay" not in (to / "README.md").read_text() or name == "ema"
    assert len(found["plain"]) == 2
    assert found["no-ema"] == found["plain"]
    assert all(found["ema"][path] != content for path, content in found["plain"].items())


@pytest.fixture(scope="module")
def model(calm: tuple[Plan, list[TrainedStage]]) -> Manifest:
    return publish_result(calm[1])


def test_both_are_published_once_with_one_manifest(calm: tuple[Plan, list[TrainedStage]], model: Manifest) -> None:
    plan, _ = calm
    assert plan.second is not None
    [folder] = Path(plan.config.run_uri, "model").iterdir()
    assert str(folder) == model.uri
    assert {"unet/diffusion_pytorch_model.safetensors", "super_resolution/model_index.json"} <= model.files.keys()
    metadata = read_manifest(model.uri).metadata
    assert (metadata["key"], metadata["base_hash"], metadata["step"]) == (plan.key, plan.base.hash, FIRST)
    assert metadata["super_resolution"] == {
        "base_model": plan.second.config.base_model,
        "base_hash": plan.second.base.hash,
        "resolution": 64,
        "step": SECOND,
        "ema_decay": plan.second.config.train.ema_decay,
    }


def sampled(sampler: ImageSampler, source: Source) -> list[Image.Image]:
    request = SampleRequest(
        prompts=PROMPTS, seeds=(3, 4), num_inference_steps=2, guidance_scale=3.0, resolution=16, dtype="float32"
    )
    return [Image.open(io.BytesIO(picture)) for picture in sampler.samples(source, request)]


def same(some: list[Image.Image], others: list[Image.Image]) -> bool:
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(some, others, strict=True))


def test_an_evaluation_sees_the_same_pictures_before_and_after_publishing(
    calm: tuple[Plan, list[TrainedStage]], model: Manifest
) -> None:
    plan, stages = calm
    task, sampler = train_task(plan, None), ImageSampler(use_gpu=False)
    base = sampled(sampler, task.base)
    in_memory = Source(address="trained:rex")
    sampler.give_weights(in_memory, task.base, published_weights(stages))
    before = sampled(sampler, in_memory)
    assert [picture.size for picture in [*base, *before]] == [(64, 64)] * 4
    assert same(sampled(sampler, task.base), base)  # its own weights are back, in both stages
    assert same(sampled(sampler, Source(address=model.uri, published=True)), before)
    pipeline = load_pipeline(Path(model.uri))
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "dtype": torch.float32}
    assert same(sample(pipeline, PROMPTS, [3, 4], **settings), before)
    assert not same(base, before)
    small = load_pipeline(resolve_base_model(plan.config.base_model).directory, alone=True)
    assert sample(small, PROMPTS[:1], [3], **settings)[0].size == (16, 16)


def test_another_noise_of_the_small_picture_is_published_and_sampled(
    calm: tuple[Plan, list[TrainedStage]], make: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = make(tmp_path, "super_resolution.noise_levels=40")
    first, second = trained(plan)
    assert_same(first, calm[1][0])
    assert losses(second) != losses(calm[1][1])
    model, task, sampler = publish_result([first, second]), train_task(plan, None), ImageSampler(use_gpu=False)
    noising = read_json(join(model.uri, "super_resolution", "image_noising_scheduler", "scheduler_config.json"))
    assert noising["_levels"] == 40
    base, in_memory = sampled(sampler, task.base), Source(address="trained:rex")
    sampler.give_weights(in_memory, task.tuned_base, published_weights([first, second]))
    before = sampled(sampler, in_memory)
    assert same(sampled(sampler, Source(address=model.uri, published=True)), before)
    assert same(sampled(sampler, task.base), base)  # at the base's own level
    assert same(sampled(sampler, train_task(calm[0], None).base), base)
    sampler.give_weights(in_memory, task.base, published_weights([first, second]))
    assert not same(sampled(sampler, in_memory), before)
    write_delta(plan.base, Path(model.uri), tmp_path / "delta", None if plan.second is None else plan.second.base)
    rebuilt = rebuild(tmp_path / "delta", tmp_path / "rebuilt")
    assert all((rebuilt / name).read_bytes() == Path(model.uri, name).read_bytes() for name in model.files)


def test_a_second_stage_of_no_steps_is_published_as_it_was(
    calm: tuple[Plan, list[TrainedStage]], make: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = make(tmp_path, "super_resolution.max_train_steps=0", "train.lr_warmup_steps=0")
    first, second = trained(plan)
    assert_same(first, calm[1][0])
    publish_result([first, second])
    result = find_result(plan)
    assert result is not None
    assert result.second is not None
    assert (result.second.steps, result.second.history, result.seconds > 0) == (0, (), True)
    assert plan.second is not None
    [path] = weight_files(plan.second.base.directory, plan.second.base.family.denoiser)
    weights = load_file(path)
    published = load_file(Path(result.model.uri, "super_resolution", "unet", "diffusion_pytorch_model.safetensors"))
    assert published.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].to(tensor.dtype)) for name, tensor in published.items())


def test_a_delta_is_exact_and_small(calm: tuple[Plan, list[TrainedStage]], model: Manifest, tmp_path: Path) -> None:
    plan, directory = calm[0], Path(model.uri)
    assert plan.second is not None
    write_delta(plan.base, directory, tmp_path / "delta", plan.second.base)
    rebuilt = rebuild(tmp_path / "delta", tmp_path / "rebuilt")
    for name in model.files:
        assert (rebuilt / name).read_bytes() == (directory / name).read_bytes(), name
    kept = {path.relative_to(tmp_path / "delta").as_posix() for path in (tmp_path / "delta").rglob("*")}
    assert "super_resolution/text_encoder" not in kept  # the base's own
    assert "manifest.json" not in kept  # which a registered version doesn't hold
    assert not (rebuilt / "manifest.json").exists()
    weights = Path("super_resolution", "unet", "diffusion_pytorch_model.safetensors")
    assert Path(tmp_path, "delta", weights).stat().st_size < Path(directory, weights).stat().st_size


def test_steps_of_the_second_stage_count_after_those_of_the_first(calm: tuple[Plan, list[TrainedStage]]) -> None:
    sent: list[Any] = []

    class Queue:
        def start(self, method: str, name: str, progress: Any, messages: Any) -> None:
            sent.append(progress)

    queue: Any = Queue()
    reports = Reports(queue, train_task(calm[0], None), 0.0)
    metrics = {"images_per_second": 1.0, "loss": 1.0}
    for message in (
        {"kind": "phase", "phase": "training", "start": 1},
        {"kind": "step", "metrics": metrics | {"step": 3}},
        {"kind": "phase", "phase": "training", "start": 2, "stage": "super_resolution"},
        {"kind": "step", "metrics": metrics | {"step": 4}, "stage": "super_resolution"},
    ):
        reports.report(message)
    assert [(progress.step, progress.steps) for progress in sent] == [(1, 8), (3, 8), (5, 8), (7, 8)]
