"""What readers were told lately, so that the next answer need only tell them what has changed.

Who polls 500 backends once a second is told half a megabyte otherwise, of which most is as it was. A reader names the
`revision` that it has; if that is not known any more, it gets all. What has changed is a JSON Merge Patch (RFC 7396):
null takes a field away, which is as good as a field that is null.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import compress, count, islice
from operator import ne
from threading import Lock
from typing import Any

KEPT = 8  # answers, newest: as many readers may take turns, each at its own pace

Told = Mapping[str, Mapping[str, Any]]  # what was told of each backend, in order
Patch = dict[str, Any]


class Revisions:
    """`_lock` guards `_told`. Numbers rise over restarts too, or somebody would be told what changed since another."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._told: dict[int, Told] = {}
        self._numbers = count(time.time_ns() // 1_000_000)

    def since(self, revision: int, backends: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, Patch] | None]:
        """The number of this answer, and a patch for each backend that has changed since `revision`; None if all have
        to be told: it is not known, or others are there, or in another order."""
        told = {backend["id"]: backend for backend in backends}
        with self._lock:
            before = self._told.get(revision)
            number = next(self._numbers)
            self._told[number] = told
            for old in list(islice(self._told, max(0, len(self._told) - KEPT))):
                del self._told[old]
        if before is None or list(before) != list(told):
            return number, None
        patches = ((key, patch(before[key], each)) for key, each in told.items() if each != before[key])
        return number, {key: changed for key, changed in patches if changed}


def patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> Patch:
    """What makes `after` of `before`; a field that is null is as good as none."""
    names = compress(after, map(ne, after.values(), map(before.get, after)))  # without a step for what is as it was
    changed = {name: _changed(before.get(name), after[name]) for name in names}
    return changed if before.keys() <= after.keys() else dict.fromkeys(before.keys() - after.keys()) | changed


def _changed(old: Any, new: Any) -> Any:
    return patch(old, new) if type(new) is dict and type(old) is dict else new
