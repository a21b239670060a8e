"""What the chaos suite is made of: backends that misbehave on command, a balancer before them, and the judge.

A request has a key of its own. Its answer must carry the checksum of method, target and body; the backends write down
every key they execute. So what a client saw can be held against what happened, also across kill -9.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from chaos_traffic import KIB, MIB, ONCE, Outcome
from support import PYTHON, BalancerProcess, Process, fetch, free_port, wait_until


class ChaosBackend:
    """`chaos_backend.py` on a port that stays the same; `log` outlives the process."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        self.log.touch()
        self._process: Process | None = None

    def start(self) -> None:
        script = Path(__file__).with_name("chaos_backend.py")
        self._process = Process([PYTHON, "-S", str(script), str(self.port), str(self.log)])
        wait_until(self._is_up, f"{self.name} answers")

    def _is_up(self) -> bool:
        try:
            return fetch(f"{self.url}/health")[0] == 200
        except OSError:
            return False

    def fault(self, kind: str = "none", every: int = 1, seconds: float = 0.0) -> None:
        assert fetch(f"{self.url}/fault", {"kind": kind, "every": every, "seconds": seconds})[0] == 204

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send(number)

    def kill(self) -> None:
        """kill -9; also ends one that is stopped."""
        if self._process is not None:
            self._process.popen.kill()
            self._process.wait()
            self._process = None


