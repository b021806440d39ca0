"""How long does a process wait for an object store that is away? A minute, shared by all that it asks of a bucket.

What fails because the store can't be reached, is busy or says nothing is tried again with growing pauses, until nothing
has got through to its bucket for `PATIENCE_SECONDS`. From then on each call is tried once, and refused at once within
seconds of the last that failed, until one gets through: what a process does at its end costs it no second minute.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from pipelines.storage.faults import StoreAway, first_line, is_away, is_missing_bucket

_T = TypeVar("_T")
PATIENCE_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_ANSWER_SECONDS = 30
_BYTES_PER_SECOND = 100_000
"""Over a line that is still worth waiting for."""
_LOOK_AGAIN_SECONDS = 5.0

_away: dict[str, tuple[float, float, str]] = {}
"""Outages by bucket: since when nothing got through, when that was seen last, and why."""


class PatientS3(S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """S3 with one patience for a whole process; raises StoreAway."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        config = {"connect_timeout": 5, "read_timeout": _ANSWER_SECONDS, "retries": {"mode": "standard"}}
        config["retries"] |= {"max_attempts": 1}  # type: ignore[operator]
        super().__init__(*arguments, **{"config_kwargs": config, "use_listings_cache": False} | options)
        self.retries = 1

    async def _call_s3(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        call = super()._call_s3
        longest = _ANSWER_SECONDS + _size(keywords.get("Body")) / _BYTES_PER_SECOND

        async def attempt() -> Any:
            # Before a driver sends, it asks the store whether it may, and no timeout of its own is for the answer.
            async with asyncio.timeout(longest):
                return await call(method, *arguments, **keywords)

        return await _patiently(keywords.get("Bucket") or "", attempt)

    call_s3 = sync_wrapper(_call_s3)  # of files that are written in parts

    async def _cat_file(self, path: str, **keywords: Any) -> bytes:
        cat = super()._cat_file

        async def attempt() -> bytes:
            content: bytes = await cat(path, **keywords)
            return content

        return await _patiently(self.split_path(path)[0], attempt)


async def _patiently(bucket: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
    pause = _FIRST_PAUSE
    while True:
        began = time.monotonic()
        since, seen, why = _away.get(bucket, (began, began, ""))
        if seen - since > PATIENCE_SECONDS and began - seen < _LOOK_AGAIN_SECONDS:
            raise _store_away(bucket, why)
        try:
            result = await attempt()
        except StoreAway:
            raise
        except Exception as error:
            # A store that comes back may deny for a moment that it has the bucket.
            if not is_away(error) and not (bucket in _away and is_missing_bucket(error)):
                _away.pop(bucket, None)  # it answered
                raise
            since, now = min(since, _away.get(bucket, (since,))[0]), time.monotonic()
            _away[bucket] = since, now, first_line(error)
            if now - since > PATIENCE_SECONDS:
                raise _store_away(bucket, first_line(error)) from error
        else:
            _away.pop(bucket, None)
            return result
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _store_away(bucket: str, why: str) -> StoreAway:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    where = f"s3://{bucket}{f' at {endpoint}' if endpoint else ''}"
    return StoreAway(
        f"{where} has been away for over {PATIENCE_SECONDS:.0f} s ({why or 'no answer'}); "
        f"what was written there stays; run the same command again when the store is back"
    )


def _size(body: Any) -> int:
    if body is None:
        return 0
    if isinstance(body, bytes | bytearray | memoryview):
        return len(body)
    try:
        return os.fstat(body.fileno()).st_size
    except (AttributeError, OSError):
        return 0
