"""The exception for what a person can put right, and the one for a training that went wrong."""


class InputError(ValueError):
    """A mistake in what the user gave: its message says what was expected, what was got and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class Diverged(RuntimeError):
    """The loss is no longer a number."""
