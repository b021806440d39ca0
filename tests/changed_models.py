"""Published models that differ from their base by what a test says."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dreambooth.models.base_model import resolve_base_model
from pipelines.storage.publications import publish


def publish_changed(base: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor], **more: Any) -> str:
    """Publish a base with its denoiser and text encoder changed; returns the address."""
    copy = Path(shutil.copytree(base, folder / "copy"))
    for part in ("unet", "text_encoder"):
        for path in (copy / part).glob("*.safetensors"):
            save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    metadata = {"key": "k", "subject": "rex", "class_noun": "dog", "identifier": "tfz", "resolution": 64}
    metadata |= {"base_model": str(base), "base_hash": resolve_base_model(str(base)).hash}
    metadata |= {"num_inference_steps": 2, "guidance_scale": 2.0} | more
    return publish(copy, str(folder / "rex" / "model"), metadata=metadata).uri
