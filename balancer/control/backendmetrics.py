"""The part of `/metrics` that there is for each backend, with hundreds of them by far the most: text of our own making.

The label `backend` is the id, `pool` the name of its pool. Series of a removed backend end, and go on from where they
were if one of that id comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from balancer.balancing.backends import State
from balancer.balancing.counts import BackendCounts
from balancer.control.control import Control
from balancer.control.exposition import Family, Kind, Pieces, labels_of, number
from balancer.errors import BackendError, BalancerError, ConnectFailed
from balancer.observe.histogram import Histogram
from balancer.observe.statistics import Counters, Lifetime
from balancer.observe.totals import BackendTotals

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STATES = get_args(State)
NO_TRAFFIC, NO_ATTEMPTS = Counters(), BackendTotals()
REFUSED = ConnectFailed("", refused=True).reason


def reasons_below(base: type[BalancerError]) -> set[str]:
    """All there are, so that a rate has a zero to start from."""
    return {base.reason, REFUSED}.union(*(reasons_below(subclass) for subclass in base.__subclasses__()))


BACKEND_REASONS = sorted(reasons_below(BackendError))


def one_of(states: Iterable[str], current: str) -> dict[str, float]:
    return {state: state == current for state in states}


def measured(samples: Histogram, bounds: Sequence[float]) -> tuple[list[tuple[str, float]], float]:
    """Buckets and sum."""
    counts = [*samples.up_to(bounds), samples.total]
    return [*zip([*map(str, bounds), "+Inf"], counts, strict=True)], samples.seconds


@dataclass(frozen=True, slots=True)
class Seen:
    """One backend: its snapshot and its counts."""

    labels: str  # as each of its samples has them
    state: Mapping[str, Any]
    counts: BackendCounts
    traffic: Counters
    attempts: BackendTotals
    idle: int
    websockets: int

    @property
    def check_seconds(self) -> float | None:
        check = self.state["health"]["last_check"]
        return None if check is None else check["duration"]


Read = Callable[[Seen], float | None]  # None: no sample

BACKEND_GAUGES: Sequence[tuple[str, str, Read]] = (
    ("up", "Whether health checks say that it is up.", lambda seen: seen.state["healthy"]),
    ("weight", "Weight, as far as a slow start lets it count.", lambda s: s.state["weight"] * s.state["admission"]),
    ("expected_share", "Share of requests it should get, if the algorithm knows.", lambda s: s.state["expected_share"]),
    ("requests_in_flight", "Requests under way on it.", lambda seen: seen.state["active_connections"]),
    ("websockets", "WebSockets open on it.", lambda seen: seen.websockets),
    ("connections_idle", "Kept connections to its address that nobody uses.", lambda seen: seen.idle),
    ("health_check_duration_seconds", "Duration of the last health check.", lambda seen: seen.check_seconds),
    (
        "last_transition_timestamp_seconds",
        "When its health last changed, or it was added.",
        lambda seen: seen.state["health"]["since"],
    ),
)
BACKEND_COUNTERS: Sequence[tuple[str, str, Read]] = (
    ("selected", "Times it was chosen for a request or a retry.", lambda seen: seen.counts.selected),
    ("connections_opened", "Attempts on a new connection.", lambda seen: seen.attempts.opened),
    ("connections_reused", "Attempts on a kept connection.", lambda seen: seen.attempts.reused),
    ("health_checks", "Health checks made.", lambda seen: seen.counts.checks),
    ("health_check_failures", "Health checks that failed.", lambda seen: seen.counts.failed_checks),
    ("ejections", "Times it was ejected because of failures of real traffic.", lambda seen: seen.counts.ejections),
    ("downtime_seconds", "Time it has been down.", lambda seen: seen.counts.down_seconds),
)


class BackendMetrics:
    """Makes them. What has not changed of a backend since the last time is not made anew."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._pieces = Pieces()

    def families(self, lifetime: Lifetime) -> Iterator[Family]:
        """Of this moment, but that requests came to what `lifetime` says."""
        backends = list(self._seen(lifetime))
        tables: Sequence[tuple[Kind, str, Sequence[tuple[str, str, Read]]]] = (
            ("gauge", "", BACKEND_GAUGES),
            ("counter", "_total", BACKEND_COUNTERS),
        )
        for kind, suffix, table in tables:
            for name, text, read in table:
                start = f"lb_backend_{name}{suffix}{{"
                lines = [
                    f"{start}{seen.labels}}} {number(value)}\n"
                    for seen in backends
                    if (value := read(seen)) is not None
                ]
                yield Family(f"lb_backend_{name}", kind, text, lines)
        yield from self._labelled(backends)

    def _seen(self, lifetime: Lifetime) -> Iterator[Seen]:
        websockets, idle = self._control.statistics.websockets.open(), self._control.idle()
        for pool in self._control.pools:
            counts, kept = pool.counts(), idle.get(pool.name, {})
            for state in pool.snapshot():
                name = state["id"]
                if name in counts:
                    labels = self._pieces.get(_labels, name, state["pool"])
                    traffic = lifetime.counters.get(name) or NO_TRAFFIC
                    attempts = lifetime.totals.backends.get(name) or NO_ATTEMPTS
                    idle_here = kept.get(state["url"], 0)
                    yield Seen(labels, state, counts[name], traffic, attempts, idle_here, websockets[name])

    def _labelled(self, backends: Sequence[Seen]) -> Iterator[Family]:
        pieces = self._pieces
        info, states, codes, errors, turns, durations = [], [], [], [], [], []
        for seen in backends:
            labels, state, attempts = seen.labels, seen.state, seen.attempts
            info.append(pieces.get(_info, labels, state["url"]))
            states.append(pieces.get(_states, labels, state["state"]))
            codes.append(pieces.get(_codes, labels, *attempts.codes().items()))
            errors.append(pieces.get(_errors, labels, *attempts.failures().items()))
            turns.append(pieces.get(_turns, labels, seen.counts.ups, seen.counts.downs))
            durations.append(pieces.get(_durations, labels, Times(seen.traffic)))
        self._pieces = pieces.turn()
        yield Family("lb_backend_info", "gauge", "Its address.", info)
        yield Family("lb_backend_state", "gauge", "1 for the state it is in.", states)
        yield Family("lb_backend_requests", "counter", "Attempts by status; none if there was none.", codes)
        yield Family("lb_backend_errors", "counter", "Attempts that failed.", errors)
        yield Family("lb_backend_health_transitions", "counter", "Times its health changed.", turns)
        text = "Time of whole requests that it answered or was the last to be tried for."
        yield Family("lb_backend_request_duration_seconds", "histogram", text, durations)


