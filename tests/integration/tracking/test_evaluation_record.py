"""An evaluation's figures in a real MLflow, on a version's tags, and where the alias `champion` goes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow_server import MlflowServer

from dreambooth.config.evaluation import GateConfig
from dreambooth.config.settings import TrackingConfig
from dreambooth.errors import InputError
from pipelines.cli import main
from pipelines.tracking.client import connect, default_tracking, quietly
from pipelines.tracking.evaluation_record import pass_gate, record_evaluation
from pipelines.tracking.model_list import list_models
from pipelines.tracking.registry import RESULT_TAG, RegisteredVersion
from pipelines.tracking.runs import track

NAME = "dreambooth-rex"


def evaluation(key: str = "k1", *, bank: str = "miniature", bank_hash: str = "b1", **figures: float) -> dict[str, Any]:
    means = {"dino": 0.7, "clip_t": 0.3, "pres": 0.2} | figures
    return {
        "key": key,
        "bank": {"name": bank, "hash": bank_hash},
        "prompts_key": "p1",
        "prompt_list": "miniature",
        "figures": {name: {"mean": mean, "low": mean, "high": mean, "n": 25} for name, mean in means.items()},
        "per_prompt": [{"prompt": "a photo of tfz dog", "dino": means["dino"]}],
    }


class Registry:
    """A tracking database with one registered model, whose versions are measured as they come."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = connect(uri)
        with quietly():
            self.client.create_registered_model(NAME)

    def version(self, *evaluations: dict[str, Any], **about: str) -> RegisteredVersion:
        tags = {RESULT_TAG: "key"} | about
        with track(TrackingConfig(uri=self.uri), run_name="rex") as run, quietly(), default_tracking(self.uri):
            model = self.client.create_logged_model(run.experiment_id, name="rex", source_run_id=run.run_id, tags=tags)
            made = self.client.create_model_version(
                NAME,
                source=f"models:/{model.model_id}",
                run_id=run.run_id,
                tags=tags,
                model_id=model.model_id,
            )
            number = int(made.version)
            version = RegisteredVersion(
                name=NAME, version=number, uri=f"models:/{NAME}/{number}", model_id=model.model_id
            )
            for one in evaluations:
                record_evaluation(run, version, one)
        return version

    def tags(self, version: RegisteredVersion) -> dict[str, str]:
        with quietly():
            return dict(self.client.get_model_version(NAME, str(version.version)).tags)

    @property
    def champion(self) -> int | None:
        with quietly():
            number = self.client.get_registered_model(NAME).aliases.get("champion")
        return None if number is None else int(number)

    def judge(self, version: RegisteredVersion, *, bank: str = "miniature", force: bool = False) -> bool:
        return pass_gate(self.uri, version, GateConfig(), bank, force=force).moved


@pytest.fixture
def registry(tracking_in: Callable[[Path], str], tmp_path: Path) -> Registry:
    return Registry(tracking_in(tmp_path))


def test_figures_are_metrics_of_the_model_tags_of_the_version_and_a_table(registry: Registry) -> None:
    version = registry.version(evaluation(dino=0.71234567))
    tags = registry.tags(version)
    assert tags["miniature.dino"] == "0.712346"
    assert (tags["miniature.hash"], tags["miniature.prompt_list"]) == ("b1", "miniature")
    with quietly():
        model = registry.client.get_logged_model(version.model_id)
        assert {metric.key: metric.value for metric in model.metrics or []}["miniature/dino"] == 0.71234567
        run_id = registry.client.get_model_version(NAME, "1").run_id
        assert {one.path for one in registry.client.list_artifacts(str(run_id), "evaluation/miniature-k1")} == {
            "evaluation/miniature-k1/prompts.json",
            "evaluation/miniature-k1/evaluation.json",
        }


def test_recorded_twice_is_recorded_once(registry: Registry) -> None:
    registry.version(evaluation(), evaluation())
    with quietly():
        run_id = registry.client.get_model_version(NAME, "1").run_id
        assert len(registry.client.get_metric_history(str(run_id), "miniature/dino")) == 1


def test_going_back_to_earlier_prompts_moves_the_tags_and_repeats_no_table(registry: Registry) -> None:
    version = registry.version(evaluation(dino=0.7), evaluation("k2", dino=0.6), evaluation(dino=0.7))
    assert registry.tags(version)["miniature.dino"] == "0.700000"
    with quietly(), default_tracking(registry.uri):
        run_id = str(registry.client.get_model_version(NAME, "1").run_id)
        path = registry.client.download_artifacts(run_id, "evaluation/miniature-k1/prompts.json")
    assert len(json.loads(Path(path).read_text())["data"]) == 1


