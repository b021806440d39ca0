"""The miniatures: built-in base models, small enough to ship with the package, and subjects to try them with.

weights/pipeline    a Stable Diffusion directory for 64 x 64 images
weights/flow        a Stable Diffusion 3 directory for the same world
weights/cascade     two directories of a pixel cascade for the same world, without a VAE
weights/vit         a ViTModel that distinguishes subjects (where a larger project uses DINO)
weights/clip        a CLIPModel with its tokenizer
subjects/NAME       five instance images of a made-up subject, and its class noun in subject.yaml
"""

from pathlib import Path

_HERE = Path(__file__).parent
WEIGHTS_DIR = _HERE / "weights"
PIPELINE_DIR = WEIGHTS_DIR / "pipeline"
FLOW_DIR = WEIGHTS_DIR / "flow"
CASCADE_DIR = WEIGHTS_DIR / "cascade"
VIT_DIR = WEIGHTS_DIR / "vit"
CLIP_DIR = WEIGHTS_DIR / "clip"
SUBJECTS_DIR = _HERE / "subjects"

BASES = {
    "miniature": "pipeline",
    "miniature-flow": "flow/pipeline",
    "miniature-cascade": "cascade/stage-1",
}
"""Folders of the built-in base models below the weights, by the names that `base_model` takes."""
SECOND_STAGES = {"miniature-cascade": "cascade/stage-2"}
"""Folders of their second stages, by the names that `super_resolution.base_model` takes."""


def subject_names() -> tuple[str, ...]:
    """The shipped subjects, sorted by name."""
    return tuple(sorted(path.parent.name for path in SUBJECTS_DIR.glob("*/subject.yaml")))


def subject_dir(name: str) -> Path:
    """The folder of a shipped subject: 00.png to 04.png and subject.yaml.

    Raises KeyError if no shipped subject has that name.
    """
    if name not in subject_names():
        raise KeyError(f"no shipped subject is called {name!r}; there are {', '.join(subject_names())}")
    return SUBJECTS_DIR / name
