"""LPIPS, version 0.1 on AlexNet: perceptual distance between images (Zhang et al. 2018, arXiv 1801.03924, section 3).

In plain PyTorch, because the lpips package needs torchvision. Weights come from two published files: torchvision's
AlexNet and the package's linear weights, under their usual names in one folder (`find_lpips`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dreambooth.errors import InputError
from dreambooth.evaluation.bank import check_one_size
from dreambooth.evaluation.weight_files import read_weights
from dreambooth.models.download import cache_directory, from_hub, from_store, is_hub_id, is_remote

WHAT_TO_FETCH = (
    "fetch AlexNet's weights, https://download.pytorch.org/models/alexnet-owt-7be5be79.pth, and LPIPS's linear "
    "weights, https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth (also in the "
    "wheel of the package lpips), and put both into one folder"
)
_ALEXNET_NAMES = ("alexnet*.safetensors", "alexnet*.pth")
_LINEAR_NAMES = ("alex.safetensors", "alex.pth")
_LEAST_SIDE = 31  # below, AlexNet's second pooling leaves nothing
_EPSILON = 1e-10  # the package's
# ImageNet's mean and standard deviation, as the package has them for pixels in [-1, 1].
_SHIFT = torch.tensor([-0.030, -0.088, -0.188])
_SCALE = torch.tensor([0.458, 0.448, 0.450])


class LPIPS(nn.Module):
    """Feature differences of AlexNet's five layers, weighted by channel, averaged over places, summed over layers."""

    def __init__(self) -> None:
        """Build LPIPS with random weights; see `load_lpips`."""
        super().__init__()
        # Numbered as torchvision's AlexNet, so that its state dict fits: convolutions are 0, 3, 6, 8 and 10.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        self.linear = nn.ParameterList([torch.rand(width) for width in (64, 192, 384, 256, 256)])

    def unit_features(self, pixels: Tensor) -> list[Tensor]:
        """Outputs of the five ReLUs for pixels (N, 3, H, W) in [-1, 1]: (N, C, h, w), of unit norm over channels."""
        hidden = (pixels - _SHIFT.to(pixels)[:, None, None]) / _SCALE.to(pixels)[:, None, None]
        found = []
        for layer in self.features:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                found.append(hidden / (hidden.norm(dim=1, keepdim=True) + _EPSILON))
        return found

    @torch.inference_mode()
    def distances(self, images: Sequence[Image.Image]) -> Tensor:
        """Distances between images of one size: (N, N), symmetric, zero on the diagonal, float32, on the CPU.

        Raises InputError for no images, images of more than one size and images under 31 pixels.
        """
        check_one_size(images)
        if min(images[0].size) < _LEAST_SIDE:
            raise InputError(f"LPIPS needs images of at least {_LEAST_SIDE} pixels, got {images[0].size}")
        device = self.linear[0].device
        # One image at a time, since its features at full size take megabytes.
        features = [self.unit_features(_pixels(image)[None].to(device)) for image in images]
        table = torch.zeros(len(images), len(images))
        for row in range(len(images)):
            for column in range(row):
                table[row, column] = table[column, row] = self._distance(features[row], features[column])
        return table

    def _distance(self, first: list[Tensor], second: list[Tensor]) -> float:
        differences = [(a - b).square().mean(dim=(0, 2, 3)) for a, b in zip(first, second, strict=True)]  # (C,) each
        return sum(float(weight @ by_channel) for weight, by_channel in zip(self.linear, differences, strict=True))


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)


def find_lpips(address: str | None) -> Path:
    """The folder of LPIPS's weights: a folder, an address, a hub id, or by default `lpips` in the cache.

    It holds alexnet*.pth and alex.pth, or both as .safetensors. Raises InputError naming what to fetch.
    """
    what = "LPIPS's weights"
    directory = Path((address or str(cache_directory() / "lpips")).removeprefix("file://")).expanduser()
    if address is not None and is_remote(address):
        directory = from_store(address, what=what)
    elif address is not None and not directory.is_dir() and is_hub_id(address):
        directory = from_hub(address, what=what, allow=[*_ALEXNET_NAMES, *_LINEAR_NAMES])
    weight_files(directory)
    return directory


def weight_files(directory: Path) -> tuple[Path, Path]:
    """Files of AlexNet's and the linear weights in a folder. Raises InputError for a missing one."""
    found = []
    for names in (_ALEXNET_NAMES, _LINEAR_NAMES):
        paths = [path for name in names for path in sorted(directory.glob(name))]
        if not paths:
            raise InputError(f"LPIPS's weights: there is no {' or '.join(names)} in {directory}; {WHAT_TO_FETCH}")
        found.append(paths[0])
    return found[0], found[1]


def load_lpips(directory: Path, *, device: str = "cpu") -> LPIPS:
    """LPIPS with the weights in a folder. Raises InputError for files that are damaged or hold something else."""
    alexnet_path, linear_path = weight_files(directory)
    alexnet, linear = (read_weights(path, cure=WHAT_TO_FETCH) for path in (alexnet_path, linear_path))
    model = LPIPS()
    _put(model.features, {name: f"features.{name}" for name in model.features.state_dict()}, alexnet, alexnet_path)
    # In the package each layer is a dropout and a 1 x 1 convolution without bias.
    _put(model.linear, {str(layer): f"lin{layer}.model.1.weight" for layer in range(5)}, linear, linear_path)
    return model.to(device).eval()


def _put(module: nn.Module, names: Mapping[str, str], weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a module's tensors from a file's tensors, by `names`."""
    own = module.state_dict()
    for name, published in names.items():
        if published not in weights or weights[published].numel() != own[name].numel():
            raise InputError(f"{path} has no {published} of {own[name].numel()} numbers; {WHAT_TO_FETCH}")
    module.load_state_dict({name: weights[published].reshape(own[name].shape) for name, published in names.items()})
