"""A lane: warm workers that take work from the queue until there is no more.

Base models are loaded once and copied in memory for every subject, so a subject's result doesn't depend on the one
before; class images are encoded once for the subjects that share them. Samples are made here too, with the weights in
memory; publishing overlaps with the next subject's training.
"""

import logging
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from dreambooth.errors import Diverged
from dreambooth.models.cascade import SUPER_RESOLUTION
from pipelines.cluster.collectives import from_all_ranks, from_rank_zero
from pipelines.cluster.collector import collect_less_garbage
from pipelines.cluster.logs import about, log, to_stderr
from pipelines.cluster.metrics import observed, record
from pipelines.cluster.preemption import exit_if_terminated, terminated, while_working
from pipelines.stages.evaluate_stage import evaluate
from pipelines.stages.evaluation_task import tasks_of_subject
from pipelines.stages.photographs import read_photographs
from pipelines.stages.prior_stage import seal
from pipelines.stages.published_model import find_model
from pipelines.storage.faults import StorageFull, StoreAway, no_room
from pipelines.storage.files import join, remove
from pipelines.storage.publications import Manifest
from pipelines.tasks import (
    LaneTask,
    MakeClassImages,
    Message,
    Source,
    TrainSubject,
    TrainTask,
    Wait,
    Work,
)
from pipelines.worker.hooks import Stopped, Terminated
from pipelines.worker.lane_reports import QueueCaller, Reports
from pipelines.worker.publish import TrainedStage, publish_result, published_weights
from pipelines.worker.shared_samplers import SharedSamplers
from pipelines.worker.stage_training import StageTraining

_PUBLISHING_AT_ONCE = 2
_LOOK_SECONDS = 0.1
"""Seconds between checks for the last publications, without further work."""


def lane_worker(loop_config: dict[str, Any]) -> None:
    """Do the queue's work until there is no more."""
    collect_less_garbage()
    import ray.train
    import ray.train.torch
    import torch

    from dreambooth.quiet import quiet

    quiet()
    to_stderr()
    task: LaneTask = loop_config["task"]
    device = str(ray.train.torch.get_device())
    if device == "cpu":
        torch.set_num_threads(task.num_threads)
    else:
        torch.cuda.set_device(device)
    context = ray.train.get_context()
    _Lane(task, device, context.get_world_rank(), context.get_world_size()).run()