class Times:
    """Of a backend's requests. They are the same as others if as many requests took as long in all."""

    __slots__ = ("traffic", "_key")

    def __init__(self, traffic: Counters) -> None:
        self.traffic = traffic
        self._key = (traffic.total, traffic.latency.seconds, traffic.other.seconds)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Times) and self._key == other._key


# The pieces of a backend's text.


def _each(name: str, labels: str, label: str, values: Iterable[tuple[str, float]]) -> str:
    """One sample per value of the last label."""
    return "".join(f'{name}{{{labels},{label}="{value}"}} {number(count)}\n' for value, count in values)


def _labels(backend: str, pool: str) -> str:
    return labels_of(backend=backend, pool=pool)


def _info(labels: str, url: str) -> str:
    return f"lb_backend_info{{{labels},{labels_of(url=url)}}} 1.0\n"


def _states(labels: str, current: str) -> str:
    return _each("lb_backend_state", labels, "state", one_of(STATES, current).items())


def _codes(labels: str, *codes: tuple[str, int]) -> str:
    return _each("lb_backend_requests_total", labels, "code", codes)


def _errors(labels: str, *failures: tuple[str, int]) -> str:
    found = dict.fromkeys(BACKEND_REASONS, 0) | dict(failures)
    return _each("lb_backend_errors_total", labels, "reason", found.items())


def _turns(labels: str, ups: int, downs: int) -> str:
    return _each("lb_backend_health_transitions_total", labels, "to", (("up", ups), ("down", downs)))


def _durations(labels: str, times: Times) -> str:
    buckets, total = measured(times.traffic.times, BUCKETS)
    name = "lb_backend_request_duration_seconds"
    lines = _each(f"{name}_bucket", labels, "le", buckets)
    return f"{lines}{name}_count{{{labels}}} {number(buckets[-1][1])}\n{name}_sum{{{labels}}} {number(total)}\n"
