"""What was decided at run time over the configuration: by whom, when, and until when, if not for good.

After a restart it is given back by the rule of a reload (`comparison`): a decision holds as long as the configuration
says what it said when that was made. Nobody has to tell of a decision: what differs from the configuration is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from threading import Lock
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from balancer.balancing import strategies
from balancer.balancing.backends import AdminState
from balancer.balancing.changes import ACTOR, acting
from balancer.balancing.options import StrategyOptions
from balancer.balancing.pools import Pools
from balancer.config.comparison import configured
from balancer.config.settings import Settings, prefix_of, show
from balancer.config.values import DrainTimeout, MaxConnections, Weight
from balancer.protocol.origin import Origin

ALGORITHM = "algorithm"
UNDONE_KEPT = 1000  # by whom, until a cluster is told, if there is one

News = Literal["change_undone", "state_restored"]


class Fields(BaseModel):
    """What may be decided of a backend, and what holds for one that the configuration does not know."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    weight: Weight = 1
    max_connections: MaxConnections | None = None
    drain_timeout: DrainTimeout | None = None
    admin_state: AdminState = "ready"


class Key(NamedTuple):
    """What was decided about: a field of a backend; whether there is one, if there is no `field`; or the algorithm."""

    pool: str
    backend: str
    field: str

    def __str__(self) -> str:
        """In the words of the configuration."""
        named = f"backends.{self.backend}" if self.backend else ""
        return prefix_of(self.pool) + ".".join(filter(None, (named, self.field)))


Facts = Mapping[Key, tuple[Any, Any]]  # what there is, and what the configuration says


class Decision(TypedDict):
    """`value` instead of `over`, which the configuration says. `before` comes back when `until` is over, `over` if that
    is None. A backend that was added has its URL as its value, one that was removed None."""

    value: Any
    over: Any
    by: str | None
    at: float
    until: float | None
    before: Decision | None


class DecisionView(TypedDict):
    """`source` is `state` if it was made before the balancer was started."""

    value: str
    source: Literal["api", "state"]
    since: float
    by: str | None
    until: float | None


