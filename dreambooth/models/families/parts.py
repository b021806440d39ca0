"""The components of a family's base models: which there are, their weights, and what of them is trained."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dreambooth.models.building import BUILDING
from dreambooth.models.component import Component
from dreambooth.models.config_fields import read_json
from dreambooth.models.weight_files import variant_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dreambooth.models.stored_weights import StoredTensor


class Parts:
    """Components in folders of a base model's directory, and how they are loaded."""

    components: tuple[Component, ...]

    def role(self, role: str) -> tuple[Component, ...]:
        """Components with a role, in order."""
        return tuple(component for component in self.components if component.role == role)

    @property
    def denoiser(self) -> Component:
        """The component that is asked at every step of sampling."""
        return self.role("denoiser")[0]

    def component(self, folder: str) -> Component:
        """The component in a folder."""
        return next(component for component in self.components if component.folder == folder)

    def parts(self, directory: Path) -> tuple[Component, ...]:
        """Components that a directory has; an optional one may be missing, or null in its index."""
        index = read_json(directory / "model_index.json")
        left_out = {part.folder for part in self.components if part.optional and index.get(part.folder) == [None, None]}
        there = [part for part in self.components if (directory / part.folder).is_dir()]
        return tuple(part for part in there if part.folder not in left_out)

    def text_encoders(self, directory: Path) -> tuple[Component, ...]:
        """Text encoders that a directory has, in order."""
        return tuple(part for part in self.parts(directory) if part.role == "text_encoder")

    def load(self, directory: Path, folder: str, dtype: "torch.dtype | None" = None) -> "nn.Module":
        """Load a component's weights, in fp32 unless another dtype is given. Never reads a pickle."""
        import torch

        wanted = dtype or torch.float32
        component = self.component(folder)
        # To save memory, diffusers has accelerate put every module on the meta device that any thread makes meanwhile.
        eager = {"low_cpu_mem_usage": False} if component.library == "diffusers" else {}
        with BUILDING:
            module: nn.Module = component.load_class().from_pretrained(
                directory,
                subfolder=folder,
                dtype=wanted,
                variant=variant_of(directory, component),
                local_files_only=True,
                use_safetensors=True,
                **component.overrides,
                **eager,
            )
        return module.to(wanted) if eager else module

    def load_vae(self, directory: Path, device: str) -> Any:
        """The frozen VAE, in fp32: some overflow in fp16. None for a family that works on pixels."""
        if not self.role("vae"):
            return None
        return self.load(directory, "vae").to(device).requires_grad_(False).eval()

    def empty(self, directory: Path, folder: str, *, device: str = "meta") -> "nn.Module":
        """A component with uninitialized weights; on the meta device it has shapes alone."""
        import torch

        return self._built(directory, folder, torch.device(device))

    def stored(self, directory: Path, folder: str) -> "tuple[nn.Module, dict[str, StoredTensor]]":
        """A component with its parameters on the meta device, and where each is stored; buffers have their values.

        Where files name a parameter otherwise than the module, the component is loaded whole, and nothing is stored.
        """
        from dreambooth.models.stored_weights import parameters_on_meta, stored_weights

        module = self._built(directory, folder, parameters_on_meta()).eval()
        stored = stored_weights(directory, self.component(folder), module)
        return (self.load(directory, folder), {}) if stored is None else (module, stored)

    def _built(self, directory: Path, folder: str, context: "AbstractContextManager[Any]") -> "nn.Module":
        """A component as its configuration says, built within a context."""
        component = self.component(folder)
        kind = component.load_class()
        with BUILDING, context:
            if component.library == "diffusers":
                return cast("nn.Module", kind.from_config(kind.load_config(directory / folder)))
            config = kind.config_class.from_pretrained(directory / folder, **component.overrides)
            return cast("nn.Module", kind(config))

    def count_parameters(self, directory: Path, folder: str) -> int:
        """Parameters of a component, by its configuration alone."""
        return sum(parameter.numel() for parameter in self.empty(directory, folder).parameters())

    def without_gradient(self, owner: str, module: "nn.Module") -> Iterable[str]:
        """Names of a module's parameters that no gradient reaches, though all are trained.

        `owner` is `denoiser`, or a text encoder's folder.
        """
        return ()

    def partly_without_gradient(self, denoiser: "nn.Module") -> Iterable[str]:
        """Names of the denoiser's parameters some rows of which no gradient reaches.

        Weight decay would move those rows, so these parameters have none.
        """
        return ()

    def kept(self, directory: Path, folder: str) -> Iterable[str]:
        """Names of a text encoder's parameters that stay as the base has them, though they would get a gradient.

        Part of a result's key: say so only of a base for which other programs can't read another value.
        """
        return ()

    def freeze(self, directory: Path, denoiser: "nn.Module", text_encoders: "Mapping[str, nn.Module]") -> None:
        """Freeze what is kept, and parameters without gradient: an optimizer would only decay them, and DDP or ZeRO
        waits for them.
        """
        for owner, module in {"denoiser": denoiser, **text_encoders}.items():
            kept = () if owner == "denoiser" else self.kept(directory, owner)
            for name in (*self.without_gradient(owner, module), *kept):
                module.get_parameter(name).requires_grad_(False)
