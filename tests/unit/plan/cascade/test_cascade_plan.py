"""The plan of a cascade has both stages: their task, keys, memory and rows."""

import dataclasses
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import BaseModel

from dreambooth.config.evaluation import EvaluationConfig
from dreambooth.config.settings import DreamBoothConfig
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
from pipelines.plan.run_plan import Plan
from pipelines.plan.sampling_memory import weights_bytes
from pipelines.stages.evaluation_task import tasks_of_subject

RESOURCES = Resources(cpus=2, gpus=0)


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
