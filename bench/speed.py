"""The measurement: wrk on each contender in interleaved rounds, with readings before and after."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from backends import BACKEND_COUNT, Backends, delay_backends, fast_backends
from contenders import Contender, Place
from loads import ONE_CONNECTION, WAIT_SECONDS, Load
from meter import Meter, read_meter
from processes import TICK_SECONDS, BenchError, Service, await_answer, free_ports, raise_file_limit, running
from report import DIRECT
from results import Sample

WARMUP_SECONDS = 1
WRK_TIMEOUT_SECONDS = 10  # the slowest contender takes seconds per request at 1,000 connections; that is no error


def measure_all(rounds: int, seconds: int, loads: list[Load], chosen: list[Contender]) -> list[Sample]:
    """Every contender once per round, each round beginning with another one, all against the same backends."""
    samples = []
    with fast_backends() as fast, delay_backends(*[f"{WAIT_SECONDS:g}"] * BACKEND_COUNT) as slow:
        for number in range(rounds):
            shift = number % len(chosen)
            for load in loads:
                backends = slow if load.waits else fast
                if load.name == ONE_CONNECTION:
                    samples.append(measure_direct(number, load, backends, seconds))
                for contender in chosen[shift:] + chosen[:shift]:
                    progress(f"round {number + 1}/{rounds}: {contender.name}, {load.about}")
                    samples.append(measure(number, contender, load, backends, seconds))
    progress("")
    return samples


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def measure_direct(number: int, load: Load, backends: Backends, seconds: int) -> Sample:
    """The same without a contender: what its latency is to be compared with."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        place = Place(backends.ports[0], backends.ports, Path(name))
        run_wrk(place, load, WARMUP_SECONDS)
        before = read_meter(None, backends)
        result = run_wrk(place, load, seconds)
        return sample_of(number, DIRECT, load, result, before, read_meter(None, backends), 0, None)


def measure(number: int, contender: Contender, load: Load, backends: Backends, seconds: int) -> Sample:
    """A fresh start, a warm-up that does not count, and one measured run of wrk."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        place = Place(free_ports(1)[0], backends.ports, Path(name))
        with running(contender.name, contender.command(place), place.directory, contender.cpus) as service:
            await_answer(service, place.port, load.path, load.expected, load.body)
            warmup = run_wrk(place, load, WARMUP_SECONDS)
            settle(service)
            before = read_meter(service, backends)
            result = run_wrk(place, load, seconds)
            settle(service)
            after = read_meter(service, backends)
            peak = service.memory_bytes("VmHWM")
            await_answer(service, place.port, load.path, load.expected, load.body)
        switches = switches_per_request(service, warmup["requests"] + result["requests"])
    return sample_of(number, contender.name, load, result, before, after, peak, switches)


def run_wrk(place: Place, load: Load, seconds: int) -> dict[str, float]:
    script = place.directory / "work.lua"
    script.write_text(load.script())
    url = f"http://127.0.0.1:{place.port}{load.path}"
    limits = [f"-c{load.connections}", f"-d{seconds}s", f"--timeout={WRK_TIMEOUT_SECONDS}s"]
    command = ["wrk", "-t1", *limits, "--latency", "-s", str(script), url]
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


def switches_per_request(service: Service, requests: float) -> float | None:
    """From the usage of the whole process tree at its end: threads that lived for one connection count too."""
    usage = service.usage
    return (usage.ru_nvcsw + usage.ru_nivcsw) / requests if usage and requests else None


def sample_of(
    number: int,
    contender: str,
    load: Load,
    result: dict[str, float],
    before: Meter,
    after: Meter,
    peak: int,
    switches: float | None,
) -> Sample:
    good = max(0.0, result["requests"] - result["status"])
    forwarded = after.backend_requests - before.backend_requests
    # At most one per connection; the rest of what the backend saw beside wrk's requests are health checks.
    unanswered = min(max(0.0, forwarded - result["requests"]), load.connections)
    cpu = after.contender_cpu - before.contender_cpu
    return Sample(
        round=number,
        contender=contender,
        load=load.name,
        requests=int(result["requests"]),
        errors=int(result["status"] + result["socket"]),
        seconds=result["seconds"],
        requests_per_second=good / result["seconds"],
        cpu_us_per_request=cpu * 1e6 / (good + unanswered) if good and contender != DIRECT else None,
        switches_per_request=switches,
        p50_ms=result["p50_ms"] if result["requests"] else None,
        p99_ms=result["p99_ms"] if result["requests"] else None,
        peak_rss_bytes=peak,
        forwarded_share=forwarded / result["requests"] if result["requests"] else 0.0,
        others_share=after.others_share(before),
    )
