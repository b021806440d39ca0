"""Start and restart lanes: each is a Ray Train run of warm workers, in a thread of the driver."""

import secrets
import threading
from dataclasses import dataclass
from typing import Any

from pipelines.cluster.nodes import nodes_there
from pipelines.cluster.preemption import answering_workers
from pipelines.cluster.ray_cluster import WORKER_ENVIRONMENT, worker_group
from pipelines.cluster.trainer import lane_trainer
from pipelines.plan.batch_plan import BatchPlan
from pipelines.storage.files import join, pyarrow_filesystem
from pipelines.tasks import BankAddress, LaneTask
from pipelines.worker.lane_worker import lane_worker

_REPORT_SECONDS = 0.5
_REPORTS_PER_SECOND = 50


def report_seconds(lanes: int) -> float:
    """Seconds between a lane's progress reports: the queue takes fifty per second from all lanes together."""
    return max(_REPORT_SECONDS, lanes / _REPORTS_PER_SECOND)


@dataclass(kw_only=True)
class _Running:
    thread: threading.Thread
    settled: int
    error: str | None = None


class Lanes:
    """Starts lanes, and restarts failed ones as long as subjects finish in between."""

    def __init__(self, plan: BatchPlan, driver: str, queue: Any, encoder: BankAddress | None) -> None:
        self._plan, self._driver, self._queue, self._encoder = plan, driver, queue, encoder
        self._lanes: dict[str, _Running] = {}
        self._numbers = 0
        self.errors: list[str] = []

    def start(self) -> None:
        """Start the planned number of lanes."""
        lane_trainer(local=True)  # imports Ray Train once: not by the threads of all lanes at a time
        for _ in range(self._plan.lanes):
            self._start(settled=-1)

    def tend(self, settled: int) -> bool:
        """Handle ended lanes; `settled` counts finished subjects. False if no lane is left."""
        import ray

        for name, lane in list(self._lanes.items()):
            if lane.thread.is_alive():
                continue
            del self._lanes[name]
            if lane.error is None:
                continue
            self.errors.append(lane.error)
            settled += ray.get(self._queue.lane_ended.remote(name, nodes_there()))
            if settled > lane.settled:
                self._start(settled=settled)
        return bool(self._lanes)

    def _start(self, *, settled: int) -> None:
        name, self._numbers = f"{self._driver}/{self._numbers}", self._numbers + 1
        # A lane waiting for a node that never returns must not keep the driver alive.
        thread = threading.Thread(target=self._run, args=(name,), name=name, daemon=True)
        self._lanes[name] = _Running(thread=thread, settled=settled)
        thread.start()

    def _run(self, name: str) -> None:
        try:
            self._fit(name)
        except BaseException as error:  # noqa: BLE001 - `tend` reports whatever ends a lane
            self._lanes[name].error = str(error).strip() or type(error).__name__

    def _fit(self, name: str) -> None:
        import ray.train

        from pipelines.cluster.process_group import ProcessGroupConfig

        cluster = self._plan.cluster
        storage_filesystem, storage_path = pyarrow_filesystem(join(self._plan.uri, "lanes"))
        trainer = lane_trainer(local=cluster.address is None)(
            lane_worker,
            train_loop_config={
                "task": LaneTask(
                    lane=name,
                    queue=self._queue,
                    num_threads=cluster.cpus_per_worker,
                    encoder=self._encoder,
                    report_seconds=report_seconds(self._plan.lanes),
                    graph=cluster.graph_sampling,
                    lanes_per_gpu=self._plan.lanes_per_gpu,
                )
            },
            backend_config=ProcessGroupConfig(backend="nccl" if self._plan.use_gpu else "gloo"),
            scaling_config=worker_group(cluster, use_gpu=self._plan.use_gpu, lanes_per_gpu=self._plan.lanes_per_gpu),
            # mypy sees the RunConfig of Ray Train V1, the interpreter V2's.
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]
                # Ray would resume a run under a known name.
                name=f"{name.replace('/', '-')}-{secrets.token_hex(4)}",
                storage_path=storage_path,
                storage_filesystem=storage_filesystem,
                failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
                worker_runtime_env=WORKER_ENVIRONMENT,
                callbacks=[answering_workers()],
            ),
        )
        trainer.fit()
