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
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from heapq import heapify, heappop, heappush, heapreplace
from itertools import accumulate
from math import ceil, exp2, inf
from typing import Any, ClassVar, TypeVar

from typing_extensions import TypedDict

from balancer.balancing.backends import Backend
from balancer.balancing.options import StrategyOptions
from balancer.balancing.ring import Ring
from balancer.balancing.speed import EWMA_HALF_LIFE_SECONDS, Speed, faded
from balancer.balancing.turns import DIGITS, FORGOTTEN, SmoothTurns
from balancer.errors import SettingsError
from balancer.protocol.request import Request
from balancer.protocol.requestkey import Key, request_key
from balancer.protocol.texts import quoted

ENTRY_POINT_GROUP = "load_balancer.strategies"
NAME_PATTERN = r"[!-~]{1,64}"  # visible ASCII
UNMEASURED_SECONDS = 1.0  # what a backend without a sample counts as once it is busy; Linkerd starts there too
MOST_FADED = 1000.0  # seconds: what has not faded for so long is well within what a float can tell
DRAWS = 16  # until one is drawn that is not away, before those who are not are gathered


class Strategy:
    """Base class: the decorator sets `name` and `text`."""

    name: ClassVar[str] = ""
    text: ClassVar[str] = ""
    # Whether `select` looks at response times. They are measured only for those that do: it costs every request.
    uses_times: ClassVar[bool] = True
    # Whether it looks at requests in flight, so that it matters at once what other processes of the balancer have.
    uses_load: ClassVar[bool] = True
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
        """Called with the lock held when a weight was set or a backend removed."""

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
    from importlib.metadata import entry_points

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
        load_entry_points()
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


class Indexed(Strategy):
    """Base of the strategies that keep their candidates in order, and so need not ask each of them for each request.

    The pool tells them of every change, with its lock held: `gather` who the candidates are, `taken` or `changed` after
    a change of one of them. What these two return is what the strategy goes by, for the record of a choice. A class
    that has a `select` of its own is asked by that alone.
    """

    follows: ClassVar[bool] = True  # every change of a backend; False: only of those that are away
    explains: ClassVar[bool] = False  # a choice cannot be told without `now` or `passed_over`
    has_ranks: ClassVar[bool] = False
    now = 0.0  # of `clock`, when the last choice was made

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        self.gather(candidates)
        chosen = self.choose(request)
        assert chosen is not None
        self.taken(chosen)
        return chosen

    def gather(self, candidates: Sequence[Backend]) -> None:
        """These are the candidates until the next time."""
        raise NotImplementedError

    def choose(self, request: Request) -> Backend | None:
        """One of them, for this request; None if all are away. It has not been `taken` yet."""
        raise NotImplementedError

    def leave(self, backend: Backend) -> None:
        """The one that was just chosen has no room: it is away until it has `changed`."""
        raise NotImplementedError

    def taken(self, backend: Backend) -> Any:
        """The one that was just chosen has the request."""
        return self.changed(backend)

    def changed(self, backend: Backend) -> Any:
        """Any backend has one request more or less, or has answered, or can be chosen again."""
        raise NotImplementedError

    def in_turn(self, candidates: Sequence[Backend]) -> Sequence[Backend]:
        """In the order of those among whom it makes no difference. A cluster's members have each their own, or all
        would go to the same backend at the same moment."""
        return self.rng.sample(candidates, len(candidates)) if self.options.is_member else candidates

    def rank(self, backend: Backend) -> Any:
        """What the strategy goes by, None if that is nothing of the backend's own."""

    def ranks(self, candidates: Sequence[Backend]) -> Sequence[Any]:
        """Of some that were gathered."""
        return [None] * len(candidates)

    def score(self, rank: Any, now: float) -> float | None:
        """What a rank comes to at a moment: the lowest goes."""
        return None


def _shares(ready: Sequence[Backend]) -> dict[str, float]:
    total = sum(backend.weight for backend in ready)
    return {backend.id: backend.weight / total for backend in ready}


class TakingTurns(SmoothTurns, Indexed):
    """Base of the strategies that take turns."""

    follows = False

    def __init__(self, **injected: Any) -> None:
        Indexed.__init__(self, **injected)
        SmoothTurns.__init__(self)

    def gather(self, candidates: Sequence[Backend]) -> None:
        super().gather(self.in_turn(candidates))


