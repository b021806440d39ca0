"""The key of a result: what changes it, and what doesn't."""

import shutil
from pathlib import Path

import pytest
from machine_plan import MachinePlan
from PIL import Image
from processor import multiplies_bf16

from dreambooth.config.settings import load_config
from dreambooth.miniature import subject_dir
from dreambooth.models.base_model import BaseModel
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.summary import request_key
from pipelines.driver.train_stage import train_task
from pipelines.plan.result_key import result_key
from pipelines.plan.run_plan import Plan, make_plan


class TestKey:
    """The same key is the same result, so it has to change with whatever decides the weights, and with nothing else."""

    @pytest.mark.parametrize(
        "override",
        [
            "train.max_train_steps=11",
            "train.learning_rate=1e-4",
            "train.seed=1",
            "train.train_text_encoder=false",
            "train.ema_decay=0.9",
            "train.micro_batch_size=2",
            "subject.identifier=rjs",
            "subject.class_noun=cat",
            "prompts.instance='a picture of {identifier} {class_noun}'",
            "images.resolution=32",
            "images.flip=true",
            "prior.prior_loss_weight=0.5",
            "prior.prior_loss_weight=0",
            "prior.num_class_images=9",
            "prior.seed=1",
            "engine=deepspeed",
            "cluster.num_workers=2",
            "storage.dtype=float32",
            "images.crop=random",
            "images.repeats={00.png: 2}",
            "train.caption_dropout=0.1",
        ],
    )
    def test_it_changes_with(self, plan: MachinePlan, override: str) -> None:
        assert plan(override).key != plan().key

    @pytest.mark.parametrize(
        "override",
        [
            "train.log_every=7",
            "train.checkpoint_every=3",
            "train.checkpoint_every_minutes=5",
            "train.validate_every=5",
            "subject.name=rover",
            "storage.root=elsewhere",
            "storage.run=elsewhere/run",
            "tracking.experiment=other",
            "evaluation.images_per_prompt=1",
            "gate.pres_limit=0.1",
            "cluster.max_failures=0",
            "cluster.cpus_per_worker=2",
            "prior.num_actors=2",
            "images.max_pixels=1000000",
            "images.crops_per_image=3",  # means nothing to the centre crop
            "zero.stage=3",  # means nothing to the engine that a single worker gets
            "train.optimizer=adamw",
            "images.repeats={00.png: 1}",
            "train.caption_dropout=0",
            "train.keep_unaveraged=false",
        ],
    )
    def test_it_does_not_change_with(self, plan: MachinePlan, override: str) -> None:
        assert plan(override).key == plan().key

    def test_looking_decides_nothing(self, plan: MachinePlan) -> None:
        looking = ("evaluation.protocol=miniature", "evaluation.every=2", "evaluation.bank=miniature")
        assert plan(*looking).key == plan().key

    def test_scores_count_where_they_choose_the_weights(self, plan: MachinePlan) -> None:
        best = ("train.keep=best", "evaluation.every=2", "evaluation.bank=miniature")
        keys = {
            plan(*overrides).key
            for overrides in (
                (),
                best,
                (*best, "train.stop_after=3"),
                (*best, "evaluation.every=3"),
                (*best, "evaluation.score_images=1"),
                (*best, "evaluation.seed=2"),
                (*best, "evaluation.prompts=['a [V] dog']"),
            )
        }
        assert len(keys) == 7
        assert plan(*best, "evaluation.images_per_prompt=1").key == plan(*best).key

    def test_the_stage_counts_where_there_is_one(self, plan: MachinePlan) -> None:
        keys = {plan("cluster.num_workers=2", f"zero.stage={stage}").key for stage in range(4)}
        assert len(keys) == 4

    def test_rounded_weights_are_another_result(self, plan: MachinePlan) -> None:
        """A checkpoint of the other setting isn't looked for."""
        rounded = ("cluster.num_workers=2", "train.mixed_precision=bf16", "zero.weights=bf16")
        assert plan(*rounded).key != plan(*rounded[:2]).key
        assert plan(*rounded[:2], "zero.weights=fp32").key == plan(*rounded[:2]).key

    def test_updates_within_the_backward_pass_are_the_same(self, plan: MachinePlan) -> None:
        unclipped = plan("train.max_grad_norm=null")
        assert unclipped.key != plan().key
        assert plan("train.max_grad_norm=null", "train.fused_backward=true").key == unclipped.key

    def test_a_captured_step_is_the_same(self, plan: MachinePlan) -> None:
        assert plan("train.graph=auto").key == plan().key

    def test_every_place_of_states_counts(self, plan: MachinePlan) -> None:
        offloads = ((), ("zero.offload_optimizer=true",))
        offloads += ((*offloads[1], "zero.offload_parameters=true"),)
        keys = {plan("cluster.num_workers=2", "zero.stage=3", *offload).key for offload in offloads}
        assert len(keys) == 3

    def test_the_device_counts(self, plan: MachinePlan) -> None:
        machine = Resources(cpus=8, gpus=1)
        assert plan(resources=machine).key != plan("cluster.use_gpu=false", resources=machine).key
        assert plan("cluster.use_gpu=false", resources=machine).key == plan().key

    def test_pictures_of_earlier_code_are_not_found_and_what_was_trained_on_them_is(
        self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def names(made: Plan) -> set[str]:
            assert made.prior is not None
            assert made.protocol is not None
            sets = (*made.protocol.base_sets, *made.protocol.fine_tuned_sets)
            return {made.prior.key, made.protocol.key, *(pictures.key for pictures in sets)}

        measured = ("evaluation.protocol=miniature", "evaluation.bank=miniature")
        now = plan(*measured)
        pictures = names(now)
        for module in ("dreambooth.sampling.class_images", "dreambooth.evaluation.protocol"):
            monkeypatch.setattr(f"{module}.STORED", 1)
        before = plan(*measured)
        assert not pictures & names(before)
        assert (before.key, before.model_key) == (now.key, now.model_key)

    @pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
    def test_all_pictures_are_planned_in_the_dtype_that_is_best_where_the_plan_is_made(
        self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str
    ) -> None:
        multiplies_bf16(monkeypatch, native)
        made = plan("evaluation.protocol=miniature", "evaluation.bank=miniature")
        assert made.prior is not None
        assert made.protocol is not None
        task, (base, *_) = train_task(made, None), made.protocol.base_sets
        assert {made.prior.dtype, base.dtype, made.sampling_dtype, task.sampling_dtype} == {dtype}
        assert made.samples is not None
        assert {one.dtype for one in (*made.samples.base_sets, *made.samples.fine_tuned_sets)} == {dtype}

    @pytest.mark.parametrize(
        ("types", "precision"),
        [
            ((), "bf16"),
            (("A100",), "bf16"),
            (("H100", "L40S", "RTX-PRO-6000", "NVIDIA-GeForce-RTX-4090"), "bf16"),
            (("V100",), "no"),
            (("A100", "T4"), "no"),
            (("Tesla V100-SXM2-16GB",), "no"),
            (("NVIDIA GeForce RTX 2080 Ti",), "no"),
            (("NVIDIA-GeForce-GTX-1080",), "no"),
            (("P40", "K80", "NVIDIA TITAN RTX"), "no"),
        ],
    )
    def test_precision_is_decided_by_all_gpus_of_the_cluster_and_counts(
        self, plan: MachinePlan, types: tuple[str, ...], precision: str
    ) -> None:
        machine = Resources(cpus=8, gpus=2, gpu_types=types)
        auto = plan(resources=machine)
        assert train_task(auto, None).config.train.mixed_precision == precision
        bf16, fp32 = (plan(f"train.mixed_precision={each}", resources=machine) for each in ("bf16", "'no'"))
        assert bf16.key != fp32.key
        assert auto.key == (bf16 if precision == "bf16" else fp32).key
        on_cpu = plan("cluster.use_gpu=false", resources=machine)
        assert on_cpu.config.train.mixed_precision == "no"

    def test_a_registered_models_key_holds_how_it_is_served(self, plan: MachinePlan) -> None:
        other = plan("evaluation.guidance_scale=2.5")
        assert other.key == plan().key
        assert other.model_key != plan().model_key
        assert plan("train.seed=1").model_key != plan().model_key

    def test_images_and_captions_count_and_where_they_lie_does_not(
        self, plan: MachinePlan, instance_folder: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(instance_folder, tmp_path / "copy"))
        assert plan(images=copy).key == plan().key
        (copy / "00.txt").write_text("tfz dog in the snow")
        captioned = plan(images=copy).key
        shutil.copy(copy / "01.png", copy / "00.png")
        assert len({plan().key, captioned, plan(images=copy).key}) == 3

    def test_a_caption_is_one_wherever_it_is_written(
        self, plan: MachinePlan, instance_folder: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(instance_folder, tmp_path / "copy"))
        (copy / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "tfz dog in the snow"}\n')
        captioned = plan(images=copy).key
        assert captioned != plan().key
        (copy / "metadata.jsonl").unlink()
        (copy / "00.txt").write_text("tfz dog in the snow")
        assert plan(images=copy).key == captioned

    def test_masks_count_where_they_are_used(self, plan: MachinePlan, instance_folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(instance_folder, tmp_path / "copy"))
        for photograph in instance_folder.iterdir():
            mask = Image.new("L", (80, 72))
            mask.paste(255, (20, 20, 60, 60))
            mask.save(copy / f"{photograph.stem}.mask.png")
        used = (("images.masks=weight",), ("images.masks=weight", "images.mask_background=0.2"), ("images.masks=crop",))
        assert len({plan(*masks, images=copy).key for masks in ((), *used)}) == 4
        assert plan(images=copy).key == plan().key
        assert plan("images.masks=weight", images=copy).warnings == ()

    def test_earlier_results_are_found(self, plan: MachinePlan) -> None:
        """Settings that have come since leave keys alone at their defaults."""
        made = plan("prior.prior_loss_weight=0")
        base = BaseModel(address="base", revision=None, directory=made.base.directory)
        base.__dict__["hash"] = "base"  # whatever the files hold
        key = result_key(made.config, base, "images", None, "torch", use_gpu=False)
        assert key == "b8ffb49b5c4d762e"

    @pytest.mark.parametrize(
        ("native", "overrides", "keys"),
        [
            (False, (), ("4c1cccbd5a07c9a3", "8b4f78a7cbaa6585", "52f0a76949c90596")),
            (True, (), ("95cbf456df86d083", "fd47bc2a8f0a919b", "61c9bd4fffed28b9")),
            (
                False,
                ("evaluation.every=50", "train.keep=best"),
                ("4c2574e5010d84ab", "28aedf47afeebd39", "7b2415474ea2ede0"),
            ),
            (
                False,
                ("cluster.num_workers=2", "zero.stage=3", "evaluation.protocol=auto"),
                ("136a3f036e98928a", "836e0c585bbad61e", "3e8fd09918834a6a"),
            ),
        ],
    )
    def test_the_demos_are_those_of_commit_de9057a(
        self, monkeypatch: pytest.MonkeyPatch, native: bool, overrides: tuple[str, ...], keys: tuple[str, str, str]
    ) -> None:
        """A setting that is new belongs into `later` of its section, or finished runs are not found."""
        multiplies_bf16(monkeypatch, native)
        settings = {
            "subject": {
                "name": "coral-car",
                "class_noun": "car",
                "identifier": "tfz",
                "instance_images": str(subject_dir("coral-car")),
            },
            "tracking": {"uri": "http://127.0.0.1:5000"},
        }
        made = make_plan(load_config(settings, overrides), Resources(cpus=8, gpus=0))
        assert (made.key, made.model_key, request_key(made)) == keys

    def test_the_base_models_content_counts(self, plan: MachinePlan, tiny_pipeline: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
        assert plan(base=copy).key == plan().key
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        assert plan(base=copy).key != plan().key

    def test_what_is_chosen_is_as_good_as_what_is_given(self, plan: MachinePlan) -> None:
        chosen = plan("subject.identifier=null", "images.resolution=null")
        identifier = chosen.config.subject.identifier
        assert plan(f"subject.identifier={identifier}", "images.resolution=64").key == chosen.key
