"""Pictures from a fine-tuned model: `dreambooth generate`. Neither Ray nor DeepSpeed is needed, nor imported."""

import base64
import dataclasses
import difflib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.base_settings import BaseSettings
from dreambooth.errors import InputError
from dreambooth.images import png_bytes
from dreambooth.subject import IDENTIFIER_PLACEHOLDER, fill_identifier
from pipelines import storage
from pipelines.report import Row, contact_sheet

Settings = dict[str, Any]  # of sampling; only what was given
_DEFAULTS: Settings = {"num_inference_steps": 25, "guidance_scale": 7.5}  # of a directory that says nothing of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """Addresses of what was written."""

    paths: tuple[str, ...]
    contact_sheet: str


def generate(
    model: str,
    prompt: str,
    *,
    num: int = 4,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    output: str = "output/generated",
    tracking_uri: str | None = None,
) -> GenerateResult:
    """Sample `num` pictures, with the seeds from `seed` on, and write them as `<seed>.png` with a contact sheet.

    `model` is `models:/NAME@ALIAS`, `models:/NAME/VERSION`, the address of a published model, or a diffusers directory.
    `[V]` in the prompt stands for the model's identifier. What is None is the model's own default.
    Raises InputError for a model that isn't there (naming those that are) and for settings out of range.
    """
    settings = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    _check(prompt, num=num, seed=seed, **given)
    output = storage.absolute(output)
    storage.check_writable(output)
    seeds = range(seed, seed + num)
    images = sample_prompts(model, [prompt] * num, seed=seed, settings=given, tracking_uri=tracking_uri)
    paths = [storage.join(output, f"{one}.png") for one in seeds]
    for path, image in zip(paths, images, strict=True):
        storage.write_bytes(path, png_bytes(image))
    sheet = storage.join(output, "contact_sheet.png")
    storage.write_bytes(sheet, png_bytes(contact_sheet([Row(title=prompt, images=images)], title=model)))
    return GenerateResult(paths=tuple(paths), contact_sheet=sheet)


def sample_prompts(
    model: str, prompts: Sequence[str], *, seed: int, settings: Settings, tracking_uri: str | None
) -> list[Image.Image]:
    """One picture per prompt, the i-th with `seed` + i; `settings` are those of sampling, where not the model's own.

    Raises InputError for a model that isn't there (naming those that are).
    """
    if model.startswith("models:"):
        return _from_registry(model, tracking_uri, prompts, seed, settings)
    return _from_directory(model, prompts, seed, settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model by the address that goes on meaning the same, and what it says of itself (empty where it doesn't)."""

    address: str
    subject: str
    class_noun: str
    base_model: str


def find_model(model: str, tracking_uri: str | None) -> FoundModel:
    """Look a model up; raises InputError for one that isn't there (naming those that are)."""
    if not model.startswith("models:"):
        manifest = find_published(model)
        return _found(manifest.uri, manifest.metadata)
    from pipelines.mlflow_client import check_connection, quietly, resolve_tracking_uri

    client = check_connection(resolve_tracking_uri(tracking_uri))
    with quietly():
        address = registered_address(client, model)
        version = client.get_model_version(*address.removeprefix("models:/").rsplit("/", 1))
    return _found(address, version.tags)


def _found(address: str, says: Mapping[str, Any]) -> FoundModel:
    subject, class_noun, base_model = (str(says.get(key) or "") for key in ("subject", "class_noun", "base_model"))
    return FoundModel(address=address, subject=subject, class_noun=class_noun, base_model=base_model)


def _check(prompt: str, **settings: float) -> None:
    if not prompt.strip():
        raise InputError("the prompt is empty; expected a text such as 'a photo of [V] dog'")
    rules: dict[str, tuple[str, Callable[[float], bool]]] = {
        "num": ("at least 1", lambda value: value >= 1),
        "seed": ("at least 0", lambda value: value >= 0),
        "num_inference_steps": ("at least 1", lambda value: value >= 1),
        "guidance_scale": ("at least 1", lambda value: value >= 1),
        "height": ("a multiple of 8", lambda value: value >= 8 and value % 8 == 0),
        "width": ("a multiple of 8", lambda value: value >= 8 and value % 8 == 0),
    }
    for name, value in settings.items():
        expected, holds = rules[name]
        if not holds(value):
            raise InputError(f"{name} is {value}; expected {expected}")


def _from_registry(
    model: str, tracking_uri: str | None, prompts: Sequence[str], seed: int, settings: Settings
) -> list[Image.Image]:
    """Sample from a registered model, by MLflow alone."""
    from dreambooth.quiet import hide_progress_bars, quiet
    from pipelines.mlflow_client import check_connection, default_tracking, quietly, resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri)
    client = check_connection(uri)
    quiet()
    hide_progress_bars()

    import mlflow.pyfunc
    import pandas as pd

    with quietly(), default_tracking(uri):
        served = mlflow.pyfunc.load_model(registered_address(client, model))
        answer = served.predict(pd.DataFrame({"prompt": list(prompts)}), {"seed": seed, **settings})
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["image"]]


