"""The paper's figures of a run, in MLflow, on the version's tags, and what the gate makes of them."""

from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import InputError
from dreambooth.miniature import subject_dir
from pipelines.apps.evaluate_model import evaluate_model
from pipelines.driver.cards import find_card
from pipelines.driver.console import RunConsole
from pipelines.driver.personalize import personalize
from pipelines.storage.publications import read_manifest
from pipelines.tracking.client import connect, quietly
from pipelines.tracking.model_list import list_models

MODEL = "models:/dreambooth-coral-car@latest"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "evaluation__enabled": "false",
        "evaluation__protocol": "own",
        "evaluation__bank": "miniature",
        "evaluation__prompts": "['a photo of [V] {class_noun}', '[V] {class_noun} at night']",
        "evaluation__images_per_prompt": 2,
        "evaluation__every": 3,
        "gate__pres_limit": 1,
        "train__keep": "best",
        "tracking__uri": f"sqlite:///{tmp_path}/mlflow.db",
    }


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_is_measured_and_judged_and_can_be_measured_again(
    make_config: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = make_config(**settings)
    console = RunConsole(quiet=True)
    summary = personalize(config, console).summary
    recorded = summary["evaluation"]
    assert recorded["bank"]["name"] == "miniature"
    assert recorded["gate"]["moved"]
    assert [score["step"] for score in summary["scores"]] == [3, 6]
    assert summary["exported_step"] == max(summary["scores"], key=lambda score: score["score"])["step"]

    uri = str(config.tracking.uri)
    client = connect(uri)
    with quietly():
        version = client.get_model_version_by_alias("dreambooth-coral-car", "champion")
        assert version.tags["miniature.hash"] == recorded["bank"]["hash"]
        assert version.tags["gate.moved"] == "true"
        run = client.get_run(summary["mlflow"]["run_id"])
        assert run.data.metrics["miniature/dino"] == recorded["figures"]["dino"]["mean"]
        assert {"score/total", "score/dino", "score/clip_t"} <= set(run.data.metrics)
        model = client.get_logged_model(str(version.source).rpartition("/")[2])
        assert {metric.key for metric in model.metrics or []} >= {"miniature/dino", "miniature/pres"}
        [folder] = client.list_artifacts(run.info.run_id, "evaluation")
        tables = {Path(one.path).name for one in client.list_artifacts(run.info.run_id, folder.path)}
        assert tables == {"prompts.json", "evaluation.json"}
    [listed] = list_models(uri)
    assert listed.aliases == ("champion",)
    assert listed.figures["miniature"]["dino"] == pytest.approx(recorded["figures"]["dino"]["mean"], abs=1e-6)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of [V] {class_noun} in the snow\n")
    overrides = ("evaluation.bank=miniature", "evaluation.images_per_prompt=1")
    images = str(subject_dir("coral-car"))
    again = evaluate_model(MODEL, images, prompts=str(prompts), overrides=overrides, tracking_uri=uri, console=console)
    assert [row["prompt"] for row in again.evaluation["per_prompt"]] == ["a photo of tfz car in the snow"]
    assert again.gate is not None
    assert "already" in again.gate.reason
    [listed] = list_models(uri)
    assert listed.figures["miniature"]["dino"] == pytest.approx(again.evaluation["figures"]["dino"]["mean"], abs=1e-6)
    with quietly():
        described = client.get_model_version_by_alias("dreambooth-coral-car", "latest").description
    assert "2 prompts (own) x 2" in described
    assert "1 prompt (own) x 1" in described
    card = find_card(read_manifest(summary["model_uri"]))
    assert card is not None
    assert [one.prompt for one in card.facts.samples] == ["a photo of tfz car", "tfz car at night"] * 2
    assert len({bytes(picture) for picture in card.pictures.values()}) == 4

    prompts.write_text("a photo of a {class_noun}\n")
    with pytest.raises(InputError, match="no placeholder"):
        evaluate_model(MODEL, images, prompts=str(prompts), overrides=overrides, tracking_uri=uri, console=console)
    with pytest.raises(InputError, match="measures nothing"):
        evaluate_model(MODEL, images, overrides=("evaluation.protocol=none",), tracking_uri=uri, console=console)
    with pytest.raises(InputError, match="no registered model"):
        evaluate_model("models:/other@latest", images, tracking_uri=uri, console=console)
