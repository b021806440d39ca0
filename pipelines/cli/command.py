"""The command that was given, as a person can give it again."""

import shlex
import sys

from dreambooth.config.addresses import without_credentials


def this_command() -> str:
    """The command line of this process, quoted for a shell; what is secret in it is left out."""
    return without_credentials(shlex.join(["dreambooth", *sys.argv[1:]]))
