"""What Ray starts: a lane, fine-tuning, samplers, checkpoints, DeepSpeed."""
