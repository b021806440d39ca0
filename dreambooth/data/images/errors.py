"""What is wrong with a picture's file, without its name: `decoding.decode` adds that."""


class Damage(ValueError):
    """A file that decodes, though a part of it is missing."""


class Undefined(ValueError):
    """A whole file that does not say which colours its numbers mean."""
