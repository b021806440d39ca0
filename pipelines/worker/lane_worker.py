"""A lane: warm workers that take work from the queue until there is no more.

The base model is loaded once and copied in memory for every subject, so that a subject's result does not depend on
which went before it; class images are encoded once for the subjects that share them. Samples are made here too, by
weights that are here anyway; publishing goes on behind the next subject's training.
"""

import dataclasses
import logging
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.models.base_model import BaseModel, resolve_base_model
from pipelines.cluster.collectives import from_all_ranks
from pipelines.cluster.collector import collect_less_garbage
from pipelines.cluster.events import Message
from pipelines.cluster.logs import about, log, to_stderr
from pipelines.cluster.metrics import observed, record
from pipelines.cluster.preemption import notice
from pipelines.stages.evaluate_stage import Evaluation, evaluate
from pipelines.stages.evaluation_store import store_evaluation
from pipelines.stages.protocol_stage import run_protocol
from pipelines.stages.published_model import find_model
from pipelines.storage.publications import join
from pipelines.tasks import (
    LaneTask,
    MakeClassImages,
    Progress,
    Source,
    TrainSubject,
    TrainTask,
    Wait,
    Work,
    base_source,
)
from pipelines.worker.checkpoints import StoredCheckpoints
from pipelines.worker.fine_tune import FineTuned, Stopped, autocast, fine_tune, publish_result
from pipelines.worker.sampler_pool import SamplersHere
from pipelines.worker.train_data import ClassLatents

_PUBLISHING_AT_ONCE = 2
_LOOK_SECONDS = 0.1
"""Between looks whether the last models are published, when there is no more work."""


def lane_worker(loop_config: dict[str, Any]) -> None:
    """Work until the queue has no more."""
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
        self._queue = _Caller(task.queue)
        self._nodes = frozenset(from_all_ranks(self, _node_id()))
        self._bases = _Bases()
        self._class_latents = ClassLatents()
        self._samplers = SamplersHere(use_gpu=device != "cpu", num_threads=task.num_threads)
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishing: dict[str, Future[None]] = {}
        # The driver's part of a lane's name is another one each time, which would make ever new curves.
        self._number = task.lane.rpartition("/")[2]

    def run(self) -> None:
        with about(lane=self._number):
            work = self._next(fresh=True)
            while work is not None:
                began = time.perf_counter()
                self._do(work)
                spent = "idle" if isinstance(work, Wait) else "busy"
                if self.rank == 0:
                    seconds = time.perf_counter() - began
                    record(f"dreambooth_lane_{spent}_seconds_total", seconds, lane=self._number)
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
        """Rank 0 asks, and all ranks get the same work."""
        work: Work | None = None
        if self.rank == 0:
            self._publishing = {name: done for name, done in self._publishing.items() if not done.done()}
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

        same: Work | None = ray.train.collective.broadcast_from_rank_zero(work)
        return same

    def _class_images(self, work: MakeClassImages) -> None:
        if self.rank < len(work.blocks):
            block, wanted = work.blocks[self.rank], work.wanted[self.rank]
            self._samplers.sampler.class_images(work.source, work.plan, block, wanted, work.uri)
        if self.world_size > 1:
            import ray.train.collective

            ray.train.collective.barrier()
        if self.rank == 0:
            indices = {index for part in work.wanted for index in part}
            self._queue.call("made", self._task.lane, work.plan.key, indices)

    def _subject(self, task: TrainTask) -> None:
        name = task.config.subject.name
        try:
            base = self._bases.get(task)
            if find_model(task.config, task.key) is None:
                self._train(task, base)
            elif self.rank == 0:
                self._conclude(task, None, None, self._evaluate(task, None, self._teller(task)))
        except Stopped:
            if self.rank == 0:
                log("stopped")
                self._queue.call("released", name)
        except Exception as error:
            if self.rank == 0:
                log("failed", level=logging.ERROR, reason=_reason(error))
                self._queue.call("failed", name, _reason(error), traceback.format_exc())
            if self.world_size > 1:
                # The other ranks wait in a collective, or will: only new workers are sure to agree.
                raise

    def _train(self, task: TrainTask, base: BaseModel) -> None:
        from dreambooth.training.model import build_model

        model = build_model(self._bases.components.copied(), task.config, autocast=autocast(task.config, self._device))
        checkpoints = StoredCheckpoints(join(task.config.run_uri, "checkpoints", task.key))
        teller = self._teller(task) if self.rank == 0 else None
        tuned = fine_tune(
            task,
            base,
            model,
            self._device,
            checkpoints,
            observed(teller.tell, lane=self._number) if teller else lambda message: None,
            teller.stopping if teller else lambda: False,
            notice(),
            self._class_latents,
        )
        if teller is not None:
            while len(self._publishing) >= _PUBLISHING_AT_ONCE:
                next(iter(self._publishing.values())).result()
                self._publishing = {name: done for name, done in self._publishing.items() if not done.done()}
            try:
                evaluation = self._evaluate(task, tuned, teller)
            except Stopped:
                publish_result(base, tuned, task)  # or it would have to be trained again
                raise
            done = self._publisher.submit(self._conclude, task, base, tuned, evaluation)
            self._publishing[task.config.subject.name] = done

    def _teller(self, task: TrainTask) -> "_Teller":
        return _Teller(self._queue, task.config, self._task.tell_seconds)

    def _evaluate(self, task: TrainTask, tuned: FineTuned | None, teller: "_Teller") -> Evaluation | None:
        """Sample and measure; the figures are written at once, the samples with the model.

        Raises Stopped when told to stop.
        """
        config = task.config
        if task.protocol is None and not config.evaluation.enabled:
            return None
        base, fine_tuned = self._sources(task, tuned)
        if task.protocol is not None:
            run_protocol(
                task.protocol, self._samplers, base=base, fine_tuned=fine_tuned, on_progress=teller.tell_pictures
            )
        if not config.evaluation.enabled:
            return None
        return evaluate(
            config,
            task.images,
            self._samplers,
            base=base,
            fine_tuned=fine_tuned,
            encoder=self._task.encoder,
            dtype=task.sampling_dtype,
            on_progress=teller.tell_pictures,
        )

    def _sources(self, task: TrainTask, tuned: FineTuned | None) -> tuple[Source, Source]:
        """The base model's pipeline and the fine-tuned one's: the weights in memory, as they will be published."""
        import torch

        config = task.config
        base = base_source(config, task.base_hash)
        if tuned is None:
            manifest = find_model(config, task.key)
            assert manifest is not None
            return base, Source(address=manifest.uri, published=True)
        fine_tuned, dtype = Source(address=f"trained:{task.key}"), getattr(torch, config.storage.dtype)
        state = {name: weight.to(dtype) for name, weight in tuned.state.items()}
        self._samplers.sampler.give_weights(fine_tuned, base, state)
        return base, fine_tuned

    def _conclude(
        self, task: TrainTask, base: BaseModel | None, tuned: FineTuned | None, evaluation: Evaluation | None
    ) -> None:
        """Publish and verify, store the samples, and tell: all that the next subject need not wait for."""
        with about(lane=self._number, subject=task.config.subject.name):  # in a thread of its own
            self._conclude_here(task, base, tuned, evaluation)

    def _conclude_here(
        self, task: TrainTask, base: BaseModel | None, tuned: FineTuned | None, evaluation: Evaluation | None
    ) -> None:
        name, config = task.config.subject.name, task.config
        try:
            if base is not None and tuned is not None:
                publish_result(base, tuned, task)
            if evaluation is not None:
                store_evaluation(evaluation, config.run_uri, task.key)
            StoredCheckpoints(join(config.run_uri, "checkpoints", task.key)).remove()
            self._queue.call("trained", name)
        except Exception as error:  # noqa: BLE001 - whatever a store or a disk raises is this subject's failure
            log("failed", level=logging.ERROR, reason=_reason(error))
            self._queue.call("failed", name, _reason(error), traceback.format_exc())


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


