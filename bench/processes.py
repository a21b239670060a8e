"""Processes of a benchmark: started in a session of their own, measured from /proc, always stopped."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import resource
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whoever imports this may import the balancer after it
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 10.0
# Below Linux's default range for outgoing connections, so that no client socket takes a port before its server does.
PORTS = range(20000, 32000)
ALL_CPUS = frozenset(os.sched_getaffinity(0))
# As cpu_affinity = "auto" does it: a contender of one core gets the last one, everything that measures the others.
CONTENDER_CPUS = frozenset({max(ALL_CPUS)})
BENCH_CPUS = ALL_CPUS - CONTENDER_CPUS or ALL_CPUS
# Variables that would change what a contender does from one machine to the next.
LEFT_OUT_NAMES = {"ALGORITHM", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}


TRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a certificate made for the moment
TRUSTING.check_hostname, TRUSTING.verify_mode = False, ssl.CERT_NONE
T = TypeVar("T")


class BenchError(Exception):
    """Something that keeps the benchmark from measuring; the message is one line for the user."""


def find_program(name: str) -> str | None:
    """That of our own environment first. Debian keeps servers in sbin, which is not on every user's PATH."""
    own, system = str(Path(sys.executable).parent), "/usr/local/sbin:/usr/sbin:/sbin"
    return shutil.which(name, path=own) or shutil.which(name) or shutil.which(name, path=system)


class Service:
    """A started process and everything below it."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.usage: resource.struct_rusage | None = None  # of its whole life and its children, once stopped cleanly
        self._process = process
        self._log = log

    def exited(self) -> bool:
        # WNOWAIT: whoever reaps the process gets its resource usage, and that is stop().
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def stop(self) -> None:
        """Ask the group to end, then make sure. The unreaped leader keeps the group id ours until the last line."""
        in_time = False
        try:
            self._signal_group(signal.SIGTERM)
            in_time = wait_until(self.exited, STOP_TIMEOUT_SECONDS)
        finally:
            self._signal_group(signal.SIGKILL)
            _, status, usage = os.wait4(self._process.pid, 0)
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self.usage = usage if in_time else None
            if not in_time:
                print(f"bench: {self.name} had to be killed: it did not end on SIGTERM", file=sys.stderr)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def cpu_seconds(self) -> float:
        """User + system of all its processes and of their children already reaped."""
        return sum(ticks for _, ticks in self._family()) * TICK_SECONDS

    def memory_bytes(self, field: str = "VmRSS") -> int:
        """Sum of VmRSS (now) or VmHWM (peak) of all its processes, where shared pages count once per process, or of
        Pss, where they count once."""
        file, total = "smaps_rollup" if field == "Pss" else "status", 0
        for directory, _ in self._family():
            with contextlib.suppress(OSError, IndexError):  # it ended since the listing
                total += int((directory / file).read_text(errors="replace").split(f"\n{field}:")[1].split()[0])
        return total * 1024

    def forget_memory_peak(self) -> None:
        """Restart VmHWM from the present size. Where the kernel cannot, the peak of the start-up stays in it."""
        for directory, _ in self._family():
            with contextlib.suppress(OSError):
                (directory / "clear_refs").write_text("5")

    def _family(self) -> Iterator[tuple[Path, int]]:
        """What /proc has of every process of its session, which nobody leaves, and the CPU ticks of each. Fields are
        counted from behind the name, which may itself hold blanks and brackets (proc(5))."""
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended since the listing
                fields = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:
                    yield directory, sum(map(int, fields[11:15]))

    def last_words(self) -> str:
        return (self._log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]


@contextlib.contextmanager
def running(name: str, command: list[str], directory: Path, cpus: frozenset[int] = BENCH_CPUS) -> Iterator[Service]:
    """Run a command in its own session and directory, on these CPUs, for the length of the with block."""
    log = directory / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={k: v for k, v in os.environ.items() if k not in LEFT_OUT_NAMES and not k.startswith("LB_")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )
    service = Service(name, process, log)
    try:
        yield service
    finally:
        service.stop()


def await_answer(
    service: Service, port: int, path: str, body: bytes, send: bytes | None = None, *, is_tls: bool = False
) -> None:
    """Wait until the service gives this body on this path (to a POST of `send`, if there is something to send): it is
    up, and so is what stands behind it."""

    def answers() -> bool:
        if service.exited():
            raise BenchError(f"{service.name} ended by itself: {service.last_words()}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return get(port, path, send, is_tls=is_tls) == (200, body)
        return False

    if not wait_until(answers, START_TIMEOUT_SECONDS):
        raise BenchError(f"{service.name} gave no right answer in {START_TIMEOUT_SECONDS:g} s: {service.last_words()}")


def get(port: int, path: str, send: bytes | None = None, *, is_tls: bool = False) -> tuple[int, bytes]:
    kind = partial(http.client.HTTPSConnection, context=TRUSTING) if is_tls else http.client.HTTPConnection
    with contextlib.closing(kind("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET" if send is None else "POST", path, send)
        answer = connection.getresponse()
        return answer.status, answer.read()


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def interleaved(rounds: int, cases: Sequence[T], about: Callable[[T], str] = str) -> Iterator[tuple[int, T]]:
    """Every case once per round, each round beginning with another one: a slow minute hits all."""
    for number in range(rounds):
        for case in rotated(cases, number):
            progress(f"round {number + 1}/{rounds}: {about(case)}")
            yield number, case
    progress("")


def rotated(cases: Sequence[T], number: int) -> list[T]:
    shift = number % len(cases)
    return [*cases[shift:], *cases[:shift]]


def medians(rounds: int, cases: Sequence[T], measure: Callable[[T], dict[str, float]]) -> dict[T, dict[str, float]]:
    """Of what is measured for each case in interleaved rounds."""
    found: dict[T, list[dict[str, float]]] = {case: [] for case in cases}
    for _, case in interleaved(rounds, cases):
        found[case].append(measure(case))
    return {
        case: {name: statistics.median(one[name] for one in many) for name in many[0]} for case, many in found.items()
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now. They are tried in random order: others may be looking at the same time."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise BenchError("no free ports left")


def raise_file_limit() -> None:
    """Two sockets for each of 1,000 connections do not fit in the usual soft limit of 1,024 files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
