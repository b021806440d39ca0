"""A model measured by the protocol in this process: what is sampled, what is found again, what is written."""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from encoder_replicas import save_dinov2, save_dreamsim
from PIL import Image

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from dreambooth.evaluation import protocol
from dreambooth.evaluation.further import load_further
from dreambooth.evaluation.similarity import mean_pairwise_similarity
from dreambooth.evaluation.verdict import similarity_of
from dreambooth.miniature import VIT_DIR
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.report.evaluated import read_evaluation
from pipelines.stages.embeddings import embeddings_uri, read_embeddings
from pipelines.stages.evaluate_stage import evaluate, samples_uri
from pipelines.stages.evaluation_task import EvaluationTask, encoder_address
from pipelines.stages.photographs import read_photographs
from pipelines.tasks import BankAddress, Call, SampleRequest, Source
from pipelines.worker.samplers import ImageSampler

TWO_CPUS = Resources(cpus=2, gpus=0)


class Counting:
    """Samples in this process, and counts the prompts that are sampled."""

    def __init__(self) -> None:
        self.sampler = ImageSampler(use_gpu=False)
        self.sampled: list[str] = []
        samples = self.sampler.samples

        def counted(source: Source, request: SampleRequest) -> list[bytes]:
            self.sampled += dict.fromkeys(request.prompts)
            return samples(source, request)

        self.sampler.samples = counted  # type: ignore[method-assign]

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """As `Samplers` says."""
        for place, call in enumerate(calls):
            yield place, getattr(self.sampler, call.method)(*call.arguments)


