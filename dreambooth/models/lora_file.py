"""A LoRA as a safetensors file, by the names of diffusers' `load_lora_weights` or of kohya's scripts.

Every layer has the same rank, with zeros where its matrix can't have as many: readers scale a layer by alpha over its
rank, and take one alpha for all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dreambooth.errors import InputError
from dreambooth.models.families import Family, family_of
from dreambooth.models.families.original_names import DENOISER
from dreambooth.models.low_rank import Layer, LowRank
from dreambooth.models.tensor_stream import Planned, Progress, write_tensors

LoraNames = Literal["diffusers", "kohya"]
LORA_NAMES: tuple[LoraNames, ...] = ("diffusers", "kohya")
_ALONE = "emb_params"


def check_lora(family: Family, names: LoraNames) -> None:
    """Raise InputError for a family that no LoRA is read for, or not by these names."""
    if not family.lora_folders:
        raise InputError(
            f"a LoRA of {family.name} can't be loaded: its diffusers pipeline has no load_lora_weights; export with "
            f"--format diffusers"
        )
    if names == "kohya" and not family.kohya_prefixes:
        raise InputError(
            f"kohya's scripts join other layers of {family.name} than diffusers has; leave --names at 'diffusers', "
            f"which ComfyUI reads too"
        )


def write_lora(
    base: Path,
    found: LowRank,
    target: Path,
    *,
    rank: int,
    names: LoraNames = "diffusers",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str],
    on_progress: Progress = lambda done, total: None,
) -> str:
    """Write a LoRA of a rank, at most that of `found`, and return its sha256; `dtype` None is float32.

    Raises InputError as `check_lora` does.
    """
    family = family_of(base)
    check_lora(family, names)
    stems = _kohya_stems(base, family, found) if names == "kohya" else {}
    planned = [
        tensor for layer in found.layers for tensor in _tensors(layer, rank, stems, dtype=dtype or torch.float32)
    ]
    return write_tensors(target, planned, {"format": "pt", **metadata}, on_progress=on_progress)


def write_embedding(family: Family, found: LowRank, target: Path) -> str:
    """Write the identifier's embeddings as a file of Textual Inversion, and return its sha256.

    Of one text encoder under `emb_params`, of several under the family's names, as ComfyUI and AUTOMATIC1111 read.
    """
    names = family.embedding_names or dict.fromkeys(found.embeddings, _ALONE)
    rows = {folder: own.rows for folder, own in found.embeddings.items() if folder in names}
    named = {_ALONE if len(rows) == 1 else names[folder]: tensor for folder, tensor in rows.items()}
    return write_tensors(target, [_planned(name, tensor, torch.float32) for name, tensor in named.items()], {})


def _tensors(layer: Layer, rank: int, stems: Mapping[Layer, str], *, dtype: torch.dtype) -> list[Planned]:
    """A layer's tensors in a file; convolutions have `down` (R, I, H, W) and `up` (O, R, 1, 1)."""
    down, up = _padded(layer.down, rank, 0), _padded(layer.up, rank, 1)
    if down.ndim > 2:
        up = up[..., None, None]
    if (stem := stems.get(layer)) is None:
        stem = f"{layer.folder}.{_with_text_model(layer)}"
        return [_planned(f"{stem}.lora_A.weight", down, dtype), _planned(f"{stem}.lora_B.weight", up, dtype)]
    return [
        _planned(f"{stem}.lora_down.weight", down, dtype),
        _planned(f"{stem}.lora_up.weight", up, dtype),
        _planned(f"{stem}.alpha", torch.tensor(float(rank)), dtype),
    ]


def _kohya_stems(base: Path, family: Family, found: LowRank) -> dict[Layer, str]:
    """What the names of each layer begin with in kohya's scripts."""
    modules = {layer: _with_text_model(layer) for layer in found.layers}
    for folder in family.kohya_original:
        names = list(family.empty(base, folder).state_dict())
        originals = family.single_file_names(base, folder, names)
        for layer in modules:
            if layer.folder == folder:
                placed = originals[f"{layer.module}.weight"].name
                modules[layer] = placed.removeprefix(DENOISER).removesuffix(".weight")
    return {layer: family.kohya_prefixes[layer.folder] + module.replace(".", "_") for layer, module in modules.items()}


def _with_text_model(layer: Layer) -> str:
    """A module by the name that LoRAs have for it: CLIP's layers with the prefix that transformers 5 dropped."""
    bare = layer.folder.startswith("text_encoder") and layer.module.startswith("encoder.")
    return f"text_model.{layer.module}" if bare else layer.module


def _padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    tensor = tensor.narrow(axis, 0, min(rank, tensor.shape[axis]))
    missing = list(tensor.shape)
    missing[axis] = rank - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis) if missing[axis] else tensor


def _planned(name: str, tensor: Tensor, dtype: torch.dtype) -> Planned:
    return Planned(name=name, dtype=dtype, shape=tuple(tensor.shape), make=lambda: tensor)
