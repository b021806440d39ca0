"""The model that MLflow serves: a prompt in, a picture out.

MLflow copies this file into every registered model and runs the copy ("models from code": nothing is pickled). So it
stands alone: it imports nothing of this project, and a model registered today loads where another version of the
project is installed, or none. That costs a dozen lines that `dreambooth.sampling` has too; a test holds the two to the
same pictures. The exception is a model that was registered as its change against a base: only this project can find the
base and put the two together.
"""

import base64
import importlib.util
import inspect
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
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
            pipeline = _load(directory, torch.float16 if cuda else torch.float32).to("cuda" if cuda else "cpu")
        self.pipeline = pipeline
        arguments = inspect.signature(pipeline.__call__).parameters
        unwanted = ("clean_caption", "use_resolution_binning")  # they change the prompt, or the size
        self.settings = {name: False for name in unwanted if name in arguments}
        if tokens := context.model_config.get("tokens"):
            pipeline.tokenizer.model_max_length = min(pipeline.tokenizer.model_max_length, tokens)
        # A CPU that multiplies bf16 itself is twice as fast with it.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        self.bf16 = not cuda and native
        if not cuda and not native:
            denoiser = pipeline.components.get("unet") or pipeline.transformer
            denoiser.to(memory_format=torch.channels_last)  # a tenth faster, in fp32
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
        height, width = int(params["height"]) or None, int(params["width"]) or None
        prompts = self._filled([str(prompt) for prompt in model_input["prompt"]])
        images = []
        for start in range(0, len(prompts), IMAGES_AT_ONCE):
            batch = prompts[start : start + IMAGES_AT_ONCE]
            # Noise from CPU generators: the same seed is the same picture on a laptop and on a GPU.
            first = int(params["seed"]) + start
            generators = [torch.Generator("cpu").manual_seed(first + row) for row in range(len(batch))]
            try:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    x0 = self.pipeline(
                        batch,
                        generator=generators,
                        num_inference_steps=int(params["num_inference_steps"]),
                        guidance_scale=float(params["guidance_scale"]),
                        height=height,
                        width=width,
                        output_type="latent" if self._vae else "pt",
                        **self.settings,
                    ).images
            except ValueError as error:  # a side that this denoiser can't divide
                raise MlflowException.invalid_parameter_value(f"height {height}, width {width}: {error}") from None
            images += self._decode(x0, height, width)
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

    @property
    def _vae(self) -> Any:
        """None of a model that works on pixels."""
        return self.pipeline.components.get("vae")

    @torch.no_grad()
    def _decode(self, x0: torch.Tensor, height: int | None, width: int | None) -> list[Any]:
        """Pictures of a pipeline's output, by the VAE in fp32: some overflow in fp16."""
        pipeline, vae = self.pipeline, self._vae
        if x0.ndim == 3:  # patches as a sequence
            side = pipeline.default_sample_size * pipeline.vae_scale_factor
            x0 = pipeline._unpack_latents(x0, height or side, width or side, pipeline.vae_scale_factor)
        if vae:
            x0 = vae.decode(x0.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
        images: list[Any] = VaeImageProcessor().postprocess(x0)
        return images


def _load(directory: Path, dtype: torch.dtype) -> Any:
    """The pipeline in a directory, without what it names and doesn't have, with the sampler of its kind of noise."""
    index = json.loads((directory / "model_index.json").read_text())
    parts = [name for name, value in index.items() if isinstance(value, list)]
    without: dict[str, Any] = {name: None for name in parts if not (directory / name).is_dir()}
    if "safety_checker" in without:
        without["requires_safety_checker"] = False
    pipeline = DiffusionPipeline.from_pretrained(
        directory,
        torch_dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
        **without,
    )
    config = pipeline.scheduler.config
    flow = type(pipeline.scheduler).__name__.startswith("FlowMatch")
    sampler = FlowMatchEulerDiscreteScheduler if flow else DPMSolverMultistepScheduler
    # Nearer to the pure noise that a cosine schedule ends in, rounding would rule.
    cosine = {"lambda_min_clipped": -5.1} if config.get("beta_schedule") == "squaredcos_cap_v2" else {}
    pipeline.scheduler = sampler.from_config(config, **cosine)
    pipeline.set_progress_bar_config(disable=True)
    if vae := pipeline.components.get("vae"):
        vae.to(torch.float32)
    for name in [name for name in parts if name.startswith("tokenizer") and name not in without]:
        tokenizer = getattr(pipeline, name)
        text_encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
        positions = getattr(text_encoder.config, "max_position_embeddings", None)  # some tokenizers name no length
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    return pipeline


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
