"""The model that MLflow serves stands alone, and yet draws what `sample` draws, for every family."""

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dreambooth.models.families import load_tokenizer
from dreambooth.sampling.sampler import load_pipeline, sample

PROMPTS = ["a photo of sks dog", "a photo of a dog"]
SAMPLING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # older versions know no other name
def test_the_served_model_draws_the_same(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    from pipelines.tracking.client import quietly

    with quietly():
        from mlflow.exceptions import MlflowException

        from pipelines.tracking.served_model import DreamBoothModel

    tokens = load_tokenizer(base).model_max_length
    settings = {"identifier": "sks", "tokens": tokens}
    served: Any = DreamBoothModel()
    context: Any = SimpleNamespace(artifacts={"pipeline": str(base)}, model_config=settings)
    served.load_context(context)
    asked = pd.DataFrame({"prompt": ["a photo of [V] dog", PROMPTS[1]]})
    answer = served.predict(context, asked, {"seed": 3, **SAMPLING})
    expected = sample(load_pipeline(base), PROMPTS, [3, 4], dtype=torch.float32, **SAMPLING)
    for encoded, picture in zip(answer["image"], expected, strict=True):
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), dtype=int)
        assert abs(drawn - np.asarray(picture, dtype=int)).max() <= 1
        assert drawn.std() > 1
    with pytest.raises(MlflowException, match=f"the model reads {tokens}"):
        served.predict(context, pd.DataFrame({"prompt": ["dog " * 600]}), {"seed": 3, **SAMPLING})
