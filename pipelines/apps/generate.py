"""`dreambooth generate`: sample from a fine-tuned model, without Ray and DeepSpeed."""

import base64
import dataclasses
import difflib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.amounts import counted
from dreambooth.config.addresses import shown
from dreambooth.config.bounds import Graph
from dreambooth.config.limits import LARGEST_SEED, LARGEST_SIDE, MOST_GUIDANCE, MOST_IMAGES, MOST_SAMPLING_STEPS
from dreambooth.config.service_names import model_name_fault
from dreambooth.config.subject import fill_identifier
from dreambooth.config.text_files import utf8_fault
from dreambooth.config.wording import IDENTIFIER_PLACEHOLDER, check_wording
from dreambooth.data.images import png_bytes
from dreambooth.data.prompt_checks import PromptReader, shortened
from dreambooth.errors import InputError
from dreambooth.models.base_settings import BaseSettings
from dreambooth.models.text_readers import TextReader, readers_of_pipeline, text_readers
from dreambooth.reach import prove_store
from pipelines.report.pictures import Row, contact_sheet
from pipelines.storage import files, publications

_ADDRESS = re.compile(r"models:/*(?P<name>[^/@]+)(?:@(?P<alias>[\w-]{1,255})|/(?P<version>[0-9]{1,9}))?")
Settings = dict[str, Any]  # of sampling; only those given
_SAMPLING = ("num_inference_steps", "guidance_scale")  # of a directory without settings, its family's
_RANGES: Mapping[str, tuple[float, float]] = {
    "num": (1, MOST_IMAGES),
    "seed": (0, LARGEST_SEED),
    "num_inference_steps": (1, MOST_SAMPLING_STEPS),
    "guidance_scale": (1, MOST_GUIDANCE),
    "height": (8, LARGEST_SIDE),
    "width": (8, LARGEST_SIDE),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """Addresses of the written files, and warnings about the prompt."""

    paths: tuple[str, ...]
    contact_sheet: str
    warnings: tuple[str, ...] = ()


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
    graph: Graph = "off",
) -> GenerateResult:
    """Sample `num` pictures with seeds from `seed` on, and write `<seed>.png` and a contact sheet.

    `model` is `models:/NAME@ALIAS`, `models:/NAME/VERSION`, the address of a published model, or a diffusers directory.
    `[V]` in the prompt stands for the model's identifier. None means the model's default. `graph` as
    `cluster.graph_sampling`; a registered model samples by MLflow's code of its version, without.
    Raises InputError for a missing model (with the existing ones) and for settings out of range.
    """
    settings = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    _check(prompt, num=num, seed=seed, **given)
    if model.startswith("models:"):
        parse_address(model)  # before any write or request
    output = files.absolute(output)
    files.check_writable(output)
    seeds = range(seed, seed + num)
    warnings: list[str] = []
    images = sample_prompts(
        model, [prompt] * num, seed=seed, settings=given, tracking_uri=tracking_uri, graph=graph, warn=warnings.append
    )
    paths = [files.join(output, f"{one}.png") for one in seeds]
    for path, image in zip(paths, images, strict=True):
        files.write_bytes(path, png_bytes(image))
    sheet = files.join(output, "contact_sheet.png")
    files.write_bytes(sheet, png_bytes(contact_sheet([Row(title=prompt, images=images)], title=model)))
    return GenerateResult(paths=tuple(paths), contact_sheet=sheet, warnings=tuple(warnings))


def sample_prompts(
    model: str,
    prompts: Sequence[str],
    *,
    seed: int,
    settings: Settings,
    tracking_uri: str | None,
    graph: Graph = "off",
    warn: Callable[[str], None] = lambda warning: None,
) -> list[Image.Image]:
    """One picture per prompt, the i-th with `seed` + i; `settings` override the model's sampling settings.

    Raises InputError for a missing model (with the existing ones), and for prompts that are too long.
    """
    if model.startswith("models:"):
        if graph == "auto":
            warn("a registered model is sampled by its version's own code, without graphs")
        return _from_registry(model, tracking_uri, prompts, seed, settings, warn)
    return _from_directory(model, prompts, seed, settings, graph, warn)


def _check_prompts(
    prompts: Sequence[str], identifier: str | None, readers: Sequence[TextReader], warn: Callable[[str], None]
) -> None:
    """Check each distinct prompt for a model with this identifier (None: unknown)."""
    reader = PromptReader(readers=readers, identifier=identifier)
    for prompt in dict.fromkeys(prompts):
        for warning in reader.check(prompt, what=f"the prompt {shortened(prompt)!r}", whole=True):
            warn(warning)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model's permanent address and metadata (empty where unknown)."""

    address: str
    subject: str
    class_noun: str
    base_model: str


