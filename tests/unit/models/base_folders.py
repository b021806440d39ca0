"""Changes to a base model's folder, and what is said of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model

UNET = "unet/diffusion_pytorch_model.safetensors"


def fault(address: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        resolve_base_model(str(address))
    return str(caught.value)


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
