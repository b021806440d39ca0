"""The stored state of each subject of a batch."""

import json

from pipelines.storage.files import filesystem
from pipelines.tasks import SubjectRecord


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
