"""What the data path knows of the control API: which requests are for it, and how large they may be.

`paths` are those of `openapi.PATHS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

MAX_BODY = 65536  # bytes of a control request


def is_control_path(paths: Collection[str], prefix: str) -> Callable[[str], bool]:
    """Is this path answered there instead of being forwarded?"""
    exact = frozenset(prefix + path for path in paths if "{" not in path)
    below = tuple(prefix + path.partition("{")[0] for path in paths if "{" in path)
    return lambda path: path in exact or path.startswith(below)


def covers_control_path(paths: Collection[str], prefix: str) -> Callable[[str], bool]:
    """Does what this string begins with include a path that is answered there?"""
    begins = tuple(prefix + path.partition("{")[0] for path in paths)
    return lambda scope: any(path.startswith(scope) for path in begins)
