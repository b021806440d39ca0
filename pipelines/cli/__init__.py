"""The command line: one thin file a command."""

from pipelines.cli.main import main

__all__ = ["main"]
