"""What a family says of its pipeline to a program that samples from it without this project."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from dreambooth.models.base_settings import BaseSettings


class Served:
    """Plain facts of a pipeline, see `dreambooth.models.served`."""

    loaded_with: ClassVar[Mapping[str, Any]] = {}
    """Arguments of its pipeline's `from_pretrained`, besides None for components that are missing."""
    called_with: ClassVar[Mapping[str, Any]] = {}
    """Arguments of its pipeline's call without which it would change the prompts or sizes that it is given."""
    packed: int = 1
    """Positions of x0, along a side, that are one token of its pipeline's output; 1: the output has x0's shape."""

    def served_call(self, settings: "BaseSettings", noise_levels: int | None) -> dict[str, Any]:
        """`called_with`, and what depends on the base, or on the levels that a second stage was tuned on."""
        return dict(self.called_with)
