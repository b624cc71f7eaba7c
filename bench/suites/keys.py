"""Dotted keys: setting them in nested settings, and saying in one line what is wrong with one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from bench.errors import UsageError

EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"dotted.key": value}; list entries are numbered from 0."""
    below = children(value)
    if not below:
        return {prefix: value}
    dotted: dict[str, Any] = {}
    for key, child in below.items():
        dotted |= flat(child, f"{prefix}.{key}" if prefix else key)
    return dotted


def children(node: Any) -> dict[str, Any]:
    """What is below a node, by key; nothing below a plain value."""
    if isinstance(node, dict):
        return {str(key): child for key, child in node.items()}
    if isinstance(node, list):
        return {str(index): child for index, child in enumerate(node)}
    return {}


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; sections that are not there are made, for validation to judge."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, dict):
            node = node.setdefault(part, {})
        elif part in children(node):
            node = node[int(part)]
        else:
            raise UsageError(unknown(key, tree))
    if isinstance(node, dict):
        node[last] = value
    elif last in children(node):
        node[int(last)] = value
    else:
        raise UsageError(unknown(key, tree))


def remove(tree: dict[str, Any], path: Sequence[str | int]) -> None:
    """Delete the setting at a path."""
    node: Any = tree
    for part in path[:-1]:
        node = node[part]
    del node[path[-1]]


def explain(problem: Mapping[str, Any], known: dict[str, Any], typed: Sequence[str] = ()) -> str:
    """One line for one pydantic error: `known` are the settings there are, `typed` the keys a person gave."""
    key = ".".join(str(part) for part in problem["loc"])
    deeper = next((name for name in typed if name.startswith(f"{key}.")), None)
    if deeper or problem["type"] == "extra_forbidden":
        return unknown(deeper or key, known)
    if problem["type"] == "missing":
        return f"setting '{key}' is missing"
    value = problem["input"]
    return f"setting '{key}': expected {_expected(problem)}, got {value!r} ({type(value).__name__})"


def _expected(problem: Mapping[str, Any]) -> str:
    plain = problem["msg"].removeprefix("Value error, ").removeprefix("Input should ").removeprefix("be ")
    plain = f"a value {plain}" if plain.startswith(("greater", "less")) else plain[0].lower() + plain[1:]
    return EXPECTED.get(problem["type"], plain)


def unknown(key: str, known: dict[str, Any]) -> str:
    """Say that a dotted key does not exist, which is nearest, and where a setting of that name does exist."""
    parts = key.split(".")
    node: Any = known
    depth = 0
    while depth < len(parts) - 1 and parts[depth] in children(node):
        node = children(node)[parts[depth]]
        depth += 1
    leaves = flat(known)
    elsewhere = [leaf for leaf in leaves if leaf.split(".")[-1] == parts[-1]]
    near = difflib.get_close_matches(parts[depth], children(node), n=1)
    hint = ""
    if near:
        section = ".".join([*parts[:depth], near[0]])
        nearest = ".".join([section, *parts[depth + 1 :]])
        inside = children(children(node)[near[0]])
        exact = nearest in leaves or not inside
        hint = f"'{nearest}'?" if exact else f"'{section}'? it has {', '.join(inside)}"
    elif not elsewhere:
        close = difflib.get_close_matches(key, leaves, n=1, cutoff=0.5)
        hint = f"'{close[0]}'?" if close else ""
    text = f"unknown setting '{key}'" + (f" (did you mean {hint})" if hint else "")
    elsewhere = [leaf for leaf in elsewhere if f"'{leaf}'" not in hint]
    return text + (f"; '{parts[-1]}' is set by {elsewhere[0]}" if elsewhere else "")
