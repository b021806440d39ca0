"""The configuration files of a base model, read by its family's list of fields."""

from pathlib import Path
from typing import Any

from dreambooth.errors import InputError
from dreambooth.models.config_fields import read_json
from dreambooth.models.families import Family, family_of
from dreambooth.models.families.schedulers import check_scheduler


class BaseSettings:
    """The settings of the base model in a directory; `settings["unet.in_channels"]`."""

    def __init__(self, directory: Path) -> None:
        """Read its files. Raises InputError naming the file and field for an invalid one."""
        self.directory = directory
        self.family: Family = family_of(directory)
        optional = {component.folder for component in self.family.components if component.optional}
        read: dict[str, dict[str, Any]] = {}
        self._values: dict[str, Any] = {}
        for field in self.family.fields:
            if field.file.partition("/")[0] in optional and not (directory / field.file).is_file():
                continue
            if field.file not in read:
                read[field.file] = read_json(directory / field.file)
            self._values[field.key] = field.value(read[field.file], directory)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def get(self, name: str) -> Any:
        """A setting, or None where an optional component is missing."""
        return self._values.get(name)

    @property
    def resolution(self) -> int:
        """Side in pixels of its training images. Raises InputError if its configuration has none."""
        return self.family.resolution(self)

    @property
    def warning(self) -> str | None:
        """A warning about a base that can't be learnt in full, or None."""
        return self.family.warning(self)

    def x0_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of what the denoiser's process starts from, for an image of these pixels; without `width` a square.

        Raises InputError for sides that it can't divide.
        """
        width = height if width is None else width
        for side in (height, width):
            self.check_side(side, "images.resolution")
        downscaling = self.family.downscaling(self)
        return self.family.channels(self), height // downscaling, width // downscaling

    def check_side(self, side: int, what: str) -> None:
        """Raise InputError for a picture's side in pixels that the denoiser can't divide, naming it `what`."""
        multiple = self.family.side_multiple(self)
        if side % multiple:
            raise InputError(f"{what} is {side}; expected a multiple of {multiple} for {self.family.name}")

    def check_trainable(self) -> None:
        """Raise InputError for a scheduler of another process, or a denoiser with inputs that training doesn't give."""
        check_scheduler(self)
        self.family.check_trainable(self)