@strategy(
    "round_robin",
    "Each backend in turn, exactly the same number of requests for all. Right for equal backends and requests of "
    "about equal cost; ignores weights and load.",
)
class RoundRobin(TakingTurns):
    uses_times = uses_load = False

    @staticmethod
    def weigh(backend: Backend) -> int:
        return 1

    def expected_shares(self, ready: Sequence[Backend]) -> Mapping[str, float] | None:
        return {backend.id: 1 / len(ready) for backend in ready}


@strategy(
    "weighted",
    "Smooth weighted round robin: requests in exact proportion to the weights (3:2:1 gives 50, 33 and 17 %), "
    "evenly spread rather than in bursts. Right for backends of known, unequal size.",
)
class Weighted(TakingTurns):
    uses_times = uses_load = False

    def expected_shares(self, ready: Sequence[Backend]) -> Mapping[str, float] | None:
        return _shares(ready)


# What a strategy goes by: the lowest is chosen. Score, turn among equals, place among the candidates, itself, its rank.
Entry = tuple[float, float, int, Backend, Any]


class LowestFirst(Indexed):
    """Base of the strategies that go by a score: the lowest goes, and equals take turns by weight.

    A heap has an entry for each candidate. One that has changed gets another entry, and its old one is dropped when it
    comes up. Among equals goes who is due first. A round is the time in which each gets its weight, so each is due
    1 / weight of a round after its last turn: no sooner, and while others have a lower score no turns are saved up.
    What is left of that is kept, whatever changes.
    """

    has_ranks = True

    def __init__(self, **injected: Any) -> None:
        super().__init__(**injected)
        self._heap: list[Entry] = []
        self._entries: dict[Backend, Entry] = {}  # the valid ones
        self._candidates: dict[Backend, tuple[int, int]] = {}  # place and weight
        self._due: dict[Backend, float] = {}  # in rounds
        self._left: dict[Backend, float] = {}  # of those that are no candidates: turns of their own until they are due
        self._total = 0  # weight of all
        self._time = 0.0  # in rounds

    def scores(self, candidates: Sequence[Backend]) -> Sequence[float]:
        self.look()
        return [self.score(self.rank(backend), self.now) for backend in candidates]

    def look(self) -> None:
        """Before scores are compared with those of before."""

    def score(self, rank: Any, now: float) -> float:
        raise NotImplementedError

    def key(self, rank: Any) -> float:
        """What is compared: in the order of scores at any time, until the rank changes."""
        raise NotImplementedError

    def gather(self, candidates: Sequence[Backend]) -> None:
        self.look()
        for backend, (_, weight) in self._candidates.items():
            self._left[backend] = round((self._due[backend] - self._time) * weight, DIGITS)
        in_turn = enumerate(self.in_turn(candidates))
        self._candidates = {backend: (place, backend.weight) for place, backend in in_turn}
        self._total = sum(backend.weight for backend in candidates)
        self._due = {backend: self._time + self._left.pop(backend, 1.0) / backend.weight for backend in candidates}
        if len(self._left) > FORGOTTEN:
            self._left = {}
        self._heap = [self._entry(backend) for backend in candidates]
        self._entries = {entry[3]: entry for entry in self._heap}
        heapify(self._heap)

    def _entry(self, backend: Backend) -> Entry:
        rank, due = self.rank(backend), self._due[backend]
        if due < self._time:
            due = self._due[backend] = self._time
        return self.key(rank), due, self._candidates[backend][0], backend, rank

    def ranks(self, candidates: Sequence[Backend]) -> Sequence[Any]:
        entries = self._entries
        return [entries[each][4] if each in entries else self.rank(each) for each in candidates]

    def choose(self, request: Request) -> Backend | None:
        heap, entries = self._heap, self._entries
        if len(heap) > 4 * len(entries) + 64:  # most of them are old
            self._heap = heap = [*entries.values()]
            heapify(heap)
        while heap:
            entry = heap[0]
            backend = entry[3]
            if entries.get(backend) is entry:
                return backend
            heappop(heap)
        return None

    def leave(self, backend: Backend) -> None:
        del self._entries[backend]

    def taken(self, backend: Backend) -> Any:
        due, weight = self._due[backend], backend.weight
        self._time = max(self._time + 1 / self._total, due - 1 / weight)
        self._due[backend] = due + 1 / weight
        entry = self._entries[backend] = self._entry(backend)
        heapreplace(self._heap, entry)
        return entry[4]

    def changed(self, backend: Backend) -> Any:
        if backend not in self._candidates:
            return None
        self.look()
        entry = self._entries[backend] = self._entry(backend)
        heappush(self._heap, entry)
        return entry[4]


