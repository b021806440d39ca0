"""Two lanes' worker groups at once on a Ray that counts one GPU: what test_shared_gpus.py starts. Prints their GPUs."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig

from dreambooth.config.settings import ClusterConfig
from pipelines.cluster.process_group import ProcessGroupConfig
from pipelines.cluster.ray_cluster import worker_group
from pipelines.cluster.trainer import lane_trainer

LANES, PATIENCE_SECONDS = 2, 120


class Meeting:
    """Lanes that have arrived, with the GPUs that Ray gave their worker."""

    def __init__(self) -> None:
        self.arrived: dict[str, list[str]] = {}

    def arrive(self, lane: str, gpus: list[str]) -> None:
        self.arrived[lane] = gpus

    def all(self) -> dict[str, list[str]]:
        return self.arrived


def wait_for_the_others(settings: dict[str, Any]) -> None:
    meeting, deadline = settings["meeting"], time.monotonic() + PATIENCE_SECONDS
    ray.get(meeting.arrive.remote(settings["lane"], [str(gpu) for gpu in ray.get_gpu_ids()]))
    while len(ray.get(meeting.all.remote())) < LANES:
        assert time.monotonic() < deadline, "the other lane never came"
        time.sleep(0.1)


def main() -> None:
    ray.init(address="local", num_cpus=LANES, num_gpus=1, include_dashboard=False, log_to_driver=False)
    meeting = ray.remote(num_cpus=0)(Meeting).remote()
    group = worker_group(ClusterConfig(), use_gpu=True, lanes_per_gpu=LANES)

    def run(lane: str) -> None:
        lane_trainer(local=True)(
            wait_for_the_others,
            train_loop_config={"meeting": meeting, "lane": lane},
            scaling_config=group,
            backend_config=ProcessGroupConfig(backend="gloo"),  # there is no CUDA behind this GPU
            run_config=RunConfig(name=f"lane-{lane}", storage_path=str(Path.cwd())),
        ).fit()

    threads = [threading.Thread(target=run, args=(str(number),)) for number in range(LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(ray.get(meeting.all.remote())))
    ray.shutdown()


if __name__ == "__main__":
    main()
