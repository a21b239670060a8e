"""How the next backend is chosen: one small class each, and the registry.

`select` is called with the pool lock held and with candidates that are ready, have room and are never empty. It only
chooses: no I/O, no sleeping, no lock, no counters of others. A strategy's own memory is guarded by the same lock.
Clock and randomness are injected, so that a test or a simulation can replay any choice.

To add one, write a class with `@strategy("name")`; from another package, name it in the entry-point group
`load_balancer.strategies`. `GET /algorithm` shows the text behind the name, else its docstring: those here have a text,
because `python -OO` leaves docstrings out.
"""

from __future__ import annotations

import inspect
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from math import ceil
from typing import Any, ClassVar, TypeVar

from typing_extensions import TypedDict

from balancer.balancing.backends import Backend
from balancer.balancing.options import StrategyOptions
from balancer.balancing.ring import Ring
from balancer.errors import SettingsError
from balancer.protocol.request import Request
from balancer.protocol.requestkey import Key, request_key
from balancer.protocol.texts import quoted

ENTRY_POINT_GROUP = "load_balancer.strategies"
NAME_PATTERN = r"[!-~]{1,64}"  # visible ASCII
UNMEASURED_SECONDS = 1.0  # what a backend without a sample counts as once it is busy; Linkerd starts there too


class Strategy:
    """Base class: the decorator sets `name` and `text`."""

    name: ClassVar[str] = ""
    text: ClassVar[str] = ""
    # Whether `select` looks at response times. They are measured only for those that do: it costs every request.
    uses_times: ClassVar[bool] = True
    options: StrategyOptions = StrategyOptions()  # set by `create`, before anything is chosen
    # Candidates that the last `select` went past, and why each, in words: only to explain the choice.
    passed_over: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None) -> None:
        self.clock = clock
        self.rng = rng or random.Random()

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        """One of `candidates`, for this request."""
        raise NotImplementedError

    def scores(self, candidates: Sequence[Backend]) -> Sequence[float] | None:
        """What `select` compares, one number each, the lowest goes; None if it takes turns. Only to explain a choice:
        called with the lock held right before `select`, so keep it cheap and change nothing."""
        return None

    def expected_shares(self, ready: Sequence[Backend]) -> Mapping[str, float] | None:
        """Share of the traffic per backend id that this strategy aims at, or None if that depends on the traffic."""
        return None

    def backends_changed(self) -> None:
        """Called with the lock held when a weight was set or a backend removed: forget what was saved up."""

    def prepare(self, weights: Mapping[str, int]) -> None:
        """Called without the lock, by one thread at a time, before the first choice and whenever these have changed:
        for what takes long. `select` goes on with what there is until then, so replace it in one step."""

    @classmethod
    def description(cls) -> str:
        return cls.text or " ".join((inspect.getdoc(cls) or "").split())


REGISTRY: dict[str, type[Strategy]] = {}
S = TypeVar("S", bound=type[Strategy])


def strategy(name: str, text: str = "") -> Callable[[S], S]:
    """Register a Strategy class under `name`. `text` says what it does, in place of its docstring.

    Raises SettingsError for what is no name, and for one that another class has; a module may be imported again.
    """
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise SettingsError(
            f"strategy {name!r:.80}: expected a name such as by_user, up to 64 visible ASCII characters"
        )

    def register(cls: S) -> S:
        ours, theirs = _whole_name(cls), _whole_name(REGISTRY.get(name, cls))
        if ours != theirs:
            raise SettingsError(f"strategy {name!r} of {ours}: {theirs} has this name already; choose another")
        cls.name, cls.text = name, text
        REGISTRY[name] = cls
        return cls

    return register


