"""Exceptions: for a user's mistake, and for a training that diverged."""


class InputError(ValueError):
    """A mistake in the user's input; the message says what was expected, what was got and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class Diverged(RuntimeError):
    """A training whose loss, gradients or weights are no longer finite."""