@dataclass(frozen=True)
class Footprint:
    """What the balancer holds of the machine."""

    threads: int
    files: int
    resident: int  # bytes

    @classmethod
    def of(cls, pid: int) -> Footprint:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
        return cls(len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd")), resident * KIB)

    def __str__(self) -> str:
        return f"{self.threads} threads, {self.files} files, {self.resident / MIB:.0f} MiB"


@dataclass
class Fleet:
    """A balancer in front of three chaos backends, and what was executed on them."""

    backends: list[ChaosBackend]
    file: Path
    balancer: BalancerProcess = field(init=False)
    base: Footprint = field(init=False)
    seen: dict[str, int] = field(default_factory=dict)  # bytes of each log that earlier scenarios wrote
    counted: Counter[str] = field(default_factory=Counter)  # what /metrics had counted before

    @property
    def url(self) -> str:
        return self.balancer.url

    def executed(self) -> Counter[str]:
        """Executions per key since the last call of `begin`."""
        found: Counter[str] = Counter()
        for backend in self.backends:
            text = backend.log.read_bytes()[self.seen.get(backend.name, 0) :].decode()
            found.update(line.partition(" ")[2] for line in text.splitlines())
        return found

    def begin(self) -> None:
        """All backends up and trusted again, all counters at zero."""
        wait_until(self._is_whole, "all backends are up and not ejected")
        for backend in self.backends:
            self.seen[backend.name] = backend.log.stat().st_size
        self.idle()
        assert fetch(f"{self.url}/reset", {})[0] == 200
        self.counted = self.metrics()

    def metrics(self) -> Counter[str]:
        """The sum over all series of each counter in /metrics, which no reset lowers."""
        found: Counter[str] = Counter()
        for line in fetch(f"{self.url}/metrics")[2].decode().splitlines():
            name = line.partition(" ")[0].partition("{")[0]
            if name.endswith("_total"):
                found[name] += int(float(line.rpartition(" ")[2]))
        return found

    def _is_whole(self) -> bool:
        fetch(f"{self.url}/trial?size=0")  # an ejected backend comes back by a request
        states = {server["id"]: server["state"] for server in self.balancer.status()["backend_servers"]}
        return states == dict.fromkeys((backend.name for backend in self.backends), "up")

    def names(self) -> set[str]:
        return {server["id"] for server in self.balancer.status()["backend_servers"]}

    def configure(self, *backends: ChaosBackend, tables: str = "", **settings: Any) -> None:
        """Write the configuration file; it is read at the start and by a reload."""
        settings = {"header_timeout": 60, **settings}
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        for number, backend in enumerate(backends or self.backends):
            lines += ["[[backends]]", f'id = "{backend.name}"', f'url = "{backend.url}"', f"weight = {1 + number % 2}"]
        self.file.write_text("\n".join([*lines, tables]), encoding="utf-8")

    def reload(self) -> None:
        assert fetch(f"{self.url}/reload", {})[0] == 200

    def idle(self) -> Any:
        """The status once nothing is in flight."""
        wait_until(lambda: self.balancer.status()["statistics"]["active_requests"] == 0, "nothing in flight")
        return self.balancer.status(100)

    def start(self, *arguments: str) -> None:
        """Time-outs that a loaded machine keeps; idle threads and sockets are given up soon, so that leaks show."""
        for backend in self.backends:
            backend.start()
        self.balancer = BalancerProcess(
            f"--config={self.file}",
            "--retries=3",  # with `extra` there are four backends, and a single good one must be found
            "--response-timeout=3",
            "--health-timeout=1.5",
            "--eject-seconds=1",
            "--slow-start=1",
            "--queue-timeout=30",
            "--min-body-rate=0",
            "--thread-idle-timeout=1",
            "--pool-idle-timeout=1",
            *arguments,
        )
        self.base = Footprint.of(self.balancer.pid)

    def settled(self) -> Footprint:
        """What the balancer holds once idle threads and connections have been given up: little more than at first."""
        self.idle()
        wait_until(lambda: self._now().threads <= self.base.threads + 10, f"threads end: {self._now()}")
        wait_until(lambda: self._now().files <= self.base.files + 6, f"files are closed: {self._now()}")
        return self._now()

    def _now(self) -> Footprint:
        return Footprint.of(self.balancer.pid)

    def stop(self) -> None:
        if hasattr(self, "balancer"):
            self.balancer.stop()
        for backend in self.backends:
            backend.kill()


@contextmanager
def running_fleet(folder: Path, *arguments: str) -> Iterator[Fleet]:
    fleet = Fleet([ChaosBackend(name, folder) for name in ("a", "b", "c")], folder / "balancer.toml")
    fleet.configure()
    try:
        fleet.start(*arguments)
        yield fleet
    finally:
        fleet.stop()


@dataclass(frozen=True)
class Row:
    """One line of the table of faults."""

    fault: str
    sent: int
    answered: int
    refused: int
    cut: int
    retried: int
    lost: int
    twice: int


LEGEND = (
    "refused: 502 to 504 where another try was not allowed; cut: broken off, and it shows; retried: on another backend",
    "lost: not answered though it could have been; twice: POST or PATCH executed twice",
)


class Table:
    """The faults that were tried; pytest prints it at the end."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        names = list(Row.__dataclass_fields__)
        cells = [names, *([str(getattr(row, name)) for name in names] for row in self.rows)]
        wide = [max(len(line[column]) for line in cells) for column in range(len(names))]
        terminalreporter.section("chaos")
        for line in cells:
            numbers = [text.rjust(width) for text, width in zip(line[1:], wide[1:], strict=True)]
            terminalreporter.write_line("  ".join([line[0].ljust(wide[0]), *numbers]))
        for note in (*LEGEND, *self.notes):
            terminalreporter.write_line(note)


def make_table(config: pytest.Config) -> Table:
    """The table of this run, registered so that pytest asks it for a summary."""
    table = config.pluginmanager.get_plugin("chaos-table")
    if table is None:
        table = Table()
        config.pluginmanager.register(table, "chaos-table")
    assert isinstance(table, Table)
    return table


def settle(
    fleet: Fleet,
    table: Table,
    fault: str,
    outcomes: list[Outcome],
    *,
    cut: bool = False,
    others: int = 0,
    left: int = 0,
) -> Row:
    """The verdict on a scenario, as a row of the table.

    `cut`: answers may break off after their head, visibly. Beyond `outcomes` there were `others`, which were answered,
    and `left`, whose clients did not wait.
    """
    status = fleet.idle()
    allowed = {"answered"} | ({"cut", "empty"} if cut else set())
    row = judge_all(fleet, table, fault, outcomes, allowed, status["statistics"]["retries"])
    assert_exact(status, outcomes, others, left)
    counted = fleet.metrics() - fleet.counted
    sockets = sum(outcome.status == 101 for outcome in outcomes)
    assert counted["lb_websockets_opened_total"] == counted["lb_websockets_closed_total"] == sockets
    assert counted["lb_requests_total"] == status["statistics"]["total_requests"]
    assert counted["lb_retries_total"] == status["statistics"]["retries"]
    return row


def judge_all(fleet: Fleet, table: Table, fault: str, outcomes: list[Outcome], allowed: set[str], retried: int) -> Row:
    """What the clients saw against what was executed. `allowed` is how a request may end that can be repeated."""
    executed, kinds = fleet.executed(), Counter(outcome.kind for outcome in outcomes)
    lost = [o for o in outcomes if o.plan.may_repeat and o.kind not in allowed]
    twice = [o for o in outcomes if o.plan.method in ONCE and executed[o.plan.key] > 1]
    broken = kinds["cut"] + kinds["empty"]
    row = Row(fault, len(outcomes), kinds["answered"], kinds["refused"], broken, retried, len(lost), len(twice))
    table.rows.append(row)
    assert_none("wrong answers", [o for o in outcomes if o.kind == "wrong"])
    assert_none("lost", lost)
    assert_none("executed twice", twice)
    unknown = [o for o in outcomes if o.kind in ("answered", "cut") and not executed[o.plan.key]]
    assert_none("answered but not executed", unknown)
    assert "Traceback" not in fleet.balancer.output
    return row


def assert_none(what: str, outcomes: list[Outcome]) -> None:
    """One line for each outcome that must not be, with what is needed to find it in the balancer's records."""
    lines = [
        f"{o.plan.method} {o.plan.target}, {o.plan.length} bytes{' chunked' * o.plan.is_chunked}: "
        f"{o.kind} {o.status} {o.text}"
        for o in outcomes
    ]
    assert not lines, "\n".join([what, *lines])


def assert_exact(status: Any, outcomes: list[Outcome], others: int, left: int) -> None:
    """The balancer counted what the clients saw, no more and no less."""
    whole, servers = status["statistics"], status["backend_servers"]
    answered, sent = sum(outcome.kind == "answered" for outcome in outcomes) + others, len(outcomes) + others + left
    assert whole["total_requests"] == sent, [outcome for outcome in outcomes if outcome.kind == "empty"]
    assert whole["successful_requests"] == answered
    assert whole["failed_requests"] == sent - answered
    assert whole["aborted_requests"] == left
    assert whole["total_requests"] == sum(whole["codes"].values()) + whole["aborted_requests"]
    assert sum(server["total_requests"] for server in servers) + whole["unassigned_requests"] == whole["total_requests"]
    assert whole["active_requests"] == whole["queued_requests"] == whole["websockets"] == 0
    for server in servers:
        assert server["total_requests"] == server["successful_requests"] + server["failed_requests"]
        assert server["active_connections"] == 0


def repeat(steps: Callable[[], Iterator[None]], until: Event) -> Thread:
    """Runs through `steps` again and again, in a thread of its own, until the event; then to their end."""

    def run() -> None:
        while not until.is_set():
            for _ in steps():
                pass

    thread = Thread(target=run, name="operator")
    thread.start()
    return thread
