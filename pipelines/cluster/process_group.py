"""PyTorch's process group among the workers of a lane, set up by Ray Train without importing PyTorch elsewhere.

Ray's TorchConfig does the same, but has the driver and every lane's controller import PyTorch: 1.6 s and 180 MiB each.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

_SHUTDOWN_SECONDS = 30
_TIMEOUT_SECONDS = 1800  # of a collective


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join all workers in a process group. Runs in the lane's controller."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        joined = [
            worker_group.execute_single_async(
                rank, _join, address, port, backend=backend_config.backend, world_rank=rank, world_size=size
            )
            for rank in range(size)
        ]
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the process group. Runs in the lane's controller."""
        left = worker_group.execute_async(_leave, several=len(worker_group) > 1)
        ray.wait(left, num_returns=len(left), timeout=_SHUTDOWN_SECONDS)


@dataclass
class ProcessGroupConfig(BackendConfig):
    """What workers talk through: `nccl` or `gloo`."""

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        """What sets the group up."""
        return _ProcessGroup

    def to_dict(self) -> dict[str, Any]:
        """The backend by name, for Ray's record of a run."""
        return {"backend": self.backend}


def _join(address: str, port: int, *, backend: str, world_rank: int, world_size: int) -> None:
    from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()  # type: ignore[no-untyped-call]
    config._setup_torch_process_group(backend, world_rank, world_size, "env://", _TIMEOUT_SECONDS)


def _leave(*, several: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(several)  # type: ignore[no-untyped-call]
