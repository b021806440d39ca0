"""What a plan chooses where a choice is open, and what it refuses."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from machine_plan import BF16_WEIGHTS, MachinePlan

from dreambooth.data.identifier import choose_identifier
from dreambooth.errors import InputError
from dreambooth.models.families.stable_diffusion import load_diffusion
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.describe import describe_plan


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
