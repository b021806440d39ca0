"""Functions of one task: class images, samples, the protocol's figures, the published model."""
