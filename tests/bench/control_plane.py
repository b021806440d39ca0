"""What does it cost to look after many lanes? 10,000 subjects over 256 lanes that only sleep, on one machine.

    python tests/bench/control_plane.py
    python tests/bench/control_plane.py --subjects 100000 --lanes 2048 --seconds 4     # hours on two cores

Either is written to output/bench/batch.json, as `control_plane` or `control_plane_100k`; other sizes are only printed.

Real: reading and checking the subjects (every image of every subject is read and decoded), the plan, the queue's actor
and its records on disk, the driver's loop, the seals of class-image sets, Ray's calls between them, the batch's MLflow
run, its report and its summary. A driver is interrupted when half is done, and the same batch is given again.
Not there: Ray Train in the driver, which brings PyTorch; worker processes (a lane is a thread that asks the queue,
sleeps, reports and asks again; a class image is an empty file), training, publishing (so the disk passes for large
enough for models), and each subject's registration in MLflow (of a subject, its small summary.json is written
instead). No two subjects share a picture's bytes, so that nothing can be remembered from one to the next.

- plan_s: from the table of subjects to the plan, all checked.
- overhead_ms_per_subject: wall time of both halves, less the sleep that all lanes share, over the number of subjects.
- driver_mib: the driver's resident memory at its peak, everything imported; imports_mib: before the first subject.
- resume_s: from giving the half-done batch again to the first subject that starts, its plan and checks included, where
  no photograph has changed; resume_plan_s: of these, the plan.
"""

import argparse
import json
import resource
import tempfile
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from batch_figures import keep
from stamps import stamp

from dreambooth.miniature import subject_dir, subject_names
from dreambooth.quiet import quiet
from dreambooth.sampling.class_images import image_name
from pipelines.cluster.collector import collect_less_garbage
from pipelines.cluster.ray_cluster import Resources, ray_cluster
from pipelines.driver.lanes import report_seconds
from pipelines.plan.batch_plan import BatchPlan, make_batch_plan
from pipelines.plan.inspections import known_inspections, remember_inspections
from pipelines.plan.run_plan import Plan
from pipelines.plan.subject_checks import check_subjects, valid_plans
from pipelines.plan.subject_list import read_batch
from pipelines.queue.subject_record import read_records
from pipelines.stages.prior_stage import seal
from pipelines.storage.files import join, write_bytes, write_json
from pipelines.tasks import MakeClassImages, Message, Progress, State, TrainSubject

if TYPE_CHECKING:  # what checks in other processes imports this module, and should not have to import MLflow
    from pipelines.driver.batch import BatchOutcome

HOSTS = 4
NAME = "control-plane"
CONSONANTS = "bcdfghjklmnpqrstvwxz"
NAMES = {(10_000, 256): "control_plane", (100_000, 2048): "control_plane_100k"}
_END = -12
"""Where the last part of a PNG begins."""


class SleepingLanes:
    """Lanes that are threads of a few processes."""

    def __init__(self, plan: BatchPlan, driver: str, queue: Any, seconds: float) -> None:
        self.errors: list[str] = []
        self._plan, self._driver, self._queue, self._seconds = plan, driver, queue, seconds
        self._hosts: list[Any] = []

    def start(self) -> None:
        import ray

        names = [f"{self._driver}/{number}" for number in range(self._plan.lanes)]
        host, every = ray.remote(num_cpus=0)(host_lanes), report_seconds(self._plan.lanes)
        self._hosts = [host.remote(self._queue, names[i::HOSTS], self._seconds, every) for i in range(HOSTS)]

    def tend(self, settled: int) -> bool:
        import ray

        ended, self._hosts = ray.wait(self._hosts, num_returns=len(self._hosts), timeout=0) if self._hosts else ([], [])
        ray.get(ended)
        return bool(self._hosts)


