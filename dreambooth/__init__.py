"""The DreamBooth method (Ruiz et al., arXiv 2208.12242): torch, diffusers and transformers, and no cluster."""

__version__ = "0.1.0"
