"""Counters as plain values, which a file can keep as JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from balancer.observe.histogram import BOUNDS

ADDED = frozenset({"hedges"})  # slots that older files do not have


def plain(value: Any) -> Any:
    """Numbers and texts as they are, a dict as pairs, for its keys may be tuples, and an object by its slots."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, dict):
        return [[plain(key), plain(each)] for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [*value]
    return {name: plain(getattr(value, name)) for name in value.__slots__}


def with_bounds(values: Mapping[str, Any]) -> dict[str, Any]:
    """With what makes histograms of another version known: their counts go by place in BOUNDS."""
    return {**values, "bounds": len(BOUNDS)}


def without_bounds(given: Mapping[str, Any]) -> dict[str, Any]:
    """Raises LookupError or ValueError if these are of another version."""
    values = dict(given)
    if values.pop("bounds") != len(BOUNDS):
        raise ValueError
    return values


def fill(value: Any, given: Any) -> Any:
    """`value`, a new one that has counted nothing, with what `plain` made of another of its kind. Raises LookupError,
    TypeError or ValueError if that makes no sense."""
    if isinstance(value, dict):
        for key, each in given:
            default = getattr(value, "default_factory", int)()
            value[tuple(key) if isinstance(key, list) else key] = fill(default, each)
        return value
    if isinstance(value, list):
        return [fill(each, other) for each, other in zip(value, given, strict=True)]
    if hasattr(value, "__slots__"):
        for name in value.__slots__:
            if name in given or name not in ADDED:
                setattr(value, name, fill(getattr(value, name), given[name]))
        return value
    if type(given) is not type(value) and (type(value), type(given)) != (float, int):
        raise TypeError
    return given
