"""Check before any work starts that results can be written, and that there is room for them."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth.amounts import counted
from dreambooth.errors import InputError
from pipelines.plan.run_plan import Plan
from pipelines.storage.faults import readable_size
from pipelines.storage.files import check_writable, filesystem, is_local, join
from pipelines.storage.publications import published
from pipelines.worker.checkpoints import CHECKPOINTS_KEPT


def check_destinations(plans: Sequence[Plan], *, lanes: int = 1, nodes: int = 1) -> None:
    """Check that files of results can be written from a cluster of `nodes`. Raises InputError if not.

    Each address is tried once; `lanes` is the number of subjects in work at a time.
    """
    roots = {plan.config.storage.root: plan for plan in plans}
    for plan in roots.values():
        check_writable(plan.config.run_uri)
        if plan.prior is not None:
            check_writable(plan.config.prior_uri)
    _check_room(plans, lanes=lanes, nodes=nodes)


def check_servers(plans: Sequence[Plan], *, nodes: int = 1) -> None:
    """Check that MLflow can be written from a cluster of `nodes`, once per address. Raises InputError if not."""
    from pipelines.tracking.runs import check_tracking

    for tracking in {plan.config.tracking: None for plan in plans}:
        check_tracking(tracking, nodes=nodes)


@dataclass(frozen=True, kw_only=True)
class _Written:
    """Bytes to be written below a folder, and their kind."""

    folder: Path
    size: int
    what: str


def _check_room(plans: Sequence[Plan], *, lanes: int, nodes: int) -> None:
    """Raise InputError unless there is room for these results' missing parts, with `lanes` subjects at a time.

    A disk shared by several folders needs room for all. Object stores and other nodes' disks are not checked.
    """
    local = is_local(plans[0].config.run_uri)
    missing = [plan for plan in plans if not local or published(join(plan.config.run_uri, "model")) is None]
    if not missing:
        return
    largest = max(missing, key=lambda plan: max(_checkpoint_sizes(plan)) + plan.published_bytes)
    writes = _into_store(missing, largest, lanes) if local else []
    if nodes == 1:
        writes += _into_temporary_folder(largest, lanes)
    disks: dict[int, list[_Written]] = {}
    for write in writes:
        disks.setdefault(write.folder.stat().st_dev, []).append(write)
    for there in disks.values():
        need, free = sum(write.size for write in there), shutil.disk_usage(there[0].folder).free
        if free < need:
            what = " and ".join(write.what for write in there)
            raise InputError(
                f"{str(there[0].folder)!r} has {readable_size(free)} free, and {readable_size(need)} will be written "
                f"there: {what}; free some, or choose another folder (storage.root, TMPDIR)"
            )


def _into_store(missing: Sequence[Plan], largest: Plan, lanes: int) -> list[_Written]:
    """Models stay; a lane's checkpoints go with its publication, and one is written before another is removed.

    A cascade's first stage keeps its own until both are published.
    """
    counts = [_checkpoints(stage, last=stage is not largest.stages[-1]) for stage in largest.stages]
    sizes = _checkpoint_sizes(largest)
    kept = sum(min(CHECKPOINTS_KEPT, count) * size for count, size in zip(counts, sizes, strict=True))
    most = [min(CHECKPOINTS_KEPT + 1, count) for count in counts]
    at_once = min(lanes, len(missing))
    at_most = sum(count * size for count, size in zip(most, sizes, strict=True))
    each = max(at_most, kept + largest.published_bytes)
    models = (len(missing) - at_once) * largest.published_bytes
    keys = [(plan, stage.key) for plan in missing for stage in plan.stages]
    there = sum(_size(join(plan.config.run_uri, "checkpoints", key)) for plan, key in keys)
    shown = [
        f"{counted(at_once * count, 'checkpoint')} of {readable_size(size)}"
        for count, size in zip(most, sizes, strict=True)
    ]
    what = ", ".join([*shown, f"{counted(len(missing), 'model')} of {readable_size(largest.published_bytes)}"])
    folder = _existing(Path(filesystem(largest.config.run_uri)[1]))
    return [_Written(folder=folder, size=max(0, at_once * each + models - there), what=what)]


def _into_temporary_folder(largest: Plan, lanes: int) -> list[_Written]:
    """Models are assembled there; those for an object store also come back for verification."""
    local = is_local(largest.config.run_uri)
    size = largest.published_bytes if local else max(2 * largest.published_bytes, *_checkpoint_sizes(largest))
    what = f"{readable_size(lanes * size)} in passing"
    return [_Written(folder=_existing(Path(tempfile.gettempdir())), size=lanes * size, what=what)]


def _checkpoint_sizes(plan: Plan) -> list[int]:
    """Bytes of a checkpoint of each stage."""
    return [stage.checkpoint_bytes for stage in plan.stages]


def _checkpoints(plan: Plan, *, last: bool) -> int:
    """Number of checkpoints of a stage; with `last` one is written after the last step, too."""
    train = plan.config.train
    if train.checkpoint_every_minutes is not None:
        return CHECKPOINTS_KEPT + 1  # as many as there are at a time
    count = (train.max_train_steps - 1) // train.checkpoint_every + (1 if last else 0)
    return max(1, count)  # in case of an interrupt


def _existing(folder: Path) -> Path:
    """The folder or its nearest existing parent."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _size(uri: str) -> int:
    folder = Path(filesystem(uri)[1])
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
