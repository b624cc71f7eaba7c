"""bench: train, sample, score and compare alignment methods for text-to-image diffusion models."""

__version__ = "0.1.0"
