"""The measurement: wrk on each contender in interleaved rounds, with readings before and after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from contenders import BODY, STUB_STATUS_PATH, Contender, Place, fast_backend_command
from processes import (
    TICK_SECONDS,
    BenchError,
    Service,
    await_answer,
    free_ports,
    get,
    machine_busy_seconds,
    raise_file_limit,
    running,
)
from report import Sample

BACKEND_COUNT = 3
# wrk reports its own figures; its printed ones are rounded to a unit chosen by size.
WRK_SCRIPT = """
done = function(summary, latency)
  local e = summary.errors
  io.stderr:write(string.format(
    '{"requests": %d, "seconds": %f, "status": %d, "socket": %d, "p50_ms": %f, "p99_ms": %f}',
    summary.requests, summary.duration / 1e6, e.status, e.connect + e.read + e.write + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Load:
    """What wrk does to each contender."""

    connections: int
    seconds: int
    warmup_seconds: int = 1
    path: str = "/api/process"


@dataclass(frozen=True)
class Meter:
    """Readings that only ever rise; two of them make a measurement."""

    contender_cpu: float
    backend_cpu: float
    own_cpu: float  # this script and its finished children: wrk
    machine_cpu: float
    backend_requests: int


def measure_all(rounds: int, loads: list[Load], chosen: list[Contender]) -> list[Sample]:
    """Every contender once per round, each round beginning with another one, all against the same backend."""
    samples = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        ports = free_ports(BACKEND_COUNT)
        with running("the nginx backend", fast_backend_command(directory, ports), directory) as backend:
            await_answer(backend, ports[-1], "/", BODY)
            for number in range(rounds):
                shift = number % len(chosen)
                for load in loads:
                    for contender in chosen[shift:] + chosen[:shift]:
                        progress(f"round {number + 1}/{rounds}: {contender.name}, {load.connections} connections")
                        samples.append(measure(number, contender, load, backend, ports))
    progress("")
    return samples


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def measure(number: int, contender: Contender, load: Load, backend: Service, ports: list[int]) -> Sample:
    """A fresh start, a warm-up that does not count, and one measured run of wrk."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        place = Place(free_ports(1)[0], ports, Path(name))
        with running(contender.name, contender.command(place), place.directory) as service:
            await_answer(service, place.port, load.path, BODY)
            warmup = run_wrk(place, load, load.warmup_seconds)
            settle(service)
            before = read_meter(service, backend, ports[0])
            result = run_wrk(place, load, load.seconds)
            settle(service)
            after = read_meter(service, backend, ports[0])
            peak = service.memory_bytes("VmHWM")
            await_answer(service, place.port, load.path, BODY)
        switches = switches_per_request(service, warmup["requests"] + result["requests"])
    return sample_of(number, contender, load, result, before, after, peak, switches)


def run_wrk(place: Place, load: Load, seconds: int) -> dict[str, float]:
    script = place.directory / "report.lua"
    script.write_text(WRK_SCRIPT)
    url = f"http://127.0.0.1:{place.port}{load.path}"
    command = ["wrk", "-t1", f"-c{load.connections}", f"-d{seconds}s", "--latency", "-s", str(script), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, preexec_fn=raise_file_limit)
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


def read_meter(service: Service, backend: Service, backend_port: int) -> Meter:
    own = os.times()
    return Meter(
        service.cpu_seconds(),
        backend.cpu_seconds(),
        own.user + own.system + own.children_user + own.children_system,
        machine_busy_seconds(),
        int(get(backend_port, STUB_STATUS_PATH)[1].splitlines()[2].split()[2]),
    )


def switches_per_request(service: Service, requests: float) -> float | None:
    """From the usage of the whole process tree at its end: threads that lived for one connection count too."""
    usage = service.usage
    return (usage.ru_nvcsw + usage.ru_nivcsw) / requests if usage and requests else None


def sample_of(
    number: int,
    contender: Contender,
    load: Load,
    result: dict[str, float],
    before: Meter,
    after: Meter,
    peak: int,
    switches: float | None,
) -> Sample:
    good = result["requests"] - result["status"]
    if good <= 0:
        raise BenchError(f"{contender.name} gave no good answer at {load.connections} connections")
    forwarded = after.backend_requests - before.backend_requests
    # At most one per connection; the rest of what the backend saw beside wrk's requests are health checks.
    unanswered = min(max(0.0, forwarded - result["requests"]), load.connections)
    cpu = after.contender_cpu - before.contender_cpu
    machine = after.machine_cpu - before.machine_cpu
    ours = cpu + after.backend_cpu - before.backend_cpu + after.own_cpu - before.own_cpu
    capacity = result["seconds"] * (os.cpu_count() or 1)
    return Sample(
        round=number,
        contender=contender.name,
        connections=load.connections,
        requests=int(result["requests"]),
        errors=int(result["status"] + result["socket"]),
        seconds=result["seconds"],
        requests_per_second=good / result["seconds"],
        cpu_us_per_request=cpu * 1e6 / (good + unanswered),
        switches_per_request=switches,
        p50_ms=result["p50_ms"],
        p99_ms=result["p99_ms"],
        peak_rss_bytes=peak,
        forwarded_share=forwarded / result["requests"],
        others_share=max(0.0, machine - ours) / capacity,
    )
