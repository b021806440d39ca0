"""What a run reads, as MLflow's datasets: the addresses of images, and their hash as digest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fsspec.utils import get_protocol

from dreambooth.config.addresses import shown
from pipelines.tracking import client as _client  # noqa: F401 - before MLflow, which it silences

from mlflow.entities import Dataset, DatasetInput, InputTag  # isort: skip

_CONTEXT = "mlflow.data.context"  # MLflow's own pages show it
_MOST_ADDRESSES = 100


@dataclass(frozen=True, kw_only=True)
class Images:
    """A set of images: folders, patterns or files at `addresses`, `count` images in all; `hash` is of their content.

    `context` is what they are read for: training, class images, evaluation.
    """

    name: str
    hash: str
    addresses: Sequence[str]
    count: int
    context: str

    def as_input(self) -> DatasetInput:
        """The dataset as an input of MLflow's, without credentials in the addresses."""
        addresses = [shown(address) for address in self.addresses[:_MOST_ADDRESSES]]
        kind = {"file": "local", "https": "http"}.get(protocol := get_protocol(addresses[0]), protocol)
        dataset = Dataset(
            name=self.name,
            digest=self.hash,
            source_type=kind,
            source=json.dumps({"url" if kind == "http" else "uri": addresses[0], "addresses": addresses}),
            profile=json.dumps({"images": self.count}),
        )
        return DatasetInput(dataset, [InputTag(_CONTEXT, self.context)])
