"""DreamSim: perceptual similarity tuned to what people find alike (Fu et al. 2023, arXiv 2306.09344).

In plain PyTorch, because the dreamsim package needs torchvision, timm, open_clip and peft, and downloads on its own. It
reads the folder that the package leaves behind (its `cache_dir`): ViTs under DINO's names, and the LoRA on their `qkv`,
which is merged into them. The embedding is the concatenation of the towers' outputs, minus its mean, of unit norm; the
distance is 1 - cosine similarity, so the similarity reported here, 1 - distance, is the cosine itself.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dreambooth.errors import InputError
from dreambooth.evaluation.encoders import IMAGENET_MEAN, IMAGENET_STD, Transform, some_at_once
from dreambooth.evaluation.weight_files import read_weights
from dreambooth.models.download import from_hub, from_store, is_hub_id, is_remote

WHAT_TO_FETCH = (
    "run the dreamsim package once with this folder as cache_dir, or unpack one of its checkpoints there "
    "(github.com/ssundaram21/dreamsim, v0.2.0), for DINO's branch with dino_vitbase16_pretrain.pth beside it "
    "(dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain)"
)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HEAD = 64  # width of an attention head in every ViT-B


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """A ViT of DreamSim: its file, and what distinguishes it from DINO's."""

    files: tuple[str, ...]  # the first that is there
    clip: bool
    quick_gelu: bool = False


_BRANCHES = {
    "dino_vitb16": _Branch(
        files=("dino_vitbase16_pretrain.pth", "checkpoints/dino_vitbase16_pretrain.pth"),  # the latter by torch.hub
        clip=False,
    ),
    "clip_vitb16": _Branch(files=("clip_vitb16_pretrain.pth.tar",), clip=True, quick_gelu=True),
    "clip_vitb32": _Branch(files=("clip_vitb32_pretrain.pth.tar",), clip=True, quick_gelu=True),
    "open_clip_vitb16": _Branch(files=("open_clip_vitb16_pretrain.pth.tar",), clip=True),
    "open_clip_vitb32": _Branch(files=("open_clip_vitb32_pretrain.pth.tar",), clip=True),
}
_ENSEMBLE = ("dino_vitb16", "clip_vitb16", "open_clip_vitb16")
_ADAPTERS = {"ensemble_lora": _ENSEMBLE} | {
    f"{name}_single_lora": (name,) for name in ("dino_vitb16", "clip_vitb32", "open_clip_vitb32")
}
"""Folders of LoRA weights, and the branches that each tunes, in the order of their outputs."""


