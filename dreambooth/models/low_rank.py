"""What fine-tuning changed, layer by layer, as products of two thin matrices (LoRA, arXiv 2106.09685).

The truncated singular value decomposition is the nearest matrix of a rank (Eckart and Young, 1936), so it is the best
LoRA of that rank for a layer's weights. It holds linear and convolution layers; what it can't hold (norms, biases,
embeddings) is measured here, and so is the identifier's own embedding, which can be given as a file of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.models.families import Family, family_of
from dreambooth.models.weight_files import open_tensors

_EXACT = 512
"""Smaller side of a matrix up to which all its singular values are computed; above, those asked for and a few more."""
_MORE, _ITERATIONS = 16, 4
_BLOCK = 2**24
"""Numbers of a block of thin matrices: so large that the system gets it back, and gives it page by page."""

HELD = ("linear layers", "convolutions")


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """The change of a layer, in components of falling weight: `up` (out, R) times `down` (R, in, ...)."""

    folder: str
    module: str  # as the denoiser or text encoder names it
    up: Tensor
    down: Tensor

    def change(self, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The nearest change of a rank, in the shape of the layer's weight, of matrices that are stored as `dtype`."""
        up, down = (each.to(dtype).float() for each in (self.up[:, :rank], self.down[:rank]))
        product = up @ down.flatten(1)
        return product.reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True, kw_only=True)
class IdentifierRows:
    """The rows (N, D) of the identifier's N tokens in a text encoder's embedding table, after fine-tuning."""

    token_ids: tuple[int, ...]
    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The changes of a model's layers against its base, to `rank`.

    `squares` is the sum of squared changes by kind of tensor; `embeddings` are the identifier's by the folder of the
    text encoder, where they changed.
    """

    layers: tuple[Layer, ...]
    rank: int
    squares: Mapping[str, float]
    embeddings: Mapping[str, IdentifierRows]

    def held(self, rank: int) -> float:
        """Share of the squared change that layers of a rank hold."""
        total = sum(self.squares.values())
        kept = sum(float(layer.up[:, :rank].square().sum(0) @ _squares(layer.down[:rank])) for layer in self.layers)
        return kept / total if total else 1.0


def low_rank(
    base: Path,
    model: Path,
    *,
    rank: int,
    identifier: str | None = None,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LowRank:
    """Decompose the difference of two diffusers directories of one architecture; `on_progress` counts tensors.

    One tensor of each is in memory at a time, beside the thin matrices. Raises ValueError for other shapes.
    """
    family = family_of(base)
    parts = (family.denoiser, *family.text_encoders(base))
    changes = {part.folder: open_tensors(base, part) for part in parts}
    total, done = sum(map(len, changes.values())), 0
    layers: list[Layer] = []
    kept = _Kept()
    squares: dict[str, float] = {}
    for part in parts:
        after = open_tensors(model, part)
        modules = dict(family.empty(base, part.folder).named_modules())
        for name, stored in changes[part.folder].items():
            done += 1
            on_progress(done, total)
            if name not in after or name.endswith("position_ids"):
                continue
            change = _change(name, stored, after[name], device)
            if change is None:
                continue
            module, kind = _kind(modules, name)
            readable = part.folder in family.lora_folders
            kind = kind if readable or kind not in HELD else f"layers of {part.folder}"
            square = float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2  # without a copy in float64
            squares[kind] = squares.get(kind, 0.0) + square
            if kind in HELD:
                up, down = map(kept, factors(change, rank))
                layers.append(Layer(folder=part.folder, module=module, up=up, down=down))
    embeddings = {} if identifier is None else dict(_embeddings(family, base, model, identifier))
    return LowRank(layers=tuple(layers), rank=rank, squares=squares, embeddings=embeddings)


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`up` (M, R) and `down` (R, N, ...) of a change (M, N, ...), whose product is the nearest of its rank.

    R is at most the rank a matrix of this shape can have; both take half of each singular value.
    """
    matrix = change.flatten(1).float()
    size = min(matrix.shape)
    rank = min(rank, size)
    if size <= max(_EXACT, rank + _MORE):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the method starts from random directions
            left, values, turned = torch.svd_lowrank(matrix, q=rank + _MORE, niter=_ITERATIONS)
            right = turned.T
    halves = values[:rank].sqrt()
    down = (halves[:, None] * right[:rank]).unflatten(1, change.shape[1:])
    return (left[:, :rank] * halves).cpu().contiguous(), down.cpu().contiguous()


