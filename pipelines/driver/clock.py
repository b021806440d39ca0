"""Where a run's time goes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Wall seconds by stage, and when each stage began (seconds since the epoch)."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time within as this stage's."""
        self.began[name] = time.time()
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    def startup(self, milestones: Mapping[str, float]) -> dict[str, float] | None:
        """Seconds from the start of this process to the first training step, by what they went into.

        `milestones` are the workers': when they were up ("loading"), had loaded ("training") and had made a step
        ("first_step"). None when nothing was trained.
        """
        import psutil

        if "first_step" not in milestones:
            return None
        created = psutil.Process().create_time()
        parts = {
            "imports": min(self.began.values()) - created,
            "check": self.seconds["check"],
            "ray": self.seconds["ray"],
            "class_images": self.seconds["class_images"],
            "worker_start": milestones["loading"] - self.began["train"],
            "loading": milestones["training"] - milestones["loading"],
            "first_step": milestones["first_step"] - milestones["training"],
            "total": milestones["first_step"] - created,
        }
        return {name: round(seconds, 2) for name, seconds in parts.items()}