def find_model(model: str, tracking_uri: str | None) -> FoundModel:
    """Look up a model. Raises InputError for a missing one, with the existing ones."""
    if not model.startswith("models:"):
        manifest = find_published(model)
        return _found(manifest.uri, manifest.metadata)
    from pipelines.tracking.client import check_connection, quietly, resolve_tracking_uri

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
    if (fault := utf8_fault(prompt)) is not None:
        raise InputError(f"the prompt {fault}")
    check_wording(prompt, what=f"the prompt {shortened(prompt)!r}")
    for name, value in settings.items():
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; expected {low} to {high}")
        if name in ("height", "width") and value % 8:
            raise InputError(f"{name} is {value}; expected a multiple of 8")
    if settings["seed"] + settings["num"] - 1 > LARGEST_SEED:
        raise InputError(
            f"seed is {settings['seed']}; expected one that {counted(int(settings['num']), 'image')} can count up from"
        )


def _from_registry(
    model: str,
    tracking_uri: str | None,
    prompts: Sequence[str],
    seed: int,
    settings: Settings,
    warn: Callable[[str], None],
) -> list[Image.Image]:
    """Sample from a registered model through MLflow alone."""
    from dreambooth.quiet import hide_progress_bars, quiet
    from pipelines.tracking.client import check_connection, default_tracking, quietly, resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri)
    client = check_connection(uri)
    quiet()
    hide_progress_bars()

    import mlflow.pyfunc
    import pandas as pd
    from mlflow.exceptions import MlflowException

    with quietly(), default_tracking(uri):
        address = registered_address(client, model)
        try:
            served = mlflow.pyfunc.load_model(address)
        except MlflowException as error:
            raise InputError(f"{address} can't be loaded: {error.message}") from error
        own = served.unwrap_python_model()
        _check_prompts(prompts, own.identifier, readers_of_pipeline(own.pipeline), warn)
        try:
            answer = served.predict(pd.DataFrame({"prompt": list(prompts)}), {"seed": seed, **settings})
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise InputError(error.message) from None
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["image"]]


def registered_address(client: Any, model: str) -> str:
    """The address `models:/NAME/VERSION` of a registered model. Raises InputError for a missing one."""
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


def parse_address(model: str, *, pattern: bool = False) -> tuple[str, str, str]:
    """(name, alias, version) of `models:/NAME@ALIAS` or `models:/NAME/VERSION`; missing parts are empty.

    The name in a `pattern` may hold `*`. Raises InputError for an address that can't be the registry's.
    """
    parts = _ADDRESS.fullmatch(model)
    if parts is None:
        raise InputError(f"the model is {model!r}; expected models:/NAME@ALIAS or models:/NAME/VERSION")
    if (fault := model_name_fault(parts["name"], pattern=pattern)) is not None:
        raise InputError(f"the model is {model!r}; {fault}")
    return parts["name"], parts["alias"] or "", parts["version"] or ""


def _unknown(name: str, known: list[str]) -> str:
    if not known:
        return f"there is no registered model {name!r}, nor any other at this tracking address; is tracking.uri right?"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"there is no registered model {name!r}{hint} Known are {', '.join(known[:20])}{more}"


def _from_directory(
    model: str,
    prompts: Sequence[str],
    seed: int,
    settings: Settings,
    graph: Graph,
    warn: Callable[[str], None],
) -> list[Image.Image]:
    """Sample from a published model, the newest one below an address, or a local diffusers directory."""
    manifest = find_published(model)
    identifier = manifest.metadata.get("identifier") or None
    if identifier is None and any(IDENTIFIER_PLACEHOLDER in prompt for prompt in prompts):
        raise InputError(
            f"{model!r} doesn't say what its identifier is; write it yourself in place of {IDENTIFIER_PLACEHOLDER}"
        )

    import torch

    from dreambooth.sampling.graphs import graphs_for
    from dreambooth.sampling.sampler import load_pipeline, sample

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with publications.opened(manifest) as directory:
        base = BaseSettings(directory)
        own = {name: manifest.metadata.get(name, getattr(base.family.defaults_of(base), name)) for name in _SAMPLING}
        for name in {"height", "width"} & settings.keys():
            base.check_side(int(settings[name]), name)
        _check_prompts(prompts, identifier, text_readers(directory), warn)
        prompts = [fill_identifier(prompt, str(identifier)) for prompt in prompts]
        if not {"height", "width"} <= settings.keys():
            resolution = manifest.metadata.get("resolution") or base.resolution
            own |= {"height": resolution, "width": resolution}
        pipeline = load_pipeline(directory, device=device, dtype=dtype)
        seeds = range(seed, seed + len(prompts))
        graphs = graphs_for(graph, device, lambda reason: warn(f"sampling is not graphed: {reason}"))
        return sample(pipeline, prompts, seeds, graphs=graphs, **{**own, **settings})


def find_published(model: str) -> publications.Manifest:
    """The published model at an address, or the newest below it. Raises InputError if there is none."""
    prove_store(model, what=f"can't read {shown(model)!r}")
    if files.exists(files.join(model, publications.MANIFEST_NAME)):
        return publications.read_manifest(model)
    newest = publications.published(model)
    if newest is not None:
        return newest
    if files.is_local(model) and Path(files.absolute(model), "model_index.json").is_file():
        return publications.Manifest(uri=files.absolute(model), files={}, metadata={})
    raise InputError(
        f"there is no model at {shown(model)!r}; expected a published model, a diffusers directory (one with a "
        f"model_index.json), or models:/NAME@ALIAS"
    )
