"""The far ends of numbers that the command line and the settings share."""

MOST_STEPS = 10_000_000
"""Of training; and of whatever is counted in its steps."""
MOST_SAMPLING_STEPS = 1000
"""As many as there are noise levels (arXiv 2006.11239)."""
MOST_GUIDANCE = 100.0
MOST_IMAGES = 100_000
LARGEST_SEED = 2**63 - 1
"""A signed integer of 64 bits, as MLflow's `long`; torch's generators take more."""
SMALLEST_SIDE, LARGEST_SIDE = 16, 4096
"""Of a picture, in pixels."""
