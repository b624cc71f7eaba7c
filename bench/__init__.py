"""bench: train, sample, score and compare alignment methods for text-to-image diffusion models."""

import logging
import os

for _library in ("TRANSFORMERS", "DIFFUSERS"):  # advice on packages left out on purpose
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.2.0"