@strategy(
    "least_connections",
    "The backend with the fewest requests in flight for its weight; ties take turns by weight. Right for requests "
    "of very different duration, and for backends of different or changing speed.",
)
class LeastConnections(LowestFirst):
    """Its rank is its score. Loads that are equal are so exactly: division rounds equal fractions to the same."""

    uses_times = False

    def rank(self, backend: Backend) -> float:
        return backend.active / backend.weight

    def score(self, rank: float, now: float) -> float:
        return rank

    def key(self, rank: float) -> float:
        return rank


class Drawing(Indexed):
    """Base of the strategies that draw by weight: a number on a line on which each has so much room."""

    follows = False

    def __init__(self, **injected: Any) -> None:
        super().__init__(**injected)
        self.gather(())

    def gather(self, candidates: Sequence[Backend]) -> None:
        self._candidates = candidates
        self._ends = [*accumulate(backend.weight for backend in candidates)]
        self._away: set[Backend] = set()

    def leave(self, backend: Backend) -> None:
        self._away.add(backend)

    def changed(self, backend: Backend) -> None:
        self._away.discard(backend)

    def draw(self, other_than: Backend | None = None) -> Backend | None:
        """None if there is nobody else."""
        candidates, ends, away = self._candidates, self._ends, self._away
        for _ in range(DRAWS if candidates else 0):
            drawn = candidates[bisect(ends, self.rng.random() * ends[-1], 0, len(ends) - 1)]
            if drawn is not other_than and drawn not in away:
                return drawn
        here = [backend for backend in candidates if backend is not other_than and backend not in away]
        return self.rng.choices(here, [backend.weight for backend in here])[0] if here else None


@strategy(
    "power_of_two",
    "The less loaded of two backends drawn at random by weight: nearly as even as asking all of them, and several "
    "balancers in front of the same backends do not all run to the same one. Right for many backends, or many "
    "balancers.",
)
class PowerOfTwo(Drawing):
    uses_times = False

    def choose(self, request: Request) -> Backend | None:
        first = self.draw()
        second = self.draw(first) if first is not None else None
        if first is None or second is None:
            return first
        ours, other = first.active + first.elsewhere, second.active + second.elsewhere
        return second if other * first.weight < ours * second.weight else first


@strategy(
    "random",
    "A backend drawn by weight, whoever had the request before. Right for very many requests, or for many balancers "
    "that know nothing of each other.",
)
class Random(Drawing):
    uses_times = uses_load = False

    def choose(self, request: Request) -> Backend | None:
        return self.draw()

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
    follows = explains = True

    def __init__(self, **injected: Any) -> None:
        super().__init__(**injected)
        self._ring = Ring({})
        self.gather(())

    def prepare(self, weights: Mapping[str, int]) -> None:
        self._ring = Ring(weights)

    def gather(self, candidates: Sequence[Backend]) -> None:
        super().gather(candidates)
        self._here: dict[str, Backend] = {}
        self._active: dict[str, int] = {}  # of each that is here, as it is counted in `_in_flight`
        self._in_flight = self._weight = 0  # of all that are here
        for backend in candidates:
            self._enter(backend)

    def _enter(self, backend: Backend) -> None:
        self._here[backend.id], self._active[backend.id] = backend, backend.active
        self._in_flight += backend.active
        self._weight += backend.weight

    def choose(self, request: Request) -> Backend | None:
        self._is_turn = False
        self.passed_over = passed_over = {}
        key = self._key(request)
        if key:
            in_all = self.options.hash_load_factor * (self._in_flight + 1)
            for owner in self._ring.owners(key):
                backend = self._here.get(owner)
                if backend is None or owner in passed_over:
                    continue
                most = ceil(in_all * backend.weight / self._weight)
                if backend.active < most:
                    return backend
                passed_over[owner] = f"above its share: {backend.active} in flight of at most {most}"
                if len(passed_over) == len(self._here):
                    break
        self._is_turn = True
        return super().choose(request)

    def leave(self, backend: Backend) -> None:
        if self._is_turn:
            super().leave(backend)
        else:
            self._in_flight -= self._active.pop(backend.id)
            self._weight -= backend.weight
            del self._here[backend.id]

    def taken(self, backend: Backend) -> None:
        if self._is_turn:
            super().taken(backend)
        self.changed(backend)

    def changed(self, backend: Backend) -> None:
        if backend not in self._places:
            return
        super().changed(backend)
        if backend.id in self._here:
            self._in_flight += backend.active - self._active[backend.id]
            self._active[backend.id] = backend.active
        else:
            self._enter(backend)

    @cached_property
    def _key(self) -> Key:
        return request_key(self.options.hash_key, self.options.networks)


