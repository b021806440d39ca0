"""The class-image sets of a batch: lanes' work on them, and subjects waiting for each."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dreambooth.sampling.class_images import PriorPlan
from pipelines.stages.prior_stage import images_present, is_whole
from pipelines.tasks import MakeClassImages, Source

_MOST_BLOCKS = 8
"""Blocks handed to a worker at once: between two hand-outs it has nothing to sample while it writes."""


@dataclass(frozen=True, kw_only=True)
class WantedSet:
    """A subject's set, the pipeline that makes it, and the folder or address of all sets."""

    plan: PriorPlan
    source: Source
    parent_uri: str


@dataclass(kw_only=True)
class _ClassSet:
    wanted: WantedSet
    missing: set[int]
    open: deque[range]
    whole: bool
    waiting: list[str] = field(default_factory=list)


class ClassImageSets:
    """Storage is read once per set, for the first subject that waits for it.

    `made` and `to_make` count images. A set shared by subjects gets as many images as the largest request.
    """

    def __init__(self, wanted: Sequence[WantedSet]) -> None:
        self._wanted: dict[str, WantedSet] = {}
        for one in wanted:
            most = self._wanted.setdefault(one.plan.key, one)
            if one.plan.count > most.plan.count:
                self._wanted[one.plan.key] = one
        self._sets: dict[str, _ClassSet] = {}
        self._handed: dict[str, list[tuple[str, range | None]]] = {}  # None: a set to seal
        self.made = self.to_make = 0

    def waits(self, name: str, key: str) -> bool:
        """Whether a subject has to wait for a set; `sealed` returns its name later."""
        if key not in self._sets:
            self._sets[key] = self._found(self._wanted[key])
        if self._sets[key].whole:
            return False
        self._sets[key].waiting.append(name)
        return True

    def hand_out(self, lane: str, count: int, *, lanes: int = 1) -> MakeClassImages | None:
        """Blocks of one set for a lane of `count` workers, or a set to seal; None if all are made or handed out.

        A worker gets several at once, as it samples one while it writes another: of all that are left half, shared by
        `lanes`, so that none has much to do when the others have nothing.
        """
        sealing = {key for handed in self._handed.values() for key, block in handed if block is None}
        for key, one in self._sets.items():
            each = min(_MOST_BLOCKS, max(1, len(one.open) // (2 * lanes * count)))
            blocks = tuple(one.open.popleft() for _ in range(min(each * count, len(one.open))))
            if not blocks and (one.missing or one.whole or key in sealing):
                continue
            self._handed[lane] = [(key, block) for block in blocks] or [(key, None)]
            return MakeClassImages(
                plan=one.wanted.plan,
                source=one.wanted.source,
                parent_uri=one.wanted.parent_uri,
                blocks=blocks,
                wanted=tuple(tuple(sorted(one.missing.intersection(block))) for block in blocks),
            )
        return None

    def written(self, lane: str, key: str, indices: Collection[int]) -> None:
        """Count images of a set written by a lane, whole blocks of them."""
        self._handed[lane] = [
            (of, block)
            for of, block in self._handed.get(lane, [])
            if of != key or block is None or not set(indices).intersection(block)
        ]
        done = self._sets[key].missing.intersection(indices)
        self._sets[key].missing.difference_update(done)
        self.made += len(done)

    def give_back(self, lane: str) -> bool:
        """Reclaim a lane's unfinished work. Returns whether it had any."""
        handed = self._handed.pop(lane, [])
        for key, block in handed:
            if block is not None and self._sets[key].missing.intersection(block):
                self._sets[key].open.append(block)
        return bool(handed)

    def sealed(self, lane: str, key: str) -> tuple[str, ...]:
        """Note a set's manifest. Returns the names of subjects that waited for it."""
        self._handed.pop(lane, None)
        one = self._sets[key]
        one.whole = True
        waited = tuple(one.waiting)
        one.waiting.clear()
        return waited

    def _found(self, wanted: WantedSet) -> _ClassSet:
        present = images_present(wanted.parent_uri, wanted.plan)
        missing = set(wanted.plan.missing(present))
        self.to_make += len(missing)
        return _ClassSet(
            wanted=wanted,
            missing=missing,
            open=deque(wanted.plan.blocks(present)),
            whole=not missing and is_whole(wanted.parent_uri, wanted.plan),
        )