def registered_address(client: Any, model: str) -> str:
    """The address `models:/NAME/VERSION` of a registered model; raises InputError that lists what there is."""
    from mlflow.exceptions import MlflowException

    name, alias, version = parse_address(model)
    try:
        registered = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise InputError(_unknown(name, sorted(entry.name for entry in client.search_registered_models()))) from None
    if version:
        versions = sorted(int(entry.version) for entry in client.search_model_versions(f"name = '{name}'"))
        if int(version) not in versions:
            raise InputError(f"{name} has no version {version}; it has {', '.join(map(str, versions)) or 'none'}")
        return f"models:/{name}/{version}"
    aliases = sorted({"latest", *registered.aliases})
    if alias and alias not in aliases:
        raise InputError(f"{name} has no alias {alias!r}; it has {', '.join(aliases)}")
    return f"models:/{name}/{client.get_model_version_by_alias(name, alias or 'latest').version}"


def parse_address(model: str) -> tuple[str, str, str]:
    """(name, alias, version) of `models:/NAME@ALIAS` or `models:/NAME/VERSION`; what it doesn't give is empty."""
    rest = model.removeprefix("models:").lstrip("/")
    name, at, alias = rest.partition("@")
    name, slash, version = name.partition("/") if not at else (name, "", "")
    if not model.startswith("models:") or not name or (at and not alias) or (slash and not version.isdigit()):
        raise InputError(f"the model is {model!r}; expected models:/NAME@ALIAS or models:/NAME/VERSION")
    return name, alias, version


def _unknown(name: str, known: list[str]) -> str:
    if not known:
        return f"there is no registered model {name!r}, nor any other at this tracking address; is tracking.uri right?"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"there is no registered model {name!r}{hint} Known are {', '.join(known[:20])}{more}"


def _from_directory(model: str, prompts: Sequence[str], seed: int, settings: Settings) -> list[Image.Image]:
    """Sample from a published model, the newest one below an address, or a local diffusers directory."""
    manifest = find_published(model)
    if any(IDENTIFIER_PLACEHOLDER in prompt for prompt in prompts):
        identifier = manifest.metadata.get("identifier")
        if not identifier:
            raise InputError(
                f"{model!r} doesn't say what its identifier is; write it yourself in place of {IDENTIFIER_PLACEHOLDER}"
            )
        prompts = [fill_identifier(prompt, str(identifier)) for prompt in prompts]

    import torch

    from dreambooth.sampling import load_pipeline, sample

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    own = {name: manifest.metadata.get(name, value) for name, value in _DEFAULTS.items()}
    with storage.opened(manifest) as directory:
        if not {"height", "width"} <= settings.keys():
            resolution = manifest.metadata.get("resolution") or BaseSettings(directory).resolution
            own |= {"height": resolution, "width": resolution}
        pipeline = load_pipeline(directory, device=device, dtype=dtype)
        seeds = range(seed, seed + len(prompts))
        return sample(pipeline, prompts, seeds, **{**own, **settings})


def find_published(model: str) -> storage.Manifest:
    """A published model at an address, or the newest one below it; InputError when there is none."""
    if storage.exists(storage.join(model, storage.MANIFEST_NAME)):
        return storage.read_manifest(model)
    newest = storage.published(model)
    if newest is not None:
        return newest
    if storage.is_local(model) and Path(storage.absolute(model), "model_index.json").is_file():
        return storage.Manifest(uri=storage.absolute(model), files={}, metadata={})
    raise InputError(
        f"there is no model at {model!r}; expected a published model, a diffusers directory (one with a "
        f"model_index.json), or models:/NAME@ALIAS"
    )
