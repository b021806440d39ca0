"""Code in Ray's workers: lanes, fine-tuning, samplers, checkpoints, DeepSpeed."""
