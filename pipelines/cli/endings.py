"""End failed commands with one sentence and an exit code; tracebacks go to a file.

| cause | exit code | output |
|---|---|---|
| InputError, click's own errors | 2 | what was expected, what was got, what to do |
| part of the result is missing: failed subjects, records not in MLflow | 3 | the part, and the command that adds it |
| Ctrl-C, SIGTERM | 130 | one line |
| closed pipe (`… | head`) | 141, as after SIGPIPE | nothing |
| anything else | 1 | one sentence, and the file that holds the traceback |
"""

import atexit
import collections
import contextlib
import datetime
import errno
import logging
import os
import secrets
import select
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import click

from dreambooth import __version__
from dreambooth.config.addresses import without_credentials
from dreambooth.errors import InputError
from pipelines.cli.given import check_text
from pipelines.cluster.sentence import sentence

FAILURE, INPUT_ERROR, INCOMPLETE, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141
_KEPT = 50
_GIVEN = "dreambooth.given"
_aside: "collections.deque[str]" = collections.deque(maxlen=_KEPT)
"""Tracebacks logged by libraries or raised in threads, for the file of a failed command."""


class Commands(click.Group):
    """A command group without tracebacks."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the raw arguments, which `invoke` checks."""
        ctx.meta[_GIVEN] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and end it by the module's table."""
        try:
            with _tracebacks_aside(), _flushed():
                check_text(ctx.meta[_GIVEN])
                return super().invoke(ctx)
        except click.ClickException as error:
            object.__setattr__(error, "message", without_credentials(error.message))
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except InputError as error:
            say(f"error: {error}")
            ctx.exit(INPUT_ERROR)
        except KeyboardInterrupt:
            say("interrupted; run the same command again to do what is missing")
            ctx.exit(INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - the last resort
            ctx.exit(_end(error))
        finally:
            atexit.register(_end_at_once_when_interrupted)


def say(text: str) -> None:
    """Print a line to the terminal, in red, with credentials hidden."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it, or the stream is closed
        click.secho(without_credentials(text), err=True, fg="red" if sys.stderr.isatty() else None)


def _end(error: Exception) -> int:
    """Report an unforeseen exception and the file of its traceback. Returns the exit code."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE and _nobody_reads():
        return UNREAD
    path = _write_details(error)
    where = f"details: {path}" if path else "the details can't be written to any folder here"
    say(f"failed: {sentence(error)}; {where}")
    return FAILURE


def _nobody_reads() -> bool:
    """Whether standard output or error is a closed pipe; redirects such a stream to /dev/null."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed_pipe(stream)]
    for stream in closed:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # Python flushes its buffer at exit
        os.close(nowhere)
    return bool(closed)


def _is_closed_pipe(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file of the system: a test's
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _write_details(error: BaseException) -> Path | None:
    """Write the traceback to a new file in the working or temporary folder; None if neither is writable."""
    now = datetime.datetime.now(datetime.UTC)
    name = f"dreambooth-error-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}.log"
    parts = [f"dreambooth {__version__}, Python {sys.version.split()[0]}, {now:%Y-%m-%d %H:%M:%S} UTC"]
    parts += [shlex.join(sys.argv), "".join(traceback.format_exception(error)), *_aside]
    for folder in (Path.cwd, tempfile.gettempdir):
        with contextlib.suppress(OSError):
            path = Path(folder(), name)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(without_credentials("\n\n".join(parts)))
            return path
    return None


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Flush output at the end of the context: at Python's exit it is too late to report errors."""
    try:
        yield
    finally:
        sys.stdout.flush()


@contextlib.contextmanager
def _tracebacks_aside() -> Iterator[None]:
    """Within this context, show library logs without tracebacks, and failed threads in one sentence."""
    make, in_thread, unraisable = logging.getLogRecordFactory(), threading.excepthook, sys.unraisablehook

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = make(*arguments, **options)
        if made.exc_info and made.exc_info[1] is not None:
            _put_aside(made.exc_info[1])
            made.msg, made.args = f"{made.getMessage()}: {sentence(made.exc_info[1])}", ()
            made.exc_info = None
        return made

    def ended(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
            _put_aside(arguments.exc_value)
            say(f"warning: a thread ended: {sentence(arguments.exc_value)}")

    logging.setLogRecordFactory(record)
    threading.excepthook = ended
    sys.unraisablehook = lambda unraised: _put_aside(unraised.exc_value, unraised.exc_traceback)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        threading.excepthook, sys.unraisablehook = in_thread, unraisable


def _put_aside(error: BaseException | None, where: TracebackType | None = None) -> None:
    if error is not None:
        _aside.append("".join(traceback.format_exception(type(error), error, where or error.__traceback__)))


def _end_at_once_when_interrupted() -> None:
    """Exit at once on an interrupt during cleanup, where libraries would print a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
