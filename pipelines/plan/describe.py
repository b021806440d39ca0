"""Describe a plan to people: its rows, and all settings without secrets."""

from typing import Any

from dreambooth.amounts import counted, readable_bytes
from dreambooth.config.addresses import shown
from dreambooth.config.settings import ClusterConfig, DreamBoothConfig
from dreambooth.data.buckets import describe_sizes
from dreambooth.sampling.class_images import PriorPlan
from pipelines.plan.run_plan import Plan


def printable_settings(config: DreamBoothConfig) -> dict[str, Any]:
    """All settings as plain values, for people and MLflow, without passwords and tokens in addresses."""
    settings: dict[str, Any] = _shown(config.model_dump(mode="json", by_alias=True))
    return settings


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shown(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_shown(each) for each in value]
    return shown(value) if isinstance(value, str) and "://" in value else value


def describe_plan(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (what, value) rows."""
    config, train = plan.config, plan.config.train
    workers, zero = config.cluster.num_workers, config.zero
    offloaded = "optimizer and weights" if zero.offload_parameters else "optimizer" if zero.offload_optimizer else None
    engine = f"DeepSpeed ZeRO-{zero.stage}{f', {offloaded} in host memory' if offloaded else ''}"
    engine += ", bf16 weights" if zero.weights == "bf16" else ""
    rows = [
        ("subject", f"{config.subject.name}: {counted(len(plan.images), 'image')} of a {config.subject.class_noun}"),
        ("instance prompt", config.prompts.instance_prompt(config.subject)),
        *_stage(plan, "base model"),
        *([] if plan.second is None else _stage(plan.second, "second stage")),
        *([("buckets", describe_sizes(plan.sizes))] if config.images.aspect_buckets else []),
        (
            "workers",
            f"{workers} x {'1 GPU' if plan.use_gpu else f'{config.cluster.cpus_per_worker} CPU'}"
            f"{fewer_workers(config.cluster)}",
        ),
        ("engine", engine if plan.engine == "deepspeed" else "PyTorch"),
        *([] if train.optimizer == "adamw" else [("optimizer", train.optimizer)]),
        (
            "memory per worker",
            f"{', then '.join(readable_bytes(stage.model_state_bytes) for stage in plan.stages)} of weights, gradients "
            f"and optimizer; activations on top",
        ),
    ]
    if plan.prior is not None:
        rows.append(("class images", _class_images(plan, plan.prior)))
    if (protocol := plan.protocol) is not None and (bank := protocol.bank) is not None:
        prompts = protocol.protocol.prompts
        drawn = f"{counted(len(prompts.prompts), 'prompt')} ({prompts.name}) x {protocol.protocol.images_per_prompt}"
        beside = "".join(f", {each.name} beside it" for each in bank.further)
        rows.append(("figures", f"{drawn}, measured by the bank {bank.name}{beside}"))
    if train.by_score and config.evaluation.every is not None:
        every = counted(config.evaluation.every, "step")
        each = "" if plan.second is None else " of each stage"
        rows.append(("scores", f"every {every}{each}; exported is the {train.keep} checkpoint"))
    name = f", registered as {config.model_name}" if config.tracking.register_model else ""
    rows.append(("writes to", f"{config.run_uri}{name}"))
    return [*rows, ("result key", plan.key)] if plan.has_weights else rows


def _stage(plan: Plan, what: str) -> list[tuple[str, str]]:
    """What a stage starts from, and what is trained of it."""
    config, train = plan.config, plan.config.train
    pairs = train.micro_batch_size * train.gradient_accumulation_steps * config.cluster.num_workers
    counts = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in plan.base.parameter_counts.items())
    known = f"hash {plan.base.hash}" if plan.base.has_weights else "whose weights aren't here: by its configuration"
    trained = " and ".join(["denoiser", *plan.run_text_encoders]).replace("text_encoder", "text encoder")
    if train.method == "textual_inversion":
        trained = "the identifier's embedding (Textual Inversion)"
    base = (what, f"{shown(config.base_model)} ({counts}), {known}")
    if not train.max_train_steps:
        return [base, ("trained", f"nothing, it stays as it is, at {config.images.resolution} px")]
    of_each = "instance/class pair" if plan.prior else "instance image"
    return [
        base,
        ("trained", f"{trained}, {_count(plan.trained_parameters)} parameters, at {config.images.resolution} px"),
        ("steps", f"{train.max_train_steps} of {counted(pairs, of_each)}"),
    ]


def fewer_workers(cluster: ClusterConfig) -> str:
    """The least number of workers, for a group that may shrink."""
    fewest = cluster.min_workers
    return "" if fewest in (None, cluster.num_workers) else f" (as few as {fewest} when the cluster shrinks)"


def _class_images(plan: Plan, prior: PriorPlan) -> str:
    from pipelines.stages.prior_stage import images_present

    missing = len(prior.missing(images_present(plan.config.prior_uri, prior)))
    there = "all made" if not missing else f"{missing} to make"
    return f"{prior.count} of {prior.class_prompt!r}: {there} (set {prior.key})"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 10_000 else str(parameters)
