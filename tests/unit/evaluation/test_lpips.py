"""LPIPS against the definition, worked out another way, and its files."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.errors import InputError
from dreambooth.evaluation.lpips import LPIPS, find_lpips, load_lpips


def noise(seed: int, size: tuple[int, int] = (70, 50)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def model() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS().eval()


@pytest.fixture
def folder(model: LPIPS, tmp_path: Path) -> Path:
    """The two published files, with the keys they have."""
    torch.save({f"features.{k}": v for k, v in model.features.state_dict().items()}, tmp_path / "alexnet.pth")
    linear = {f"lin{i}.model.1.weight": w.detach()[None, :, None, None] for i, w in enumerate(model.linear)}
    torch.save(linear, tmp_path / "alex.pth")
    return tmp_path


def outputs(model: LPIPS, image: Image.Image) -> list[np.ndarray]:
    """What AlexNet's five ReLUs give for an image, (C, h, w) each."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)) / 255
    # The package's scaling layer is, but for rounding, ImageNet's mean and standard deviation.
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    hidden = ((2 * pixels - 1 - shift) / scale).permute(2, 0, 1)[None]
    found = []
    with torch.no_grad():
        for place, layer in enumerate(model.features):
            hidden = layer(hidden)
            if place in (1, 4, 7, 9, 11):
                found.append(hidden[0].double().numpy())
    return found


def defined(model: LPIPS, first: Image.Image, second: Image.Image) -> float:
    """Equation 1 of the paper as it stands there: unit vectors place by place."""
    total = 0.0
    for a, b, weight in zip(outputs(model, first), outputs(model, second), model.linear, strict=True):
        _, height, width = a.shape
        for y, x in itertools.product(range(height), range(width)):
            difference = a[:, y, x] / np.linalg.norm(a[:, y, x]) - b[:, y, x] / np.linalg.norm(b[:, y, x])
            total += float(weight.detach().double().numpy() @ difference**2) / (height * width)
    return total


def test_the_distance_is_the_papers(model: LPIPS) -> None:
    first, second = noise(0), Image.linear_gradient("L").convert("RGB").resize((70, 50))
    assert float(model.distances([first, second])[0, 1]) == pytest.approx(defined(model, first, second), rel=1e-4)


def test_distances_are_symmetric_whatever_the_order_and_company(model: LPIPS) -> None:
    images = [noise(seed) for seed in range(4)]
    distances = model.distances(images)
    assert torch.equal(distances, distances.T)
    assert distances.diagonal().tolist() == [0] * 4
    torch.testing.assert_close(model.distances(images[::-1]), distances.flip(0, 1))
    torch.testing.assert_close(model.distances(images[1:3])[0, 1], distances[1, 2])
    assert float(model.distances([images[0], images[0].copy()])[0, 1]) == 0
    assert model.distances(images[:1]).tolist() == [[0]]


def test_a_channel_without_weight_does_not_count(model: LPIPS) -> None:
    for weight in model.linear:
        weight.data.zero_()
    assert not bool(model.distances([noise(0), noise(1)]).any())
    model.linear[2].data[7] = 1
    with torch.no_grad():
        pixels = [torch.from_numpy(np.asarray(noise(s), np.float32).transpose(2, 0, 1) / 127.5 - 1) for s in (0, 1)]
        a, b = (model.unit_features(each[None])[2][0, 7] for each in pixels)
    assert float(model.distances([noise(0), noise(1)])[0, 1]) == pytest.approx(float((a - b).square().mean()), rel=1e-5)


def test_weights_come_from_the_published_files(model: LPIPS, folder: Path) -> None:
    images = [noise(0), noise(1)]
    assert torch.equal(load_lpips(find_lpips(str(folder))).distances(images), model.distances(images))


def test_weights_come_from_safetensors_too(model: LPIPS, folder: Path) -> None:
    from safetensors.torch import save_file

    for path in list(folder.glob("*.pth")):
        save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"))
        path.unlink()
    images = [noise(0), noise(1)]
    assert torch.equal(load_lpips(folder).distances(images), model.distances(images))


def test_a_file_that_is_missing_is_named_with_its_source(folder: Path) -> None:
    (folder / "alex.pth").unlink()
    with pytest.raises(InputError, match=r"no alex\.safetensors or alex\.pth in .*; fetch AlexNet's weights, https"):
        find_lpips(str(folder))


def test_a_file_that_holds_something_else(folder: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, folder / "alexnet.pth")
    with pytest.raises(InputError, match=r"alexnet\.pth has no features\.0\.weight of 23232 numbers"):
        load_lpips(folder)
    torch.save([1, 2], folder / "alexnet.pth")
    with pytest.raises(InputError, match=r"alexnet\.pth holds list, not a state dict"):
        load_lpips(folder)


def test_a_damaged_file(folder: Path) -> None:
    (folder / "alex.pth").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"alex\.pth is damaged or no file of weights"):
        load_lpips(folder)


def test_images_too_small_for_alexnet(model: LPIPS) -> None:
    with pytest.raises(InputError, match=r"at least 31 pixels, got \(30, 64\)"):
        model.distances([noise(0, (30, 64))])
    assert model.distances([noise(0, (31, 31)), noise(1, (31, 31))])[0, 1] > 0
