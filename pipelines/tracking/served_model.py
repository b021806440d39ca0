"""The model that MLflow serves: a prompt in, a picture out.

MLflow copies this file into every registered model and runs the copy ("models from code": nothing is pickled), also at
registration, so PyTorch and diffusers are imported when a model is loaded. It imports nothing of this project: a model
loads where another version of the project is installed, or none. Nor does it know a family: the facts of its own were
written beside the copy at registration (`served` in its model_config). The exception is a model that was registered as
its change against a base: only this project can find the base and put the two together.

A version holds its weights, or refers to the publication they lie in: by its address, and by the sha256 of its
manifest, which names the size and sha256 of every file. Credentials come from the environment, as fsspec has it.
"""

import base64
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.pyfunc.model import PythonModel, PythonModelContext

IMAGES_AT_ONCE = 8
PIXELS_AT_ONCE = 1024**2  # of the VAE, which takes some 3.5 GiB for so many
PLACEHOLDER = "[V]"  # stands for the model's own identifier
SECOND_STAGE = "super_resolution"  # folder of the stage that scales up the pictures
MISTAKEN = re.compile(r"[\[{<]\s*(?:v|identifier|class_noun)\s*[\]}>]", re.IGNORECASE)
MANIFEST = "manifest.json"
# A store that is away is an error within a minute, not within ten.
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard"}}}


class DreamBoothModel(PythonModel):
    """A fine-tuned text-to-image pipeline, or two: a second stage scales up the pictures of the first."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights onto the GPU if there is one. Raises MlflowException if the publication is gone."""
        facts, self.second = context.model_config["served"], None
        with model_directory(context.artifacts.get("pipeline"), context.model_config) as directory:
            self.first = Stage(directory, facts)
            if SECOND_STAGE in facts:
                text_encoder = self.first.pipeline.text_encoder
                self.second = Stage(directory / SECOND_STAGE, facts[SECOND_STAGE], text_encoder=text_encoder)
        self.pipeline = self.first.pipeline  # asked for, as in every version, by `dreambooth generate`
        self.tokenizers = [one for name, one in self.pipeline.components.items() if "tokenizer" in name and one]
        for each in self.tokenizers:
            each.model_max_length = min(each.model_max_length, context.model_config.get("tokens") or 10**6)
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
        guidance_scale, steps = float(params["guidance_scale"]), int(params["num_inference_steps"])
        prompts = self._filled([str(prompt) for prompt in model_input["prompt"]])
        images = []
        for start in range(0, len(prompts), IMAGES_AT_ONCE):
            batch = prompts[start : start + IMAGES_AT_ONCE]
            seeds = [int(params["seed"]) + start + row for row in range(len(batch))]
            try:
                pictures = self.first.sample(batch, seeds, steps, height, width, guidance_scale=guidance_scale)
            except ValueError as error:  # a side that this denoiser can't divide
                raise MlflowException.invalid_parameter_value(f"height {height}, width {width}: {error}") from None
            if self.second is not None:
                sides = [self.second.facts["scales_up"] * side for side in pictures[0].size]
                pictures = self.second.sample(batch, [*map(_further, seeds)], steps, sides[1], sides[0], image=pictures)
            images += pictures
        return pd.DataFrame({"image": [_base64_png(image) for image in images]})

    def _filled(self, prompts: Sequence[str]) -> list[str]:
        """Prompts with the identifier put in, each of which the model reads whole and as it was meant."""
        filled = [prompt.replace(PLACEHOLDER, self.identifier) for prompt in prompts]
        for prompt, text in zip(prompts, filled, strict=True):
            if not text.strip():
                raise MlflowException.invalid_parameter_value("a prompt is empty; write 'a photo of [V] dog'")
            if mistaken := MISTAKEN.search(prompt.replace(PLACEHOLDER, "")):
                raise MlflowException.invalid_parameter_value(
                    f"{mistaken[0]!r} in {prompt!r} is no placeholder here; {PLACEHOLDER} stands for the identifier"
                )
            self._check_length(prompt, text)
        return filled

    def _check_length(self, prompt: str, text: str) -> None:
        """One text encoder has to read all of a text (CLIP cuts what T5 beside it reads), and each the identifier."""
        readings, (before, named, _) = [], prompt.partition(PLACEHOLDER)
        for each in self.tokenizers:
            ids, fits = each(text, verbose=False).input_ids, each.model_max_length
            lost = each.decode(ids[fits - 1 : -1])
            fault = f"has {len(ids)} tokens, and the model reads {fits}: {lost!r} is cut off"
            readings.append((len(ids) - fits, fault))
            if named and len(each(before + self.identifier, verbose=False).input_ids) > fits:
                readings = [(1, f"{fault}, the identifier with it")]
                break
        if (least := min(readings))[0] > 0:
            raise MlflowException.invalid_parameter_value(f"{prompt!r} {least[1]}; shorten it")


