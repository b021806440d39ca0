"""Host memory for many tensors, in pieces that PyTorch doesn't round up.

It rounds each block of pinned memory up to a power of two: of a tensor each, and of one buffer for all as well. So
blocks of such sizes are shared by tensors.
"""

import torch
from torch import Tensor

PIECE = 2**26
"""Bytes of a piece, unless a larger tensor needs a larger one."""
_ALIGNED = 64


class HostPieces:
    """Pieces of host memory, pinned or not. Each `Carving` gives out all of it anew."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self.pieces: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.numel() for piece in self.pieces)

    def add(self, size: int) -> None:
        """Add a piece that has room for so many bytes."""
        rounded = max(PIECE, 1 << (size - 1).bit_length())
        self.pieces.append(torch.empty(rounded, dtype=torch.uint8, pin_memory=self._pinned))


class Carving:
    """Tensors from pieces, each where there is room first: for equal shapes in equal order the same addresses."""

    def __init__(self, memory: HostPieces) -> None:
        self._memory = memory
        self._used = [0] * len(memory.pieces)

    def tensor(self, like: Tensor) -> Tensor:
        """A contiguous tensor of this shape and dtype, with a storage of its own: torch.save writes whole storages."""
        size = like.numel() * like.element_size()
        if size == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        piece, start = self._place(size)
        # A view would have the piece's storage.
        part = self._memory.pieces[piece].numpy()[start : start + size]
        return torch.frombuffer(part, dtype=like.dtype).view(like.shape)

    def _place(self, size: int) -> tuple[int, int]:
        """The piece with room for so many bytes, and where."""
        for piece, used in enumerate(self._used):
            if used + size <= self._memory.pieces[piece].numel():
                break
        else:
            self._memory.add(size)
            self._used.append(0)
            piece, used = len(self._used) - 1, 0
        self._used[piece] = used + -(-size // _ALIGNED) * _ALIGNED
        return piece, used
