"""DeepSpeed's configuration dict, as a pure function of the settings."""

import pytest

from dreambooth.config.settings import ZeroConfig
from dreambooth.config.train import TrainConfig
from pipelines.worker.deepspeed_engine import deepspeed_config


def test_sizes_and_clipping_come_from_the_settings() -> None:
    train = TrainConfig(micro_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.7)
    config = deepspeed_config(train, ZeroConfig())
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["gradient_clipping"] == 0.7
    # The global batch follows from these and the number of ranks, which is not known here.
    assert "train_batch_size" not in config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage(stage: int) -> None:
    zero = deepspeed_config(TrainConfig(), ZeroConfig(stage=stage))["zero_optimization"]
    assert zero["stage"] == stage
    assert "offload_optimizer" not in zero
    assert ("contiguous_gradients" in zero) == (stage > 0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload(stage: int) -> None:
    zero = deepspeed_config(TrainConfig(), ZeroConfig(stage=stage, offload_optimizer=True))["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"


def test_offload_of_weights_too() -> None:
    settings = ZeroConfig(stage=3, offload_optimizer=True, offload_parameters=True)
    zero = deepspeed_config(TrainConfig(), settings)["zero_optimization"]
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_without_clipping() -> None:
    assert deepspeed_config(TrainConfig(max_grad_norm=None), ZeroConfig())["gradient_clipping"] == 0


def test_what_only_a_gpu_can_do() -> None:
    zero = ZeroConfig(stage=2, offload_optimizer=True)
    on_cpu, on_gpu = (deepspeed_config(TrainConfig(), zero, cuda=cuda)["zero_optimization"] for cuda in (False, True))
    for of_gpu in "contiguous_gradients", "overlap_comm":
        assert (on_cpu[of_gpu], on_gpu[of_gpu]) == (False, True)
    assert (on_cpu["offload_optimizer"]["pin_memory"], on_gpu["offload_optimizer"]["pin_memory"]) == (False, True)


def test_the_optimizer_is_ours_and_nothing_is_compiled() -> None:
    config = deepspeed_config(TrainConfig(), ZeroConfig(offload_optimizer=True))
    assert "optimizer" not in config
    assert "scheduler" not in config
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("precision", ["auto", "bf16", "no"])
def test_weights_stay_fp32_whatever_the_precision(precision: str) -> None:
    """bf16 comes from autocast within the model, alike in every engine."""
    config = deepspeed_config(TrainConfig.model_validate({"mixed_precision": precision}), ZeroConfig())
    assert not {"bf16", "fp16", "torch_autocast", "amp"} & config.keys()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_weights_have_fp32_sums_of_gradients(stage: int) -> None:
    config = deepspeed_config(TrainConfig(), ZeroConfig(stage=stage, weights="bf16"))
    assert config["bf16"]["enabled"] is True
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "communication_data_type" not in config  # bf16, as the weights


def test_equal_settings_give_equal_configurations_that_share_nothing() -> None:
    one, other = (deepspeed_config(TrainConfig(), ZeroConfig()) for _ in range(2))
    assert one == other
    one["zero_optimization"]["stage"] = 0
    assert deepspeed_config(TrainConfig(), ZeroConfig()) == other
