"""Which route a request takes: the best of those that match it, by the rules of the Gateway API.

The more exact host counts first: itself, then the longest wildcard, then any. Then comes the exact path, then the
longest prefix of whole segments; then a route that names methods, the one with more header fields, the one with more
query parameters. Only what is equal in all of these is decided by the order of the routes. Routes are looked up by host
and by path, so that a thousand cost what ten cost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from balancer.protocol.paths import is_ambiguous, raw_path, read_path, without_parameters
from balancer.protocol.request import Request
from balancer.protocol.requestkey import host_of, request_key

T = TypeVar("T")

_PLAIN_HOST = re.compile(rb"(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)?|\[[0-9a-f:.]+\]")
LONGEST_HOST = 255  # bytes (RFC 1035 section 2.3.4): no wildcard covers a longer one


@dataclass(frozen=True, slots=True)
class Match:
    """Which requests a route is for; what is left out matches all."""

    host: bytes = b""  # as `host_name` has it, or `*.` and a part of one: of whatever number of labels in front
    path: bytes = b""  # as `read_path` has it: a prefix without a slash at its end, unless it `is_exact`
    is_exact: bool = False
    methods: frozenset[str] = frozenset()
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Among those of the same host and path the greatest counts."""
        return bool(self.methods), len(self.headers), len(self.query)

    def conditions(self) -> Iterator[Callable[[Request], bool]]:
        """Beside host and path."""
        if self.methods:
            yield lambda request: request.method in self.methods
        for kind, wanted in (("header", self.headers), ("query", self.query)):
            for name, value in wanted.items():
                yield _says(f"{kind}:{name}", value.encode("latin-1"))


def _says(key: str, value: bytes) -> Callable[[Request], bool]:
    told = request_key(key)
    return lambda request: told(request) == value


class Candidate(Generic[T]):
    """A route: where it leads, and whether its paths must mean the same to everybody. `takes_ambiguous` if its own need
    not."""

    __slots__ = ("match", "target", "is_guarded", "takes_ambiguous", "_conditions")

    def __init__(self, match: Match, target: T, *, is_guarded: bool = False, takes_ambiguous: bool = False) -> None:
        self.match = match
        self.target = target
        self.is_guarded = is_guarded
        self.takes_ambiguous = takes_ambiguous
        self._conditions = tuple(match.conditions())

    def takes(self, request: Request) -> bool:
        """Of its host and path."""
        for condition in self._conditions:
            if not condition(request):
                return False
        return True


class _Paths(Generic[T]):
    """The routes of one host, or of one wildcard."""

    def __init__(self) -> None:
        self.exact: dict[bytes, list[Candidate[T]]] = {}
        self.prefixes: dict[bytes, list[Candidate[T]]] = {}
        self._depth = 0  # segments of the longest prefix
        self.is_guarded = False

    def add(self, candidate: Candidate[T]) -> None:
        match = candidate.match
        self.is_guarded = self.is_guarded or candidate.is_guarded
        by_path = self.exact if match.is_exact else self.prefixes
        by_path.setdefault(match.path, []).append(candidate)
        by_path[match.path].sort(key=lambda each: each.match.rank, reverse=True)  # stable: the order decides ties
        if not match.is_exact:
            self._depth = max(self._depth, match.path.count(b"/"))

    def find(self, path: bytes, request: Request) -> Candidate[T] | None:
        for candidate in self.exact.get(path, ()):
            if candidate.takes(request):
                return candidate
        # A client may send thousands of segments; no more are looked at than a prefix has.
        prefix = b"/".join(path.split(b"/", self._depth + 1)[: self._depth + 1])
        while True:
            for candidate in self.prefixes.get(prefix, ()):
                if candidate.takes(request):
                    return candidate
            if not prefix:
                return None
            prefix = prefix[: max(0, prefix.rfind(b"/"))]


class _Host(Generic[T]):
    """What counts for one host: its own routes, then those of whatever is less exact."""

    def __init__(self, own: _Paths[T] | None, rest: _Host[T] | None) -> None:
        self._levels: tuple[_Paths[T], ...] = ((own,) if own else ()) + (rest._levels if rest else ())
        self.is_guarded = any(level.is_guarded for level in self._levels)

    def find(self, path: bytes, request: Request) -> Candidate[T] | None:
        for paths in self._levels:
            found = paths.find(path, request)
            if found is not None:
                return found
        return None


class RouteTable(Generic[T]):
    """Finds what a request is for: the target of its route; `missing` if no route matches it; `ambiguous` if its path
    may mean something else to a backend and any route of its host is guarded, or if its host may and any host is.
    Never changes, so any thread may look up."""

    def __init__(self, candidates: Iterable[Candidate[T]], *, missing: T, ambiguous: T) -> None:
        self._missing, self._ambiguous = missing, ambiguous
        by_host: dict[bytes, _Paths[T]] = {}
        for candidate in candidates:
            by_host.setdefault(candidate.match.host, _Paths()).add(candidate)
        self._has_guarded_host = any(paths.is_guarded for host, paths in by_host.items() if host)
        self._any = _Host(by_host.pop(b"", None), None)
        self._wildcards: dict[bytes, _Host[T]] = {}  # by what follows `*.`
        self._hosts: dict[bytes, _Host[T]] = {}
        for host in sorted(by_host, key=lambda host: (not host.startswith(b"*."), host.count(b"."))):
            if host.startswith(b"*."):  # each after those that cover it
                name = host.removeprefix(b"*.")
                self._wildcards[name] = _Host(by_host[host], self._covering(name))
            else:
                self._hosts[host] = _Host(by_host[host], self._covering(host))

    def find(self, request: Request) -> T:
        raw = raw_path(request.target)
        path, name = read_path(raw), host_of(request)
        host = self._hosts.get(name) or self._covering(name)
        if self._has_guarded_host and name not in self._hosts and not _PLAIN_HOST.fullmatch(name):
            return self._ambiguous  # somebody else may take it for one that is
        found = host.find(path, request)
        if host.is_guarded and not (found is not None and found.takes_ambiguous):
            # Where parameters are left out it may be another route.
            if is_ambiguous(raw) or (b";" in path and host.find(without_parameters(path), request) is not found):
                return self._ambiguous
        return self._missing if found is None else found.target

    def _covering(self, name: bytes) -> _Host[T]:
        """The longest wildcard's, or any host's."""
        while self._wildcards and name and len(name) <= LONGEST_HOST:
            name = name.partition(b".")[2]
            if name in self._wildcards:
                return self._wildcards[name]
        return self._any
