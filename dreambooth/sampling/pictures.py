"""Pictures on their way from the device that decoded them to the host."""

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Pictures(Sequence[Image.Image]):
    """Pictures of pixels (N, 3, H, W) in [-1, 1], of which a GPU makes copies on the host.

    It is asked for them at once, and only whoever looks at a picture waits for them: meanwhile the host prepares the
    next batch. Any thread may look. Raises RuntimeError for a picture whose pixels are not numbers.
    """

    def __init__(self, pixels: Tensor) -> None:
        self._shown = _on_host((pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))  # (N, H, W, 3), as diffusers does
        self._finite = _on_host(torch.isfinite(pixels).flatten(1).all(1))  # (N,)
        self._copied: torch.cuda.Event | None = None
        if pixels.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(pixels.device))

    def __len__(self) -> int:
        return len(self._shown)

    @overload
    def __getitem__(self, place: int) -> Image.Image: ...

    @overload
    def __getitem__(self, place: slice) -> list[Image.Image]: ...

    def __getitem__(self, place: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if self._copied is not None:
            self._copied.synchronize()
        if not self._finite[place]:
            raise RuntimeError("the pictures are not numbers: the weights are damaged, or overflow in half precision")
        return Image.fromarray((self._shown[place].float().numpy() * 255).round().astype(np.uint8))


def _on_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # else the copy would wait
    return pinned.copy_(tensor, non_blocking=True)
