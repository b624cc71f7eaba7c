"""bench: train, sample, score and compare alignment methods for text-to-image diffusion models."""

import os

for _library in ("TRANSFORMERS", "DIFFUSERS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")  # advice on packages left out on purpose

__version__ = "0.1.0"
