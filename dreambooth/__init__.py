"""The DreamBooth method (Ruiz et al., arXiv 2208.12242) with torch, diffusers and transformers, without a cluster.

Everything in `__all__` can be imported from here; examples/ has scripts.
"""

from typing import TYPE_CHECKING

from dreambooth.lazy import lazily

if TYPE_CHECKING:
    from dreambooth.config.settings import DreamBoothConfig, load_config
    from dreambooth.data.batches import TrainingData
    from dreambooth.data.identifier import choose_identifier
    from dreambooth.data.images import InstanceImage, find_instance_images
    from dreambooth.data.prepare import prepare_data
    from dreambooth.errors import Diverged, InputError
    from dreambooth.evaluation.banks import load_bank
    from dreambooth.evaluation.measure import PromptSamples, measure
    from dreambooth.miniature import subject_dir, subject_names
    from dreambooth.models.base_model import BaseModel, resolve_base_model
    from dreambooth.models.export import export_pipeline, verify_export
    from dreambooth.sampling.sampler import load_pipeline, load_trained, sample
    from dreambooth.training.engine import Engine, TorchEngine
    from dreambooth.training.loop import StepMetrics, fit
    from dreambooth.training.model import Components, DreamBoothModel, build_model, load_components, load_model
else:
    __getattr__ = lazily(
        __name__,
        {
            "config.settings": ["DreamBoothConfig", "load_config"],
            "data.batches": ["TrainingData"],
            "data.identifier": ["choose_identifier"],
            "data.images": ["InstanceImage", "find_instance_images"],
            "data.prepare": ["prepare_data"],
            "errors": ["Diverged", "InputError"],
            "evaluation.banks": ["load_bank"],
            "evaluation.measure": ["PromptSamples", "measure"],
            "miniature": ["subject_dir", "subject_names"],
            "models.base_model": ["BaseModel", "resolve_base_model"],
            "models.export": ["export_pipeline", "verify_export"],
            "sampling.sampler": ["load_pipeline", "load_trained", "sample"],
            "training.engine": ["Engine", "TorchEngine"],
            "training.loop": ["StepMetrics", "fit"],
            "training.model": ["Components", "DreamBoothModel", "build_model", "load_components", "load_model"],
        },
    )

__version__ = "0.1.0"
__all__ = [
    "BaseModel",
    "Components",
    "Diverged",
    "DreamBoothConfig",
    "DreamBoothModel",
    "Engine",
    "InputError",
    "InstanceImage",
    "PromptSamples",
    "StepMetrics",
    "TorchEngine",
    "TrainingData",
    "build_model",
    "choose_identifier",
    "export_pipeline",
    "find_instance_images",
    "fit",
    "load_bank",
    "load_components",
    "load_config",
    "load_model",
    "load_pipeline",
    "load_trained",
    "measure",
    "prepare_data",
    "resolve_base_model",
    "sample",
    "subject_dir",
    "subject_names",
    "verify_export",
]


def __dir__() -> list[str]:
    return __all__
