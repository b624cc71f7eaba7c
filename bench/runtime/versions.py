"""Which versions made a number. Imports nothing heavy: looking up old scores needs this too."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from bench import __version__


def versions(packages: Iterable[str]) -> dict[str, str]:
    """This package's version and those of the ones named, as far as they are installed."""
    found = {"bench": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