class Tower(nn.Module):
    """A ViT whose tensors are named as in DINO's repository; CLIP's towers come under these names, too."""

    def __init__(
        self, *, width: int, depth: int, patch: int, places: int, output: int | None, quick_gelu: bool
    ) -> None:
        """`places` counts patches and the class token; `output` is the width of CLIP's projection, None for DINO."""
        super().__init__()
        epsilon = 1e-6 if output is None else 1e-5
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, places, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.pos_drop = nn.Identity() if output is None else nn.LayerNorm(width, eps=epsilon)
        self.blocks = nn.ModuleList([_Block(width, epsilon, quick_gelu=quick_gelu) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.proj = None if output is None else nn.Parameter(torch.zeros(width, output))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, D) of pixels (N, 3, H, W): DINO's class token before the last norm, CLIP's projected one."""
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)  # (N, P, width)
        hidden = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        hidden = self.pos_drop(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        output: Tensor = hidden[:, 0] if self.proj is None else self.norm(hidden[:, 0]) @ self.proj
        return output


class _Block(nn.Module):
    def __init__(self, width: int, epsilon: float, *, quick_gelu: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=epsilon), nn.LayerNorm(width, eps=epsilon)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self._quick_gelu = quick_gelu

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, places, width) to the same."""
        count, places, width = hidden.shape
        qkv = self.attn["qkv"](self.norm1(hidden)).reshape(count, places, 3, width // _HEAD, _HEAD)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, places, 64) each
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.attn["proj"](mixed.transpose(1, 2).reshape(count, places, width))
        inner = self.mlp["fc1"](self.norm2(hidden))
        inner = inner * torch.sigmoid(1.702 * inner) if self._quick_gelu else nn.functional.gelu(inner)
        output: Tensor = hidden + self.mlp["fc2"](inner)
        return output


class DreamSim:
    """DreamSim's embeddings, by all branches of a folder."""

    def __init__(self, directory: Path, *, device: str) -> None:
        """Load the branches and merge their LoRA. Raises InputError for files that are damaged or of another model."""
        adapter, names = find_adapter(directory)
        tuning, scale, source = _read_adapter(adapter)
        self._device = device
        self._towers: list[tuple[Tower, Transform]] = []
        for place, name in enumerate(names):
            path = branch_file(directory, name)
            weights = read_weights(path, cure=WHAT_TO_FETCH)
            prefix = f"base_model.model.extractor_list.{place}.model."
            own = {key.removeprefix(prefix): tuning.pop(key) for key in list(tuning) if key.startswith(prefix)}
            tower = _tower(weights.get("state_dict", weights), path, _BRANCHES[name])
            _merge(tower, own, scale, source)
            self._towers.append((tower.to(device).eval(), _transform(tower, clip=_BRANCHES[name].clip)))
        if tuning:
            raise InputError(f"{source} has {next(iter(tuning))}, which {' and '.join(names)} lack; {WHAT_TO_FETCH}")

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images: (N, D), float32, of unit norm, on the CPU; raises InputError for no images."""
        embeddings = []
        for some in some_at_once(images):
            outputs = [
                tower(torch.stack([transform(image) for image in some]).to(self._device))
                for tower, transform in self._towers
            ]
            embeddings.append(torch.cat(outputs, dim=1).float().cpu())
        joined = torch.cat(embeddings)
        return nn.functional.normalize(joined - joined.mean(dim=1, keepdim=True), dim=1)


def find_dreamsim(address: str) -> Path:
    """DreamSim's folder: a folder, an address that fsspec knows, or a hub id.

    Raises InputError, with what to fetch, if anything is missing.
    """
    what = "DreamSim"
    directory = Path(address.removeprefix("file://")).expanduser()
    if is_remote(address):
        directory = from_store(address, what=what)
    elif not directory.is_dir() and is_hub_id(address):
        directory = from_hub(address, what=what, allow=["*.pth", "*.pth.tar", "*_lora/*"])
    if not directory.is_dir():
        raise InputError(f"{what} {address!r}: there is no such folder; {WHAT_TO_FETCH}")
    used_files(directory)
    return directory


def used_files(directory: Path) -> list[Path]:
    """All files that `DreamSim` reads of a folder."""
    adapter, names = find_adapter(directory)
    return [adapter / "adapter_config.json", _adapter_weights(adapter)] + [
        branch_file(directory, name) for name in names
    ]


def find_adapter(directory: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder of LoRA weights in DreamSim's, and the branches it tunes. Raises InputError unless there is one."""
    found = [name for name in _ADAPTERS if (directory / name).is_dir()]
    if len(found) != 1:
        there = f"{' and '.join(found)}; leave one of them" if found else f"none of them; {WHAT_TO_FETCH}"
        raise InputError(f"DreamSim in {directory}: expected one of {', '.join(_ADAPTERS)}, got {there}")
    return directory / found[0], _ADAPTERS[found[0]]


def branch_file(directory: Path, name: str) -> Path:
    """The file of a branch. Raises InputError for a missing one."""
    files = _BRANCHES[name].files
    for file in files:
        if (directory / file).is_file():
            return directory / file
    raise InputError(f"DreamSim in {directory}: there is no {' or '.join(files)}; {WHAT_TO_FETCH}")


def _adapter_weights(adapter: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (adapter / name).is_file() and (adapter / "adapter_config.json").is_file():
            return adapter / name
    raise InputError(
        f"DreamSim: expected adapter_config.json and adapter_model.safetensors or .bin in {adapter}; {WHAT_TO_FETCH}"
    )


def _read_adapter(adapter: Path) -> tuple[dict[str, Tensor], float, Path]:
    """The LoRA's tensors, what they are scaled by, and their file."""
    path = _adapter_weights(adapter)
    try:
        settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
        modules, scale = settings["target_modules"], float(settings["lora_alpha"]) / int(settings["r"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{adapter / 'adapter_config.json'} is no LoRA's ({error!r}); {WHAT_TO_FETCH}") from None
    if list(modules) != ["qkv"] or settings.get("use_rslora"):
        raise InputError(f"{adapter / 'adapter_config.json'} tunes {modules}, DreamSim's ['qkv']; {WHAT_TO_FETCH}")
    return dict(read_weights(path, cure=WHAT_TO_FETCH)), scale, path


def _tower(weights: Mapping[str, Tensor], path: Path, branch: _Branch) -> Tower:
    """A branch's ViT, of the sizes that its tensors have."""
    try:
        width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        output = weights["proj"].shape[1] if branch.clip else None
        if width % _HEAD:
            raise ValueError(f"a width of {width} isn't heads of {_HEAD}")
        places = weights["pos_embed"].shape[1]
        tower = Tower(width=width, depth=depth, patch=patch, places=places, output=output, quick_gelu=branch.quick_gelu)
        tower.load_state_dict(dict(weights))
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} doesn't hold DreamSim's ViT ({reason}); {WHAT_TO_FETCH}") from None
    return tower


def _merge(tower: Tower, tuning: Mapping[str, Tensor], scale: float, source: Path) -> None:
    """Add a LoRA to the `qkv` of every block; `scale` is its alpha over its rank."""
    left = dict(tuning)
    for place, block in enumerate(tower.blocks):
        weight: Tensor = block.attn["qkv"].weight  # type: ignore[union-attr, index]
        first, second = (left.pop(f"blocks.{place}.attn.qkv.lora_{which}.weight", None) for which in "AB")
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else () for each in (first, second)]
        rank = shapes[0][0] if shapes[0] else 0
        if first is None or second is None or shapes != [(rank, weight.shape[1]), (weight.shape[0], rank)]:
            raise InputError(f"{source} has no LoRA of {tuple(weight.shape)} for block {place}; {WHAT_TO_FETCH}")
        weight.data += scale * (second.float() @ first.float())
    if left:
        raise InputError(f"{source} has {next(iter(left))}, which DreamSim lacks; {WHAT_TO_FETCH}")


def _transform(tower: Tower, *, clip: bool) -> Transform:
    """The package's: the whole image, squeezed to a square."""
    side = round((tower.pos_embed.shape[1] - 1) ** 0.5) * tower.patch_embed["proj"].kernel_size[0]  # type: ignore[index]
    return Transform(
        resize=(side, side),
        crop=None,
        mean=_CLIP_MEAN if clip else IMAGENET_MEAN,
        std=_CLIP_STD if clip else IMAGENET_STD,
    )