# Seconds that are remembered, and of when; since when it owes an answer, inf if it owes none (entries are compared);
# requests in flight; weight.
Expectation = tuple[float, float, float, int, int]


class ExpectedSoonest(LowestFirst):
    """Base of the strategies that go by time: expected time of one request x (those in flight + 1) / weight.

    The expected time is what is remembered, or for how long a backend has owed an answer by now if that is longer: a
    backend that stalls gives no samples that would tell.

    Memories fade all at the same pace, so that their order does not change: keys are scores as they would be if they
    had not faded since `_epoch`. What a backend owes only grows by that measure: a key is too low at most, and is made
    anew when it comes up.
    """

    explains = True

    def __init__(self, **injected: Any) -> None:
        super().__init__(**injected)
        self._epoch, self._unfaded = -inf, 1.0

    def memory(self, speed: Speed) -> float:
        """Seconds to the first byte, 0.0 if never measured."""
        raise NotImplementedError

    def look(self) -> None:
        self.now = self.clock()
        if self.now - self._epoch > MOST_FADED:
            self._epoch = self.now
            self.gather([*self._candidates])
        self._unfaded = exp2((self.now - self._epoch) / EWMA_HALF_LIFE_SECONDS)

    def rank(self, backend: Backend) -> Expectation:
        speed = backend.speed
        owes_since = speed.answered_at if speed.unanswered else inf
        return self.memory(speed), speed.ewma_at, owes_since, backend.active, backend.weight

    def score(self, rank: Expectation, now: float) -> float:
        seconds, at, owes_since, active, weight = rank
        # Never measured: first if idle, else as if slow, or it would draw all traffic until its first answer.
        expected = faded(seconds, now - at) or (UNMEASURED_SECONDS if active else 0.0)
        if now - owes_since > expected:
            expected = now - owes_since
        return expected * (active + 1) / weight

    def key(self, rank: Expectation) -> float:
        return self.score(rank, self.now) * self._unfaded

    def choose(self, request: Request) -> Backend | None:
        self.look()
        while (backend := super().choose(request)) is not None:
            too_low, turn, place, _, rank = self._heap[0]
            if rank[2] == inf or (key := self.key(rank)) <= too_low:
                break
            entry = self._entries[backend] = key, turn, place, backend, rank
            heapreplace(self._heap, entry)
        return backend


@strategy(
    "least_response_time",
    "The backend expected to answer first: its remembered time to first byte (EWMA; a failure counts as 1 s), or "
    "for how long it has owed an answer, times its requests in flight plus one, over its weight. An idle "
    "backend's remembered time halves every 5 s, so a slow one is tried again; one never measured is tried first. "
    "Right when speed differs for reasons nobody knows beforehand.",
)
class LeastResponseTime(ExpectedSoonest):
    def memory(self, speed: Speed) -> float:
        return speed.ewma


@strategy(
    "peak_ewma",
    "As least_response_time, but one slow answer counts in full at once and is forgotten only as time passes (it "
    "halves every 5 s), as in Finagle and Linkerd. Right when a backend that was slow a moment ago is better "
    "avoided, and the others have room for its share.",
)
class PeakEwma(ExpectedSoonest):
    def memory(self, speed: Speed) -> float:
        return speed.peak
