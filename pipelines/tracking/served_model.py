"""The model that MLflow serves: a prompt in, a picture out.

MLflow copies this file into every registered model and runs the copy ("models from code": nothing is pickled). So it
stands alone: it imports nothing of this project, and a model registered today loads where another version of the
project is installed, or none. That costs a dozen lines that `dreambooth.sampling` has too; a test holds the two to the
same pictures. The exception is a model that was registered as its change against a base: only this project can find the
base and put the two together.
"""

import base64
import importlib.util
import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

IMAGES_AT_ONCE = 8
PLACEHOLDER = "[V]"  # stands for the model's own identifier
MISTAKEN = re.compile(r"[\[{<]\s*(?:v|identifier|class_noun)\s*[\]}>]", re.IGNORECASE)


class DreamBoothModel(PythonModel):
    """A fine-tuned text-to-image pipeline."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights onto the GPU if there is one."""
        cuda = torch.cuda.is_available()
        with _whole(Path(context.artifacts["pipeline"])) as directory:
            pipeline = StableDiffusionPipeline.from_pretrained(
                directory,
                torch_dtype=torch.float16 if cuda else torch.float32,
                safety_checker=None,
                requires_safety_checker=False,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
            ).to("cuda" if cuda else "cpu")
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.to(torch.float32)
        positions = pipeline.text_encoder.config.max_position_embeddings  # some tokenizers name no length
        pipeline.tokenizer.model_max_length = min(pipeline.tokenizer.model_max_length, positions)
        self.pipeline = pipeline
        # A CPU that multiplies bf16 itself is twice as fast with it.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        self.bf16 = not cuda and native
        if not cuda and not native:
            pipeline.unet.to(memory_format=torch.channels_last)  # a tenth faster, in fp32
        self.identifier: str = context.model_config["identifier"]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Sample one picture per row of the column `prompt`; returns them as base64 PNG in the column `image`.

        Parameters are seed (row i takes seed + i), num_inference_steps, guidance_scale, and height and width in pixels
        (by default what it was trained at; so is 0). Row i of n and the same prompt alone with seed + i give the same
        picture. Raises MlflowException (status 400) for a prompt that is empty, is longer than the model reads, or
        holds a placeholder that is none.
        """
        params = params or {}
        prompts = self._filled([str(prompt) for prompt in model_input["prompt"]])
        images = []
        for start in range(0, len(prompts), IMAGES_AT_ONCE):
            batch = prompts[start : start + IMAGES_AT_ONCE]
            # Noise from CPU generators: the same seed is the same picture on a laptop and on a GPU.
            first = int(params["seed"]) + start
            generators = [torch.Generator("cpu").manual_seed(first + row) for row in range(len(batch))]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                latents = self.pipeline(
                    batch,
                    generator=generators,
                    num_inference_steps=int(params["num_inference_steps"]),
                    guidance_scale=float(params["guidance_scale"]),
                    height=int(params["height"]) or None,
                    width=int(params["width"]) or None,
                    output_type="latent",
                ).images
            images += self._decode(latents)
        return pd.DataFrame({"image": [_base64_png(image) for image in images]})

    def _filled(self, prompts: Sequence[str]) -> list[str]:
        """Prompts with the identifier put in, each of which the model reads whole and as it was meant."""
        tokenizer = self.pipeline.tokenizer
        filled = [prompt.replace(PLACEHOLDER, self.identifier) for prompt in prompts]
        for prompt, text in zip(prompts, filled, strict=True):
            if not text.strip():
                raise MlflowException.invalid_parameter_value("a prompt is empty; write 'a photo of [V] dog'")
            if mistaken := MISTAKEN.search(prompt.replace(PLACEHOLDER, "")):
                raise MlflowException.invalid_parameter_value(
                    f"{mistaken[0]!r} in {prompt!r} is no placeholder here; {PLACEHOLDER} stands for the identifier"
                )
            ids, fits = tokenizer(text, verbose=False).input_ids, tokenizer.model_max_length
            if len(ids) > fits:
                lost = tokenizer.decode(ids[fits - 1 : -1])
                raise MlflowException.invalid_parameter_value(
                    f"{prompt!r} has {len(ids)} tokens, and the model reads {fits}: {lost!r} is cut off; shorten it"
                )
        return filled

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> list[Any]:
        """Pictures of latents, by the VAE in fp32: some overflow in fp16."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels = vae.decode(latents).sample
        images: list[Any] = self.pipeline.image_processor.postprocess(pixels)
        return images


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """Where the whole model lies for as long as it is loaded."""
    if not (directory / "delta.json").is_file():
        yield directory
        return
    try:
        from dreambooth.models.delta import rebuild
    except ImportError:
        raise RuntimeError(
            "this model was registered with registry.storage 'delta', as its change against a base; install the "
            "package dreambooth where it is loaded"
        ) from None
    with tempfile.TemporaryDirectory(prefix="dreambooth-model-") as folder:
        yield rebuild(directory, Path(folder))


def _base64_png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


set_model(DreamBoothModel())
