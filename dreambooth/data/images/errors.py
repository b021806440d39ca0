"""Errors of an image file, without its name, which `decoding.decode` adds."""


class Damage(ValueError):
    """A file that decodes although part of it is missing."""


class Undefined(ValueError):
    """A sound file without a definition of its colours."""