@pytest.mark.parametrize("kind", ["database", "server"])
def test_models_are_found_by_what_they_are_and_how_good(kind: str, registry: Registry, tmp_path: Path) -> None:
    server = MlflowServer(tmp_path)
    if kind == "server":
        server.start()
        registry.uri, registry.client = server.uri, connect(server.uri)
    try:
        good = registry.version(evaluation(clip_t=0.31), subject="rex", class_noun="dog", verdict="bound")
        registry.version(evaluation("k2", clip_t=0.29), evaluation("k3", bank="paper", dino=0.4), subject="rex")

        def found(where: str | None) -> list[int]:
            return [model.version for model in list_models(registry.uri, where)]

        assert found(None) == [2]
        assert found("miniature/clip_t > 0.3") == [1]  # the newest that fits
        assert found("miniature/clip_t > 0.2 and subject = rex") == [2]
        assert found("class_noun = dog and version < 2 and verdict = bound") == [1]
        assert found("paper/dino > 0.5") == found("subject = other") == found("similarity/identifier > 0") == []
        with pytest.raises(InputError, match="clip_t may be miniature/clip_t or paper/clip_t"):
            found("clip_t > 0.3")
        with quietly():
            experiment = registry.client.get_experiment_by_name("dreambooth").experiment_id
            where = "metrics.`miniature/clip_t` > 0.3 AND tags.subject = 'rex' AND tags.class_noun = 'dog'"
            assert [one.model_id for one in registry.client.search_logged_models([experiment], where)] == [
                good.model_id
            ]
    finally:
        if kind == "server":
            server.kill()


def test_figures_of_two_banks_stay_apart(registry: Registry) -> None:
    registry.version(evaluation(), evaluation("k2", bank="paper", bank_hash="b2", dino=0.4))
    [listed] = list_models(registry.uri)
    assert listed.figures["miniature"]["dino"] == 0.7
    assert listed.figures["paper"] == {"dino": 0.4, "clip_t": 0.3, "pres": 0.2}


def test_figures_of_encoders_beside_the_bank_stay_apart(registry: Registry) -> None:
    measured = evaluation()
    measured["figures"]["dinov2"] = measured["figures"]["dino"] | {
        "bank": {"name": "dinov2", "hash": "d1"},
        "mean": 0.5,
    }
    version = registry.version(measured)
    [listed] = list_models(registry.uri)
    assert listed.figures["miniature"] == {"dino": 0.7, "clip_t": 0.3, "pres": 0.2}
    assert listed.figures["dinov2"] == {"dinov2": 0.5}
    assert registry.tags(version)["dinov2.hash"] == "d1"
    [found] = list_models(registry.uri, "dinov2 > 0.4 and miniature/dino > 0.6")
    assert found.version == version.version
    assert registry.judge(version)


def test_the_list_has_columns_of_the_subjects_figures(registry: Registry) -> None:
    """Those of models with masks."""
    measured = evaluation(dino_subject=0.625, dino_subject_patches=0.375)
    measured["figures"]["dinov2_subject_patches"] = measured["figures"]["dino"] | {
        "bank": {"name": "dinov2", "hash": "d1"},
        "mean": 0.125,
    }
    registry.version(measured)
    result = CliRunner().invoke(main, ["models", "--tracking-uri", registry.uri])
    assert result.exit_code == 0, result.output
    *_, banks, names, row = result.output.splitlines()
    figures = dict(zip(names.split()[-6:], row.split()[-6:], strict=True))
    assert figures == {
        "DINOV2-SUBJECT-PATCHES": "0.12",
        "DINO": "0.70",
        "DINO-SUBJECT": "0.62",
        "DINO-SUBJECT-PATCHES": "0.38",
        "CLIP-T": "0.30",
        "PRES": "0.20",
    }
    assert banks.split()[-6:] == ["dinov2", *["miniature"] * 5]


def test_the_champion_moves_to_what_is_as_good_and_says_why(registry: Registry) -> None:
    first, worse, better = (registry.version(evaluation(f"k{dino}", dino=dino)) for dino in (0.7, 0.5, 0.8))
    assert registry.judge(first)
    assert registry.champion == 1
    assert not registry.judge(worse)
    assert registry.champion == 1
    assert registry.tags(worse)["gate.moved"] == "false"
    assert registry.tags(worse)["gate.reason"].startswith("dino is 0.500, more than 0.02 under the 0.700 of version 1")
    assert registry.judge(better)
    assert registry.champion == 3
    assert registry.tags(better)["gate.champion"] == "1"
    assert registry.judge(worse, force=True)
    assert registry.champion == 2


def test_it_never_moves_without_figures_nor_by_those_of_another_bank(registry: Registry) -> None:
    first = registry.version(evaluation())
    assert registry.judge(first)
    unmeasured = registry.version()
    assert not registry.judge(unmeasured, force=True)
    other = registry.version(evaluation("k3", bank="paper", bank_hash="b2", dino=0.99))
    assert not registry.judge(other, bank="paper")
    retrained = registry.version(evaluation("k4", bank_hash="b3", dino=0.99))
    assert not registry.judge(retrained)
    assert registry.champion == 1
