"""What the tests on a CUDA device share."""

import os
import socket
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_rank() -> Iterator[None]:
    """A process group of one, which DeepSpeed wants, is set up by what these say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in fp32 as on a CPU: by default a GPU rounds their factors to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
