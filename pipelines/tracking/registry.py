"""A fine-tuned model in MLflow's registry: `models:/NAME@latest`.

A version refers to the publication that its weights lie in, or holds a copy of them, all or as a delta. A copy is
uploaded straight from where it lies: MLflow's own `log_model` would first copy it to a temporary folder, gigabytes for
Stable Diffusion. The alias `latest` is kept by MLflow itself: it always means the highest version (the name is
reserved, and nothing else can be given it).
"""

import contextlib
import dataclasses
import importlib.metadata
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec import get_filesystem_class
from fsspec.utils import get_protocol

from dreambooth.quiet import quiet
from pipelines.cluster.environment import environment
from pipelines.storage.publications import MANIFEST_NAME, Manifest, manifest_sha256
from pipelines.tracking.client import connect, default_tracking, prove_connection, quietly, resolve_tracking_uri
from pipelines.tracking.line import not_twice

# Import after tracking.client, which silences MLflow.
import pandas as pd  # isort: skip
from mlflow import MlflowClient, pyfunc  # isort: skip
from mlflow.entities import LoggedModelOutput, LoggedModelStatus  # isort: skip
from mlflow.exceptions import MlflowException  # isort: skip
from mlflow.models import ModelSignature  # isort: skip
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema  # isort: skip

RESULT_TAG = "dreambooth.result_key"
MOST_DESCRIPTION = 5000
"""Most characters of a description in MLflow."""
_FORM_TAG, _PLACE_TAG = "stored_as", "published"
_REQUIREMENTS = (
    "torch",
    "diffusers",
    "transformers",
    "sentencepiece",
    "protobuf",
    "safetensors",
    "pillow",
    "fsspec",
    "filelock",
)
_WEIGHTS = Path("artifacts", "pipeline")  # where MLflow puts an artifact named "pipeline"
_DELTA = "delta.json"  # in a delta's folder (dreambooth.models.delta, whose import takes seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """A version of a registered model; `uri` is `models:/NAME/VERSION`."""

    name: str
    version: int
    uri: str
    model_id: str


def register(
    *,
    run_id: str,
    tracking_uri: str,
    model: Manifest | Path,
    name: str,
    tags: Mapping[str, object],
    identifier: str,
    class_noun: str,
    result_key: str,
    served: Mapping[str, Any],
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int = 0,
    tokens: int | None = None,
    description: str | None = None,
) -> RegisteredVersion:
    """Register the next version of a model; the same `result_key` twice is one version.

    `model` is a publication, which the version refers to, or a diffusers directory or a delta, which it holds; `served`
    is how it is loaded and sampled (`dreambooth.models.served`).
    `num_inference_steps`, `guidance_scale` and `resolution` (in pixels; 0: the model's own) become the served model's
    defaults. `tags` go onto the version, with identifier, class noun and form. Prompts of more than `tokens`
    tokens are refused; None: as many as the tokenizer or its text encoder reads. `description` is Markdown, shown with
    the version, and with the model, unless somebody has written another.
    """
    client = connect(tracking_uri)
    quiet()
    # A database's registry looks a logged model up at the default address, whatever the client's own is.
    with quietly(), default_tracking(tracking_uri):
        all_tags = {key: str(value) for key, value in tags.items()}
        all_tags |= {"identifier": identifier, "class_noun": class_noun, RESULT_TAG: result_key}
        all_tags |= _form(model)
        known = _find(client, name, all_tags)
        if known is not None:
            if description is not None:
                describe(client, name, known.version, description)
            return known
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder, "model")
            _write_package(
                package,
                model,
                prompt=f"a photo of [V] {class_noun}",
                settings={"identifier": identifier, "tokens": tokens, "served": dict(served)},
                signature=_signature(num_inference_steps, guidance_scale, resolution),
            )
            model_id = _upload(client, package, run_id, re.sub(r"[^\w-]", "-", name), all_tags)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        with not_twice():
            made = client.create_model_version(
                name,
                source=f"models:/{model_id}",
                run_id=run_id,
                tags=all_tags,
                model_id=model_id,
                description=description,
            )
        if description is not None:
            describe(client, name, made.version, description)
    return _version(name, made.version, model_id)


def describe(client: MlflowClient, name: str, version: int | str, description: str) -> None:
    """Describe a version, and its model if that is its newest, unless somebody has described them otherwise."""
    title = description.partition("\n")[0]  # of all of a subject's cards

    def ours(known: str | None) -> bool:
        return known != description and (not known or known.startswith(title))

    if ours(client.get_model_version(name, str(version)).description):
        client.update_model_version(name, str(version), description)
    newest = client.get_model_version_by_alias(name, "latest").version
    if str(newest) == str(version) and ours(client.get_registered_model(name).description):
        client.update_registered_model(name, description)


def find_version(
    tracking_uri: str | None, name: str, result_key: str, *, form: str, published: str
) -> RegisteredVersion | None:
    """The version that a result, published at an address, was registered as in this form (`registry.storage`), or None.

    One that holds the weights, in whatever form, answers for a reference, too.
    """
    client = prove_connection(resolve_tracking_uri(tracking_uri))
    wanted = {RESULT_TAG: result_key, _FORM_TAG: form, _PLACE_TAG: published}
    with quietly():
        return None if client is None else _find(client, name, wanted)


def version_of(client: MlflowClient, address: str) -> tuple[RegisteredVersion, Mapping[str, str], str | None]:
    """A version by its address `models:/NAME/VERSION`, its tags, and the id of the run that registered it."""
    name, _, number = address.removeprefix("models:/").rpartition("/")
    version = client.get_model_version(name, number)
    return _version(name, number, str(version.source).rpartition("/")[2]), version.tags, version.run_id


