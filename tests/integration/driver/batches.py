"""Plans of batches, a view that shows nothing, and what batches leave."""

from collections.abc import Callable, Mapping, Sequence

from dreambooth.config.settings import DreamBoothConfig
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.batch import BatchOutcome
from pipelines.plan.batch_plan import BatchPlan
from pipelines.storage.files import join, read_json
from pipelines.storage.publications import published
from pipelines.tasks import Message, Progress, State

FOUR_CPUS = Resources(cpus=4, gpus=0)


class Silent:
    """Shows nothing; calls `watch` with the subjects in lanes, after keeping `class_images` (made, to make)."""

    def __init__(self, watch: Callable[[Mapping[str, Progress]], None] = lambda running: None) -> None:
        self.watch = watch
        self.class_images: tuple[int, int] | None = None
        self.lines: list[str] = []
        self.messages: list[tuple[str, Message]] = []

    def update(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        *,
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        self.class_images = class_images
        self.watch(running)

    def line(self, text: str) -> None:
        self.lines.append(text)

    def message(self, name: str, message: Message) -> None:
        self.messages.append((name, message))


def poison(config: DreamBoothConfig) -> DreamBoothConfig:
    """With noise that no configuration may ask for, so that the loss stops being a number."""
    return config.model_copy(update={"train": config.train.model_copy(update={"noise_offset": 1e30})})


def weights(plan: BatchPlan) -> dict[str, dict[str, str]]:
    """sha256 of every file of every subject's published model."""
    found = {}
    for subject in plan.subjects:
        manifest = published(join(subject.config.run_uri, "model"))
        assert manifest is not None, subject.config.subject.name
        found[subject.config.subject.name] = {name: record.sha256 for name, record in manifest.files.items()}
    return found


def history(plan: BatchPlan, name: str) -> list[tuple[float, float]]:
    [subject] = [subject for subject in plan.subjects if subject.config.subject.name == name]
    record = read_json(join(subject.config.run_uri, "training", f"{subject.key}.json"))
    return [(step["step"], step["loss"]) for step in record["history"]]


def states(outcome: BatchOutcome) -> dict[str, str]:
    return {row["subject"]: row["state"] for row in outcome.summary["results"]}
