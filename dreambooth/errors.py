"""The one exception for what a person can put right."""


class InputError(ValueError):
    """A mistake in what the user gave: its message says what was expected, what was got and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
