"""What a member tells the others of itself, and what those of all members come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from balancer.balancing.pools import Pools
from balancer.config.values import MAX_WORKERS
from balancer.observe.history import History
from balancer.observe.statistics import Statistics

WINDOW = 10  # seconds that the figures are of
MOST_BACKENDS = 1000  # that are told of, the busiest


# Others read them in a store where anybody may have written.
Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1000)]


class Load(TypedDict):
    """`requests` and `failed` are those of the last `seconds`, as are `rate`, per second, and `p95`, of their times in
    seconds, None without any. Of several members `p95` is the highest."""

    in_flight: Count
    total_requests: Count
    seconds: Count
    requests: Count
    failed: Count
    rate: Number
    p95: Number | None


class Figures(Load):
    """`url` is where it listens, `processes` are those of it that serve. `backends` has requests in flight by ids of
    backends that have any."""

    id: Text
    url: Annotated[Text, Field(pattern=r"^https?(\+unix)?://")] | None
    since: Number
    version: Text
    lifecycle: Text
    processes: Annotated[int, Field(ge=0, le=MAX_WORKERS)]
    backends: dict[str, Count]


def load_of(statistics: Statistics, history: History) -> Load:
    whole, _, _ = statistics.snapshot(0)
    window = history.window(WINDOW)
    seconds, figures = (0, None) if window is None else (window.seconds, window.whole)
    requests = 0 if figures is None else figures["requests"]
    return {
        "in_flight": whole["active_requests"],
        "total_requests": whole["total_requests"],
        "seconds": seconds,
        "requests": requests,
        "failed": 0 if figures is None else figures["failed"],
        "rate": requests / seconds if seconds else 0.0,
        "p95": None if figures is None else figures["p95"],
    }


def busiest(pools: Pools) -> dict[str, int]:
    busy = sorted(((backend.active, backend.id) for backend in pools.backends() if backend.active), reverse=True)
    return {backend: active for active, backend in busy[:MOST_BACKENDS]}


def in_flight(figures: Iterable[Figures]) -> dict[str, int]:
    """By the ids of backends, of all of them."""
    total = Counter[str]()
    for each in figures:
        total.update(each["backends"])
    return dict(total)


def together(loads: Iterable[Load]) -> Load:
    all_of = list(loads)
    times = [each["p95"] for each in all_of if each["p95"] is not None]
    return {
        "in_flight": sum(each["in_flight"] for each in all_of),
        "total_requests": sum(each["total_requests"] for each in all_of),
        "seconds": max((each["seconds"] for each in all_of), default=0),
        "requests": sum(each["requests"] for each in all_of),
        "failed": sum(each["failed"] for each in all_of),
        "rate": sum(each["rate"] for each in all_of),
        "p95": max(times, default=None),
    }