class _Lane:
    def __init__(self, task: LaneTask, device: str, rank: int, world_size: int) -> None:
        self._task, self._device, self.rank, self.world_size = task, device, rank, world_size
        self._queue = QueueCaller(task.queue)
        self._nodes = frozenset(from_all_ranks(self, _node_id()))
        self._stages = StageTraining(device, rank), StageTraining(device, rank, scales_up=True)
        self._samplers = SharedSamplers(
            rank, world_size, use_gpu=device != "cpu", num_threads=task.num_threads, graph=task.graph
        )
        self._gpu_bytes = 0
        self._up = time.time()
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publication: Future[None]
        self._publishing: dict[str, Future[None]] = {}
        # Without the driver's part of the name, which would start new curves every time.
        self._number = task.lane.rpartition("/")[2]

    def run(self) -> None:
        tell = partial(self._queue.start, "terminated", self._task.lane)
        with about(lane=self._number), while_working(tell):
            work = self._next(fresh=True)
            while work is not None:
                began = time.perf_counter()
                try:
                    self._do(work)
                except StoreAway as error:
                    self._queue.call("halt", str(error))
                    raise
                spent = "idle" if isinstance(work, Wait) else "busy"
                if self.rank == 0:
                    seconds = time.perf_counter() - began
                    record(f"dreambooth_lane_{spent}_seconds_total", seconds, lane=self._number)
                if any(from_all_ranks(self, terminated())):
                    self._leave()
                    raise Terminated("terminated between two subjects")
                work = self._next()
            self._publisher.shutdown(wait=True)

    def _do(self, work: Work) -> None:
        if isinstance(work, TrainSubject):
            with about(subject=work.task.config.subject.name):
                self._subject(work.task)
        elif isinstance(work, MakeClassImages):
            self._class_images(work)
        else:
            time.sleep(work.seconds)

    def _next(self, *, fresh: bool = False) -> Work | None:
        """The next work, asked for by rank 0, on all ranks."""
        work: Work | None = None
        if self.rank == 0:
            self._forget_published()
            while len(self._publishing) >= _PUBLISHING_AT_ONCE:
                next(iter(self._publishing.values())).result()
                self._forget_published()
            work = self._queue.call(
                "next",
                self._task.lane,
                count=self.world_size,
                holding=tuple(self._publishing),
                fresh=fresh,
                nodes=self._nodes,
            )
            if work is None and self._publishing:
                work = Wait(seconds=_LOOK_SECONDS)
        if self.world_size == 1:
            return work
        import ray.train.collective

        # Ray's has no timeout, unlike torch's: rank 0 may wait long for an upload or work.
        same: Work | None = ray.train.collective.broadcast_from_rank_zero(work)
        return same

    def _forget_published(self) -> None:
        self._publishing = {name: done for name, done in self._publishing.items() if not done.done()}

    def _class_images(self, work: MakeClassImages) -> None:
        """Make this rank's blocks, if any; rank 0 seals a complete set."""
        self._free_captured()
        name, key = self._task.lane, work.plan.key
        mine = slice(self.rank, None, self.world_size)
        if work.blocks[mine]:
            self._samplers.sampler.class_images(
                work.source,
                work.plan,
                work.blocks[mine],
                work.wanted[mine],
                work.uri,
                lambda indices: bool(self._queue.call("made", name, key, indices)) or terminated(),
            )
        from_all_ranks(self, None)  # all ranks have written
        if not work.blocks and self.rank == 0:
            seal(work.parent_uri, work.plan)
            self._queue.call("sealed", name, key)

    def _subject(self, task: TrainTask) -> None:
        name = task.config.subject.name
        reports = Reports(self._queue, task, self._task.report_seconds) if self.rank == 0 else None
        try:
            self._report(reports, {}, {"kind": "phase", "phase": "loading", "up": self._up})
            manifest = from_rank_zero(self, find_model(task.config, task.key) if self.rank == 0 else None)
            trained = () if manifest is not None else self._train(task, reports)
            self._evaluate_and_conclude(task, manifest, trained, reports)
        except Stopped:
            if self.rank == 0:
                log("stopped")
                self._queue.call("released", name)
        except Terminated:
            self._leave()
            raise
        except (Diverged, StorageFull) as error:  # on every rank alike
            if self.rank == 0:
                self._failed(name, error)
        except Exception as error:
            if self.world_size == 1:
                self._failed(name, error)
                return
            # Other ranks are lost, or wait in a collective, now or soon: only new workers surely agree.
            if isinstance(error, StoreAway) or no_room(error) is not None:
                if self.rank == 0:
                    self._failed(name, error)
            else:
                self._queue.call("broke_off", self._task.lane, name, _reason(error), traceback.format_exc())
            raise

    def _leave(self) -> None:
        """Publish what is trained, give back other work, and exit if this rank got SIGTERM."""
        if self.rank == 0:
            log("terminated")
            self._publisher.shutdown(wait=True)
            self._queue.call("left", self._task.lane)
        from_all_ranks(self, None)  # the first to exit takes the others with it
        exit_if_terminated()

    def _train(self, task: TrainTask, reports: Reports | None) -> tuple[TrainedStage, ...]:
        """Train, stage by stage, and publish in the background."""
        self._gpu_bytes = task.gpu_bytes * self._task.lanes_per_gpu
        self._samplers.sampler.make_room(self._gpu_bytes)
        trainings = [*zip(self._stages, task.stages, (None, SUPER_RESOLUTION), strict=False)]
        for stage, one, _ in trainings:
            stage.base(one)  # a wrong one of the second stage shouldn't be found when the first is trained
        trained: list[TrainedStage] = []
        for stage, one, name in trainings:
            self._free_captured(but=stage)
            report = partial(self._report, reports, {} if name is None else {"stage": name})
            trained.append(
                stage.train(
                    one,
                    observed(report, lane=self._number) if reports is not None else report,
                    reports.stopping if reports is not None else lambda: False,
                    trained[0] if trained else None,
                )
            )
        if self.rank == 0:
            self._publication = self._publisher.submit(self._publish, task, trained)
        return tuple(trained)

    def _free_captured(self, but: StageTraining | None = None) -> None:
        """Free captured steps of training, where a GPU has no room for other work beside them."""
        for stage in self._stages:
            if stage is not but:
                stage.make_room(self._gpu_bytes)

    def _report(self, reports: Reports | None, of: Message, message: Message) -> None:
        if reports is not None:
            reports.report(message | of)

    def _evaluate_and_conclude(
        self, task: TrainTask, manifest: Manifest | None, trained: Sequence[TrainedStage], reports: Reports | None
    ) -> None:
        """Sample and measure on all ranks; conclude the subject during the next one's training."""
        try:
            self._evaluate(task, manifest, trained, reports)
        except (Stopped, Terminated):
            if self.rank == 0 and trained:
                self._publication.result()  # else it would be trained again
            raise
        if self.rank == 0:
            publication = self._publication if trained else None
            done = self._publisher.submit(self._conclude, task, publication)
            self._publishing[task.config.subject.name] = done

    def _evaluate(
        self, task: TrainTask, manifest: Manifest | None, trained: Sequence[TrainedStage], reports: Reports | None
    ) -> None:
        """Sample and measure; pictures and figures are written at once.

        Raises Stopped or Terminated, on every rank, when asked to stop or if a rank got SIGTERM.
        """
        if not (evaluations := tasks_of_subject(task, self._task.encoder)):
            return
        base, fine_tuned = task.base, self._fine_tuned(task, manifest, trained)

        def measure() -> None:
            assert reports is not None
            photographs = read_photographs(task.config, task.images, task.config.picture_side)
            for one in evaluations:
                reports.report({"kind": "phase", "phase": "evaluating" if one.for_the_eye else "measuring"})
                evaluate(
                    one,
                    self._samplers,
                    base=base,
                    fine_tuned=fine_tuned,
                    photographs=photographs if one.images == task.images else None,
                    on_progress=reports.report_pictures,
                )

        self._free_captured()
        ended: Stopped | Terminated | None = None
        try:
            self._samplers.sharing(measure)
        except (Stopped, Terminated) as error:
            ended = error
        if (ended := from_rank_zero(self, ended)) is not None:
            raise ended

    def _fine_tuned(self, task: TrainTask, manifest: Manifest | None, trained: Sequence[TrainedStage]) -> Source:
        """The fine-tuned pipeline: weights in memory, or else the publication."""
        if not trained:
            assert manifest is not None
            return Source(address=manifest.uri, published=True)
        fine_tuned = Source(address=f"trained:{task.key}")
        self._samplers.give_weights(fine_tuned, task.tuned_base, published_weights(trained))
        return fine_tuned

    def _publish(self, task: TrainTask, trained: Sequence[TrainedStage]) -> None:
        """Publish and verify in a thread, during the subject's evaluation."""
        with about(lane=self._number, subject=task.config.subject.name):
            publish_result(trained)

    def _conclude(self, task: TrainTask, publication: Future[None] | None) -> None:
        """Report a published subject to the queue, in the background."""
        name, config = task.config.subject.name, task.config
        with about(lane=self._number, subject=name):
            try:
                if publication is not None:
                    publication.result()
                for stage in task.stages:
                    remove(join(config.run_uri, "checkpoints", stage.key))
                self._queue.call("trained", name)
            except Exception as error:  # noqa: BLE001 - any fault of a store or a disk fails this subject
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        """Report a failure, and whether to retry."""
        log("failed", level=logging.ERROR, reason=_reason(error))
        if isinstance(error, StoreAway):  # no subject's fault
            self._queue.call("halt", str(error))
            return
        final = isinstance(error, Diverged) or no_room(error) is not None
        self._queue.call("failed", name, _reason(error), traceback.format_exc(), final=final)


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _reason(error: Exception) -> str:
    if isinstance(error, Diverged | StorageFull):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
