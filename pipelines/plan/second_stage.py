"""What the second stage of a cascade takes from the first, and what the first may not train."""

from collections.abc import Sequence

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import InputError
from dreambooth.evaluation.banks import default_bank
from dreambooth.models.base_model import BaseModel
from dreambooth.models.config_fields import read_json


def check_text_encoders(first: DreamBoothConfig, trained: Sequence[str], second: BaseModel) -> None:
    """Refuse to train what the second stage reads prompts with, and to train it by the identifier's embedding alone.

    `trained` are the folders of text encoders that the first stage runs.
    """
    folders = " and ".join(trained)
    if first.train.method == "textual_inversion":
        raise InputError(
            f"train.method textual_inversion trains an embedding of {folders} alone, and the second stage of a cascade "
            f"has none of its own; leave it out, or super_resolution.base_model"
        )
    config = read_json(second.directory / second.family.denoiser.folder / "config.json")
    if folders and second.family.reads_text(config):
        raise InputError(
            f"train.text_encoders trains {folders}, which both stages of a cascade read prompts with: the second would "
            f"be sampled with another than it was trained with; leave it out, or super_resolution.base_model"
        )


def scored_like(first: DreamBoothConfig, second: DreamBoothConfig) -> DreamBoothConfig:
    """The second stage's settings with the first one's bank, which measures the scores of both."""
    evaluation = second.evaluation
    if evaluation.every is None or evaluation.bank != "auto":
        return second
    bank = {"bank": default_bank(first.base_model)}
    return second.model_copy(update={"evaluation": evaluation.model_copy(update=bank)})
