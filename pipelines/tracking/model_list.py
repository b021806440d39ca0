"""The registered models and their figures, all or those for which conditions hold."""

import dataclasses
from collections.abc import Iterable, Mapping

from pipelines.tracking.client import every, prove_connection, quietly, resolve_tracking_uri
from pipelines.tracking.figure_tags import banks_of, figures_of
from pipelines.tracking.registry import RESULT_TAG
from pipelines.tracking.where import Condition, parse_where

# Import after the client, which silences MLflow.
from mlflow import MlflowClient  # isort: skip
from mlflow.entities.model_registry import ModelVersion  # isort: skip

_TEXTS = ("model", "subject", "class_noun", "identifier", "base_model", "base_hash", "verdict")
_OF_RUNS = (
    "similarity/identifier",
    "similarity/class_before",
    "similarity/class_after",
    "similarity/instance",
    "samples/near_copies",
    "samples/prompts_followed",
)
"""Metrics of a version's run: of the samples for the eye. The protocol's are in the version's tags."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedModel:
    """A version of a registered model, and its run's similarities (None if not measured).

    `figures` are those of the paper's protocol, by bank and name.
    """

    name: str
    subject: str
    class_noun: str
    identifier: str
    version: int
    aliases: tuple[str, ...]
    similarity: float | None
    class_after: float | None
    figures: Mapping[str, Mapping[str, float]]


def list_models(tracking_uri: str | None, where: str | None = None) -> tuple[ListedModel, ...]:
    """The latest version of every model that this project registered, by name; with `where`, the latest that fits.

    Raises InputError for conditions that can't be read (`parse_where`).
    """
    client = prove_connection(resolve_tracking_uri(tracking_uri))
    if client is None:
        return ()
    versions: dict[str, list[ModelVersion]] = {}
    with quietly():
        for version in every(client.search_model_versions):
            if RESULT_TAG in version.tags:
                versions.setdefault(version.name, []).append(version)
        all_versions = [version for several in versions.values() for version in several]
        conditions = _conditions(where, all_versions) if where is not None else ()
        newest = (_newest(client, versions[name], conditions) for name in sorted(versions))
        return tuple(_listed(client, version) for version in newest if version is not None)


def _conditions(where: str, versions: Iterable[ModelVersion]) -> tuple[Condition, ...]:
    numbers = {name for version in versions for name in _figures(version)}
    return parse_where(where, texts=_TEXTS, numbers={"version", *_OF_RUNS, *numbers})


def _newest(
    client: MlflowClient, versions: Iterable[ModelVersion], conditions: Iterable[Condition]
) -> ModelVersion | None:
    """The newest version for which all conditions hold, those that need its run asked for last."""
    of_runs = [condition for condition in conditions if condition.name in _OF_RUNS]
    of_versions = [condition for condition in conditions if condition.name not in _OF_RUNS]
    for version in sorted(versions, key=lambda version: int(version.version), reverse=True):
        values: dict[str, str | float] = {name: version.tags[name] for name in _TEXTS if name in version.tags}
        values.update(_figures(version), model=version.name, version=float(version.version))
        if all(condition.holds(values) for condition in of_versions) and (
            not of_runs or all(condition.holds(_metrics(client, version)) for condition in of_runs)
        ):
            return version
    return None


def _figures(version: ModelVersion) -> dict[str, float]:
    """A version's figures by the names of MLflow's metrics: `miniature/dino`."""
    return {
        f"{bank}/{name}": value
        for bank in banks_of(version.tags)
        for name, value in figures_of(version.tags, bank).items()
    }


def _metrics(client: MlflowClient, version: ModelVersion) -> Mapping[str, float]:
    return client.get_run(version.run_id).data.metrics if version.run_id else {}


def _listed(client: MlflowClient, version: ModelVersion) -> ListedModel:
    metrics = _metrics(client, version)
    return ListedModel(
        name=version.name,
        subject=version.tags.get("subject", "-"),
        class_noun=version.tags.get("class_noun", "-"),
        identifier=version.tags.get("identifier", "-"),
        version=int(version.version),
        aliases=tuple(client.get_registered_model(version.name).aliases),
        similarity=metrics.get("similarity/identifier"),
        class_after=metrics.get("similarity/class_after"),
        figures={bank: figures_of(version.tags, bank) for bank in banks_of(version.tags)},
    )
