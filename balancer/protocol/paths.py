"""Paths as routes read them, and which of them somebody else might read in another way.

What goes to a backend is what the client sent, byte for byte. So what guards a path must not be decided by another
reading of it than the backend's own: where that could differ, the path is ambiguous.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

_ENCODED_SLASH = re.compile(rb"%2f", re.IGNORECASE)
_PARAMETERS = re.compile(rb";[^/]*")
_AMBIGUOUS = re.compile(
    # What is decoded twice, or wrongly, may become: a dot, a slash, an escape, a backslash, a control character,
    rb"%(?:2[ef5]|5c|[01][0-9a-f]|7f|(?![0-9a-f]{2})"
    rb"|c[01]%[89ab]|e0%[89]|f0%8)"  # one of these in more bytes than it needs (RFC 3629 section 3).
    # Some take a backslash for a slash, two slashes for one, and cut off what follows a #.
    rb"|[\\#]|//"
    # Dot segments, and segments that have parameters alone, which some leave out (RFC 3986 sections 3.3 and 5.2.4).
    rb"|/\.{1,2}(?=[/;]|%3b|\Z)|/(?:;|%3b)",
    re.IGNORECASE,
)


def raw_path(target: bytes) -> bytes:
    return target.partition(b"?")[0]


def read_path(raw: bytes) -> bytes:
    """Decoded, but for slashes: an encoded one ends no segment (RFC 3986 section 2.2)."""
    return b"%2F".join(map(unquote_to_bytes, _ENCODED_SLASH.split(raw))) if b"%" in raw else raw


def is_ambiguous(raw: bytes) -> bool:
    return _AMBIGUOUS.search(raw) is not None


def without_parameters(path: bytes) -> bytes:
    """As servlet containers read it: `/a;x=1/b` is `/a/b`."""
    return _PARAMETERS.sub(b"", path)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Puts `new` in the place of the prefix `old`: whole segments both, the empty one is `/`."""

    old: bytes
    new: bytes

    def of_target(self, target: bytes) -> bytes:
        """However its first segments are written, there are as many of them as in `old`, which they match."""
        path, mark, query = target.partition(b"?")
        parts = path.split(b"/", self.old.count(b"/") + 1)
        rest = b"/" + parts[-1] if len(parts) > self.old.count(b"/") + 1 else b""
        return (self.new + rest or b"/") + mark + query

    def of_answer(self, path: bytes) -> bytes:
        """What a backend calls so, as clients see it; as it is if they cannot see it."""
        if path == self.new or path.startswith(self.new + b"/"):
            return self.old + path.removeprefix(self.new) or b"/"
        return path
