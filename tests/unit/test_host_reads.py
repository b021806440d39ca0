"""The test double that tells what a device would wait for sees it on a CPU."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from host_reads import HostReads
from torch import Tensor


@pytest.mark.parametrize(
    ("waits", "seen"),
    [
        (lambda x: x.new_tensor(5.0), ["new_tensor"]),
        (lambda x: torch.tensor(5.0), ["tensor"]),
        (lambda x: torch.as_tensor([1, 2]), ["as_tensor"]),
        (lambda x: torch.from_numpy(np.ones(2)), ["from_numpy"]),
        (lambda x: x[x > 0], ["index"]),
        (lambda x: x.masked_select(x > 0), ["masked_select"]),
        (lambda x: x.nonzero(), ["nonzero"]),
        (lambda x: x.sum().item(), ["_local_scalar_dense"]),
        (lambda x: x.tolist(), ["tolist"]),
        (lambda x: x.numpy(), ["numpy"]),
        (lambda x: x.to("meta"), ["_to_copy"]),
        (lambda x: torch.full_like(x, 5.0)[torch.zeros_like(x, dtype=torch.long)] + torch.zeros(3), []),
    ],
)
def test_what_waits_is_seen(waits: Callable[[Tensor], object], seen: list[str]) -> None:
    with HostReads() as reads:
        waits(torch.arange(3.0))
    assert reads.seen == seen


def test_bools_that_are_written_by_are_seen() -> None:
    values = torch.arange(3.0)
    with HostReads() as reads:
        values[values > 0] = torch.ones(2)
    assert reads.seen == ["index_put_"]
