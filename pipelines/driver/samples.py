"""A run's samples for the eye: their record, their pictures, and what a summary says of them."""

import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from dreambooth.amounts import counted
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.evaluation.verdict import Shares, Similarity, shares_of, similarity_of
from pipelines.report.pictures import Row
from pipelines.storage.files import join, write_bytes
from pipelines.storage.pictures import read_pictures


@dataclass(frozen=True)
class Samples:
    """The record that `evaluate` wrote of the samples at an address. Without encoders it has pictures alone."""

    uri: str
    record: Mapping[str, Any]

    @property
    def similarity(self) -> Similarity | None:
        """Similarities to the photographs, if measured."""
        return similarity_of(self._means) if self._means else None

    @property
    def shares(self) -> Shares | None:
        """Near-copies and prompts followed, if measured."""
        return shares_of(self._means) if self._means else None

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The shares and the warnings, for a summary."""
        return None if self.shares is None else asdict(self.shares) | {"warnings": list(self.record["warnings"])}

    @cached_property
    def _means(self) -> dict[str, float]:
        return {name: figure["mean"] for name, figure in self.record.get("figures", {}).items()}

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """All pictures, by address, the photographs with them.

        The base model's, which lie beside the class images, may have been removed. Raises FileNotFoundError for others.
        """
        own = [*self.record["photographs"], *(address for _, tuned, _ in self._rows for address in tuned)]
        found = read_pictures([*own, *(address for _, _, base in self._rows for address in base)])
        if missing := [address for address in own if address not in found]:
            raise FileNotFoundError(f"{counted(len(missing), 'picture')} of {self.uri} can't be found: {missing[0]}")
        return found

    @property
    def _rows(self) -> list[tuple[str, list[str], list[str]]]:
        """Each prompt with the addresses of both models' pictures, the class prompt last."""
        record = self.record
        rows = [(of["prompt"], of["fine_tuned"], of["base"]) for of in record["pictures"]]
        return [*rows, (record["class_prompt"], record["class_pictures"], record["base_class_pictures"])]

    def rows(self) -> list[Row]:
        """The contact sheet's rows: the photographs, and samples of each prompt beside the base model's."""
        shown = self.record["images_per_prompt"]
        return [
            Row(title="instance images", images=self._opened(self.record["photographs"])),
            *(
                Row(title=prompt, images=self._opened(tuned[:shown]), baseline=self._opened(base[:shown]))
                for prompt, tuned, base in self._rows
            ),
        ]

    def _opened(self, addresses: list[str]) -> list[Image.Image]:
        pictures = self.pictures
        return [
            Image.open(io.BytesIO(pictures[address])).convert("RGB") for address in addresses if address in pictures
        ]

    def copy(self, config: DreamBoothConfig) -> None:
        """Write the fine-tuned model's pictures where people look for them, by prompt."""
        for prompt, tuned, _ in self._rows:
            for index, address in enumerate(tuned):
                write_bytes(sample_uri(config, prompt, index), self.pictures[address])


def sample_uri(config: DreamBoothConfig, prompt: str, index: int) -> str:
    """Address of a run's sample for the eye."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80]
    return join(config.run_uri, "samples", slug, f"{index}.png")
