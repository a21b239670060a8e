"""Loads, one per kind of work, and their measurement: wrk on each contender in interleaved rounds, with readings before
and after."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from backends import BACKEND_COUNT, Backends, Spent, fast_backends, meter, slow_backends
from contenders import BODY, FILES, HERE, UPLOAD_PATH, WAIT_PATH, Contender, started
from processes import TICK_SECONDS, BenchError, Service, T, await_answer, progress, raise_file_limit, rotated
from results import Figures, Sample

WARMUP_SECONDS = 1
WRK_TIMEOUT_SECONDS = 10  # the slowest contender takes seconds per request at 1,000 connections; that is no error
MIB = 1 << 20
WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Load:
    """One run of wrk. `waits` puts the slow backend behind the contender."""

    name: str
    about: str
    connections: int
    path: str = "/api/process"
    send: bytes | None = None
    headers: int = 0
    waits: bool = False

    def script(self) -> str:
        """For wrk: the request, and its figures at the end."""
        lines = [f'wrk.headers["X-Bench-{number:02}"] = "{number:02}-{"v" * 24}"' for number in range(self.headers)]
        if self.send is not None:
            lines += ['wrk.method = "POST"', f'wrk.body = string.rep("x", {len(self.send)})']
        return "\n".join([*lines, (HERE / "config" / "wrk.lua").read_text()])


SMALL = "small JSON answer"
EVERY = (
    Load("small-1", f"{SMALL}, 1 connection", 1),
    *(Load(f"small-{count}", f"{SMALL}, {count} connections", count) for count in (32, 256, 1000)),
    Load("headers-32", f"{SMALL}, 20 more request headers, 32 connections", 32, headers=20),
    Load("wait-1000", f"{SMALL} after {WAIT_SECONDS:g} s, 1000 connections", 1000, path=WAIT_PATH, waits=True),
    Load("down-64k", "64 KiB down, 32 connections", 32, path="/64k"),
    Load("up-64k", "64 KiB up, 32 connections", 32, path=UPLOAD_PATH, send=FILES["/64k"]),
    Load("down-10m", "10 MiB down, 8 connections", 8, path="/10m"),
    Load("up-10m", "10 MiB up, 8 connections", 8, path=UPLOAD_PATH, send=FILES["/10m"]),
)
LOADS = {load.name: load for load in EVERY}
USUAL = ("small-1", "small-32", "small-256", "small-1000", "up-64k", "up-10m", "down-10m")


def measure_all(rounds: int, seconds: int, loads: list[Load], chosen: list[Contender]) -> list[Sample]:
    """Every contender against the same backends."""
    samples = []
    with fast_backends() as fast, slow_backends(*[f"{WAIT_SECONDS:g}"] * BACKEND_COUNT) as slow:
        for number in range(rounds):
            for load in loads:  # in turn, so that a slow minute hits one round of each
                for one in rotated(chosen, number):
                    progress(f"round {number + 1}/{rounds}: {one.name}, {load.about}")
                    figures = measure(one, load, slow if load.waits else fast, seconds)
                    samples.append(Sample("speed", load.name, one.name, "", number, figures))
    progress("")
    return samples


def measure(contender: Contender, load: Load, backends: Backends, seconds: int) -> Figures:
    """A fresh start, a warm-up that does not count, and one measured run of wrk."""
    expected = (load.path, FILES.get(load.path, BODY), load.send)
    with started(contender, backends.ports, *expected) as (service, place):
        warmup = run_wrk(place.port, load, WARMUP_SECONDS)
        settle(service)
        spent = meter(service, backends)
        result = run_wrk(place.port, load, seconds)
        settle(service)
        found = figures_of(load, result, spent())
        peak = service.memory_bytes("VmHWM")
        await_answer(service, place.port, *expected)
    usage, requests = service.usage, warmup["requests"] + result["requests"]
    # Of the whole process tree at its end: threads that lived for one connection count too.
    switches = (usage.ru_nvcsw + usage.ru_nivcsw) / requests if usage and requests else None
    return found | {"switches/req": switches, "peak MiB": peak / MIB}


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


def h2load(scheme: str, port: int, count: int, *options: str) -> float:
    """Requests per second."""
    command = ["h2load", "-n", str(count), *options, f"{scheme}://127.0.0.1:{port}/api/process"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"finished in [^,]+, ([\d.]+) req/s", said)
    if found is None or f"status codes: {count} 2xx" not in said:
        raise BenchError(f"h2load: {said[-300:]}")
    return float(found[1])


def cost(service: Service, count: int, send: Callable[[int], T]) -> tuple[T, float]:
    """What so many requests bring, and CPU us of each; a tenth of them before that warms up."""
    send(count // 10)
    settle(service)
    before = service.cpu_seconds()
    found = send(count)
    settle(service)
    return found, (service.cpu_seconds() - before) * 1e6 / count


def settle(service: Service) -> None:
    """Let it finish what wrk left open when its time was up, so that this work falls on the right side of a reading."""
    for _ in range(20):
        before = service.cpu_seconds()
        time.sleep(0.1)
        if service.cpu_seconds() - before <= TICK_SECONDS:
            return


def figures_of(load: Load, result: dict[str, float], spent: Spent) -> Figures:
    answers = result["requests"]  # of any status
    good = max(0.0, answers - result["status"])
    # At most one per connection; the rest of what the backend saw beside wrk's requests are health checks.
    unanswered = min(max(0.0, spent.requests - answers), load.connections)
    return {
        "errors": int(result["status"] + result["socket"]),
        "req/s": good / result["seconds"],
        "CPU us/req": spent.cpu_seconds * 1e6 / (good + unanswered) if good else None,
        "p50 ms": result["p50 ms"] if answers else None,
        "p99 ms": result["p99 ms"] if answers else None,
        "not forwarded %": 100 * max(0.0, 1 - spent.requests / answers) if answers else None,  # somebody else answered
        "others %": spent.others_percent,
    }