class _Kept:
    """Copies of thin matrices in large blocks: one by one among matrices that come and go, they hold freed memory."""

    def __init__(self) -> None:
        self._block, self._used = torch.empty(0), 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Copy a tensor, which may then be freed."""
        end = self._used + tensor.numel()
        if end > len(self._block):
            self._block, self._used, end = torch.empty(max(_BLOCK, tensor.numel())), 0, tensor.numel()
        copy = self._block[self._used : end].view(tensor.shape)
        self._used = end
        return copy.copy_(tensor)


def weights_of(directory: Path) -> dict[str, Tensor]:
    """Denoiser and text encoders of a diffusers directory, as an engine's state_dict names them, in fp32."""
    family = family_of(directory)
    return {
        f"{'denoiser' if part == family.denoiser else part.folder}.{name}": weight.detach()
        for part in (family.denoiser, *family.text_encoders(directory))
        for name, weight in family.load(directory, part.folder).named_parameters()
    }


def weights_with(
    base: Path, found: LowRank, rank: int, *, embeddings: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The base's denoiser and text encoders with a LoRA of a rank, as an engine's state_dict names them, in fp32.

    `dtype` is that of the LoRA's file. With `embeddings` the identifier's rows are those of the model.
    """
    family = family_of(base)
    layers = {(layer.folder, layer.module): layer for layer in found.layers}
    changed = {folder for folder, _ in layers} | set(found.embeddings)
    state: dict[str, Tensor] = {}
    for part in (family.denoiser, *family.text_encoders(base)):
        if part.folder not in changed:
            continue
        module = family.load(base, part.folder)
        if embeddings and part.folder in found.embeddings:
            own = found.embeddings[part.folder]
            with torch.no_grad():
                module.get_input_embeddings().weight[list(own.token_ids)] = own.rows  # type: ignore[operator]
        owner = "denoiser" if part == family.denoiser else part.folder
        for name, weight in module.named_parameters():
            layer = layers.get((part.folder, name.removesuffix(".weight")))
            change = layer.change(rank, dtype) if layer is not None and name.endswith(".weight") else 0
            state[f"{owner}.{name}"] = weight.detach() + change
    return state


def _squares(down: Tensor) -> Tensor:
    return down.flatten(1).square().sum(1)


def _change(name: str, before: Any, after: Any, device: str) -> Tensor | None:
    """The change of a tensor in fp32, None where there is none. In a lower dtype that is what rounding leaves of it."""
    old, new = before.get_tensor(name), after.get_tensor(name)
    if old.shape != new.shape:
        raise ValueError(f"{name} has shape {tuple(new.shape)}, and {tuple(old.shape)} in the base")
    if torch.equal(old.to(new.dtype), new):
        return None
    change: Tensor = new.to(device, torch.float32) - old.to(device, torch.float32)
    return change


def _kind(modules: Mapping[str, nn.Module], name: str) -> tuple[str, str]:
    """A tensor's module, by the name that the loaded component has for it, and what kind it is."""
    path, _, ending = name.rpartition(".")
    if path not in modules:
        path = path.removeprefix("text_model.")  # transformers 5 dropped it from some
    module = modules.get(path)
    if isinstance(module, nn.Embedding):
        return path, "embeddings"
    if isinstance(module, nn.Linear | nn.Conv2d) and ending == "weight":
        return path, HELD[isinstance(module, nn.Conv2d)]
    return path, "biases" if isinstance(module, nn.Linear | nn.Conv2d) else "norms"


def identifier_ids(family: Family, directory: Path, folder: str, identifier: str) -> list[int]:
    """Ids of the identifier's tokens for the text encoder in a folder, each once."""
    tokenizer = family.tokenizer(directory, folder.replace("text_encoder", "tokenizer"))
    return list(dict.fromkeys(tokenizer(identifier, add_special_tokens=False).input_ids))


def _embeddings(family: Family, base: Path, model: Path, identifier: str) -> Iterator[tuple[str, IdentifierRows]]:
    """The identifier's rows of each table, in the order of its tokens, where fine-tuning changed them."""
    for part in family.text_encoders(base):
        before, after = open_tensors(base, part), open_tensors(model, part)
        name = next((name for name in after if name.endswith(part.table)), None)
        if name is None or name not in before:
            continue
        ids = identifier_ids(family, base, part.folder, identifier)
        rows = after[name].get_tensor(name)[ids].float()
        if not torch.equal(rows, before[name].get_tensor(name)[ids].to(rows.dtype)):
            yield part.folder, IdentifierRows(token_ids=tuple(ids), rows=rows)
