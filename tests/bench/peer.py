"""Runs diffusers' examples/dreambooth/train_dreambooth.py on the miniature, as a person would who has only that.

The script wants two packages that this project does without. accelerate is installed into a folder of the benchmark's
own; and where torchvision is missing, a copy of the script is run that takes the five transforms it uses from a module
which makes them with Pillow and numpy, under the same names.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dreambooth.miniature import PIPELINE_DIR, subject_dir

ACCELERATE = "accelerate==1.15.0"
TORCHVISION = "from torchvision import transforms\n"
TRANSFORMS = '''
import enum, random
import numpy as np
import torch
from PIL import Image

class InterpolationMode(enum.Enum):
    BILINEAR = Image.Resampling.BILINEAR

class Compose:
    def __init__(self, transforms): self.transforms = transforms
    def __call__(self, image):
        for transform in self.transforms: image = transform(image)
        return image

class Resize:
    """The shorter side becomes `size`."""
    def __init__(self, size, interpolation): self.size, self.filter = size, interpolation.value
    def __call__(self, image):
        scale = self.size / min(image.size)
        return image.resize([max(self.size, int(side * scale)) for side in image.size], self.filter)

class _Crop:
    def __init__(self, size): self.size = size
    def __call__(self, image):
        left, top = (self.place(side - self.size) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))

class CenterCrop(_Crop):
    def place(self, slack): return slack // 2

class RandomCrop(_Crop):
    def place(self, slack): return random.randint(0, slack)

class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()

class Normalize:
    def __init__(self, mean, std): self.mean, self.std = mean[0], std[0]
    def __call__(self, pixels): return (pixels - self.mean) / self.std
'''


class Peer:
    """The script at a path, and what it needs, made in a folder."""

    def __init__(self, script: Path, folder: Path) -> None:
        self._script, self._folder = folder / "train_dreambooth.py", folder
        packages = folder / "packages"
        packages.mkdir(parents=True)
        if importlib.util.find_spec("accelerate") is None:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", str(packages), ACCELERATE], check=True)
        text = script.read_text()
        if importlib.util.find_spec("torchvision") is None:
            if text.count(TORCHVISION) != 1:
                raise SystemExit(f"{script} isn't diffusers' train_dreambooth.py: no {TORCHVISION.strip()!r} in it")
            text = text.replace(TORCHVISION, "import pillow_transforms as transforms\n")
            (packages / "pillow_transforms.py").write_text(TRANSFORMS)
        self._script.write_text(text)
        path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
        self._environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def seconds(self, subject: str, class_noun: str, *, steps: int, class_images: int, class_folder: Path) -> float:
        """Wall time of one subject, from the command to its end."""
        images = self._folder / "images" / subject
        if not images.is_dir():
            images.mkdir(parents=True)
            for path in subject_dir(subject).glob("*.png"):  # the script takes whatever lies there for a picture
                shutil.copy(path, images)
        output = self._folder / "output"
        options = {
            "pretrained_model_name_or_path": PIPELINE_DIR,
            "instance_data_dir": images,
            "instance_prompt": f"a photo of tfz {class_noun}",
            "class_prompt": f"a photo of a {class_noun}",
            "class_data_dir": class_folder,
            "num_class_images": class_images,
            "sample_batch_size": 8,
            "resolution": 64,
            "train_batch_size": 1,
            "max_train_steps": steps,
            "learning_rate": 5e-4,
            "lr_scheduler": "linear",
            "seed": 0,
            "output_dir": output,
        }
        command = [sys.executable, str(self._script), "--with_prior_preservation", "--train_text_encoder"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=self._folder, env=self._environment, check=False, capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        if done.returncode or not (output / "unet" / "diffusion_pytorch_model.safetensors").is_file():
            raise RuntimeError(f"{self._script} failed:\n{done.stderr[-3000:]}")
        shutil.rmtree(output)
        return seconds
