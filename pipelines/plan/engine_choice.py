"""The engine of a run and its precision, and what it can't do together."""

from typing import Literal

from dreambooth.config.explain import in_yaml
from dreambooth.config.settings import DreamBoothConfig, ZeroConfig
from dreambooth.config.train import TrainConfig
from dreambooth.errors import InputError
from pipelines.cluster.ray_cluster import Resources


def choose_engine(config: DreamBoothConfig, *, gpus_have_bf16: bool = True) -> str:
    """DeepSpeed if needed; plain PyTorch for a single worker, where it is faster (`make bench`).

    Raises InputError for settings that exclude each other, for an optimizer whose library is missing, and for bf16
    weights on GPUs without bf16.
    """
    if config.train.optimizer != "adamw":
        from dreambooth.training.optimizer import check_optimizer_installed

        check_optimizer_installed(config.train.optimizer)
    of_zero, of_torch = _needs_zero(config.zero), _needs_torch(config.train)
    _check_exclusions(config, of_zero, of_torch)
    if config.zero.weights == "bf16":
        _check_bf16_weights(config, gpus_have_bf16=gpus_have_bf16)
    several = (config.cluster.num_workers > 1 or of_zero is not None) and of_torch is None
    engine = config.engine if config.engine != "auto" else "deepspeed" if several else "torch"
    if engine == "deepspeed" and config.cluster.min_workers is not None and config.train.ema_decay is not None:
        raise InputError(
            "cluster.min_workers goes with train.ema_decay only where engine is 'torch': DeepSpeed's shards of the "
            "moving average can't be divided anew; leave one of them out"
        )
    return engine


def choose_precision(config: DreamBoothConfig, resources: Resources) -> Literal["bf16", "no"]:
    """The precision of matrix products: chosen once for all workers, whatever GPU each gets."""
    if config.train.mixed_precision != "auto":
        return config.train.mixed_precision
    return "bf16" if resources.use_gpu(config.cluster) and resources.gpus_have_bf16 else "no"


def _check_exclusions(config: DreamBoothConfig, of_zero: str | None, of_torch: str | None) -> None:
    """Raise InputError for what no engine does together."""
    zero, workers = config.zero, config.cluster.num_workers
    if config.engine == "torch" and of_zero is not None:
        raise InputError(f"{of_zero} needs DeepSpeed, but engine is 'torch'; leave engine at 'auto'")
    if zero.offload_optimizer and zero.stage == 0:
        raise InputError(
            "zero.offload_optimizer needs zero.stage 1, 2 or 3, got 0, which keeps every state on the device"
        )
    if zero.offload_parameters and not (zero.stage == 3 and zero.offload_optimizer):
        raise InputError(
            f"zero.offload_parameters needs zero.stage 3 and zero.offload_optimizer, got stage {zero.stage} and "
            f"{in_yaml(zero.offload_optimizer)}: only ZeRO-3 fetches weights as they are needed"
        )
    if zero.gather_blocks:
        _check_gathered_blocks(config)
    if of_torch is not None and (config.engine == "deepspeed" or of_zero is not None):
        instead = of_zero or "engine: deepspeed"
        raise InputError(f"{of_torch} needs engine 'torch', which excludes {instead}; leave one of them out")
    if config.train.fused_backward and workers > 1:
        raise InputError(
            f"train.fused_backward needs one worker, got cluster.num_workers {workers}, whose gradients are averaged "
            f"after the backward pass; leave one of them out"
        )


def _check_gathered_blocks(config: DreamBoothConfig) -> None:
    if config.zero.stage != 3:
        raise InputError(
            f"zero.gather_blocks needs zero.stage 3, got {config.zero.stage}, which gathers no weights; leave it out"
        )
    if config.images.aspect_buckets:
        # DeepSpeed reduces a block's gradients once for each of its passes, and finds them in its bucket already.
        raise InputError(
            "zero.gather_blocks needs one pass of the denoiser a step, and images.aspect_buckets makes two where sizes "
            "differ; leave one of them out"
        )


def _check_bf16_weights(config: DreamBoothConfig, *, gpus_have_bf16: bool) -> None:
    train = config.train
    if config.zero.stage == 0:
        raise InputError(
            "zero.weights bf16 needs zero.stage 1, 2 or 3, got 0, which keeps no fp32 masters beside the weights; set "
            "zero.stage, or leave zero.weights out"
        )
    if not gpus_have_bf16 and config.cluster.use_gpu is not False:
        raise InputError(
            "zero.weights bf16 needs GPUs that compute in bf16 (NVIDIA's from Ampere on), but the cluster has one that "
            "doesn't; leave zero.weights out, or leave that one out of the cluster"
        )
    if train.mixed_precision == "no":
        raise InputError(
            "zero.weights bf16 needs train.mixed_precision bf16, got no, which auto is on CPUs; set "
            "train.mixed_precision=bf16, or leave zero.weights out"
        )
    if train.method == "textual_inversion":
        raise InputError(
            "zero.weights bf16 rounds the weights that are trained, and train.method textual_inversion trains an "
            "embedding alone; leave one of them out"
        )


def _needs_zero(zero: ZeroConfig) -> str | None:
    """The setting that plain PyTorch excludes."""
    for name in ("offload_parameters", "offload_optimizer"):
        if getattr(zero, name):
            return f"zero.{name}"
    return "zero.weights bf16" if zero.weights == "bf16" else None


def _needs_torch(train: TrainConfig) -> str | None:
    """The setting that DeepSpeed excludes: ZeRO flattens parameters, which have no rows or columns then."""
    if train.optimizer != "adamw":
        return f"train.optimizer {train.optimizer}"
    return "train.fused_backward" if train.fused_backward else None
