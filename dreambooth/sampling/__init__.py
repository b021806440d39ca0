"""Sampling from a pipeline, class-image plans, and what is computed once."""
