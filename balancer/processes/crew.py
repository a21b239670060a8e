"""The worker processes of one balancer, as their master has them: started, watched, replaced, and ended together.

Each has a place, with a listening socket that is the master's: so a connection that nobody has accepted yet waits for
the next worker there, whatever has become of the last one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from balancer.config.values import MAX_WORKERS
from balancer.control.control import WorkerState, WorkerView
from balancer.edge.server import DRAIN_LOOK_SECONDS, PARKED_SECONDS, STOP_SECONDS, Server
from balancer.processes import program, reuseport
from balancer.processes.link import Link

log = logging.getLogger("balancer.processes")

LOOK_SECONDS = 0.1  # between two looks at all workers
HUNG_SECONDS, START_SECONDS = 5.0, 60.0  # without a word: a worker that serves, and one that begins
YOUNG_SECONDS = 1.0  # who dies within this time of being ready would soon do so again
PAUSE_SECONDS, LONGEST_PAUSE = 0.5, 30.0  # before the next one begins then; twice as long each time
MOST_DEATHS, DEATHS_SECONDS = 5, 60.0  # of all workers: more often it is no accident
SETTLE_SECONDS = 1.0  # for connections that are being made while others are steered away
# They ask the master for something; a terminal and systemd send them to all of us.
OURS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU]


class Child:
    """One worker process. The thread of its link says when it was heard of last."""

    def __init__(self, popen: subprocess.Popen[bytes], link: Link) -> None:
        self.popen, self.link = popen, link
        self.since = time.time()
        self.heard_at = time.monotonic()
        self.ready_at = float("inf")  # of time.monotonic()
        self.is_given_up = False

    @property
    def is_ready(self) -> bool:
        return self.ready_at < float("inf")

    def beat(self) -> None:
        self.heard_at = time.monotonic()

    def ready(self) -> None:
        self.ready_at = self.heard_at = time.monotonic()


@dataclass(slots=True, eq=False)
class Place:
    """Where a worker is, or will be from `start_at` on. `early` deaths in a row came when it had hardly begun."""

    number: int
    listener: socket.socket
    cpus: Sequence[int]
    child: Child | None = None
    start_at: float = 0.0
    early: int = 0
    is_leaving: bool = False

    def describe(self) -> WorkerView:
        child = self.child
        state: WorkerState = "waiting"
        if child is not None:
            state = "draining" if self.is_leaving else "running" if child.is_ready else "starting"
        return {
            "id": self.number,
            "pid": None if child is None else child.popen.pid,
            "cpu": self.cpus[0] if len(self.cpus) == 1 else None,
            "since": None if child is None else child.since,
            "state": state,
        }


@dataclass(slots=True)
class Meeting:
    """What the master does when a worker comes and goes."""

    passes: Callable[[Place], list[int]]  # descriptors that the worker is to have, in the order that it expects
    begin: Callable[[Place], None]
    lost: Callable[[Place, str], None]
    cpus: Callable[[int], Sequence[int]]


class Crew(Server):
    """All workers. `listeners` of the main port are one for each of them, or the same one for all; `others` are of
    further ports, by role, and for all.

    Everything belongs to the thread of the event loop, but that others may read `places`, which is replaced.
    """

    def __init__(
        self, listeners: Sequence[socket.socket], others: Collection[socket.socket], meeting: Meeting, **hooks: Any
    ) -> None:
        super().__init__([], **hooks)
        self._meeting = meeting
        self._others = others
        self._is_reuseport = len(set(map(id, listeners))) > 1
        self.places = [Place(number, each, meeting.cpus(number)) for number, each in enumerate(listeners)]
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self._is_ending = False
        self._program = program.state()
        self._spare: tuple[subprocess.Popen[bytes], socket.socket] | None = None  # that has no place yet
        self._spare_at = -math.inf  # from then on there may be one
        self._early_spares = 0  # in a row, each lost within LONGEST_PAUSE of when it might begin
        self._looked_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._wishes: asyncio.Queue[Callable[[], Coroutine[Any, Any, None]]] = asyncio.Queue()
        self.failure = ""  # why it has ended by itself

    def close(self) -> None:
        for place in self.places:
            if place.child is not None:
                place.child.popen.kill()
                place.child.popen.wait()
                self._part(place.child)
        if self._spare is not None:
            popen, ours = self._spare
            popen.kill()
            popen.wait()
            ours.close()
        self._close_listeners()
        self._on_stop()

    # In the event loop's thread.

    def start(self) -> None:
        self._tasks = [asyncio.create_task(steps) for steps in (self._watch_all(), self._grant())]

    async def ready(self) -> None:
        while not all(place.child is not None and place.child.is_ready for place in self.places):
            await asyncio.sleep(LOOK_SECONDS)

    def signals(self) -> Mapping[str, Callable[[], None]]:
        wishes = {"SIGTTIN": self._more, "SIGTTOU": self._less}
        return {name: partial(self._wishes.put_nowait, wish) for name, wish in wishes.items()}

    async def give_way(self, hurry: asyncio.Future[Any]) -> None:
        self._is_ending = True
        self._tell_all("leave")
        deadline = time.monotonic() + PARKED_SECONDS + STOP_SECONDS
        while any(place.child for place in self.places) and time.monotonic() < deadline and not hurry.done():
            await asyncio.wait([hurry], timeout=LOOK_SECONDS)

    async def end(self, why: str, limit: float, delay: float = 0.0, hurry: asyncio.Future[Any] | None = None) -> bool:
        hurry = hurry or asyncio.get_running_loop().create_future()
        self._is_ending = True
        text = f"requests in flight have at most {limit:g} s to finish ({why})"
        log.info("draining %d workers: %s", len(self.places), text)
        self._on_drain(text)
        self._tell_all("end", why, limit, delay)
        await asyncio.wait([hurry], timeout=delay)
        self._tasks.pop().cancel()  # what was wished for: there are no sockets to do it with
        self._close_listeners()
        deadline, has_hurried = time.monotonic() + limit + 2 * STOP_SECONDS, False
        while any(place.child is not None for place in self.places) and time.monotonic() < deadline:
            if hurry.done() and not has_hurried:
                has_hurried, deadline = True, time.monotonic() + 2 * STOP_SECONDS
                self._tell_all("hurry")
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        for task in self._tasks:
            task.cancel()
        return True  # what has not ended by now, `close` ends

    def adapt(self, count: int) -> None:
        """So many are to stay of those that there are, with a process before this one that had others."""
        if self._is_reuseport:
            reuseport.steer([self.places[0].listener], count)
        for _ in range(count, len(self.places)):
            self._wishes.put_nowait(self._less)

    def sockets(self) -> list[socket.socket]:
        """One for each worker, or the same one for all."""
        return [place.listener for place in self._staying]

    @property
    def _staying(self) -> list[Place]:
        return [place for place in self.places if not place.is_leaving]

    async def _grant(self) -> None:
        """One after the other: so the sockets are numbered as `places` are."""
        while True:
            wish = await self._wishes.get()
            try:
                await wish()
            except Exception:  # no descriptor is left, say: the next wish may be another
                log.exception("the number of workers cannot be changed")

    async def _more(self) -> None:
        """SIGTTIN: one worker more, to which nobody is led before it is ready."""
        staying = self._staying
        number = min({*range(len(self.places) + 1)} - {place.number for place in self.places})
        if number == MAX_WORKERS:
            log.warning("SIGTTIN: there are %d workers, and cannot be more", number)
            return
        listener = staying[0].listener
        if self._is_reuseport:
            reuseport.steer([listener], len(staying))
            listener = reuseport.listen_too(*listener.getsockname()[:2])
        place = Place(number, listener, self._meeting.cpus(number))
        self.places = [*self.places, place]
        log.info("SIGTTIN: %d workers", len(staying) + 1)
        while place.child is None or not place.child.is_ready:
            await asyncio.sleep(LOOK_SECONDS)
        if self._is_reuseport:
            reuseport.steer([listener], len(staying) + 1)

    async def _less(self) -> None:
        """SIGTTOU: one worker less, the last one. Nobody who has connected is turned away: new connections go
        elsewhere, and those that wait are served."""
        *others, place = self._staying
        if not others:
            log.warning("SIGTTOU: the only worker stays")
            return
        place.is_leaving = True
        log.info("SIGTTOU: %d workers", len(others))
        if self._is_reuseport:
            reuseport.steer([place.listener], len(others))
            await asyncio.sleep(SETTLE_SECONDS)
            while reuseport.waiting(place.listener) and place.child is not None:
                await asyncio.sleep(LOOK_SECONDS)
            place.listener.close()
        if place.child is not None:
            place.child.link.tell("leave")
        else:
            self._forget(place)

    def _forget(self, place: Place) -> None:
        self.places = [each for each in self.places if each is not place]

    # Who is there.

    async def _watch_all(self) -> None:
        while True:
            now = time.monotonic()
            if now - self._looked_at > 10 * LOOK_SECONDS:  # this process was kept waiting, and so may they have been
                for place in self.places:
                    if place.child is not None:
                        place.child.beat()
            self._looked_at = now
            self._look_at_spare(now)  # before a place is given to it
            for place in self.places:
                try:
                    self._look(place, now)
                except Exception:  # the others must be looked at
                    log.exception("worker %d", place.number)
                    place.start_at = now + PAUSE_SECONDS
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self, place: Place, now: float) -> None:
        child = place.child
        if child is None:
            if now >= place.start_at and not (self._is_ending or place.is_leaving):
                self._begin(place)
        elif child.popen.poll() is not None:
            self._died(place, child, now)
        elif now - child.heard_at > (HUNG_SECONDS if child.is_ready else START_SECONDS) and not child.is_given_up:
            child.is_given_up = True
            child.popen.kill()

    def _begin(self, place: Place) -> None:
        popen, ours = self._spare = self._spare or self._spawn()
        link, passed = Link(ours, f"process-{place.number}"), self._meeting.passes(place)
        self._spare = None  # until here it is the next look's, if a descriptor is missing
        with suppress(OSError):  # it has ended already: the next look finds that
            socket.send_fds(ours, [b"\n"], passed)
        place.child = Child(popen, link)
        self._meeting.begin(place)

    def _look_at_spare(self, now: float) -> None:
        """Once all serve there is one more process that has imported all that it needs, for the next who ends."""
        if self._spare is not None and (code := self._spare[0].poll()) is not None:
            self._spare[1].close()
            self._spare = None
            self._lost_spare(math.inf if code == program.IS_ANOTHER else now)
        all_serve = all(place.child is not None and place.child.is_ready for place in self.places)
        if self._spare is None and all_serve and now >= self._spare_at and not self._is_ending:
            try:
                self._spare = self._spawn()
            except OSError as error:
                log.warning("no spare worker: %s", error)
                self._lost_spare(now)

    def _lost_spare(self, now: float) -> None:
        """The next one begins at once, unless that is so soon after the last one was lost."""
        self._early_spares = self._early_spares + 1 if now - self._spare_at < LONGEST_PAUSE else 0
        self._spare_at = now + _pause(self._early_spares)

    def _spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """A process that waits for a place, and our end of what will be its link."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "balancer.processes.entry", str(theirs.fileno()), self._program]
            path = os.pathsep.join(filter(None, (str(program.ROOT), os.environ.get("PYTHONPATH"))))
            # They stay blocked in the child, and those that come to us meanwhile are not lost.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
            try:
                environ = os.environ | {"PYTHONPATH": path}
                passed = [theirs.fileno()]
                return subprocess.Popen(command, pass_fds=passed, stdin=subprocess.DEVNULL, env=environ), ours
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _died(self, place: Place, child: Child, now: float) -> None:
        place.child = None
        self._part(child)
        code, pid = child.popen.returncode, child.popen.pid
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        if child.is_given_up:
            how = "did not answer any more, and was ended"
        is_expected = self._is_ending or place.is_leaving
        self._meeting.lost(place, "" if is_expected else f"worker {place.number} (process {pid}) {how}")
        if place.is_leaving:
            self._forget(place)
        if is_expected:
            return
        if code == program.IS_ANOTHER:
            self._cannot_begin(place, now)
            return
        place.early = place.early + 1 if now - child.ready_at < YOUNG_SECONDS else 0
        place.start_at = now + _pause(place.early)
        self._deaths.append(now)
        if len(self._deaths) == MOST_DEATHS and now - self._deaths[0] <= DEATHS_SECONDS:
            self._fail(f"{MOST_DEATHS} workers ended within {DEATHS_SECONDS:g} s, the last one {how}")

    def _cannot_begin(self, place: Place, now: float) -> None:
        """No worker of ours can begin any more, and those who connect there must not wait for one."""
        what = "no worker can begin, the program's files are others now"
        if os.getpid() == 1 or signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, []):
            self._fail(what)  # no process may take the place of this one: a container, or the demo
            return
        log.warning("%s: what is there takes over", what)
        place.start_at = now + LONGEST_PAUSE
        os.kill(os.getpid(), signal.SIGUSR2)

    def _fail(self, reason: str) -> None:
        if not self.failure:
            self.failure = reason
            log.critical("%s; so this balancer ends", reason)
            os.kill(os.getpid(), signal.SIGTERM)

    def _part(self, child: Child) -> None:
        child.link.close()
        child.link.join()

    def _tell_all(self, what: str, *values: Any) -> None:
        for place in self.places:
            if place.child is not None:
                place.child.link.tell(what, *values)

    def _close_listeners(self) -> None:
        for listener in (*(place.listener for place in self.places), *self._others):
            listener.close()


def _pause(early: int) -> float:
    """Before the next one begins, after so many in a row that did not last."""
    return min(PAUSE_SECONDS * 2.0 ** min(early - 1, 10), LONGEST_PAUSE) if early else 0.0
