"""Wall time of a run by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipelines.tasks import Message


class Milestones:
    """Times when a lane first reached each milestone, in seconds since the epoch.

    `up`: its workers run; `loading`: they took the subject; `training`, `measuring`, `evaluating`: that phase began;
    `first_step`: the first step is done.
    """

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    def take(self, message: Message) -> None:
        """Update from a lane's message."""
        if message["kind"] == "step":
            self.times.setdefault("first_step", message["time"])
        elif message["kind"] == "phase":
            self.times.setdefault(message["phase"], message["time"])
            if "up" in message:
                self.times.setdefault("up", message["up"])


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Wall seconds by stage, and when each stage began (seconds since the epoch)."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time within this context for a stage."""
        self.begin(name)
        yield
        self.end(name)

    def begin(self, name: str) -> None:
        """Begin a stage now."""
        self.began[name] = time.time()

    def end(self, name: str) -> None:
        """End a stage now."""
        self.seconds[name] = round(time.time() - self.began[name], 2)

    def take_lane(self, milestones: Milestones, *, protocol: bool) -> None:
        """Record the stages of a lane that was started when "train" began and is done now."""
        began, done, times = self.began["train"], time.time(), milestones.times
        up = times.get("up", began)
        loading = times.get("loading", up)
        measuring = times.get("measuring", done)
        trained = times.get("evaluating", measuring)
        parts = {
            "class_images": loading - up,  # starting the workers is counted with the training
            "train": (up - began) + (trained - loading),
            "evaluate": measuring - trained,
        } | ({"protocol": done - measuring} if protocol else {})
        self.seconds.update({name: round(seconds, 2) for name, seconds in parts.items()})

    def startup(self, milestones: Milestones) -> dict[str, float] | None:
        """Seconds from the start of this process to the first training step, by part.

        None if nothing was trained.
        """
        import psutil

        times = milestones.times
        if not {"up", "loading", "training", "first_step"} <= times.keys():
            return None
        created = psutil.Process().create_time()
        parts = {
            "imports": min(self.began.values()) - created,
            "check": self.seconds["check"],
            "ray": self.seconds["ray"],
            "worker_start": times["up"] - self.began["train"],
            "class_images": times["loading"] - times["up"],
            "loading": times["training"] - times["loading"],
            "first_step": times["first_step"] - times["training"],
            "total": times["first_step"] - created,
        }
        return {name: round(seconds, 2) for name, seconds in parts.items()}
