"""One member of a cluster: what it tells the others, and makes of what they tell, in a thread of its own.

Once a second it says that it is there, and how it goes; what was decided, and who finds a backend down or up, is told
at once. Nobody waits for this thread. Without the server each member goes on alone, and tries again and again.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from balancer.cluster.agreement import Agreement
from balancer.cluster.figures import Figures, in_flight
from balancer.cluster.link import Link, LinkError
from balancer.filters.sharedlimit import SETTLE_SECONDS, Asked

log = logging.getLogger("balancer.cluster")

BEAT_SECONDS = 1.0
READ_SECONDS = 10.0  # between two looks at all decisions, whatever was told of them
STUCK_SECONDS = 3.0  # without an answer: who answers byte by byte is none
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # between two attempts, and at random up to half of it less
MOST_NEWS = 100  # that are kept until they are told
LEAVE_SECONDS = 1.0  # for the end of what it is about
JOIN_SECONDS = 5.0  # a name that cannot be resolved is nothing that can be called off

News = Literal["cluster_found", "cluster_lost", "member_joined", "member_left"]


@dataclass(frozen=True, slots=True)
class Member:
    """`seen` of time.time(): when it was heard of last."""

    figures: Figures
    seen: float


_FIGURES = TypeAdapter(Figures)


@dataclass(frozen=True, slots=True)
class State:
    """Replaced whole. `revision` is of the decisions that were read last. `error` says why it is alone."""

    is_together: bool
    since: float
    error: str | None = None


class Cluster:
    """`start` and `stop` once each; `wake`, `tell_health` and `pass_time` from any thread. `members` by name, this one
    among them, and `state` are replaced and never changed, so that anybody may read them; the rest belongs to the
    thread.

    `asks` is what processes have to say to the ledger of limits, each with where the answer goes, and `share` tells
    them how many of all members there are, and whether they are lost; `note_elsewhere` is told what the others have in
    flight. A master with workers sets these three anew.
    `figures` are those of this one; `check` is called with what another has found: which backend, and whether it is up.
    """

    def __init__(
        self,
        name: str,
        link: Link,
        agreement: Agreement,
        asks: Callable[[], Iterable[Asked]],
        share: Callable[[int, bool], None],
        note_elsewhere: Callable[[Mapping[str, int]], None],
        figures: Callable[[], Figures],
        check: Callable[[str, bool], None],
        note: Callable[[News, str], None],
    ) -> None:
        self.name = name
        self.link = link
        self.members: Mapping[str, Member] = {}
        self.state = State(False, time.time())
        self._agreement = agreement
        self.asks = asks
        self.share = share
        self.note_elsewhere = note_elsewhere
        self._figures = figures
        self._check = check
        self._note = note
        self._processes = 1  # of all members, that let requests through
        self._revision = ""
        self._beat_at = self._read_at = 0.0  # of time.monotonic(), when each is due
        self._heard_at = time.monotonic()
        self._has_tried = False
        self._is_nudged = False
        self._news: deque[str] = deque(maxlen=MOST_NEWS)
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="cluster", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and join; the others learn that it has left."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(LEAVE_SECONDS)
            self.link.abort()
            self._thread.join(JOIN_SECONDS)

    def wake(self) -> None:
        """Something was decided."""
        self._is_nudged = True

    def tell_health(self, backend: str, is_up: bool) -> None:
        """The others look for themselves."""
        self._news.append(f"{'up' if is_up else 'down'} {self.name} {backend}")

    def pass_time(self) -> None:
        """Call about once a second."""
        if time.monotonic() - self._heard_at > STUCK_SECONDS:
            self._heard_at = time.monotonic()
            self.link.abort()

    @property
    def age(self) -> float:
        """Seconds since the server has answered."""
        return time.monotonic() - self._heard_at

    # The thread.

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            try:
                self._heard_at = time.monotonic()
                self.link.open()
                self._beat()
                self._agree()
                self._found()
                pause = FIRST_PAUSE
                self._stay()
            except LinkError as error:
                self._lost(str(error))
            except Exception as error:  # the thread must outlive any surprise, or this one would be alone for ever
                if self.state.is_together:
                    log.exception("the cluster is left")
                self._lost(f"{type(error).__name__}")
            self.link.close()
            self._stopping.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _stay(self) -> None:
        while not self._stopping.is_set():
            while (news := self.link.wait(0.0 if self._stopping.is_set() else SETTLE_SECONDS)) is not None:
                self._hear(news)
            now = time.monotonic()
            if now >= self._beat_at:
                self._beat()
            if self._is_nudged or now >= self._read_at:
                self._agree()
            while self._news:
                self.link.tell(self._news.popleft())
            for process, charges, settle in self.asks():
                settle(charges, self.link.charge(process, charges))
        self.link.leave()

    def _hear(self, news: str) -> None:
        kind, _, rest = news.partition(" ")
        if kind == "decided":
            self._is_nudged = self._is_nudged or rest != self._revision
        elif kind in ("up", "down"):
            who, _, backend = rest.partition(" ")
            if who != self.name:
                self._check(backend, kind == "up")

    def _beat(self) -> None:
        beat = self.link.beat(json.dumps(self._figures()))
        now, self._heard_at = time.time(), time.monotonic()
        self._beat_at = self._heard_at + BEAT_SECONDS
        self._is_nudged = self._is_nudged or beat.revision != self._revision
        before, members = self.members, dict[str, Member]()
        for name, (text, age) in beat.members.items():
            with suppress(ValidationError):  # of another version
                members[name] = Member(_FIGURES.validate_json(text), now - age)
        self.members = members
        for name in members.keys() - before.keys() - {self.name}:
            self._note("member_joined", f"{members[name].figures['id']} ({name})")
        for name in before.keys() - members.keys() - {self.name}:
            self._note("member_left", f"{before[name].figures['id']} ({name})")
        self._processes = sum(each.figures["processes"] for each in members.values()) or 1
        self.share(self._processes, False)
        self.note_elsewhere(in_flight(each.figures for name, each in members.items() if name != self.name))

    def _agree(self) -> None:
        self._is_nudged = False
        self._read_at = time.monotonic() + READ_SECONDS
        self._revision, told = self.link.decided()
        if words := self._agreement.merge(told):
            self.link.write(words)

    def _found(self) -> None:
        self.state, self._has_tried = State(True, time.time()), True
        self._note("cluster_found", f"{len(self.members)} members at {self.link.address}")

    def _lost(self, why: str) -> None:
        was_told, self._has_tried = self._has_tried and not self.state.is_together, True
        self.state = State(False, self.state.since if was_told else time.time(), why)
        if not was_told:
            self.share(max(self._processes, self._figures()["processes"]), True)
            self.note_elsewhere({})
            self._note("cluster_lost", f"{self.link.address}: {why}; this one goes on alone")
