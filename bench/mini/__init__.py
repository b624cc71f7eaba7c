"""The embedded default: what its networks are trained on and how, its judge, and the finished weights."""

from pathlib import Path

MINI_WEIGHTS = Path(__file__).parent / "weights"
