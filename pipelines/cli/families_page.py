"""Families of base models as a page, `dreambooth families --markdown`, from their classes and published models."""

from collections.abc import Iterator
from dataclasses import replace

from dreambooth.models.base_model import BaseModel
from dreambooth.models.families import FAMILIES, Family
from pipelines.plan.capacity import GPU_SIZES, MOST_GPUS, STAGES, Fewest, fewest_gpus
from pipelines.plan.changes import FROZEN_TEXT, OFFLOAD, OFFLOAD_ALL
from pipelines.plan.memory import peak_of
from pipelines.plan.published import published_models, published_plan
from pipelines.plan.run_plan import Plan
from pipelines.plan.sampling_memory import weights_bytes

_HEAD = """# Families of base models

A base model is a folder that diffusers' `save_pretrained` wrote, or a hub id. Its `model_index.json` names a pipeline
class, which decides the family. Each is one file in `dreambooth/models/families/`. This page is made by `dreambooth
families --markdown`.

## What each supports

All components named *trained* are fine-tuned in all their layers, with prior preservation. `train.text_encoders`
chooses other text encoders: `all`, `none` or their folders. Those that stay frozen encode the prompts once, and
wait in main memory for the next subject. Each default gives way to a setting of yours.
"""
_SAMPLES = """A published model carries the base's own scheduler, as the base's repository does. `generate`, `serve`,
`evaluate` and the model that MLflow serves sample by the table's sampler, made from it. Plain diffusers gives the same
picture of the same noise once its scheduler is set as ours, where the base has another:

```python
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

pipeline = DiffusionPipeline.from_pretrained("output/rex/model/…")
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
```

A cosine schedule (`squaredcos_cap_v2`) needs `lambda_min_clipped=-5.1` behind it.
"""
_CASCADE = """## Cascades

`super_resolution.base_model` names a second stage, which scales up the pictures of `base_model`: a model of the family
{second}. Both are fine-tuned, one after the other, on the instance images at their own
resolutions; class images are the first stage's alone. The second stage learns on what sampling gives it: x_t beside the
small picture, scaled up and noised, with the level of that noise as its class. Its settings are the group
`super_resolution`; all others hold for both stages.

- The model is published as one: a diffusers directory, with the second stage as another in its folder
  `super_resolution`. `generate`, `serve`, `evaluate` and the model that MLflow serves sample both, the second one with
  the first one's text encoder, at its family's guidance scale, in as many steps.
- The stages have to read prompts by the same text encoder, which stays frozen. A second stage without cross-attention
  reads none: then the first one's may be trained (`train.text_encoders`), and the second is sampled without guidance.
- The noise of the small picture has a level from 0 to 999 in training and 250 in samples by default. A base may name
  fewer levels, as `_levels` in `image_noising_scheduler/scheduler_config.json`, and so may you, as
  `super_resolution.noise_levels`, which is published with the model; samples have a quarter of them.
- `super_resolution.max_train_steps: 0` leaves the second stage as it is.
- A run that is struck goes on in the stage it was in. The first stage's last checkpoint is kept until the model is
  published. Other settings of either stage train both anew.
- Both stages are scored during training (`evaluation.every`), and `train.keep: best` and `train.stop_after` hold for
  each. Scores of the second are of its own pictures, scaled up from those of the trained first, which are drawn once.
- Curves of the second stage in MLflow are named `super_resolution/…`; validation samples are of the first.
"""
_MEMORY = """## Memory

Of published models, counted from their configurations without weights: parameters in millions, GiB of tensors at the
peak of a step on each of {workers} GPUs, and the fewest GPUs that a subject can be trained on. Steps are of one
instance/class pair with gradient checkpointing, at the model's resolution, with the family's defaults: weights and
Adam's moments in fp32, matrix products in bf16. A tenth of a GPU's memory is left for what isn't counted. *Offload* is
`zero.offload_optimizer`, *offload all* is `zero.offload_parameters` with it, *frozen text* is `train.text_encoders:
none`; *none* means that not even {most} GPUs with all of them are enough, and behind it stands what helps. *Samples*
are the weights of a pipeline in fp16, which samples on one GPU.

`dreambooth run --dry-run --base-model …` counts the same for your settings; the base's weights needn't be there. So it
does for {without}, which is missing here: no published configuration could be found outside its
repository.
"""
_HOW = """## How to add a family

1. Write `dreambooth/models/families/<family>.py` with a subclass of `Family`, and list it in `FAMILIES`. Nothing
   outside that folder may name it. `pixart.py` is a short one to start from.
2. Name its `components` (folder, role, class, name of the weight files), the `fields` of its configurations that are
   read before anything is loaded, and its `defaults`.
3. Say how text becomes the denoiser's: `tokenize`, `encode_with` one text encoder, `join` what all gave.
4. Say what is learnt: `process` is a `Diffusion` or a `RectifiedFlow`, `arguments` are the denoiser's by name,
   `prediction` brings its output into the shape of x0.
5. Say how it is sampled: `sampler`, `pipeline`, `prompt_arguments`, `call_arguments`, and `decode` if it takes more
   than the VAE. The model that MLflow serves can't ask the family: it is told `loaded_with`, `called_with` and `packed`
   when it is registered.
6. Name parameters that no gradient reaches in `without_gradient`, those that other programs take for granted in `kept`,
   and refuse inputs that training doesn't give in `check_trainable`.
7. Build a tiny random replica of its repository in `tests/replicas/<family>.py` and list it in `REPLICAS`: the tests
   in `tests/unit/models/families/` compare replicas with the plain diffusers pipeline, in arguments, losses,
   embeddings and pictures.
8. Add the configurations of its published models to `dreambooth/models/published/`, and make this page anew.
"""
_WORKERS = 8
_CHANGES = {OFFLOAD.name: "offload", OFFLOAD_ALL.name: "offload all", FROZEN_TEXT.name: "frozen text"}


