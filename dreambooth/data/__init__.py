"""Photographs to latents, and which pair is trained on when."""
