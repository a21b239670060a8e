"""Which backends there are, where sources look for them: what they find is brought into the pools, and kept so.

A source that fails, or finds nobody, takes nobody away; and what takes more than half of its backends away must be
found twice. Who goes drains, as one that was removed by hand. What the operator decides of a backend holds until its
source says something else of the same; one that was removed by hand stays away as long as its source names it.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from ipaddress import ip_address
from threading import Event, Lock, Thread
from typing import Any, Literal

from typing_extensions import TypedDict

from balancer.balancing.backends import ID_PATTERN, MAX_WEIGHT, Backend
from balancer.balancing.changes import ACTOR
from balancer.balancing.members import PoolChanges
from balancer.balancing.pool import BackendPool
from balancer.balancing.pools import Pools
from balancer.protocol.origin import Origin
from balancer.protocol.texts import shown

RETRY_SECONDS = 1.0  # after a first failure; twice as long after each further one
CONFIRM_SECONDS = 1.0  # until the second look at what seems to take many backends away
ID_LENGTH = 64  # at most
FIRST_SECONDS = 10.0  # after which nobody waits any more for a first word
LONGEST_ERROR = 1000  # bytes
JOIN_SECONDS = 1.0  # for a source that does not end at once; it can change nothing any more
DECIDED = ("weight", "max_connections", "drain_timeout")  # what a source says of a backend, beside where it is

State = Literal["starting", "good", "failing", "doubtful"]
News = Literal["source_failed", "source_recovered"]


class SourceFailed(Exception):
    """Why nothing was found, or nobody started, in one line."""


@dataclass(frozen=True, slots=True)
class Found:
    """A backend as a source has it, by the names of the settings. Raises ValueError if it cannot be one."""

    id: str
    pool: str
    origin: Origin
    weight: int = 1
    max_connections: int | None = None
    drain_timeout: float | None = None

    def __post_init__(self) -> None:
        """Others have said this, so that no part is to be relied on."""
        origin = self.origin
        if not re.fullmatch(ID_PATTERN, self.id):
            raise ValueError(f"{self.id!r} cannot be an id")
        if origin.address:
            ip_address(origin.address)
        if not (origin.is_unix or 0 < origin.port < 65536) or not 0 <= self.weight <= MAX_WEIGHT:
            raise ValueError(f"{self.id}: port {origin.port} or weight {self.weight} is out of range")

    def changes(self, before: Found | None) -> dict[str, Any]:
        """What is to be set that was something else before."""
        fields = {name: getattr(self, name) for name in ("origin", *DECIDED)}
        return {name: value for name, value in fields.items() if before is None or value != getattr(before, name)}

    @property
    def configured(self) -> dict[str, Any]:
        return {"url": self.origin.url, **{name: getattr(self, name) for name in DECIDED}}


class Source:
    """Looks for backends. `place` is where, and `key` all that it was made of: by that a reload knows whether it is the
    same. `pool` is the only one that it finds backends for, None if it names one for each."""

    kind = ""
    longest_pause = 5.0  # seconds between two looks while it fails

    def __init__(self, name: str, place: str, key: object, pool: str | None = None) -> None:
        self.name, self.place, self.key, self.pool = name, place, key, pool
        self.complaints: list[str] = []  # whom it has left out of what it told last, and why
        self.stopping = Event()

    def look(self) -> Generator[Sequence[Found], None, None]:
        """All backends, asked for anew at first and then whenever there is news, until `stopping` is set. Raises
        SourceFailed, or whatever comes of what others say. Runs in a thread of its own."""
        raise NotImplementedError

    def stop(self) -> None:
        """End whatever `look` waits for, from any thread."""
        self.stopping.set()

    @property
    def title(self) -> str:
        """By which it is known after a restart, unless it looks elsewhere then."""
        return f"{self.name} {self.place}"


class SourceView(TypedDict):
    """`age` is how many seconds ago it last told who is there, None if it never has. It is `doubtful` while it wants to
    take away more than half of its `backends`, and has said so once."""

    name: str
    kind: str
    pool: str | None
    state: State
    backends: int
    age: float | None
    failures: int
    last_error: str | None


@dataclass(slots=True, eq=False)
class Watch:
    """One source, and what came of it. The lock of Discovery guards all of it."""

    source: Source
    applied: Mapping[str, Found] = field(default_factory=dict)  # is in the pools
    trusted: Mapping[str, Found] = field(default_factory=dict)  # the last answer that was not in doubt
    doubted: Mapping[str, Found] | None = None  # one that must come twice
    told_at: float | None = None
    failures: int = 0
    in_a_row: int = 0
    last_error: str | None = None
    thread: Thread | None = None
    _kept: tuple[Mapping[str, Found] | None, list[dict[str, Any]]] = (None, [])

    def kept(self) -> list[dict[str, Any]]:
        """What is applied, as a file can keep it: it is asked for once a second, and hardly ever another."""
        if self._kept[0] is not self.applied:
            self._kept = self.applied, [asdict(each) for each in self.applied.values()]
        return self._kept[1]

    @property
    def state(self) -> State:
        if self.in_a_row:
            return "failing"
        return "starting" if self.told_at is None else "good" if self.doubted is None else "doubtful"

    def describe(self, now: float) -> SourceView:
        return {
            "name": self.source.name,
            "kind": self.source.kind,
            "pool": self.source.pool,
            "state": self.state,
            "backends": len(self.applied),
            "age": None if self.told_at is None else now - self.told_at,
            "failures": self.failures,
            "last_error": self.last_error,
        }


class Discovery:
    """All sources. `start` and `stop` once each; `use` at any time. `note` is told what happens to them.

    `_lock` is held while what one has found is brought into the pools, and guards `_watches`, by the names of the
    sources, what is in them, and the other fields here. It is taken before those of pools.
    """

    def __init__(self, pools: Pools, note: Callable[[News, str], None]) -> None:
        self._pools = pools
        self._note = note
        self._lock = Lock()
        self._watches: dict[str, Watch] = {}
        self._is_running = False
        self._started_at = math.inf

    def start(self) -> None:
        with self._lock:
            self._is_running, self._started_at = True, time.monotonic()
            for watch in self._watches.values():
                self._start(watch)

    def stop(self) -> None:
        """Stop and join, whatever a source waits for."""
        with self._lock:
            self._is_running = False
            watches = list(self._watches.values())
            for watch in watches:
                watch.source.stop()
        _join(watches)

    def use(self, sources: Sequence[Source]) -> None:
        """These are all from now on. What was found by one that is here no more goes; one of the same name that is
        another now must find them again, as it would after a failure."""
        with self._lock:
            before, self._watches = self._watches, {}
            for source in sources:
                known = before.get(source.name)
                if known is None or known.source.key != source.key:
                    applied = {} if known is None else known.applied
                    pool = source.pool
                    moved = {key: replace(each, pool=pool or each.pool) for key, each in applied.items()}
                    known = Watch(source, applied, moved)
                self._watches[source.name] = known
            gone = [watch for name, watch in before.items() if self._watches.get(name) is not watch]
            for watch in gone:
                watch.source.stop()
                if watch.source.name not in self._watches:
                    self._apply(watch, {})
            for watch in self._watches.values():
                # Pools may have gone, and others have come.
                watch.applied = {key: each for key, each in watch.applied.items() if self._pools.get(each.pool)}
                left_out = self._apply(watch, watch.trusted) if watch.doubted is None else ""
                if watch.state == "good":
                    watch.last_error = left_out or None
                if self._is_running and watch.thread is None:
                    self._start(watch)
        _join(gone)

    def has_looked(self) -> bool:
        """Each has said who is there, now or before a restart, or failed to, or has had time enough."""
        with self._lock:
            is_late = time.monotonic() - self._started_at > FIRST_SECONDS
            return is_late or all(watch.applied or watch.state != "starting" for watch in self._watches.values())

    def is_lost(self, backend_id: str) -> bool:
        """It is known by now that it takes no requests."""
        pool = self._pools.pool_of(backend_id)
        backend = pool and pool.get(backend_id)
        return bool(backend and not backend.is_ready and backend.health.status != "unknown")

    def describe(self) -> list[SourceView]:
        with self._lock:
            return [watch.describe(time.monotonic()) for watch in self._watches.values()]

    # Over restarts.

    def kept(self) -> dict[str, list[dict[str, Any]]]:
        """What each has found, for the time after a restart in which it may fail."""
        with self._lock:
            return {watch.source.title: watch.kept() for watch in self._watches.values() if watch.applied}

    def restore(self, kept: Mapping[str, Sequence[Found]]) -> None:
        """Before the start."""
        with self._lock:
            for watch in self._watches.values():
                watch.trusted = {each.id: each for each in kept.get(watch.source.title, ())}
                self._apply(watch, watch.trusted)

    # The thread of each.

    def _start(self, watch: Watch) -> None:
        watch.thread = Thread(target=self._run, args=(watch,), name=f"source-{watch.source.name}", daemon=True)
        watch.thread.start()

    def _run(self, watch: Watch) -> None:
        source = watch.source
        ACTOR.set(source.name)
        while not source.stopping.is_set():
            pause = CONFIRM_SECONDS
            try:
                with closing(source.look()) as answers:
                    for found in answers:
                        if not self._told(watch, {each.id: each for each in found}):
                            break
            except Exception as error:  # whatever others have said, the next look may bring better
                pause = self._failed(watch, error)
            source.stopping.wait(pause)

    def _told(self, watch: Watch, now: Mapping[str, Found]) -> bool:
        """False if it has to say so once more, or shall say nothing. Raises SourceFailed if nobody is left."""
        left_out = ""
        with self._lock:
            if watch.source.stopping.is_set():
                return False
            if watch.applied and not now:
                raise SourceFailed(f"it names no backends any more; the {len(watch.applied)} that it named stay")
            is_sure = now == watch.doubted or 2 * len(watch.trusted.keys() - now.keys()) <= len(watch.trusted)
            is_same = now == watch.trusted and watch.doubted is None and watch.told_at is not None
            failed = watch.last_error
            if not is_same or failed or watch.source.complaints:
                left_out = self._apply(watch, now if is_sure else {**watch.applied, **now})
            watch.trusted, watch.doubted = (now, None) if is_sure else (watch.trusted, now)
            watch.told_at, watch.in_a_row, watch.last_error = time.monotonic(), 0, left_out or None
        if left_out and left_out != failed:
            self._note("source_failed", f"{watch.source.name}: {left_out}")
        elif failed and not left_out:
            self._note("source_recovered", f"{watch.source.name}: it names {len(now)} backends")
        return is_sure

    def _failed(self, watch: Watch, error: Exception) -> float:
        """Returns how long to wait."""
        text = shown(str(error) if isinstance(error, SourceFailed) else f"what it says makes no sense: {error!r}")
        with self._lock:
            before, watch.last_error = watch.last_error, text
            watch.failures += 1
            watch.in_a_row += 1
            pause = min(watch.source.longest_pause, RETRY_SECONDS * 2.0 ** min(watch.in_a_row - 1, 10))
        if text != before and not watch.source.stopping.is_set():
            self._note("source_failed", f"{watch.source.name}: {text}")
        return pause * random.uniform(0.9, 1.1)

    # With the lock held.

    def _apply(self, watch: Watch, now: Mapping[str, Found]) -> str:
        """Bring the pools from what was applied to what is found now. Returns what had to be left out, in words."""
        changes: dict[str, PoolChanges] = {}
        left_out: dict[str, str] = {}
        before, after = _by_pool(watch.applied), _by_pool(now)
        for name in before | after:
            pool = self._pools.get(name)
            if pool is None:
                left_out |= dict.fromkeys(after.get(name, {}), f"there is no pool {name!r}")
            else:
                changes[name] = _changes(pool, watch.source.name, before.get(name, {}), after.get(name, {}))
        left_out |= dict.fromkeys(self._pools.change(changes), "another backend has its id")
        watch.applied = {key: each for key, each in now.items() if key not in left_out}
        told = [f"{key} is left out: {why}" for key, why in left_out.items()]
        return shown("; ".join([*watch.source.complaints, *told]), LONGEST_ERROR)


def _changes(pool: BackendPool, source: str, before: Mapping[str, Found], after: Mapping[str, Found]) -> PoolChanges:
    """By the rule of a reload: what differs from before is set; for all else the operator's word counts."""
    live = {backend.id: backend for backend in pool.backends() if backend.source == source}
    add: list[Backend] = []
    update: dict[str, dict[str, Any]] = {}
    for key, each in after.items():
        known, backend = before.get(key), live.get(key)
        if backend is not None and (known is None or not backend.is_leaving):
            update[key] = {**each.changes(known), "configured": each.configured}
            if backend.is_leaving:  # it is back while its last requests were ending
                update[key]["admin_state"] = "ready"
        elif known is None:  # else the operator has removed it
            add.append(_made(each, source))
    gone = [key for key, backend in live.items() if key in before.keys() - after.keys() and not backend.is_leaving]
    return PoolChanges(add, update, gone)


def _made(found: Found, source: str) -> Backend:
    made = Backend(found.id, found.origin, source=source, configured=found.configured)
    for name in DECIDED:
        setattr(made, name, getattr(found, name))
    return made


def _by_pool(found: Mapping[str, Found]) -> dict[str, dict[str, Found]]:
    pools: dict[str, dict[str, Found]] = {}
    for key, each in found.items():
        pools.setdefault(each.pool, {})[key] = each
    return pools


def id_of(prefix: str, address: str, port: int | None = None) -> str:
    """The same for the same address; `:` stands in IPv6 ones alone."""
    end = "-" + address.replace(":", "-") + ("" if port is None else f"-{port}")
    return prefix[: ID_LENGTH - len(end)] + end


def _join(watches: Collection[Watch]) -> None:
    for watch in watches:
        if watch.thread is not None:
            watch.thread.join(JOIN_SECONDS)
