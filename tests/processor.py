"""A processor that multiplies bf16 itself or doesn't, whichever a test is about."""

import pytest
import torch


def multiplies_bf16(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    """Have samplers, plans and the served model believe it of this processor."""
    monkeypatch.setattr("dreambooth.sampling.best_dtype.multiplies_bf16", lambda: answer)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: answer)
