"""The files of output/bench/: which command measures each, and what its figures are called on docs/benchmarks.md."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class File:
    """What the page says of a file.

    `names` are words for figures by their path in the file. Where there are `columns`, each mapping in the file is a
    row of a table with these figures, by their words, and `row` heads its first column.
    """

    title: str
    command: str
    names: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    row: str = ""


_STARTUP = {
    "startup_seconds, total": "from `dreambooth run` to the end of the first training step, s",
    "startup_seconds, imports": "of that, imports, s",
    "startup_seconds, check": "of that, checks, s",
    "startup_seconds, ray": "of that, Ray, s",
    "startup_seconds, class_images": "of that, class images, s",
    "startup_seconds, worker_start": "of that, starting workers, s",
    "startup_seconds, loading": "of that, loading, s",
    "startup_seconds, first_step": "of that, the step, s",
}


def _control_plane(name: str, size: str) -> dict[str, str]:
    return {
        f"{name}, plan_s": f"{size}: planned in, every image read and decoded, s",
        f"{name}, overhead_ms_per_subject": f"{size}: overhead per subject, ms",
        f"{name}, driver_mib": f"{size}: memory of the driver, MiB",
        f"{name}, imports_mib": f"{size}: of that, its imports, MiB",
        f"{name}, resume_s": f"{size}: a half-done batch taken up again in, s",
        f"{name}, resume_plan_s": f"{size}: of that, the plan, s",
    }


FILES = {
    "demo": File(
        title="The demo",
        command="`python tests/bench/demo.py`: what `make demo` runs, two workers, ZeRO-2, 100 class images, 400 steps",
        names={
            "wall_seconds": "from the command to its end, s",
            "class_image_seconds": "of that, class images, s",
            "training_seconds": "training with the start of its workers, s",
            "evaluation_seconds": "evaluation, s",
            "steps_per_second": "steps per second",
            "worker_peak_mib": "memory of each worker at its peak, MiB",
            "gain": "gain in similarity to the subject",
            **_STARTUP,
        },
    ),
    "main": File(
        title="What the pipeline costs over the bare work",
        command="`make bench`",
        names={
            "loop_efficiency": "steps per second of `fit`, over a bare loop of the same model, batch and optimizer",
            "bare_steps_per_second": "the bare loop, two threads, steps/s",
            "fit_steps_per_second": "`fit`, two threads, steps/s",
            "single_worker, torch": "one worker of one thread, PyTorch, steps/s",
            "single_worker, deepspeed": "one worker of one thread, DeepSpeed, steps/s",
            "prior_speedup": "class images of two actors, over plain diffusers in one process of two threads",
            "prior_images_per_second": "class images of two actors, images/s",
            "diffusers_images_per_second": "plain diffusers, images/s",
            **_STARTUP,
        },
    ),
    "subjects": File(
        title="Subjects",
        command="`python tests/bench/subjects.py`: mean cosine similarity of the miniature ViT's embeddings to the "
        "instance images",
        row="subject",
        columns={
            "instance": "instance images",
            "identifier": "with the identifier",
            "class_before": "class prompt before",
            "class_after": "class prompt after",
            "gain": "gain",
        },
    ),
    "batch": File(
        title="Batches",
        command="`make bench-batch`, with diffusers' script by `PEER=path`: eight subjects of two classes, 50 class "
        "images a class, 200 steps of one pair each",
        names={
            "batch_vs_sequential": "eight `dreambooth run` one after the other, over one batch of the eight",
            "batch_vs_peer": "diffusers' script for each, with class images of its own, over the batch",
            "batch_vs_peer_shared_class": "the same with one folder of class images per class, shared by hand",
            "batch_vs_peer_same_sampler": "diffusers' script, over a batch that samples class images as it does",
            "batch_vs_peer_shared_class_same_sampler": "the same with shared folders of class images",
            "lane_busy_share": "share of lane time in training steps",
            "batch_seconds": "the batch of eight, s",
            "batches_of_eight": "each of the batches of eight whose median that is, s",
            "batch_same_sampler_seconds": "the batch that samples class images as the script does, s",
            "sequential_seconds": "the eight runs, s",
            "sequential_runs": "runs that those seconds are reckoned from",
            "peer_seconds": "the script for the eight, s",
            "peer_shared_class_seconds": "the script with shared class images, s",
            "peer_runs": "runs of the script that both are reckoned from",
            **{f"seconds_per_subject, {n}": f"seconds per subject of a batch of {n}" for n in (1, 2, 4, 8, 16)},
            **_control_plane("control_plane", "control plane, 10,000 subjects over 256 lanes that sleep"),
            **_control_plane("control_plane_100k", "control plane, 100,000 subjects over 2,048 lanes that sleep"),
        },
    ),
    "serve": File(
        title="Serving",
        command="`python tests/bench/serve.py`: one replica, 60 requests of one picture (64 px, 12 steps) each",
        names={
            "first_s, rex": "the first request for the first subject, which loads the base model, s",
            "first_s, mug": "the first for a second one, s",
            "first_s, bag": "the first for a third one, s",
        },
        row="requests at once",
        columns={"requests_per_s": "requests/s", "p50_s": "half within, s", "p95_s": "95 of 100 within, s"},
    ),
    "faults": File(
        title="Faults",
        command="`python -m tests.bench.faults`: a batch of two subjects in one lane, a checkpoint every 4 steps "
        "([faults](faults.md))",
        row="fault",
        columns={
            "what": "what is done",
            "subjects_lost": "subjects lost",
            "attempts": "attempts",
            "seen_at_step": "seen at step",
            "resumed_from": "resumed from step",
            "steps_repeated": "steps repeated",
        },
    ),
    "near_copies": File(
        title="Near-copies",
        command="`python tests/bench/near_copies.py`: shares of drawn pictures counted as copies "
        "([figures](metrics.md))",
        row="pictures",
        columns={"clip_alone": "CLIP alone", "with_distances": "with distances", "pictures": "of so many"},
    ),
    "subject_patches": File(
        title="A subject told from others of its class",
        command="`python tests/bench/subject_patches.py`: 20 drawn subjects ([figures](metrics.md))",
        row="figure and pose",
        columns={"own": "subject", "other": "another of its class", "area": "area under the curve"},
    ),
    "gpu": File(title="A GPU", command="`make bench-gpu`: random weights of the published sizes"),
}