def host_lanes(queue: Any, names: Sequence[str], seconds: float, report_every: float) -> None:
    threads = [threading.Thread(target=sleeping_lane, args=(queue, name, seconds, report_every)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def sleeping_lane(queue: Any, lane: str, seconds: float, report_every: float) -> None:
    import ray

    work = ray.get(queue.next.remote(lane, fresh=True))
    while work is not None:
        if isinstance(work, TrainSubject):
            train(queue, work.task.config.subject.name, seconds, report_every)
        elif isinstance(work, MakeClassImages):
            indices = {index for block in work.wanted for index in block}
            for index in indices:
                write_bytes(join(work.uri, image_name(index)), b"")
            if work.blocks:
                ray.get(queue.made.remote(lane, work.plan.key, indices))
            else:
                seal(work.parent_uri, work.plan)
                ray.get(queue.sealed.remote(lane, work.plan.key))
        else:
            time.sleep(work.seconds)
        work = ray.get(queue.next.remote(lane))


def train(queue: Any, name: str, seconds: float, report_every: float) -> None:
    import ray

    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        time.sleep(min(left, report_every))
        if ray.get(queue.progress.remote(name, Progress(step=1, steps=2, images_per_second=1.0, loss=0.1))):
            ray.get(queue.released.remote(name))
            return
    ray.get(queue.trained.remote(name))


class StopAt:
    """Shows nothing, and interrupts the driver when so many subjects are through their lanes."""

    def __init__(self, done: int) -> None:
        self.done = done

    def update(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        *,
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        if counts["trained"] + counts["done"] >= self.done:
            self.done = 1 << 60
            raise KeyboardInterrupt

    def line(self, text: str) -> None:
        pass

    def message(self, name: str, message: Message) -> None:
        pass


def write_table(folder: Path, count: int) -> str:
    """Subjects of the miniature's pictures; every other one brings an identifier, as there are not enough."""
    names = subject_names()
    pictures = {name: [path.read_bytes() for path in sorted(subject_dir(name).glob("*.png"))] for name in names}
    given = (f"{a}{b}{c}{d}" for a in CONSONANTS for b in CONSONANTS for c in CONSONANTS for d in CONSONANTS)
    rows = [
        {
            "name": f"subject-{number:05d}",
            "class_noun": names[number % len(names)].rsplit("-", 1)[-1],
            "identifier": next(given) if number % 2 else None,
            "instance_images": write_pictures(folder / "photos" / str(number), pictures[names[number % len(names)]]),
            "storage.root": str(folder / "output"),
            "tracking.uri": f"sqlite:///{folder}/mlflow.db",
            "tracking.register_model": False,
            "prior.num_class_images": 8,
        }
        for number in range(count)
    ]
    table = folder / "subjects.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(table)


def write_pictures(folder: Path, pictures: Sequence[bytes]) -> str:
    """Copies of PNGs with the folder's name as a comment."""
    comment = b"tEXtComment\0" + folder.name.encode()
    chunk = (len(comment) - 4).to_bytes(4, "big") + comment + zlib.crc32(comment).to_bytes(4, "big")
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        (folder / f"{number}.png").write_bytes(picture[:_END] + chunk + picture[_END:])
    return str(folder)


def planned(table: str, lanes: int) -> BatchPlan:
    from pipelines.driver.personalize import check_batch_destinations

    room, root = Resources(cpus=lanes, gpus=0), str(Path(table).parent / "output")
    checks = check_subjects(read_batch(table), room, known_inspections(root, NAME))
    plan = make_batch_plan(NAME, valid_plans(checks, skip_invalid=False), room)
    check_batch_destinations(plan)
    remember_inspections(root, NAME, {check.name: check.found for check in checks})
    return plan


def write_small_summary(plan: Plan, batch_run_id: str, batch_uri: str) -> str:
    subject, uri = plan.config.subject, plan.config.run_uri
    summary = {
        "subject": subject.name,
        "class_noun": subject.class_noun,
        "identifier": subject.identifier,
        "key": plan.key,
        "registered_model": None,
        "version": None,
        "model_uri": "",
        "report": join(uri, "report.html"),
        "contact_sheet": None,
        "similarity": None,
        "steps": 1,
        "resumed_from": 0,
        "steps_per_second": 1.0,
    }
    write_json(join(uri, "summary.json"), summary)
    write_json(join(uri, "training", f"{plan.key}.json"), {"history": []})
    return "done"


def half(plan: BatchPlan, seconds: float, stop_at: int) -> "BatchOutcome":
    from pipelines.driver.batch import run_batch

    return run_batch(
        plan,
        StopAt(stop_at),
        None,
        make_lanes=lambda plan, driver, queue, encoder: SleepingLanes(plan, driver, queue, seconds),
        conclude=write_small_summary,
    )


def measure(count: int, lanes: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        plan = planned(write_table(Path(name), 1), lanes)  # so that no figure holds the import of a library
        imports = peak_mib()
        table = write_table(Path(name), count)
        with ray_cluster(plan.cluster):
            began = time.perf_counter()
            plan = planned(table, lanes)
            planned_at = time.perf_counter()
            first = half(plan, seconds, count // 2)
            stopped_at, stopped = time.perf_counter(), time.time()
            plan = planned(table, lanes)
            again_at = time.perf_counter()
            second = half(plan, seconds, count + 1)
            ended_at = time.perf_counter()
        assert first.interrupted
        assert first.summary["subjects"]["done"] < count
        assert second.summary["subjects"]["done"] == count
        records = read_records(join(second.uri, "subjects")).values()
        assert sum(record.attempts for record in records) < count + 2 * lanes
        resumed = min(record.began for record in records if record.began and record.began > stopped)
    running = (stopped_at - planned_at) + (ended_at - again_at)
    return {
        "plan_s": round(planned_at - began, 1),
        "overhead_ms_per_subject": round(1000 * (running - count * seconds / lanes) / count, 1),
        "driver_mib": peak_mib(),
        "imports_mib": imports,
        "resume_s": round(resumed - stopped, 1),
        "resume_plan_s": round(again_at - stopped_at, 1),
    }


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=10_000)
    parser.add_argument("--lanes", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=1.0, help="that the training of a subject sleeps")
    options = parser.parse_args()
    quiet()
    collect_less_garbage()
    name = NAMES.get((options.subjects, options.lanes))
    at = stamp() if name is not None else {}
    with patch("shutil.disk_usage", return_value=SimpleNamespace(free=1 << 60)):
        measured = measure(options.subjects, options.lanes, options.seconds)
    if name is not None:
        keep(name, measured, at)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
