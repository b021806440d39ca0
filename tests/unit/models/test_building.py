"""Models are loaded by several threads of a lane: one publishes and verifies, another one samples and measures."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from replicas import deepfloyd
from torch import nn

from dreambooth.models.families import family_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deepfloyd.build(tmp_path)
    return tmp_path


def test_text_encoders_loaded_by_several_threads_are_whole(base: Path) -> None:
    family = family_of(base)

    def names(module: nn.Module) -> int:
        return len({id(parameter) for parameter in module.parameters()})

    wanted = names(family.load(base, "text_encoder"))
    with ThreadPoolExecutor(4) as pool:
        loaded = [*pool.map(lambda _: names(family.load(base, "text_encoder")), range(24))]
        empty = [*pool.map(lambda _: names(family.empty(base, "text_encoder")), range(4))]
    assert {*loaded, *empty} == {wanted}
    assert not any(one.is_meta for one in family.load(base, "text_encoder").parameters())