def families_page() -> str:
    """Render the tables in Markdown."""
    published = published_models()
    plans, known = [published_plan(base) for base in published], {base.pipeline_class for base in published}
    parts = [
        _HEAD,
        *families_table(),
        "",
        _SAMPLES,
        _CASCADE.format(second=", ".join(family.name for family in FAMILIES if family.scales_up)),
        _MEMORY.format(
            workers=_WORKERS,
            most=MOST_GPUS,
            without=", ".join(family.name for family in FAMILIES if family.pipeline_class not in known),
        ),
        *_memory_table(plans),
        "",
        _HOW,
    ]
    return "\n".join(parts)


def families_table() -> Iterator[str]:
    """A row for each family."""
    yield "| family | pipeline | components | trained | learns | sampler | min-SNR | defaults |"
    yield "|---|---|---|---|---|---|---|---|"
    published = published_models()
    for family in FAMILIES:
        of_family = [base for base in published if base.pipeline_class == family.pipeline_class]
        cells = [family.name, f"`{family.pipeline_class}`", _components(family), _trained(family)]
        cells += [_learnt(family, of_family), family.sampler, "yes" if family.min_snr else "no", _defaults(family)]
        yield f"| {' | '.join(cells)} |"


def _components(family: Family) -> str:
    parts = [part for part in family.components if part.role in ("denoiser", "text_encoder", "vae")]
    return "<br>".join(f"`{part.folder}` {part.kind}{' (optional)' if part.optional else ''}" for part in parts)


def _trained(family: Family) -> str:
    return "<br>".join(f"`{folder}`" for folder in (family.denoiser.folder, *family.defaults.text_encoders))


def _learnt(family: Family, published: list[BaseModel]) -> str:
    """Processes of a family's published models, or their kind where there are none."""
    learnt = []
    for base in published:
        process = base.family.process(base.directory, base.settings.x0_shape(base.resolution))
        learnt.append(
            f"{type(process).__name__}{f', {kind}' if (kind := getattr(process, 'prediction_type', '')) else ''}"
        )
    return "<br>".join(dict.fromkeys(learnt)) or family.noise.capitalize()


def _defaults(family: Family) -> str:
    own = family.defaults
    rows = [f"{own.max_train_steps} steps at {own.learning_rate:g}"]
    rows += [f"{own.num_inference_steps} sampling steps, guidance {own.guidance_scale:g}"]
    rows += [f"{own.resolution} px"] if own.resolution else []
    return "<br>".join(rows)


def _memory_table(plans: list[Plan]) -> Iterator[str]:
    stages = " | ".join(f"ZeRO-{stage}" for stage in STAGES)
    sizes = " | ".join(f"{size} GB GPUs" for size in GPU_SIZES)
    yield f"| model | px | parameters | {stages} | samples | {sizes} |"
    yield f"|{'---|' * (4 + len(STAGES) + len(GPU_SIZES))}"
    for plan in plans:
        counts = "<br>".join(f"`{part}` {count / 1e6:.1f}" for part, count in plan.base.parameter_counts.items())
        cells = [plan.base.address, str(plan.base.resolution), counts]
        cells += [f"{peak_of(plan, stage, _WORKERS) / 2**30:.0f}" for stage in STAGES]
        cells += [f"{weights_bytes(plan.bases) / 2**30:.0f}", *(_fewest(plan, size) for size in GPU_SIZES)]
        yield f"| {' | '.join(cells)} |"


def _fewest(plan: Plan, size: int) -> str:
    fewest = fewest_gpus(plan, size)
    if fewest.by_stage:
        return _shown(fewest)
    side = plan.base.resolution // 2
    images = plan.config.images.model_copy(update={"resolution": side})
    smaller = fewest_gpus(replace(plan, config=plan.config.model_copy(update={"images": images})), size)
    return f"none; at {side} px {_shown(smaller)}" if smaller.by_stage else "none; larger GPUs"


def _shown(fewest: Fewest) -> str:
    stage, count = min(fewest.by_stage.items(), key=lambda item: (item[1], item[0]))
    offloads_all = OFFLOAD_ALL.name in fewest.changes
    changes = [_CHANGES[change] for change in fewest.changes if not (offloads_all and change == OFFLOAD.name)]
    return f"{count} ({', '.join([f'ZeRO-{stage}', *changes])})"