@pytest.fixture
def plan(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> Any:
    def make(*overrides: str, name: str = "rex", identifier: str = "tfz") -> Plan:
        plain: dict[str, Any] = {
            "base_model": str(tiny_pipeline),
            "subject": {
                "name": name,
                "class_noun": "dog",
                "identifier": identifier,
                "instance_images": str(instance_folder),
            },
            "evaluation": {
                "protocol": "own",
                "bank": "miniature",
                "image_encoder": "miniature",
                "prompts": ["a photo of [V] {class_noun}", "[V] {class_noun} at night"],
                "images_per_prompt": 2,
                "num_inference_steps": 2,
            },
            "storage": {"root": str(tmp_path / "output")},
        }
        return make_plan(load_config(plain, overrides), TWO_CPUS)

    return make


@pytest.fixture(scope="module")
def samplers() -> Counting:
    """One for all tests: it loads the pipeline and the encoders once."""
    return Counting()


def measure(plan: Plan, samplers: Counting) -> tuple[dict[str, Any], list[str]]:
    """The evaluation, and what was sampled for it; the tiny base stands in for the fine-tuned model."""
    samplers.sampled.clear()
    base = Source(address=plan.config.base_model)
    return evaluate(task_of(plan), samplers, base=base, fine_tuned=base), list(samplers.sampled)


def pixels(address: str) -> npt.NDArray[np.int16]:
    return np.asarray(Image.open(address), dtype=np.int16)


def task_of(plan: Plan) -> EvaluationTask:
    assert plan.protocol is not None
    return plan.protocol


FINE_TUNED = ["a photo of tfz dog", "tfz dog at night"]
BASE = ["a photo of a dog", "a dog at night"]
OF_CLASS = "a photo of a dog"


def test_what_is_measured_and_written(plan: Any, samplers: Counting) -> None:
    evaluation, sampled = measure(plan(), samplers)
    assert sampled == [*BASE, OF_CLASS, *FINE_TUNED, OF_CLASS]
    written = json.loads(Path(task_of(plan()).uri).read_text())
    assert written == json.loads(json.dumps(evaluation))
    assert written["bank"]["name"] == "miniature"
    assert (written["format"], written["subject"], written["model_key"]) == (1, "rex", plan().key)
    assert [row["prompt"] for row in written["per_prompt"]] == FINE_TUNED
    names = {"dino", "clip_i", "clip_t", "clip_t_no_identifier", "clip_t_base", "pres", "pres_base", "div", "real_dino"}
    assert names <= set(written["figures"])
    assert written["figures"]["dino"]["n"] == 2
    assert written["figures"]["pres"]["n"] == 8
    samples, photographs = read_embeddings(Path(embeddings_uri(task_of(plan()).uri)).read_bytes())
    assert len(samples) == sum(len(prompt["fine_tuned"]) for prompt in written["pictures"])
    assert mean_pairwise_similarity(samples, photographs) == pytest.approx(written["figures"]["dino"]["mean"])
    rows = [address for prompt in written["pictures"] for address in (*prompt["fine_tuned"], *prompt["base"])]
    of_class = written["class_pictures"], written["base_class_pictures"]
    assert [len(addresses) for addresses in of_class] == [8, 8]
    assert all(Path(address).is_file() for address in (*rows, *of_class[0], *of_class[1], *written["photographs"]))


class TestSamplesForTheEye:
    """They go through the same evaluation: of other prompts, and by an image encoder alone if need be."""

    def measured(
        self, plan: Plan, samplers: Counting, encoder: BankAddress | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        samplers.sampled.clear()
        assert plan.samples is not None
        task, base = replace(plan.samples, bank=encoder), Source(address=plan.config.base_model)
        return evaluate(task, samplers, base=base, fine_tuned=base), list(samplers.sampled)

    def test_prompts_that_the_protocol_has_too_are_sampled_once(self, plan: Any, samplers: Counting) -> None:
        measure(plan(), samplers)
        record, sampled = self.measured(plan(), samplers, encoder_address(plan().config))
        assert sampled == [OF_CLASS, OF_CLASS]  # half as many as of the protocol's
        assert [len(record[name]) for name in ("class_pictures", "base_class_pictures")] == [4, 4]
        assert record["pictures"] == json.loads(Path(task_of(plan()).uri).read_text())["pictures"]

    @pytest.mark.parametrize(("encoder", "by"), [("miniature", "text"), (str(VIT_DIR), "pictures")])
    def test_they_are_measured_with_a_clip_or_without(
        self, plan: Any, samplers: Counting, encoder: str, by: str
    ) -> None:
        made = plan(f"evaluation.image_encoder={encoder}")
        record, _ = self.measured(made, samplers, encoder_address(made.config))
        means = {name: figure["mean"] for name, figure in record["figures"].items()}
        assert ("clip_t" in means) == (by == "text")
        assert ("prompts_apart" in means) == (by == "pictures")
        assert similarity_of(means).identifier == means["dino"]
        expected = "miniature" if by == "text" else "encoder"
        assert record["bank"]["name"] == expected
        assert len(record["bank"]["hash"]) == 16
        if by == "pictures":  # the same ViT
            miniature, _ = self.measured(plan(name="mia"), samplers, encoder_address(plan().config))
            assert means["dino"] == pytest.approx(miniature["figures"]["dino"]["mean"], abs=1e-6)

    def test_a_prompt_that_no_clip_reads_is_judged_by_pictures(self, plan: Any, samplers: Counting) -> None:
        long = "a photo of [V] {class_noun} " + "on the beach " * 40
        made = plan("evaluation.protocol=none", f"evaluation.prompts=['[V] {{class_noun}}', '{long}']")
        record, _ = self.measured(made, samplers, encoder_address(made.config))
        assert record["unmeasured"]["clip_t"] == "no text encoder read the prompts"
        assert {"clip_i", "prompts_apart"} <= set(record["figures"])

    def test_without_an_encoder_there_are_pictures_alone(self, plan: Any, samplers: Counting) -> None:
        record, _ = self.measured(plan(), samplers)
        assert "figures" not in record
        assert len(record["pictures"]) == 2
        assert read_evaluation(plan().samples.uri).figures is None

    def test_they_and_the_protocol_name_the_miniatures_bank_alike(self, plan: Any) -> None:
        """A sampler keeps the last bank loaded, and would load two that differ in turns."""
        of_protocol = task_of(plan()).bank
        assert of_protocol is not None
        assert encoder_address(plan().config) == replace(of_protocol, hash=None)

    def test_a_prompt_needs_no_identifier(self, plan: Any, samplers: Counting) -> None:
        made = plan("evaluation.protocol=none", "evaluation.prompts=['a cat']")
        record, sampled = self.measured(made, samplers, encoder_address(made.config))
        assert sampled == ["a cat", OF_CLASS, "a cat", OF_CLASS]
        assert "prompts_followed" in record["unmeasured"]

    def test_photographs_that_are_gone_are_still_on_pages(
        self, plan: Any, samplers: Counting, instance_folder: Path
    ) -> None:
        record, _ = self.measured(plan(), samplers)
        assert len(record["photographs"]) == len(record["instance_images"]) == 5
        assert not {Path(one).parent for one in record["photographs"]} & {instance_folder}
        assert {pixels(one).shape for one in record["photographs"]} == {(64, 64, 3)}


def test_a_finished_evaluation_is_found(plan: Any, samplers: Counting) -> None:
    first, _ = measure(plan(), samplers)
    again, sampled = measure(plan(), samplers)
    assert (again, sampled) == (json.loads(json.dumps(first)), [])


def test_one_that_broke_off_samples_what_is_missing_and_comes_to_the_same(plan: Any, samplers: Counting) -> None:
    first, _ = measure(plan(), samplers)
    task = task_of(plan())
    Path(task.uri).unlink()
    Path(samples_uri(task, task.fine_tuned_sets[0]), "1.png").unlink()
    again, sampled = measure(plan(), samplers)
    assert sampled == FINE_TUNED
    assert again == first


def test_what_is_sampled_together_is_told_apart(plan: Any, samplers: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    three = plan("evaluation.prompts=['[V] {class_noun}', 'a red [V] {class_noun}', '[V] {class_noun} at night']")
    monkeypatch.setattr(protocol, "SAMPLED_TOGETHER", 4)
    assert [len(pictures.seeds) for pictures in task_of(three).fine_tuned_sets] == [4, 2, 8]
    together, _ = measure(three, samplers)
    monkeypatch.setattr(protocol, "SAMPLED_TOGETHER", 1)
    apart, sampled = measure(three, samplers)
    assert len(sampled) == 3 + 3 - 2  # the last prompt of either was alone before, too
    assert apart["per_prompt"] == [pytest.approx(row, abs=0.02) for row in together["per_prompt"]]
    for one, other in zip(apart["pictures"], together["pictures"], strict=True):
        assert {**one, "fine_tuned": 0, "base": 0} == {**other, "fine_tuned": 0, "base": 0}
        for here, there in zip(one["fine_tuned"] + one["base"], other["fine_tuned"] + other["base"], strict=True):
            assert np.abs(pixels(here) - pixels(there)).mean() < 2


def test_another_subject_of_the_class_shares_the_base_models_pictures(plan: Any, samplers: Counting) -> None:
    measure(plan(), samplers)
    _, sampled = measure(plan(name="max", identifier="bqx"), samplers)
    assert sampled == ["a photo of bqx dog", "bqx dog at night", OF_CLASS]


def test_other_weights_and_other_noise_are_other_pictures(plan: Any, samplers: Counting) -> None:
    measure(plan(), samplers)
    _, sampled = measure(plan("train.seed=1"), samplers)
    assert sampled == [*FINE_TUNED, OF_CLASS]
    _, sampled = measure(plan("evaluation.seed=2"), samplers)
    assert sampled == [*BASE, OF_CLASS, *FINE_TUNED, OF_CLASS]


def test_masks_add_the_likeness_to_the_subject(
    plan: Any, samplers: Counting, instance_folder: Path, tmp_path: Path
) -> None:
    plain, _ = measure(plan(), samplers)
    folder = Path(shutil.copytree(instance_folder, tmp_path / "masked"))
    for photograph in sorted(instance_folder.iterdir())[:3]:
        mask = Image.new("L", (80, 72))
        mask.paste(255, (20, 20, 60, 60))
        mask.save(folder / f"{photograph.stem}.mask.png")
    made = plan("images.masks=weight", f"subject.instance_images={folder}")
    cut = read_photographs(made.config, made.images, 64).masked
    subject, squares, masks = (
        [np.asarray(Image.open(io.BytesIO(getattr(each, name)))) for each in cut]
        for name in ("alone", "picture", "mask")
    )
    assert len(subject) == 3
    for square, whole, inside in zip(
        squares, read_photographs(made.config, made.images, 64).squares, masks, strict=False
    ):
        assert (
            square == np.asarray(Image.open(io.BytesIO(whole)))
        ).all()  # as trained on: the middle, surroundings too
        rows, columns = np.nonzero(inside > 127)  # 20 to 60 of 72 rows, and of 80 columns without 4 on each side
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (18, 52, 14, 49)
    assert all((each[[0, -1], [0, -1]] == 255).all() and (each[32, 32] < 255).any() for each in subject)
    masked, _ = measure(made, samplers)
    assert set(masked["figures"]) == {*plain["figures"], "dino_subject", "dino_subject_patches"}
    alone, patches = (masked["figures"][name] for name in ("dino_subject", "dino_subject_patches"))
    assert alone["mean"] != masked["figures"]["dino"]["mean"] != patches["mean"]
    assert all(-1 <= value <= 1 for value in patches["values"])
    assert len(patches["values"]) == len(masked["per_prompt"])
    cropped = plan("images.masks=crop", f"subject.instance_images={folder}")
    # 40 pixels and a margin of 10 % on each side are the whole square: the mask covers 5 / 6 of it.
    [inside, *_] = [
        np.asarray(Image.open(io.BytesIO(each.mask)))
        for each in read_photographs(cropped.config, cropped.images, 64).masked
    ]
    assert (inside > 127).mean() == pytest.approx((5 / 6) ** 2, abs=0.02)


def test_encoders_beside_the_bank_measure_the_same_pictures(
    plan: Any, samplers: Counting, instance_folder: Path, tmp_path: Path
) -> None:
    save_dinov2(tmp_path / "dinov2")
    save_dreamsim(tmp_path / "dreamsim", ("dino_vitb16",))
    plain, _ = measure(plan(), samplers)
    given = [f"evaluation.{name}={tmp_path / name}" for name in ("dinov2", "dreamsim")]
    both, sampled = measure(plan(*given), samplers)
    assert not sampled
    more = {"dinov2", "real_dinov2", "dreamsim", "real_dreamsim"}
    assert {name: figure for name, figure in both["figures"].items() if name not in more} == plain["figures"]
    for name in ("dinov2", "dreamsim"):
        encoder = load_further(name, str(tmp_path / name))
        photographs = [
            Image.open(io.BytesIO(each)) for each in read_photographs(plan().config, plan().images, 64).squares
        ]
        samples = [Image.open(address).convert("RGB") for address in both["pictures"][0]["fine_tuned"]]
        found = both["figures"][name]
        assert found["bank"] == {"name": name, "hash": encoder.hash}
        expected = mean_pairwise_similarity(encoder.encode(samples), encoder.encode(photographs))
        assert found["values"][0] == pytest.approx(expected, abs=1e-5)
    assert both["bank"] == plain["bank"]
    again, _ = measure(plan(*given), samplers)
    assert again == both


def test_encoders_that_are_not_there_are_told_before_any_work(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^evaluation.dreamsim: DreamSim '/no/such': there is no such folder"):
        plan("evaluation.dreamsim=/no/such")
    with pytest.raises(
        InputError, match=r"evaluation.dinov2 measures the samples of evaluation.protocol, which is 'none'"
    ):
        plan("evaluation.dinov2=/no/such", "evaluation.protocol=none")


def test_one_image_per_prompt_has_no_div(plan: Any, samplers: Counting) -> None:
    evaluation, _ = measure(plan("evaluation.images_per_prompt=1"), samplers)
    assert "div" in evaluation["unmeasured"]


def test_prompts_without_a_placeholder_are_told_before_any_work(plan: Any) -> None:
    with pytest.raises(InputError, match=r"no placeholder \[V\] for the identifier in 1 of 1 prompt of 'own'"):
        plan("evaluation.prompts=['a dog']")


def test_a_bank_that_is_not_there_is_told_before_any_work(plan: Any) -> None:
    with pytest.raises(InputError, match="bank"):
        plan("evaluation.bank=paper")
