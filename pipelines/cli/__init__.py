"""The command line, one file per command."""

from pipelines.cli.main import main

__all__ = ["main"]
