"""Limits and defaults shared by the command line, the settings and the method."""

MOST_STEPS = 10_000_000
"""Most training steps, and the limit of all settings in steps."""
MOST_SAMPLING_STEPS = 1000
"""Most sampling steps: the number of noise levels (arXiv 2006.11239)."""
MOST_GUIDANCE = 100.0
MOST_IMAGES = 100_000
LARGEST_SEED = 2**63 - 1
"""Largest seed: a signed 64-bit integer, as MLflow's `long`; torch's generators take more."""
SMALLEST_SIDE, LARGEST_SIDE = 16, 4096
"""Largest side of a picture in pixels."""
SAMPLED_TOGETHER = 8
"""Images of a batch, for class images by default and for samples: enough to keep a GPU busy."""
