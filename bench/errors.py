"""Errors that are shown to a person as one line, without a stack trace."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BenchError(Exception):
    """Something failed; the message names the cause and the fix. The command exits with 1."""

    exit_code = 1


class UsageError(BenchError):
    """The request itself is wrong (unknown name, bad value). The command exits with 2."""

    exit_code = 2


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the option nearest to `word`, or "" when none is near."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_line(error: BaseException) -> str:
    """What somebody else's error says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str, most: int | None = None) -> str:
    """Text from outside as a terminal may show it: control, format and surrogate characters escaped, cut at `most`."""
    cut = text if most is None or len(text) <= most else f"{text[:most]}..."
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode()
        for letter in cut
    )