class Stage:
    """A pipeline, sampled by its family's facts (`dreambooth.models.served`)."""

    def __init__(self, directory: Path, facts: Mapping[str, Any], **given: Any) -> None:
        """Load the weights, but parts that are given."""
        import torch

        cuda = torch.cuda.is_available()
        self.facts, self.pipeline = facts, _load(directory, facts, torch.float16 if cuda else torch.float32, given)
        self.pipeline.to("cuda" if cuda else "cpu")
        # A CPU that multiplies bf16 itself is twice as fast with it.
        self._bf16 = not cuda and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        if not cuda and not self._bf16:
            self.pipeline.components[facts["denoiser"]].to(memory_format=torch.channels_last)  # a tenth faster, in fp32

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_inference_steps: int,
        height: int | None,
        width: int | None,
        **further: Any,
    ) -> list[Any]:
        """A picture for each prompt and seed; without a size in pixels that of training. Raises ValueError as its call.

        `further` are arguments of the pipeline's call, as those of its family are.
        """
        import torch

        # Noise from CPU generators: the same seed is the same picture on a laptop and on a GPU.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        height, width = height or self.facts["side"], width or self.facts["side"]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            x0 = self.pipeline(
                list(prompts),
                generator=generators,
                num_inference_steps=num_inference_steps,
                height=height,
                width=width,
                output_type=self.facts["output_type"],
                **(self.facts["called_with"] | further),
            ).images
        return self._pictures(x0, height, width)

    def _pictures(self, x0: Any, height: int | None, width: int | None) -> list[Any]:
        """Pictures of a pipeline's output, by the VAE in fp32: some overflow in fp16."""
        from diffusers.image_processor import VaeImageProcessor

        parts = [x0]
        if (decode := self.facts["decode"]) is not None:
            vae, pixels = self.pipeline.components[decode["vae"]], decode["downscaling"]
            if (side := decode["packed"]) > 1 and height and width:  # the channel slowest
                rows, columns = height // (side * pixels), width // (side * pixels)
                squares = x0.reshape(len(x0), rows, columns, -1, side, side).permute(0, 3, 1, 4, 2, 5)
                x0 = squares.reshape(len(x0), -1, side * rows, side * columns)
            x0 = x0.to(vae.dtype) / decode["scaling_factor"] + decode["shift_factor"]
            few = max(1, PIXELS_AT_ONCE // (x0[0, 0].numel() * pixels**2))
            parts = [vae.decode(part).sample for part in x0.split(few)]
        return [picture for part in parts for picture in VaeImageProcessor().postprocess(part)]


def _further(seed: int) -> int:
    """The second stage's seed: with the first one's its noise would begin with the same numbers."""
    digest = hashlib.blake2b(repr((seed, SECOND_STAGE)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _load(directory: Path, facts: Mapping[str, Any], dtype: Any, given: Mapping[str, Any]) -> Any:
    """The pipeline in a directory with given parts, without what isn't there, with its family's sampler."""
    import diffusers
    import torch

    index = json.loads((directory / "model_index.json").read_text())
    parts = [name for name, value in index.items() if isinstance(value, list)]
    without: dict[str, Any] = {name: None for name in parts if not (directory / name).is_dir()}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        directory,
        torch_dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,  # else accelerate puts what other threads make meanwhile on the meta device, too
        **(without | facts["loaded_with"] | given),
    )
    sampler = getattr(diffusers, facts["sampler"])
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config, **facts["sampler_settings"])
    pipeline.set_progress_bar_config(disable=True)
    if facts["decode"] is not None:
        pipeline.components[facts["decode"]["vae"]].to(torch.float32).requires_grad_(False)
    for name in [name for name in parts if name.startswith("tokenizer") and name not in without]:
        tokenizer = getattr(pipeline, name)
        text_encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
        positions = getattr(text_encoder.config, "max_position_embeddings", None)  # some tokenizers name no length
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    return pipeline


@contextmanager
def model_directory(artifact: str | Path | None, model_config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with the whole model within this context: a publication, all weights, or a delta put together."""
    if "publication" in model_config:
        yield publication_directory(model_config["publication"], model_config["manifest_sha256"])
        return
    directory = Path(str(artifact))
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


def publication_directory(address: str, manifest_sha256: str) -> Path:
    """The folder of a publication if it is local, else of its copy in $DREAMBOOTH_CACHE (~/.cache/dreambooth).

    Each file is compared with the manifest: in place at every call, a copy when it is made. Of several processes one
    downloads, and a copy has its name only when it is whole. Raises MlflowException, with what was expected and what to
    do, if the publication is gone, another one, damaged, or out of reach.
    """
    try:
        return _publication_directory(address, manifest_sha256)
    except FileNotFoundError as error:
        why = f"it isn't there ({error}), expected a {MANIFEST} of sha256 {manifest_sha256}"
        raise _unusable(address, why) from error
    except _Damaged as error:
        raise _unusable(address, str(error)) from None
    except Exception as error:  # each driver raises its own
        raise MlflowException(
            f"can't fetch the publication {address} that the registered model refers to: "
            f"{type(error).__name__}: {error}; the store's address and credentials come from the environment (for S3 "
            f"AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), and the copy goes to $DREAMBOOTH_CACHE, now "
            f"{_cache()}"
        ) from error


def _publication_directory(address: str, manifest_sha256: str) -> Path:
    copy = _cache() / "publications" / manifest_sha256
    if _is_whole(copy, manifest_sha256):
        return copy
    options = S3_OPTIONS if address.startswith(("s3://", "s3a://")) else {}
    fs, root = url_to_fs(address, **options)
    if isinstance(fs, LocalFileSystem):
        content = Path(root, MANIFEST).read_bytes()
        for name, record in _files(content, manifest_sha256).items():
            _compare(Path(root, name), name, record)
        return Path(root)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):
        if not _is_whole(copy, manifest_sha256):
            _download(fs, root, copy, manifest_sha256)
    return copy


def _download(fs: AbstractFileSystem, root: str, copy: Path, manifest_sha256: str) -> None:
    """Download a publication into `copy`; what an attempt that died has downloaded isn't fetched again."""
    content = fs.cat_file(f"{root}/{MANIFEST}")
    part = copy.with_name(f"{copy.name}.part")
    for name, record in _files(content, manifest_sha256).items():
        target = part / name
        if target.is_file():  # compared before it got its name
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            fs.get_file(f"{root}/{name}", str(partial))
            _compare(partial, name, record)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    (part / MANIFEST).write_bytes(content)
    shutil.rmtree(copy, ignore_errors=True)  # a file of it was lost or cut since
    part.rename(copy)


class _Damaged(Exception):
    """A manifest or a file isn't the one that was registered."""


def _is_whole(copy: Path, manifest_sha256: str) -> bool:
    """Whether all files are in a copy; their content was compared when it was made."""
    try:
        files = _files((copy / MANIFEST).read_bytes(), manifest_sha256)
        return all((copy / name).stat().st_size == record["size"] for name, record in files.items())
    except (OSError, _Damaged):
        return False


def _files(manifest: bytes, manifest_sha256: str) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file, by a manifest with this sha256."""
    if (got := hashlib.sha256(manifest).hexdigest()) != manifest_sha256:
        raise _Damaged(f"its {MANIFEST} has sha256 {got}, expected {manifest_sha256}: it is another publication")
    return dict(json.loads(manifest)["files"])


def _compare(path: Path, name: str, record: Mapping[str, Any]) -> None:
    if (size := path.stat().st_size) != record["size"]:
        raise _Damaged(f"{name} has {size} bytes, expected {record['size']}")
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != record["sha256"]:
        raise _Damaged(f"{name} has sha256 {got}, expected {record['sha256']}")


def _unusable(address: str, why: str) -> MlflowException:
    here = "" if "://" in address else " (a path of the machine it was made on)"
    return MlflowException(
        f"the registered model refers to the publication {address}{here}: {why}. Put the publication back; or, if it "
        f"was moved, name its new address: mlflow.pyfunc.load_model(..., model_config={{'publication': ADDRESS}}); or "
        f"run 'dreambooth run' again, which registers a new version (with registry.storage=full one that holds its "
        f"weights)",
        error_code=RESOURCE_DOES_NOT_EXIST,
    )


def _cache() -> Path:
    return Path(os.environ.get("DREAMBOOTH_CACHE", "~/.cache/dreambooth")).expanduser()


def _base64_png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


set_model(DreamBoothModel())
