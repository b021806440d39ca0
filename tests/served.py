"""The model that MLflow serves, loaded from a folder as MLflow loads it, without a registry."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from PIL import Image

from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.served import served_facts
from pipelines.tracking.client import quietly


def facts_of(base: Path, second: Path | None = None) -> dict[str, Any]:
    """What the served model is told of a base, as it reads it: registered models hold JSON."""
    facts = served_facts(BaseSettings(base), second and BaseSettings(second))
    return dict(json.loads(json.dumps(facts)))


class Served:
    """A model that is tuned from a base, and from that of a second stage; by default it is the base itself."""

    def __init__(self, base: Path, second: Path | None = None, *, model: Path | None = None, **settings: Any) -> None:
        with quietly():
            from pipelines.tracking.served_model import DreamBoothModel

        self.context: Any = SimpleNamespace(
            artifacts={"pipeline": str(model or base)},
            model_config={"identifier": "sks", "served": facts_of(base, second), **settings},
        )
        self._model = DreamBoothModel()
        self._model.load_context(self.context)

    def pictures(self, prompts: Sequence[str], *, seed: int, **settings: Any) -> list[Image.Image]:
        params = {"seed": seed, "height": 0, "width": 0, **settings}
        answer = self._model.predict(self.context, pd.DataFrame({"prompt": list(prompts)}), params)
        return [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["image"]]
