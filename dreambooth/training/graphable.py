"""Which settings let a step be captured, told without PyTorch, so that a plan can ask."""

from dreambooth.config.train import TrainConfig


def why_not_graphed(config: TrainConfig, device: str, workers: int, *, sizes: int = 1) -> str | None:
    """The reason why a step can't be captured that is known beforehand; None if there is none.

    `sizes` counts those of the instance images.
    """
    if not device.startswith("cuda"):
        return "there is no CUDA device"
    if workers > 1:
        return f"{workers} workers average their gradients"
    if config.optimizer != "adamw":
        return f"train.optimizer is {config.optimizer}"
    if config.fused_backward:
        return "train.fused_backward updates within the backward pass"
    if sizes > 1:
        return f"the photographs have {sizes} sizes (images.aspect_buckets), and a graph has one"
    if config.gradient_checkpointing:
        return "train.gradient_checkpointing reads the state of random numbers from the device"
    return None
