"""bench: train, sample, score and compare alignment methods for text-to-image diffusion models."""

import os

# transformers warns at every import that torchvision is missing; nothing here needs it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.1.0"