class Decisions:
    """What differs from the configuration. `note` is told what happens without anybody's asking for it; `told` is
    called, off the lock, after something was decided; whoever cares sets it.

    `_lock` is held while a decision is made or undone, and taken before those of pools; it guards `_undone`, and
    `_made`, which is replaced and never changed, so that anybody may read it.
    """

    def __init__(self, settings: Callable[[], Settings], pools: Pools, note: Callable[[News, str, str], None]) -> None:
        self._settings = settings
        self._pools = pools
        self._note = note
        self._wall_clock = time.time
        self._started = time.time()
        self.told: Callable[[], None] = lambda: None
        self._lock = Lock()
        self._made: Mapping[Key, Decision] = {}
        self._undone: dict[Key, str | None] = {}  # by whom, of those before that hold no more

    @contextmanager
    def making(self, keys: Collection[Key] = (), seconds: float | None = None) -> Iterator[None]:
        """Whatever changes in this block was decided by its ACTOR, and what `keys` are for, for so many seconds; also
        if that is what there was before."""
        with self._lock:
            before = self._look(None)
            yield
            made, by = dict(self._look(ACTOR.get())), ACTOR.get()
            until = None if seconds is None else self._wall_clock() + seconds
            facts = dict(self._facts())
            for key in filter(facts.__contains__, keys):
                value, over = facts[key]
                known = before.get(key)
                back = known["before"] if known is not None and known["until"] is not None else known
                made.pop(key, None)
                if until is not None or value != over:
                    made[key] = self._decision(value, over, by, until, None if until is None else back)
            self._made = made
            self._undone |= dict.fromkeys(before.keys() - made.keys(), by)
            for key in [*islice(self._undone, max(0, len(self._undone) - UNDONE_KEPT))]:
                del self._undone[key]
        self.told()

    def undo(self) -> None:
        """End what was decided for a time that is over. Call about once a second."""
        if not any(map(self._is_over, self._made.values())):
            return
        with self._lock:
            for key, each in self._look(None).items():
                if self._is_over(each):
                    self._undo(key, each)
        self.told()

    def _is_over(self, decision: Decision) -> bool:
        return decision["until"] is not None and decision["until"] <= self._wall_clock()

    def _undo(self, key: Key, over: Decision) -> None:
        made, back = dict(self._made), over["before"]
        value = over["over"] if back is None else back["value"]
        del made[key]
        if back is not None:
            made[key] = back
        self._made = made
        with suppress(KeyError):  # it was removed in this moment
            self._set(key, value)
            text = f"{key} {show(value)} again, {show(over['value'])} was for a time"
            self._note("change_undone", text, key.backend)

    def _look(self, by: str | None) -> Mapping[Key, Decision]:
        """Forget what holds no more, as after a reload; what is new was decided now."""
        made: dict[Key, Decision] = {}
        for key, (value, over) in self._facts():
            known = self._made.get(key)
            if known is not None and (known["value"], known["over"]) == (value, over):
                made[key] = known
            elif value != over:
                made[key] = self._decision(value, over, by)
        self._made = made
        return made

    def _decision(
        self, value: Any, over: Any, by: str | None, until: float | None = None, before: Decision | None = None
    ) -> Decision:
        return {"value": value, "over": over, "by": by, "at": self._wall_clock(), "until": until, "before": before}

    def _facts(self) -> Iterator[tuple[Key, tuple[Any, Any]]]:
        """Whatever can be decided about: what there is, and what the configuration says."""
        for name, wanted in self._settings().by_pool().items():
            pool = self._pools.get(name)
            if pool is None:
                continue  # a reload is about to bring it
            yield Key(name, "", ALGORITHM), (pool.algorithm, wanted.algorithm)
            said = {backend.id: configured(backend) for backend in wanted.backends}
            live = {backend.id: backend for backend in pool.backends() if not backend.is_leaving}
            for backend_id in said.keys() - live.keys():
                yield Key(name, backend_id, ""), (None, said[backend_id])
            for backend in live.values():
                over, url = said.get(backend.id), backend.origin.url
                is_another = backend.source == "api" or (over is not None and over["url"] != url)
                yield Key(name, backend.id, ""), (url if is_another else over, over)
                for field, default in Fields():
                    yield (
                        Key(name, backend.id, field),
                        (getattr(backend, field), backend.configured.get(field, default)),
                    )

    def _set(self, key: Key, value: Any) -> None:
        """Raises KeyError or ValueError if that cannot be any more."""
        pool = self._pools.get(key.pool)
        if pool is None:
            raise KeyError(key.pool)
        if key.field == ALGORITHM:
            options = self._settings().by_pool()[key.pool].options(StrategyOptions)
            pool.use(strategies.create(value, options))
        elif key.field:
            Fields.model_validate({key.field: value})
            pool.update(key.backend, {key.field: value})
        else:
            if pool.get(key.backend) is not None:
                pool.remove(key.backend)
            if value is not None:
                self._pools.add(pool, key.backend, Origin.parse(value))

    # Over restarts.

    def kept(self) -> dict[str, Decision]:
        with self._lock:
            return {" ".join(key): each for key, each in self._look(None).items()}

    def restore(self, kept: Mapping[str, Decision]) -> None:
        """Decide this again, before the first request. Raises TypeError for a key that is none."""
        found = [(Key(*name.split(" ")), each) for name, each in kept.items()]
        with self._lock:
            lost = self._decide(found)
        held = ", ".join(f"{key} {show(each['value'])}" for key, each in found if key not in lost)
        left_out = ", ".join(f"{key} {show(each['value'])} ({lost[key]})" for key, each in found if key in lost)
        text = f"decided before: {held or 'nothing that holds'}"
        self._note("state_restored", f"{text}; left out: {left_out}" if lost else text, "")

    def _decide(self, found: Collection[tuple[Key, Decision]]) -> dict[Key, str]:
        """Again. Why each could not be, of those that could not."""
        lost: dict[Key, str] = {}
        for is_field in (False, True):  # of backends that are added first
            facts = dict(self._facts())
            for key, each in found:
                if bool(key.field) is is_field and (why := self._why_not(key, each, facts, lost)):
                    lost[key] = why
        return lost

    def _why_not(self, key: Key, each: Decision, facts: Facts, lost: Collection[Key]) -> str:
        """Decide it again; why that cannot be, empty if it is done."""
        if self._is_over(each):
            back = each["before"]
            return "its time is over" if back is None else self._why_not(key, back, facts, lost)
        if key.field and key not in facts:
            return "there is no such backend or pool"
        is_configured_now = Key(key.pool, key.backend, "") in lost and key.field != "admin_state"
        value, over = facts.get(key, (None, None))
        if over != each["over"] or is_configured_now:
            return "the configuration has changed"
        try:
            if each["value"] != value:
                with acting(each["by"]):
                    self._set(key, each["value"])
        except (KeyError, ValueError):
            return "that is not possible any more"
        made = {**self._made, key: each}
        if each["value"] == over and each["until"] is None:
            del made[key]  # it is undone
        self._made = made
        return ""

    # Among several balancers.

    def since(self, seen: Mapping[Key, Decision]) -> tuple[Mapping[Key, Decision], dict[Key, Decision]]:
        """What holds now; and what was decided since that was `seen`, with what holds no more: as the configuration
        says."""
        with self._lock:
            made = self._look(None)
            new = {key: each for key, each in made.items() if each != seen.get(key)}
            gone = seen.keys() - made.keys()
            over = {key: said for key, (_, said) in self._facts()} if gone else {}
            new |= {key: self._decision(over.get(key), over.get(key), self._undone.get(key)) for key in gone}
            self._undone = {}
            return made, new

    def merge(
        self, decided: Mapping[Key, Decision], seen: Mapping[Key, Decision]
    ) -> tuple[dict[Key, Decision | None], dict[Key, str]]:
        """What others have decided, but for what was decided here after it was `seen`. Returns what holds now of these,
        and why each could not be, of those that could not."""
        with self._lock:
            made = self._look(None)
            found = [(key, each) for key, each in decided.items() if made.get(key) == seen.get(key)]
            lost = self._decide(found)
            return {key: self._made.get(key) for key, _ in found}, lost

    # Reading.

    def ends(self) -> dict[tuple[str, str], float]:
        """When the first decision for a time ends about each backend, by its pool and its id; about a pool without."""
        found: dict[tuple[str, str], float] = {}
        for key, each in self._made.items():
            if each["until"] is not None:
                about = key.pool, key.backend
                found[about] = min(each["until"], found.get(about, each["until"]))
        return found

    def describe(self) -> dict[str, DecisionView]:
        """In the words of the configuration."""
        with self._lock:
            made = self._look(None)
        return {
            str(key): {
                "value": show(each["value"]) if each["value"] is not None or key.field else "removed",
                "source": "state" if each["at"] < self._started else "api",
                "since": each["at"],
                "by": each["by"],
                "until": each["until"],
            }
            for key, each in made.items()
        }
