"""The stored state of each subject of a batch."""

import json

from pipelines.stages.evaluation_task import tasks_of_subject
from pipelines.storage.files import exists, filesystem
from pipelines.tasks import SubjectRecord, TrainTask


def read_records(uri: str) -> dict[str, SubjectRecord]:
    """The records in a folder, by subject name."""
    fs, path = filesystem(uri)
    try:
        files = [name for name in fs.ls(path, detail=False) if name.endswith(".json")]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    contents = fs.cat(files) if files else {}
    records = [SubjectRecord.from_dict(json.loads(content)) for content in contents.values()]
    return {record.name: record for record in records}


def taken_up(stored: SubjectRecord | None, asked: SubjectRecord, task: TrainTask, driver: str) -> SubjectRecord:
    """The state left by an earlier attempt: results of the same settings count, claims only of lanes that may live."""
    if asked.state != "waiting":
        return asked
    if stored is None or stored.key != asked.key:
        return asked
    if stored.state == "training" and not str(stored.lane).startswith(f"{driver}/"):
        return stored.changed(state="waiting", lane=None)
    if stored.state == "failed":
        # The cause may have been fixed since.
        return stored.changed(state="waiting", failures=0)
    if stored.state != "trained":
        return stored
    if not all(exists(one.uri) for one in tasks_of_subject(task)):
        # Earlier versions wrote their figures otherwise: a lane measures the published model.
        return stored.changed(state="waiting", lane=None)
    return stored
