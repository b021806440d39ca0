"""The command that was given, as a person can give it again."""

import shlex
import sys


def this_command() -> str:
    """The command line of this process, quoted for a shell."""
    return shlex.join(["dreambooth", *sys.argv[1:]])
