"""The plan of a run: what decides its result, what is chosen where a choice is open, and what it will take."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from processor import multiplies_bf16

from dreambooth.config.settings import load_config
from dreambooth.data.identifier import choose_identifier
from dreambooth.errors import InputError
from dreambooth.miniature import subject_dir
from dreambooth.models.base_model import BaseModel
from dreambooth.models.families.stable_diffusion import load_diffusion
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.summary import request_key
from pipelines.driver.train_stage import train_task
from pipelines.plan.batch_plan import describe_batch, make_batch_plan
from pipelines.plan.describe import describe_plan
from pipelines.plan.destinations import check_destinations, check_servers
from pipelines.plan.result_key import result_key
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.stages.evaluate_stage import sample_requests
from pipelines.tasks import Source

MachinePlan = Callable[..., Plan]
BF16_WEIGHTS = "zero.weights=bf16", "train.mixed_precision=bf16"


@pytest.fixture
def plan(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path, mlflow_database: str) -> MachinePlan:
    def make(
        *overrides: str,
        images: Path = instance_folder,
        base: str | Path = tiny_pipeline,
        resources: Resources = Resources(cpus=8, gpus=0),  # noqa: B008 - frozen
    ) -> Plan:
        settings = {
            "base_model": str(base),
            "subject": {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(images)},
            "prior": {"num_class_images": 8},
            "train": {"max_train_steps": 10},
            "storage": {"root": str(tmp_path / "output")},
            "tracking": {"uri": mlflow_database},
        }
        return make_plan(load_config(settings, overrides), resources)

    return make


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
        source = Source(address="base")
        requests = [request for _, request in sample_requests(made.config, source, source, made.sampling_dtype)]
        assert {request.dtype for request in requests} == {dtype}

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


class TestChoices:
    @pytest.mark.parametrize(
        ("overrides", "engine"),
        [
            ((), "torch"),
            (("cluster.num_workers=2",), "deepspeed"),
            (("zero.offload_optimizer=true",), "deepspeed"),
            (("zero.weights=bf16", "train.mixed_precision=bf16"), "deepspeed"),
            (("engine=torch", "cluster.num_workers=2"), "torch"),
            (("engine=deepspeed",), "deepspeed"),
            (("train.optimizer=adafactor", "cluster.num_workers=2"), "torch"),
            (("train.optimizer=adamw8bit", "cluster.num_workers=2", "cluster.min_workers=1"), "torch"),
            (("train.fused_backward=true", "train.max_grad_norm=null"), "torch"),
        ],
    )
    def test_the_engine(
        self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], engine: str
    ) -> None:
        monkeypatch.setattr("dreambooth.training.optimizer.find_spec", lambda name: name)  # with torchao or without
        assert plan(*overrides).engine == engine

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (("engine=torch", "zero.offload_optimizer=true"), "needs DeepSpeed, but engine is 'torch'"),
            (("zero.stage=0", "zero.offload_optimizer=true"), r"needs zero.stage 1, 2 or 3, got 0"),
            (("engine=torch", "zero.offload_parameters=true"), "zero.offload_parameters needs DeepSpeed"),
            (("zero.gather_blocks=true", "engine=deepspeed"), "zero.gather_blocks needs zero.stage 3, got 2"),
            (
                ("zero.gather_blocks=true", "zero.stage=3", "images.aspect_buckets=true"),
                "and images.aspect_buckets makes two",
            ),
            (("zero.offload_parameters=true", "zero.stage=3"), "zero.offload_optimizer, got stage 3 and false"),
            (("zero.offload_parameters=true", "zero.offload_optimizer=true"), "needs zero.stage 3 .* got stage 2"),
            (("train.optimizer=adafactor", "engine=deepspeed"), "needs engine .torch., which excludes engine"),
            (("train.optimizer=adamw8bit", "zero.offload_optimizer=true"), "excludes zero.offload_optimizer; leave"),
            (("train.max_grad_norm=null", "train.fused_backward=true", "engine=deepspeed"), "fused_backward needs"),
            (("train.max_grad_norm=null", "train.fused_backward=true", "cluster.num_workers=2"), "needs one worker"),
            ((*BF16_WEIGHTS, "engine=torch"), "zero.weights bf16 needs DeepSpeed, but engine is 'torch'"),
            ((*BF16_WEIGHTS, "zero.stage=0"), "zero.weights bf16 needs zero.stage 1, 2 or 3, got 0, which keeps no"),
            ((*BF16_WEIGHTS, "train.mixed_precision='no'"), "needs train.mixed_precision bf16, got no"),
            (("zero.weights=bf16",), "got no, which auto is on CPUs; set train.mixed_precision=bf16, or"),
            ((*BF16_WEIGHTS, "train.optimizer=adafactor"), "adafactor .* excludes zero.weights bf16; leave one"),
            ((*BF16_WEIGHTS, "train.method=textual_inversion"), "textual_inversion trains an embedding alone; leave"),
        ],
    )
    def test_what_excludes_each_other(
        self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], message: str
    ) -> None:
        monkeypatch.setattr("dreambooth.training.optimizer.find_spec", lambda name: name)
        with pytest.raises(InputError, match=message):
            plan(*overrides)

    def test_bf16_weights_on_gpus_without_bf16(self, plan: MachinePlan) -> None:
        old, new = (Resources(cpus=8, gpus=2, gpu_types=(name,)) for name in ("V100", "A100"))
        for precision in ("auto", "bf16"):
            overrides = ("zero.weights=bf16", f"train.mixed_precision={precision}", "cluster.num_workers=2")
            assert plan(*overrides, resources=new).engine == "deepspeed"
            with pytest.raises(InputError, match=r"needs GPUs that compute in bf16 .*; leave zero.weights out, or"):
                plan(*overrides, resources=old)

    def test_a_library_that_is_missing(self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchao", None)
        with pytest.raises(InputError, match="adamw8bit needs torchao, which isn't installed here; pip install"):
            plan("train.optimizer=adamw8bit")
        assert plan("train.optimizer=adafactor").engine == "torch"

    def test_an_identifier_and_the_resolution(self, plan: MachinePlan, tiny_pipeline: Path) -> None:
        from dreambooth.models.families import load_tokenizer

        chosen = plan("subject.identifier=null").config
        tokenizer = load_tokenizer(tiny_pipeline)
        assert chosen.subject.identifier == choose_identifier(tokenizer, subject_name="rex")
        assert chosen.images.resolution == 64

    def test_a_common_identifier_is_warned_of(self, plan: MachinePlan) -> None:
        assert plan().warnings == ()
        (warning,) = plan("subject.identifier=beach").warnings
        assert "the identifier 'beach' is" in warning

    @pytest.mark.parametrize(
        ("identifier", "shared"),
        [
            ("a7x", r"'a' with the class prompt 'a photo of a dog'"),
            ("photo", r"'photo' with the class prompt"),
            ("dog bqx", "'dog' with the class noun"),
        ],
    )
    def test_words_that_are_learnt_along_with_the_identifier(
        self, plan: MachinePlan, identifier: str, shared: str
    ) -> None:
        warnings = [w for w in plan(f"subject.identifier={identifier}").warnings if "shares" in w]
        assert len(warnings) == 1
        assert re.search(shared, warnings[0])

    @pytest.mark.parametrize("identifier", ["dog dog", "bqx dog", "DOG tfz"])
    @pytest.mark.parametrize("how", ["train.identifier_learning_rate=1e-3", "train.method=textual_inversion"])
    def test_an_embedding_of_its_own_that_is_the_class_nouns_too(
        self, plan: MachinePlan, identifier: str, how: str
    ) -> None:
        with pytest.raises(InputError, match="is read as 'dog', and so is the class noun 'dog'"):
            plan(f"subject.identifier={identifier}", how)
        assert plan(f"subject.identifier={identifier}").warnings

    def test_a_repeated_token_is_one_to_learn(self, plan: MachinePlan) -> None:
        inversion = "train.method=textual_inversion"
        widths = [
            plan(inversion, f"subject.identifier={identifier}").trained_parameters
            for identifier in ("tfz tfz", "'1111'", "x22")
        ]
        assert widths == [16, 16, 32]

    @pytest.mark.parametrize(
        ("changes", "warned"),
        [
            ({"rescale_betas_zero_snr": True}, True),
            ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, False),
            ({"rescale_betas_zero_snr": False}, False),
        ],
    )
    def test_noise_that_is_predicted_where_there_is_nothing_else(
        self, plan: MachinePlan, tiny_pipeline: Path, tmp_path: Path, changes: dict[str, object], warned: bool
    ) -> None:
        copy = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
        path = copy / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        assert float(load_diffusion(copy).alphas_cumprod[-1] == 0) == changes["rescale_betas_zero_snr"]
        assert any("ends in pure noise" in warning for warning in plan(base=copy).warnings) == warned

    def test_a_single_photograph_is_warned_of(self, plan: MachinePlan, instance_folder: Path) -> None:
        (warning,) = plan(images=instance_folder / "00.png").warnings
        assert warning.startswith("1 instance image; the method is made for three to five")

    def test_gpus(self, plan: MachinePlan) -> None:
        machine = Resources(cpus=8, gpus=1)
        assert plan(resources=machine).use_gpu
        assert not plan("cluster.use_gpu=false", resources=machine).use_gpu
        assert not plan().use_gpu
        assert plan(resources=machine).prior != plan().prior  # sampled in half precision

    def test_local_addresses_become_absolute(
        self, plan: MachinePlan, tiny_pipeline: Path, working_folder: Path, instance_folder: Path
    ) -> None:
        """Workers run in folders of their own."""
        (working_folder / "tiny").symlink_to(tiny_pipeline)
        (working_folder / "photos").symlink_to(instance_folder)
        (working_folder / "vit").mkdir()
        config = plan("storage.root=out", "evaluation.image_encoder=vit", base="tiny", images=Path("photos")).config
        assert config.base_model == str(working_folder / "tiny")
        assert config.subject.instance_images == (str(working_folder / "photos"),)
        assert (config.run_uri, config.prior_uri) == (f"{working_folder}/out/rex", f"{working_folder}/out/prior")
        assert config.evaluation.image_encoder == str(working_folder / "vit")

    @pytest.mark.parametrize("address", ["s3://bucket/results", "memory://results"])
    def test_remote_ones_stay(self, plan: MachinePlan, address: str) -> None:
        config = plan(f"storage.root={address}").config
        assert (config.run_uri, config.prior_uri) == (f"{address}/rex", f"{address}/prior")

    def test_workers_that_do_not_fit(self, plan: MachinePlan) -> None:
        with pytest.raises(InputError, match="num_workers is 9, which takes 9 CPUs and 0 GPUs, but the cluster has 8"):
            plan("cluster.num_workers=9")
        with pytest.raises(InputError, match="num_workers is 4, which takes 12 CPUs"):
            plan("cluster.num_workers=4", "cluster.cpus_per_worker=3")
        with pytest.raises(InputError, match="and 2 GPUs, but the cluster has 8 CPUs and 1 GPU"):
            plan("cluster.num_workers=2", resources=Resources(cpus=8, gpus=1))
        with pytest.raises(InputError, match="and 1 GPU, but the cluster has 8 CPUs and 0 GPUs"):
            plan("cluster.use_gpu=true")

    def test_a_cluster_that_shrinks(self, plan: MachinePlan) -> None:
        small, thirds = Resources(cpus=2, gpus=0), "train.gradient_accumulation_steps=3"
        four = "cluster.num_workers=4"
        made = plan(four, "cluster.min_workers=2", thirds, resources=small)
        assert dict(describe_plan(made))["workers"] == "4 x 1 CPU (as few as 2 when the cluster shrinks)"
        assert made.key == plan(four, thirds).key
        with pytest.raises(InputError, match="min_workers is 3, which takes 3 CPUs and 0 GPUs, but the cluster has 2"):
            plan(four, "cluster.min_workers=3", thirds, resources=small)
        with pytest.raises(InputError, match="3 workers can't share the 4 micro steps of a step evenly; set train"):
            plan(four, "cluster.min_workers=2")
        with pytest.raises(InputError, match=r"min_workers is 3, but cluster\.num_workers only 2"):
            plan("cluster.num_workers=2", "cluster.min_workers=3")
        with pytest.raises(InputError, match=r"min_workers goes with train\.ema_decay only where engine is 'torch'"):
            plan("cluster.num_workers=2", "cluster.min_workers=1", "train.ema_decay=0.9")


class TestMemory:
    """ZeRO's paper (arXiv 1910.02054, section 3.1) for N workers and P parameters, with 4 bytes each instead of 2:

    weights and gradients 4 P each, and K P of optimizer states, here two Adam moments and fp32 masters (none of those
    at stage 0, where the weights themselves serve). Stage 1 divides K by N, stage 2 gradients too, stage 3 weights too.
    """

    @pytest.mark.parametrize("workers", [2, 4, 8])
    @pytest.mark.parametrize(
        ("stage", "whole", "shared"), [(0, 4 + 4 + 8, 0), (1, 4 + 4, 12), (2, 4, 4 + 12), (3, 0, 4 + 4 + 12)]
    )
    def test_stages(self, plan: MachinePlan, workers: int, stage: int, whole: int, shared: int) -> None:
        made = plan(f"cluster.num_workers={workers}", f"zero.stage={stage}")
        assert made.model_state_bytes == pytest.approx(made.trained_parameters * (whole + shared / workers), abs=1)

    @pytest.mark.parametrize(("stage", "whole", "shared"), [(1, 2 + 4, 12), (2, 2, 4 + 12), (3, 0, 2 + 4 + 12)])
    def test_bf16_weights(self, plan: MachinePlan, stage: int, whole: int, shared: int) -> None:
        """Sums of gradients and masters stay fp32."""
        made = plan(*BF16_WEIGHTS, "cluster.num_workers=4", f"zero.stage={stage}")
        assert made.model_state_bytes == pytest.approx(made.trained_parameters * (whole + shared / 4), abs=1)

    def test_a_single_worker_with_pytorch(self, plan: MachinePlan) -> None:
        assert plan("zero.stage=3").model_state_bytes == 16 * plan().trained_parameters

    def test_the_moving_average_is_divided_like_the_masters(self, plan: MachinePlan) -> None:
        made = plan("cluster.num_workers=4", "zero.stage=2", "train.ema_decay=0.9")
        assert made.model_state_bytes == pytest.approx(made.trained_parameters * (4 + 20 / 4), abs=1)

    @pytest.mark.parametrize(("stage", "bytes_each"), [(1, 4 + 4), (2, 4 + 4 / 4), (3, 4 / 4 + 4 / 4)])
    def test_offload_takes_the_optimizer_away(self, plan: MachinePlan, stage: int, bytes_each: float) -> None:
        made = plan("cluster.num_workers=4", f"zero.stage={stage}", "zero.offload_optimizer=true")
        assert made.model_state_bytes == pytest.approx(made.trained_parameters * bytes_each, abs=1)

    def test_what_is_trained(self, plan: MachinePlan) -> None:
        counts = plan().base.parameter_counts
        assert plan().trained_parameters == counts["unet"] + counts["text_encoder"]
        assert plan("train.train_text_encoder=false").trained_parameters == counts["unet"]


class TestDestinations:
    def test_they_pass_and_nothing_is_left_in_them(self, plan: MachinePlan, tmp_path: Path) -> None:
        check_destinations([plan()])
        assert [path for path in (tmp_path / "output").rglob("*") if path.is_file()] == []

    @pytest.mark.parametrize("place", ["run", "prior"])
    def test_a_folder_that_cannot_be(self, plan: MachinePlan, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=f"can't write to '{tmp_path}/file/here': a part of the path is a file"):
            check_destinations([plan(f"storage.{place}={tmp_path}/file/here")])

    def test_a_batch_names_every_base_model(self, plan: MachinePlan, tiny_pipeline: Path, tmp_path: Path) -> None:
        resources = Resources(cpus=8, gpus=0)
        copy = Path(shutil.copytree(tiny_pipeline, tmp_path / "other"))
        (copy / "vae" / "note.txt").write_text("another one")
        plans = [plan(), plan(base=copy), plan("train.seed=1", base=copy)]
        rows = [value for name, value in describe_batch(make_batch_plan("b", plans, resources)) if name == "base model"]
        assert rows == [
            f"{tiny_pipeline}, hash {plans[0].base.hash}: 1 subject",
            f"{copy}, hash {plans[1].base.hash}: 2 subjects",
        ]
        alone = dict(describe_batch(make_batch_plan("b", plans[:1], resources)))
        assert alone["base model"] == f"{tiny_pipeline}, hash {plans[0].base.hash}"

    def test_a_batch_is_not_measured_by_the_first_subjects_encoder(self, plan: MachinePlan) -> None:
        resources = Resources(cpus=8, gpus=0)
        with pytest.raises(InputError, match=r"evaluation\.image_encoder=facebook/dino-vits16"):
            make_batch_plan("b", [plan(), plan(base="miniature")], resources)
        encoder = "evaluation.image_encoder=miniature"
        assert make_batch_plan("b", [plan(encoder), plan(encoder, base="miniature")], resources).lanes == 2

    def test_without_prior_preservation_its_folder_is_not_looked_at(self, plan: MachinePlan, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        check_destinations([plan(f"storage.prior={tmp_path}/file/here", "prior.prior_loss_weight=0")])

    def test_a_tracking_server_that_is_away(self, plan: MachinePlan) -> None:
        with pytest.raises(InputError, match=r"no MLflow tracking at http://127\.0\.0\.1:9"):
            check_servers([plan("tracking.uri=http://127.0.0.1:9")])

    def test_a_file_of_sqlite_is_no_place_for_several_nodes(self, plan: MachinePlan, tmp_path: Path) -> None:
        made = plan(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
        check_servers([made], nodes=1)
        with pytest.raises(InputError, match=r"the cluster has 3 nodes, but MLflow .*'mlflow server'.* tracking\.uri"):
            check_servers([made], nodes=3)

    @pytest.mark.parametrize(
        ("overrides", "checkpoints", "models"),
        [
            (("train.max_train_steps=1000", "train.checkpoint_every=100"), 3, 1),  # two are kept while one is written
            (("train.max_train_steps=200", "train.checkpoint_every=100"), 1, 2),
            (("train.max_train_steps=5", "train.checkpoint_every_minutes=1"), 3, 1),
            (("train.max_train_steps=5", "storage.dtype=float32"), 1, 2),  # the model, and where it is put together
        ],
    )
    def test_the_space_that_a_run_takes(
        self,
        plan: MachinePlan,
        monkeypatch: pytest.MonkeyPatch,
        overrides: tuple[str, ...],
        checkpoints: int,
        models: int,
    ) -> None:
        made = plan(*overrides)
        model = (4 if made.config.storage.dtype == "float32" else 2) * sum(made.base.parameter_counts.values())
        needed = checkpoints * 12 * made.trained_parameters + models * model  # they and TMPDIR lie on one disk
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(InputError, match=r"[GM]B free, and .* will be written there: .* checkpoints? of "):
            check_destinations([made])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        check_destinations([made])

    def test_checkpoints_that_are_there_already_take_no_more_room(
        self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = plan("train.max_train_steps=1000", "train.checkpoint_every=100")
        left = Path(made.config.run_uri, "checkpoints", made.key, "step-00000100-16f3a1b2c3d4e5f6", "engine.pt")
        left.parent.mkdir(parents=True)
        left.write_bytes(bytes(1000))
        usage = shutil.disk_usage("/")
        needed = 3 * made.checkpoint_bytes + made.published_bytes - 1000
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        check_destinations([made])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(InputError, match="will be written"):
            check_destinations([made])

    def test_the_models_of_all_subjects_need_room(self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        many = [plan(f"subject.name=dog-{number}", "train.max_train_steps=5") for number in range(4)]
        usage = shutil.disk_usage("/")
        needed = 2 * many[0].checkpoint_bytes + (4 + 2) * many[0].published_bytes  # two lanes, two in TMPDIR
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        check_destinations(many, lanes=2)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(InputError, match="4 models of"):
            check_destinations(many, lanes=2)


class TestDescription:
    def rows(self, plan: Plan) -> dict[str, str]:
        return dict(describe_plan(plan))

    def test_all_that_a_person_wants_to_know(self, plan: MachinePlan, tmp_path: Path) -> None:
        made = plan("cluster.num_workers=2", "train.micro_batch_size=3", "train.gradient_accumulation_steps=2")
        rows = self.rows(made)
        assert rows["instance prompt"] == "a photo of tfz dog"
        assert rows["steps"] == "10 of 12 instance/class pairs"
        assert rows["workers"] == "2 x 1 CPU"
        assert rows["engine"] == "DeepSpeed ZeRO-2"
        assert rows["class images"].startswith("8 of 'a photo of a dog': 8 to make")
        assert rows["writes to"] == f"{tmp_path}/output/rex, registered as dreambooth-rex"
        assert rows["result key"] == made.key
        assert "unet 0.06 M" in rows["base model"]
        assert made.base.hash in rows["base model"]
        assert rows["memory per worker"].startswith("1 MiB")

    def test_class_images_that_are_there_already(self, plan: MachinePlan, tmp_path: Path) -> None:
        made = plan()
        assert made.prior is not None
        folder = tmp_path / "output" / "prior" / made.prior.key
        folder.mkdir(parents=True)
        for index in range(3):
            (folder / f"{index:06d}.png").touch()
        assert "5 to make" in self.rows(made)["class images"]
        for index in range(3, 8):
            (folder / f"{index:06d}.png").touch()
        assert "all made" in self.rows(made)["class images"]

    def test_without_prior_preservation(self, plan: MachinePlan) -> None:
        rows = self.rows(plan("prior.prior_loss_weight=0"))
        assert "class images" not in rows
        assert rows["steps"] == "10 of 1 instance image"
        assert rows["engine"] == "PyTorch"


def test_captions_are_read_before_anything_starts(plan: MachinePlan, instance_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(instance_folder, tmp_path / "rex"))
    (folder / "00.txt").write_text("a photo of [V] dog on the beach")
    (folder / "01.txt").write_text("a photo of a dog")
    (folder / "02.txt").write_text(f"a photo of [V] dog {'in the snow ' * 8}")
    assert plan(images=folder).warnings == (
        f"the caption of {folder}/01.png names no [V]; write [V] where the subject is meant",
        f"the caption of {folder}/02.png has 29 tokens, and the base model reads 22: 'snow in the snow in the snow' is "
        f"cut off",
    )
    (folder / "03.txt").write_text(f"a photo {'in the snow ' * 8}of [V] dog")
    with pytest.raises(InputError, match=r"03\.png has 29 tokens, .* is cut off, the identifier with it; shorten it"):
        plan(images=folder)
