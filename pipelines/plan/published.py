"""Plans for base models as they are published, from their configurations alone."""

from pathlib import Path

import dreambooth.models
from dreambooth.config.settings import load_config
from dreambooth.data.inspection import Inspection
from dreambooth.models.base_model import BaseModel
from dreambooth.models.families import FAMILIES
from dreambooth.sampling.class_images import prior_plan
from pipelines.plan.run_plan import Plan, with_defaults_of

PUBLISHED = Path(dreambooth.models.__file__).with_name("published")
"""Folders of model_index.json and each component's configuration, without weights and vocabularies."""


def published_models() -> list[BaseModel]:
    """Published base models of the families, in the families' order."""
    found = [BaseModel(address=path.name, revision=None, directory=path) for path in sorted(PUBLISHED.iterdir())]
    known = [family.pipeline_class for family in FAMILIES]
    return sorted(
        (one for one in found if one.pipeline_class in known), key=lambda one: known.index(one.pipeline_class)
    )


def published_plan(base: BaseModel) -> Plan:
    """The plan of a subject on GPUs, with gradient checkpointing and the family's defaults."""
    settings = {
        "base_model": str(base.directory),
        "subject": {"name": "subject", "class_noun": "dog", "identifier": "xwz", "instance_images": "photos"},
        "images": {"resolution": base.resolution},
        "train": {"gradient_checkpointing": True, "mixed_precision": "bf16"},
    }
    config = with_defaults_of(load_config(settings), base)
    prior = prior_plan(
        config.prior,
        base_hash=base.hash,
        class_prompt=config.prompts.class_prompt(config.subject),
        resolution=base.resolution,
        dtype="float16",
        sampler=base.family.sampler_name,
    )
    return Plan(
        config=config,
        base=base,
        images=(),
        data_hash="",
        compared=Inspection(images=(), data_hash="", warnings=()),
        prior=prior,
        engine="deepspeed",
        use_gpu=True,
        sampling_dtype="float16",
        key="",
        warnings=(),
    )