class _Caller:
    """Calls to the queue's actor, which is made again when its node dies."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        import ray

        return ray.get(getattr(self._actor, method).remote(*arguments, **keywords))

    def start(self, method: str, *arguments: Any) -> Any:
        return getattr(self._actor, method).remote(*arguments)


class _Teller:
    """Tells the queue now and then how far a subject is, and learns whether to stop, without waiting for it."""

    def __init__(self, queue: _Caller, config: DreamBoothConfig, every_seconds: float) -> None:
        steps = config.train.max_train_steps
        self._queue, self._name, self._every_seconds = queue, config.subject.name, every_seconds
        self._progress = Progress(step=steps, steps=steps, images_per_second=0.0, loss=0.0)
        self._told = 0.0
        self._answer: Any = None
        self._stop = False

    def tell(self, message: Message) -> None:
        """Of the training."""
        if message["kind"] != "step":
            return
        metrics = message["metrics"]
        self._tell(step=int(metrics["step"]), images_per_second=metrics["images_per_second"], loss=metrics["loss"])

    def tell_pictures(self, made: int, total: int) -> None:
        """Of the evaluation. Raises Stopped when told to stop."""
        self._tell(pictures=(made, total))
        if made < total and self.stopping():
            raise Stopped(f"stopped at picture {made} of the evaluation")

    def _tell(self, **changes: Any) -> None:
        if time.monotonic() - self._told < self._every_seconds:
            return
        self.stopping()  # the last answer, before another takes its place: steps may be slower than reports
        self._told = time.monotonic()
        self._progress = dataclasses.replace(self._progress, **changes)
        self._answer = self._queue.start("progress", self._name, self._progress)

    def stopping(self) -> bool:
        """Whether to stop, as far as the queue has answered."""
        import ray

        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._answer))
            self._answer = None
        return self._stop


class _Bases:
    """The base model that was used last, its weights kept in memory as they were loaded."""

    def __init__(self) -> None:
        self._base: BaseModel | None = None
        self.components: Any = None

    def get(self, task: TrainTask) -> BaseModel:
        from dreambooth.training.model import load_components

        config = task.config
        known = self._base
        if known is None or (known.address, known.revision) != (config.base_model, config.revision):
            self.components = None
            known = self._base = resolve_base_model(config.base_model, config.revision)
            self.components = load_components(known.directory)
        if known.hash != task.base_hash:
            raise RuntimeError(
                f"the base model here has hash {known.hash}, the driver's {task.base_hash}; use one copy"
            )
        return known


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
