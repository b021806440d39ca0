"""From photographs to latents, and the order of training pairs."""
