"""The command line of this process, for users to repeat."""

import shlex
import sys

from dreambooth.config.addresses import without_credentials


def this_command() -> str:
    """The command line of this process, quoted for a shell, without secrets."""
    return without_credentials(shlex.join(["dreambooth", *sys.argv[1:]]))
