"""The plan of a cascade: both stages, or a sentence about why they don't go together."""

import dataclasses
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pydantic import BaseModel
from replicas import cascade
from safetensors.torch import load_file, save_file

from dreambooth.config.evaluation import EvaluationConfig
from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.config.train import TrainConfig
from dreambooth.data.images import InstanceImage
from dreambooth.errors import InputError
from dreambooth.miniature import CASCADE_DIR
from pipelines.cli.main import main
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import train_task
from pipelines.plan.batch_plan import describe_batch, make_batch_plan
from pipelines.plan.capacity import describe_capacity
from pipelines.plan.describe import describe_plan
from pipelines.plan.destinations import check_destinations
from pipelines.plan.estimate import describe_estimate
from pipelines.plan.host_memory import host_phases
from pipelines.plan.pace import remember_paces
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.plan.sampling_memory import weights_bytes
from pipelines.plan.subject_checks import check_subjects
from pipelines.plan.subject_list import ListedSubject
from pipelines.stages.evaluation_task import tasks_of_subject

RESOURCES = Resources(cpus=2, gpus=0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cascade.build(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def settings(bases: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for place in range(2):
        Image.effect_noise((100, 100), 80).convert("RGB").save(photographs / f"{place}.png")
    return {
        "base_model": str(bases[0]),
        "super_resolution": {"base_model": str(bases[1]), "max_train_steps": 5},
        "subject": {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(photographs)},
        "train": {"max_train_steps": 3},
        "storage": {"root": str(tmp_path / "output")},
    }


@pytest.fixture
def planned(settings: dict[str, Any]) -> Callable[..., Plan]:
    return lambda *overrides, **given: make_plan(load_config(settings, overrides), RESOURCES, **given)


def test_a_plan_has_both_stages(planned: Callable[..., Plan], bases: tuple[Path, Path]) -> None:
    plan, alone = planned(), planned("super_resolution.base_model=null")
    second = plan.second
    assert second is not None
    assert plan.stages == (plan, second)
    assert (second.config.base_model, second.config.images.resolution) == (str(bases[1]), 64)
    assert plan.config.super_resolution.resolution == plan.config.picture_side == 64
    assert second.prior is None
    assert second.protocol is None
    assert (alone.second, alone.config.picture_side) == (None, 16)
    assert len({plan.key, alone.key, second.key}) == 3
    assert plan.base_hash != alone.base_hash == plan.base.hash
    assert plan.prior == alone.prior  # class images are the first stage's
    assert plan.published_bytes > alone.published_bytes
    assert weights_bytes(plan.bases) == weights_bytes(alone.bases) + 2 * second.base.parameter_counts["unet"]


class TestTask:
    """The message to the workers, as it arrives."""

    def test_it_says_all_that_was_planned(self, planned: Callable[..., Plan]) -> None:
        plan = planned("evaluation.protocol=own", "evaluation.bank=miniature", "images.flip=true")
        task = pickle.loads(pickle.dumps(train_task(plan, None)))
        assert [stage.config for stage in task.stages] == [stage.config for stage in plan.stages]
        for name in ("images", "engine", "key", "data_hash", "checkpoint_bytes", "sampling_dtype"):
            assert [getattr(stage, name) for stage in task.stages] == [getattr(stage, name) for stage in plan.stages]
        assert tasks_of_subject(task) == plan.evaluations

    def test_the_second_stage_is_made_once_and_does_not_travel(self, planned: Callable[..., Plan]) -> None:
        task = train_task(planned(), None)
        asked = train_task(planned(), None)
        assert asked.stages[1] is asked.stages[1]
        assert pickle.dumps(asked) == pickle.dumps(task)
        assert pickle.loads(pickle.dumps(asked)) == asked == task

    @pytest.mark.parametrize("others", [False, True])
    def test_it_carries_each_fact_once(self, planned: Callable[..., Plan], instance_folder: Path, others: bool) -> None:
        plan = planned(
            "evaluation.protocol=own",
            "evaluation.bank=miniature",
            *([f"evaluation.real_images={instance_folder}"] if others else []),
        )
        task = pickle.loads(pickle.dumps(train_task(plan, None)))
        counts = Counter(type(part) for part in parts_of(task))
        assert counts[DreamBoothConfig] == counts[EvaluationConfig] == counts[TrainConfig] == 1
        assert counts[InstanceImage] == len(plan.images) + (len(plan.compared.images) if others else 0)
        texts = Counter(part for part in parts_of(task) if isinstance(part, str))
        facts = (plan.key, plan.data_hash, plan.base.hash, *(image.address for image in plan.images))
        assert {fact: texts[fact] for fact in facts} == dict.fromkeys(facts, 1)


def parts_of(message: object) -> Iterator[object]:
    """A message and all it is made of."""
    yield message
    below: Iterable[object] = ()
    if isinstance(message, Mapping):
        below = [*message.keys(), *message.values()]
    elif isinstance(message, list | tuple | set | frozenset):
        below = message
    elif isinstance(message, BaseModel) or dataclasses.is_dataclass(message):
        below = vars(message).values()
    for part in below:
        yield from parts_of(part)


@pytest.mark.parametrize(
    "setting",
    [
        "super_resolution.max_train_steps=6",
        "super_resolution.max_train_steps=0",
        "super_resolution.learning_rate=1e-5",
        "super_resolution.noise_levels=40",
        "train.max_train_steps=4",
    ],
)
def test_settings_of_either_stage_make_another_result(planned: Callable[..., Plan], setting: str) -> None:
    assert planned(setting).key != planned().key
    assert planned(setting).base_hash == planned().base_hash  # the base's pictures are sampled as it is


SCORED = ("evaluation.every=2", "evaluation.bank=miniature")


class TestScores:
    """Both stages have them; where they choose the weights they are part of the key."""

    def test_looking_decides_nothing(self, planned: Callable[..., Plan]) -> None:
        plan = planned(*SCORED)
        assert plan.second is not None
        assert plan.second.config.evaluation.every == 2
        assert [stage.key for stage in plan.stages] == [stage.key for stage in planned().stages]

    @pytest.mark.parametrize("setting", ["train.keep=best", "train.stop_after=2"])
    def test_a_second_stage_chosen_by_pictures_of_the_first_is_of_that_first(
        self, planned: Callable[..., Plan], setting: str
    ) -> None:
        def key_of_second(*overrides: str) -> str:
            second = planned(*SCORED, *overrides).second
            assert second is not None
            return second.key

        assert key_of_second(setting, "prior.seed=1") != key_of_second(setting)
        assert key_of_second("prior.seed=1") == key_of_second()
        assert planned(*SCORED, setting).key != planned(*SCORED).key

    def test_the_best_weights_are_part_of_its_checkpoints(self, planned: Callable[..., Plan]) -> None:
        last, best = planned(*SCORED).second, planned(*SCORED, "train.keep=best").second
        assert last is not None
        assert best is not None
        assert best.checkpoint_bytes == last.checkpoint_bytes + 4 * best.trained_parameters

    def test_nothing_is_chosen_of_a_stage_that_takes_no_steps(self, planned: Callable[..., Plan]) -> None:
        plan = planned(*SCORED, "train.keep=best", "super_resolution.max_train_steps=0")
        assert plan.second is not None
        assert plan.second.key == planned("super_resolution.max_train_steps=0").second.key
        assert plan.second.config.evaluation.every is None

    def test_they_are_by_the_first_stages_bank(self, planned: Callable[..., Plan]) -> None:
        large = f"super_resolution.base_model={CASCADE_DIR / 'stage-2'}"
        plan = planned("base_model=miniature-cascade", large, "train.keep=best", "evaluation.every=2")
        assert plan.second is not None
        assert plan.second.config.evaluation.bank == "miniature"

    def test_the_rows_say_so(self, planned: Callable[..., Plan]) -> None:
        rows = dict(describe_plan(planned(*SCORED, "train.keep=best")))
        assert rows["scores"] == "every 2 steps of each stage; exported is the best checkpoint"


def test_the_first_stages_weights_wait_in_main_memory_for_those_of_the_second(planned: Callable[..., Plan]) -> None:
    plan = planned()
    assert plan.second is not None
    alone = host_phases(plan.second)
    for held, own in zip(host_phases(plan)[-len(alone) :], alone, strict=True):
        assert (held.phase, held.first) == (own.phase, own.first + 4 * plan.trained_parameters)


def test_a_second_stage_that_stays_as_it_is_takes_no_steps(planned: Callable[..., Plan]) -> None:
    plan = planned("super_resolution.max_train_steps=0", "train.lr_warmup_steps=1")
    rows = describe_plan(plan)
    assert [value for what, value in rows if what == "steps"] == ["3 of 1 instance/class pair"]
    assert [value for what, value in rows if what == "trained"][1] == "nothing, it stays as it is, at 64 px"
    assert dict(describe_batch(make_batch_plan("pets", [plan], RESOURCES)))["steps"] == "3 in all, 3 a lane"
    remember_paces(plan.config.storage.root, "pets", [(plan, 2.0)])
    assert "at the 2.0 steps/s" in dict(describe_estimate([plan], 1))["time"]
    check_destinations([plan])


@pytest.mark.parametrize("levels", ["0", "1001", "few"])
def test_impossible_noise_levels_are_refused(planned: Callable[..., Plan], levels: str) -> None:
    with pytest.raises(InputError, match=r"super_resolution\.noise_levels"):
        planned(f"super_resolution.noise_levels={levels}")


def test_more_levels_than_the_second_stages_timesteps_are_refused(
    planned: Callable[..., Plan], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    large = shutil.copytree(bases[1], tmp_path / "large")
    path = large / "image_noising_scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 500}))
    with pytest.raises(InputError, match=r"noise_levels is 501, but image_noising_scheduler .* has 500 timesteps"):
        planned(f"super_resolution.base_model={large}", "super_resolution.noise_levels=501")


def test_the_rows_show_both_stages(planned: Callable[..., Plan]) -> None:
    rows = describe_plan(planned())
    assert [value for what, value in rows if what == "steps"] == [
        "3 of 1 instance/class pair",
        "5 of 1 instance image",
    ]
    assert [value.rpartition(" at ")[2] for what, value in rows if what == "trained"] == ["16 px", "64 px"]
    memory = dict(rows)["memory per worker"]
    assert memory.count("MiB") == 2
    capacity = dict(describe_capacity(planned()))
    assert capacity["peak on 1 GPU"] != capacity["second stage: peak on 1 GPU"]
    assert capacity["second stage: 24 GB GPUs"].startswith("1 at ZeRO-0")
    batch = dict(describe_batch(make_batch_plan("pets", [planned()], RESOURCES)))
    assert batch["second stage"] == f"{planned().second.config.base_model}, hash {planned().second.base.hash}"
    assert batch["steps"] == "8 in all, 8 a lane"


def test_a_dry_run_needs_no_weights_of_either_stage(
    settings: dict[str, Any], tmp_path: Path, mlflow_database: str
) -> None:
    for name in ("small", "large"):
        base = Path(settings["base_model"]).parent / name
        shutil.copytree(base, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    command = ["run", "--images", settings["subject"]["instance_images"], "--class-noun", "dog", "--identifier", "sks"]
    command += ["--base-model", str(tmp_path / "small"), "--set", f"super_resolution.base_model={tmp_path / 'large'}"]
    planned = CliRunner().invoke(main, [*command, "--set", f"tracking.uri={mlflow_database}", "--dry-run"])
    assert planned.exit_code == 0, planned.output
    words = " ".join(planned.output.split())
    assert words.count("whose weights aren't here") == 2
    assert "second stage: peak on 1 GPU" in words
    assert "result key" not in words


def _another_width(base: Path) -> None:
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_model": 64}))


def _another_vocabulary(base: Path) -> None:
    path = base / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_ids": 0, "additional_special_tokens": ["<a>"]}))


def _other_weights(base: Path) -> None:
    path = base / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if name.endswith("wo.weight"))
    save_file(weights | {name: weights[name] * 1.001}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (_another_width, r"d_model in text_encoder/config\.json is 48 and 64"),
        (_another_vocabulary, "their vocabularies differ"),
        (_other_weights, r"wo\.weight in text_encoder has other weights"),
    ],
)
def test_stages_that_read_prompts_by_different_text_encoders_are_refused(
    planned: Callable[..., Plan],
    bases: tuple[Path, Path],
    tmp_path: Path,
    change: Callable[[Path], None],
    difference: str,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bases[1], other)
    change(other)
    with pytest.raises(InputError, match=rf"don't read prompts alike: .*{difference}\. Both stages are sampled"):
        planned(f"super_resolution.base_model={other}", weights=change is not _another_width)


def test_weights_in_half_precision_are_the_same_text_encoder(
    planned: Callable[..., Plan], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bases[1], other)
    path = other / "text_encoder" / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path, {"format": "pt"})
    assert planned(f"super_resolution.base_model={other}").second is not None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("super_resolution.resolution=128",),
            "super_resolution.resolution is 128 and images.resolution 16, but .* 64",
        ),
        (("images.resolution=32",), "super_resolution.resolution is 64 and images.resolution 32, .* expected 128"),
        (
            ("train.method=textual_inversion",),
            "train.method textual_inversion trains an embedding of text_encoder alone",
        ),
        (("train.text_encoders=all",), "train.text_encoders trains text_encoder, which both stages"),
        (("super_resolution.base_model=miniature",), r"super_resolution\.base_model 'miniature' is Stable Diffusion"),
        (
            ("super_resolution.base_model=nowhere/at/all",),
            r"^super_resolution\.base_model 'nowhere/at/all': expected 'miniature-cascade', a folder",
        ),
        (
            ("super_resolution.max_train_steps=2", "train.lr_warmup_steps=2"),
            "train.lr_warmup_steps is 2, and holds for",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    planned: Callable[..., Plan], overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        planned(*overrides)


def test_a_second_stage_that_reads_no_text_leaves_the_first_ones_text_encoder_to_be_trained(
    planned: Callable[..., Plan], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bases[1], other)
    path = other / "unet" / "config.json"
    config = json.loads(path.read_text())
    asked = (f"super_resolution.base_model={other}", "train.text_encoders=all")
    without = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3, "mid_block_type": None}
    path.write_text(json.dumps(config | without))
    with pytest.raises(InputError, match="trains text_encoder, which both stages of a cascade read prompts with"):
        planned(*asked)  # by addition_embed_type
    path.write_text(json.dumps(config | without | {"addition_embed_type": None}))
    plan = planned(*asked)
    assert plan.second is not None
    assert plan.run_text_encoders == ("text_encoder",)
    assert plan.second.run_text_encoders == ()
    with pytest.raises(InputError, match=r"train\.method textual_inversion"):
        planned(*asked, "train.method=textual_inversion")


def test_another_side_is_that_of_both(planned: Callable[..., Plan]) -> None:
    assert planned("images.resolution=24", "super_resolution.resolution=96").config.picture_side == 96
    with pytest.raises(InputError, match=r"is 100 x 100 pixels, but super_resolution\.resolution is 128;"):
        planned("images.resolution=32", "super_resolution.resolution=128")


def test_a_base_of_another_family_has_no_second_stage(planned: Callable[..., Plan]) -> None:
    with pytest.raises(
        InputError, match="their text encoders are text_encoder CLIPTextModel and text_encoder T5Encoder"
    ):
        planned("base_model=miniature", "images.resolution=16", "super_resolution.resolution=64")


def test_a_batch_finds_the_second_stage_once_and_names_its_fault(
    settings: dict[str, Any], bases: tuple[Path, Path]
) -> None:
    config = load_config(settings)
    wrong = load_config(settings, ("subject.name=tim", f"super_resolution.base_model={bases[0]}"))
    other = load_config(settings, ("subject.name=max", "subject.identifier=tfz"))
    checks = check_subjects(
        [ListedSubject(name=one.subject.name, config=one) for one in (config, wrong, other)], RESOURCES
    )
    assert [check.plan is not None and check.plan.second is not None for check in checks] == [True, False, True]
    assert "expected a model that scales up pictures" in checks[1].errors[0]
    identifiers = [check.plan.config.subject.identifier for check in checks if check.plan is not None]
    assert identifiers == ["sks", "tfz"]
    seconds = [check.plan.second for check in checks if check.plan is not None]
    assert [second.config.subject.identifier for second in seconds if second is not None] == identifiers


def test_room_for_checkpoints_of_both_stages_is_asked_for(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("train.max_train_steps=1000", "super_resolution.max_train_steps=1000", "train.checkpoint_every=100")
    assert plan.second is not None
    checkpoints = 3 * (plan.checkpoint_bytes + plan.second.checkpoint_bytes)
    kept = 2 * (plan.checkpoint_bytes + plan.second.checkpoint_bytes)
    needed = max(checkpoints, kept + plan.published_bytes) + plan.published_bytes
    free: list[int] = []

    def disk_usage(folder: Any) -> Any:
        return type("Usage", (), {"free": free[0]})

    monkeypatch.setattr("pipelines.plan.destinations.shutil.disk_usage", disk_usage)
    free[:] = [needed]
    check_destinations([plan])
    free[:] = [needed - 1]
    with pytest.raises(InputError, match=r"3 checkpoints of .*, 3 checkpoints of .*, 1 model of"):
        check_destinations([plan])
