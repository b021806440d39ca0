"""The base model that a lane's worker keeps in memory from one subject to the next."""

from typing import Any

from dreambooth.models.base_model import BaseModel, resolve_base_model
from pipelines.tasks import TrainTask


class Bases:
    """The last base model, its weights kept in memory as loaded; with `scales_up` the last second stage of one.

    `components` are those that are trained, `text_encoders` those that stay frozen. For ZeRO-3 the former stay in their
    files, of which every subject's engine reads its part.
    """

    def __init__(self, *, scales_up: bool = False) -> None:
        self._scales_up = scales_up
        self._base: BaseModel | None = None
        self.components: Any = None
        self.text_encoders: Any = None

    def get(self, task: TrainTask) -> BaseModel:
        """The base of a task, with `components` loaded that it trains. Raises RuntimeError if its hash is another."""
        from dreambooth.data.frozen_text import FrozenTextEncoders
        from dreambooth.training.model import load_components

        config = task.config
        known = self._base
        if known is None or (known.address, known.revision) != (config.base_model, config.revision):
            self.components = self.text_encoders = None
            known = self._base = resolve_base_model(config.base_model, config.revision, scales_up=self._scales_up)
        if known.hash != task.base_hash:
            raise RuntimeError(
                f"the base model here has hash {known.hash}, the driver's {task.base_hash}; use one copy"
            )
        self.text_encoders = self.text_encoders or FrozenTextEncoders(known.directory)
        run = known.family.run_text_encoders(known.directory, config.train)
        whole, held = not task.reads_slices, self.components
        if held is None or (held.stored is None) != whole or not set(run) <= set(held.text_encoders):
            held = self.components = None  # freed before the next ones take their place
            self.components = load_components(known.directory, run, whole=whole)
        return known
