"""What a family says of the forms in which other programs read its models: one file, and a LoRA."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from dreambooth.errors import InputError
from dreambooth.models.placed import Names


class OtherPrograms:
    """Names in other programs' files; by default there are none."""

    name: str
    lora_folders: ClassVar[tuple[str, ...]] = ()
    """Components that `load_lora_weights` of its pipeline reads a LoRA for; none where it has no such method."""
    kohya_prefixes: ClassVar[Mapping[str, str]] = {}
    """What a LoRA's names begin with in kohya's scripts, by component; empty where they name other modules."""
    embedding_names: ClassVar[Mapping[str, str]] = {}
    """What a file of Textual Inversion calls the embeddings of its text encoders, in one that holds several."""
    kohya_original: ClassVar[tuple[str, ...]] = ()
    """Components whose modules kohya's scripts name as a single file does."""

    def single_file_names(self, directory: Path, folder: str, names: Iterable[str]) -> Names:
        """Where the tensors `names` of a component lie in a single file, as other programs read it.

        Raises InputError for a family without such a layout.
        """
        raise InputError(
            f"{self.name} has no layout of one file that other programs read: they load its pipeline's folder; export "
            f"with --format diffusers"
        )
