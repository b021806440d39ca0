"""Settings that suit a family of base models."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Settings of training and sampling that suit a family; a user's own override them.

    `text_encoders` are the folders of those trained by default; `resolution` in pixels is for bases whose configuration
    names none.
    """

    text_encoders: tuple[str, ...]
    resolution: int | None = None
    learning_rate: float = 5e-6
    max_train_steps: int = 1000
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
