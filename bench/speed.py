"""Loads, one per kind of work, and their measurement: wrk on each contender in interleaved rounds, with readings before
and after."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from dataclasses import dataclass

from backends import BACKEND_COUNT, Backends, Meter, fast_backends, slow_backends
from contenders import BODY, FILES, HERE, UPLOAD_PATH, WAIT_PATH, Contender, started
from processes import TICK_SECONDS, BenchError, Service, await_answer, progress, raise_file_limit
from results import Figures, Sample

WARMUP_SECONDS = 1
WRK_TIMEOUT_SECONDS = 10  # the slowest contender takes seconds per request at 1,000 connections; that is no error
MIB = 1 << 20
WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Load:
    """One run of wrk. `send` is the name of a body in FILES; `waits` puts the slow backend behind the contender."""

    name: str
    about: str
    connections: int
    path: str = "/api/process"
    send: str | None = None
    headers: int = 0
    waits: bool = False

    @property
    def body(self) -> bytes | None:
        return None if self.send is None else FILES[self.send]

    @property
    def expected(self) -> bytes:
        return FILES.get(self.path, BODY)

    def script(self) -> str:
        """For wrk: the request, and its figures at the end."""
        lines = [f'wrk.headers["X-Bench-{number:02}"] = "{number:02}-{"v" * 24}"' for number in range(self.headers)]
        if self.body is not None:
            lines += ['wrk.method = "POST"', f'wrk.body = string.rep("x", {len(self.body)})']
        return "\n".join([*lines, (HERE / "config" / "wrk.lua").read_text()])


SMALL = "small JSON answer"
EVERY = (
    Load("small-1", f"{SMALL}, 1 connection", 1),
    *(Load(f"small-{count}", f"{SMALL}, {count} connections", count) for count in (32, 256, 1000)),
    Load("headers-32", f"{SMALL}, 20 more request headers, 32 connections", 32, headers=20),
    Load("wait-1000", f"{SMALL} after {WAIT_SECONDS:g} s, 1000 connections", 1000, path=WAIT_PATH, waits=True),
    Load("down-64k", "64 KiB down, 32 connections", 32, path="/64k"),
    Load("up-64k", "64 KiB up, 32 connections", 32, path=UPLOAD_PATH, send="/64k"),
    Load("down-10m", "10 MiB down, 8 connections", 8, path="/10m"),
    Load("up-10m", "10 MiB up, 8 connections", 8, path=UPLOAD_PATH, send="/10m"),
)
LOADS = {load.name: load for load in EVERY}
USUAL = ("small-1", "small-32", "small-256", "small-1000", "up-64k", "up-10m", "down-10m")


def measure_all(rounds: int, seconds: int, loads: list[Load], chosen: list[Contender]) -> list[Sample]:
    """Every contender once per round, each round beginning with another one, all against the same backends."""
    samples = []
    with fast_backends() as fast, slow_backends(*[f"{WAIT_SECONDS:g}"] * BACKEND_COUNT) as slow:
        for number in range(rounds):
            shift = number % len(chosen)
            for load in loads:
                backends = slow if load.waits else fast
                for contender in chosen[shift:] + chosen[:shift]:
                    progress(f"round {number + 1}/{rounds}: {contender.name}, {load.about}")
                    figures = measure(contender, load, backends, seconds)
                    samples.append(Sample("speed", load.name, contender.name, "", number, figures))
    progress("")
    return samples


def measure(contender: Contender, load: Load, backends: Backends, seconds: int) -> Figures:
    """A fresh start, a warm-up that does not count, and one measured run of wrk."""
    expected = (load.path, load.expected, load.body)
    with started(contender, backends.ports, *expected) as (service, place):
        warmup = run_wrk(place.port, load, WARMUP_SECONDS)
        settle(service)
        before = Meter.read(service, backends)
        result = run_wrk(place.port, load, seconds)
        settle(service)
        after = Meter.read(service, backends)
        peak = service.memory_bytes("VmHWM")
        await_answer(service, place.port, *expected)
    switches = switches_per_request(service, warmup["requests"] + result["requests"])
    return figures_of(load, result, before, after) | {"switches/req": switches, "peak MiB": peak / MIB}


def run_wrk(port: int, load: Load, seconds: int) -> dict[str, float]:
    limits = [f"-c{load.connections}", f"-d{seconds}s", f"--timeout={WRK_TIMEOUT_SECONDS}s"]
    with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".lua") as script:
        script.write(load.script())
        script.flush()
        command = ["wrk", "-t1", *limits, "--latency", "-s", script.name, f"http://127.0.0.1:{port}{load.path}"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + 60, preexec_fn=raise_file_limit
        )
    try:
        return json.loads(done.stderr.splitlines()[-1])  # type: ignore[no-any-return]
    except (ValueError, IndexError):
        raise BenchError(f"wrk gave no figures: {(done.stderr or done.stdout).strip()[-200:]}") from None


def settle(service: Service) -> None:
    """Let it finish what wrk left open when its time was up, so that this work falls on the right side of a reading."""
    for _ in range(20):
        before = service.cpu_seconds()
        time.sleep(0.1)
        if service.cpu_seconds() - before <= TICK_SECONDS:
            return


def switches_per_request(service: Service, requests: float) -> float | None:
    """From the usage of the whole process tree at its end: threads that lived for one connection count too."""
    usage = service.usage
    return (usage.ru_nvcsw + usage.ru_nivcsw) / requests if usage and requests else None


def figures_of(load: Load, result: dict[str, float], before: Meter, after: Meter) -> Figures:
    answers = result["requests"]  # of any status
    good = max(0.0, answers - result["status"])
    forwarded = after.backend_requests - before.backend_requests
    # At most one per connection; the rest of what the backend saw beside wrk's requests are health checks.
    unanswered = min(max(0.0, forwarded - answers), load.connections)
    cpu = after.contender_cpu - before.contender_cpu
    return {
        "errors": int(result["status"] + result["socket"]),
        "req/s": good / result["seconds"],
        "CPU us/req": cpu * 1e6 / (good + unanswered) if good else None,
        "p50 ms": result["p50 ms"] if answers else None,
        "p99 ms": result["p99 ms"] if answers else None,
        "not forwarded %": 100 * max(0.0, 1 - forwarded / answers) if answers else None,  # somebody else answered
        "others %": after.others_percent(before),
    }
