"""Find the memory of sampling beyond the weights, on fake tensors as that of a training step."""

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.vae import decode
from dreambooth.training.empty_step import EmptyStep
from dreambooth.training.step_memory import LiveBytes


def sampling_memory(directory: Path, *, size: tuple[int, int], images: int, guided: bool) -> int:
    """Peak bytes of sampling `images` images of a height and width in pixels together, without the weights.

    Of the denoiser in half precision, which evaluates each image with and without text if `guided`, or of the VAE in
    fp32, whichever takes more.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        denoising = _denoising(directory, size, images * (2 if guided else 1))
        return max(denoising, _decoding(directory, size, images))


def _denoising(directory: Path, size: tuple[int, int], rows: int) -> int:
    step = EmptyStep(directory, size=size, images=rows, text_encoders=(), checkpointing=False, device="cpu")
    step.denoiser.eval()
    step.round_weights()
    step.round_inputs()
    with LiveBytes() as alive:
        step.model_pred()
    return int(alive.most)


def _decoding(directory: Path, size: tuple[int, int], images: int) -> int:
    settings = BaseSettings(directory)
    if not settings.family.role("vae"):
        return 0
    vae = settings.family.empty(directory, "vae", device="cpu").eval()
    with LiveBytes() as alive:
        decode(vae, torch.empty(images, *settings.x0_shape(*size)))
    return int(alive.most)