def _form(model: Manifest | Path) -> dict[str, str]:
    """Tags of the form that a version has its weights in."""
    if isinstance(model, Manifest):
        return {_FORM_TAG: "reference", _PLACE_TAG: model.uri}
    return {_FORM_TAG: "delta" if (model / _DELTA).is_file() else "full"}


def _answers(tags: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a version (or logged model) with these tags is the result wanted, in a form that serves for it."""
    if tags.get(RESULT_TAG) != wanted[RESULT_TAG]:
        return False
    form = tags.get(_FORM_TAG, "full")  # older versions don't say
    if form == "reference":  # to an earlier publication, it may be dead
        return wanted[_FORM_TAG] == form and tags[_PLACE_TAG] == wanted[_PLACE_TAG]
    return wanted[_FORM_TAG] in ("reference", form)


def _find(client: MlflowClient, name: str, wanted: Mapping[str, str]) -> RegisteredVersion | None:
    found = [
        version
        for version in client.search_model_versions(f"name = '{name}'")
        if _answers(version.tags, wanted) and version.status == "READY"
    ]
    if not found:
        return None
    newest = max(found, key=lambda version: int(version.version))
    # A search doesn't fill in model_id; the source is models:/MODEL_ID.
    return _version(name, newest.version, str(newest.source).rpartition("/")[2])


def _version(name: str, version: int | str, model_id: str) -> RegisteredVersion:
    return RegisteredVersion(name=name, version=int(version), uri=f"models:/{name}/{version}", model_id=model_id)


def _signature(num_inference_steps: int, guidance_scale: float, resolution: int) -> ModelSignature:
    params = [
        ParamSpec("seed", "long", 0),
        ParamSpec("num_inference_steps", "long", num_inference_steps),
        ParamSpec("guidance_scale", "double", float(guidance_scale)),
        ParamSpec("height", "long", resolution),
        ParamSpec("width", "long", resolution),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "image")]),
        params=ParamSchema(params),
    )


def _write_package(
    package: Path, model: Manifest | Path, *, prompt: str, settings: Mapping[str, Any], signature: ModelSignature
) -> None:
    """Write what MLflow needs to load a model: the address of its publication, or else its files, as links."""
    requirements = list(_REQUIREMENTS)
    config = dict(settings)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, Manifest):
            config |= {"publication": model.uri, "manifest_sha256": manifest_sha256(model.uri)}
            requirements += _driver(model.uri)
            artifacts = None
        else:
            artifacts = {"pipeline": str(_stand_in(model, Path(folder, "pipeline")))}
        pyfunc.save_model(
            package,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts=artifacts,
            model_config=config,
            signature=signature,
            input_example=(pd.DataFrame({"prompt": [prompt]}), {"seed": 1}),
            pip_requirements=[f"{package}=={_public_version(package)}" for package in requirements],
        )
    if isinstance(model, Path):
        _link_files(model, package / _WEIGHTS)


def _driver(address: str) -> list[str]:
    """The package that fsspec reads an address with, if it isn't fsspec itself: s3fs, gcsfs, adlfs."""
    package = get_filesystem_class(get_protocol(address)).__module__.partition(".")[0]
    return [] if package == "fsspec" else [package]


def _stand_in(model: Path, folder: Path) -> Path:
    """A folder for MLflow to copy in place of the weights; it wants a file in it."""
    folder.mkdir()
    (index,) = [name for name in (_DELTA, "model_index.json") if (model / name).is_file()][:1]
    (folder / index).write_bytes((model / index).read_bytes())
    return folder


def _link_files(model: Path, weights: Path) -> None:
    for path in model.rglob("*"):
        target = weights / path.relative_to(model)
        if path.is_file() and path.relative_to(model) != Path(MANIFEST_NAME) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())


def _public_version(package: str) -> str:
    # Without a local part such as +cpu, which package indexes don't have.
    return importlib.metadata.version(package).partition("+")[0]


def upload_seconds(size: int) -> float:
    """Most seconds for an upload of `size` bytes, to MLflow or through it to a store."""
    return 30 + size / 5_000_000


def _upload(client: MlflowClient, package: Path, run_id: str, name: str, tags: dict[str, str]) -> str:
    """Upload a model and compare what arrived, unless an earlier attempt has; returns its id."""
    experiment_id = client.get_run(run_id).info.experiment_id
    here = f"source_run_id = '{run_id}' AND tags.`{RESULT_TAG}` = '{tags[RESULT_TAG]}'"
    for known in client.search_logged_models([experiment_id], filter_string=here):
        if known.status == LoggedModelStatus.READY and _answers(known.tags, tags):
            return str(known.model_id)
    with not_twice():
        model = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, tags=tags)
    try:
        largest = max(path.stat().st_size for path in package.rglob("*") if path.is_file())
        with environment({"MLFLOW_HTTP_REQUEST_TIMEOUT": str(int(upload_seconds(largest)))}):
            client.log_model_artifacts(model.model_id, str(package))
        _check_arrival(client, model.model_id, package)
    except BaseException:
        with contextlib.suppress(Exception):  # where MLflow has gone away, what was caught says so
            client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
    client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def _check_arrival(client: MlflowClient, model_id: str, package: Path) -> None:
    arrived: dict[str, int | None] = {}
    folders: list[str | None] = [None]
    while folders:
        for item in client.list_logged_model_artifacts(model_id, folders.pop()):
            if item.is_dir:
                folders.append(item.path)
            else:
                arrived[item.path] = item.file_size
    for path in package.rglob("*"):
        name = path.relative_to(package).as_posix()
        if path.is_file() and arrived.get(name) != path.stat().st_size:
            raise OSError(f"{name} has {path.stat().st_size} bytes, but MLflow holds {arrived.get(name)} of them")