def _whole_name(cls: type[Strategy]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def load_entry_points() -> None:
    """Register the strategies of installed packages. One that cannot be imported is a SettingsError naming it."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry.load()
        except (Exception, SystemExit) as error:  # whatever a foreign module does when it is imported
            raise SettingsError(f"strategy {entry.name!r} of {entry.value} cannot be loaded: {error}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, Strategy)):
            raise SettingsError(f"strategy {entry.name!r}: {entry.value} is not a Strategy class")
        strategy(entry.name, loaded.text)(loaded)


def create(name: str, options: StrategyOptions = StrategyOptions(), **injected: Any) -> Strategy:  # noqa: B008
    """A new strategy with no memory. Raises SettingsError with the valid names."""
    if name not in REGISTRY:
        raise SettingsError(f"unknown algorithm {quoted(name)}, expected one of: {', '.join(sorted(REGISTRY))}")
    made = REGISTRY[name](**injected)
    made.options = options
    return made


class StrategyView(TypedDict):
    name: str
    description: str


def describe() -> list[StrategyView]:
    """Name and description of each there is."""
    return [{"name": name, "description": cls.description()} for name, cls in REGISTRY.items()]


class SmoothTurns:
    """Smooth weighted round robin, the turn-taking that every strategy here uses for itself or for its ties.

    Each turn every candidate gains its weight; the richest goes and pays what all gained. Over sum(weights) turns each
    gets exactly its weight, spread as evenly as possible. Candidates that are away neither gain nor pay.

    `_credits` and `_weights` are those of `_candidates`, in their order, as long as these stay the same list, which
    they mostly do; `_saved` are the credits of all that have ever been candidates.
    """

    def __init__(self, weigh: Callable[[Sequence[Backend]], list[int]]) -> None:
        self._weigh = weigh
        self._saved: dict[Backend, int] = {}
        self._candidates: Sequence[Backend] = ()
        self._credits: list[int] = []
        self._weights: list[int] = []
        self._total = 0

    def next(self, candidates: Sequence[Backend]) -> Backend:
        if candidates is not self._candidates:
            self._turn_to(candidates)
        credits = [credit + weight for credit, weight in zip(self._credits, self._weights, strict=True)]
        richest = credits.index(max(credits))
        credits[richest] -= self._total
        self._credits = credits
        return candidates[richest]

    def _turn_to(self, candidates: Sequence[Backend]) -> None:
        self._saved.update(zip(self._candidates, self._credits, strict=True))
        self._candidates = candidates
        self._credits = [self._saved.get(backend, 0) for backend in candidates]
        self._weights = self._weigh(candidates)
        self._total = sum(self._weights)


def _weights(candidates: Sequence[Backend]) -> list[int]:
    return [backend.weight for backend in candidates]


def _drawn(candidates: Sequence[Backend], rng: random.Random) -> Backend:
    return rng.choices(candidates, _weights(candidates))[0]


def _shares(ready: Sequence[Backend]) -> dict[str, float]:
    total = sum(backend.weight for backend in ready)
    return {backend.id: backend.weight / total for backend in ready}


class TakingTurns(Strategy):
    """Base of the strategies that take turns by weight, at least among equals."""

    def __init__(self, **injected: Any) -> None:
        super().__init__(**injected)
        self.backends_changed()

    def backends_changed(self) -> None:
        self._turns = SmoothTurns(_weights)


@strategy(
    "round_robin",
    "Each backend in turn, exactly the same number of requests for all. Right for equal backends and requests of "
    "about equal cost; ignores weights and load.",
)
class RoundRobin(TakingTurns):
    uses_times = False

    def backends_changed(self) -> None:
        self._turns = SmoothTurns(lambda candidates: [1] * len(candidates))

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        return self._turns.next(candidates)

    def expected_shares(self, ready: Sequence[Backend]) -> Mapping[str, float] | None:
        return {backend.id: 1 / len(ready) for backend in ready}


@strategy(
    "weighted",
    "Smooth weighted round robin: requests in exact proportion to the weights (3:2:1 gives 50, 33 and 17 %), "
    "evenly spread rather than in bursts. Right for backends of known, unequal size.",
)
class Weighted(TakingTurns):
    uses_times = False

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        return self._turns.next(candidates)

    def expected_shares(self, ready: Sequence[Backend]) -> Mapping[str, float] | None:
        return _shares(ready)


@strategy(
    "least_connections",
    "The backend with the fewest requests in flight for its weight; ties take turns by weight. Right for requests "
    "of very different duration, and for backends of different or changing speed.",
)
class LeastConnections(TakingTurns):
    uses_times = False

    def scores(self, candidates: Sequence[Backend]) -> Sequence[float]:
        return [backend.active / backend.weight for backend in candidates]

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        least = candidates[0]
        tied = [least]
        for backend in candidates[1:]:
            # active / weight compared without dividing, so equal loads are exactly equal
            ours, theirs = backend.active * least.weight, least.active * backend.weight
            if ours < theirs:
                least, tied = backend, [backend]
            elif ours == theirs:
                tied.append(backend)
        return least if len(tied) == 1 else self._turns.next(tied)


@strategy(
    "power_of_two",
    "The less loaded of two backends drawn at random by weight: nearly as even as asking all of them, and several "
    "balancers in front of the same backends do not all run to the same one. Right for many backends, or many "
    "balancers.",
)
class PowerOfTwo(Strategy):
    uses_times = False

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        first = _drawn(candidates, self.rng)
        rest = [backend for backend in candidates if backend is not first]
        if not rest:
            return first
        second = _drawn(rest, self.rng)
        return second if second.active * first.weight < first.active * second.weight else first


@strategy(
    "random",
    "A backend drawn by weight, whoever had the request before. Right for very many requests, or for many balancers "
    "that know nothing of each other.",
)
class Random(Strategy):
    uses_times = False

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        return _drawn(candidates, self.rng)

    def expected_shares(self, ready: Sequence[Backend]) -> Mapping[str, float] | None:
        return _shares(ready)


@strategy(
    "consistent_hash",
    "The same backend for the same key (hash_key: the client's address, the path, a header, cookie or query "
    "parameter), as long as it is available and has no more than hash_load_factor times its share of the requests in "
    "flight; what is beyond that goes to the key's next one. Adding or losing one of ten backends moves a tenth of "
    "the keys. Requests without the key take turns by weight. Right for backends that cache, or keep sessions.",
)
class ConsistentHash(TakingTurns):
    """`_ring` is replaced by `prepare` in one step; a backend that it does not have yet gets no keys until then."""

    uses_times = False

    def __init__(self, **injected: Any) -> None:
        super().__init__(**injected)
        self._ring = Ring({})

    def prepare(self, weights: Mapping[str, int]) -> None:
        self._ring = Ring(weights)

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        self.passed_over = {}
        key = self._key(request)
        if key:
            by_id = {backend.id: backend for backend in candidates}
            in_all = self.options.hash_load_factor * (sum(backend.active for backend in candidates) + 1)
            weights = sum(backend.weight for backend in candidates)
            for owner in self._ring.owners(key):
                backend = by_id.pop(owner, None)
                if backend is None:
                    continue
                most = ceil(in_all * backend.weight / weights)
                if backend.active < most:
                    return backend
                self.passed_over[owner] = f"above its share: {backend.active} in flight of at most {most}"
                if not by_id:
                    break
        return self._turns.next(candidates)

    @cached_property
    def _key(self) -> Key:
        return request_key(self.options.hash_key, self.options.networks)


class ExpectedSoonest(TakingTurns):
    """Base of the strategies that go by time: expected time of one request x (those in flight + 1) / weight.

    The expected time is what is remembered, or for how long a backend has owed an answer by now if that is longer: a
    backend that stalls gives no samples that would tell.
    """

    def remembered(self, backend: Backend, now: float) -> float:
        """Seconds to the first byte, 0.0 if never measured."""
        raise NotImplementedError

    def scores(self, candidates: Sequence[Backend]) -> list[float]:
        now = self.clock()
        # Never measured: first if idle, else as if slow, or it would draw all traffic until its first answer.
        return [
            max(
                self.remembered(backend, now) or (UNMEASURED_SECONDS if backend.active else 0.0),
                backend.speed.silence(now),
            )
            * (backend.active + 1)
            / backend.weight
            for backend in candidates
        ]

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        scores = self.scores(candidates)
        lowest = min(scores)
        tied = [backend for backend, score in zip(candidates, scores, strict=True) if score == lowest]
        return tied[0] if len(tied) == 1 else self._turns.next(tied)


@strategy(
    "least_response_time",
    "The backend expected to answer first: its remembered time to first byte (EWMA; a failure counts as 1 s), or "
    "for how long it has owed an answer, times its requests in flight plus one, over its weight. An idle "
    "backend's remembered time halves every 5 s, so a slow one is tried again; one never measured is tried first. "
    "Right when speed differs for reasons nobody knows beforehand.",
)
class LeastResponseTime(ExpectedSoonest):
    def remembered(self, backend: Backend, now: float) -> float:
        return backend.speed.response_time(now)


@strategy(
    "peak_ewma",
    "As least_response_time, but one slow answer counts in full at once and is forgotten only as time passes (it "
    "halves every 5 s), as in Finagle and Linkerd. Right when a backend that was slow a moment ago is better "
    "avoided, and the others have room for its share.",
)
class PeakEwma(ExpectedSoonest):
    def remembered(self, backend: Backend, now: float) -> float:
        return backend.speed.peak_time(now)
