"""Pretraining of the miniature: its world, the stages, and how good it became."""
