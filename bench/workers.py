"""What a second worker process brings and costs, beside nginx and Caddy with as many: requests per second and CPU time
per request while load generator, backends and contender share this machine's CPUs, and memory.

python bench/workers.py [ROUNDS]     needs nginx, caddy and h2load; prints the medians
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from backends import fast_backends
from contenders import BODY, CONTENDERS, OURS, Place
from processes import ALL_CPUS, BenchError, await_answer, free_ports, get, running, wait_until
from speed import settle

NAMES, COUNTS = (OURS, "nginx", "caddy"), (1, 2)
PATH = "/api/process"
REQUESTS = 30_000


def command(name: str, place: Place, workers: int) -> list[str]:
    made = CONTENDERS[name].command(place)
    if name == OURS:
        return [*made, f"--workers={workers}"]
    if name == "nginx":
        config = place.directory / "nginx.conf"
        config.write_text(config.read_text().replace("worker_processes 1;", f"worker_processes {workers};"))
    return [each.replace("GOMAXPROCS=1", f"GOMAXPROCS={workers}") for each in made]


def load(port: int, count: int) -> float:
    """Requests a second over 64 kept connections."""
    url = f"http://127.0.0.1:{port}{PATH}"
    said = subprocess.run(["h2load", "--h1", "-n", str(count), "-c64", url], capture_output=True, text=True).stdout
    found = re.search(r"finished in [^,]+, ([\d.]+) req/s", said)
    if found is None or not re.search(rf"status codes: {count} 2xx", said):
        raise BenchError(f"h2load: {said[-300:]}")
    return float(found[1])


def are_all_ready(port: int, workers: int) -> bool:
    states = [each["state"] for each in json.loads(get(port, "/cluster")[1])["workers"]]
    return states == ["running"] * workers


def measure(name: str, workers: int, backends: list[int]) -> tuple[float, float, float]:
    """Requests per second, CPU us per request, MiB."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Place(free_ports(1)[0], backends, Path(folder))
        with running(name, command(name, place, workers), place.directory, ALL_CPUS) as service:
            await_answer(service, place.port, PATH, BODY)
            if name == OURS and not wait_until(lambda: are_all_ready(place.port, workers), 60):
                raise BenchError("not all workers are ready")
            load(place.port, REQUESTS // 10)
            settle(service)
            before = service.cpu_seconds()
            rate = load(place.port, REQUESTS)
            settle(service)
            return rate, (service.cpu_seconds() - before) * 1e6 / REQUESTS, service.shared_memory_bytes() / 2**20


def main(rounds: int) -> None:
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with fast_backends() as backends:
        for _ in range(rounds):
            for name in NAMES:
                for workers in COUNTS:
                    found.setdefault((name, workers), []).append(measure(name, workers, backends.ports))
    for (name, workers), figures in found.items():
        rate, cpu, memory = map(statistics.median, zip(*figures, strict=True))
        print(f"{name:9} {workers} workers  {rate:7.0f} req/s  {cpu:6.1f} us CPU a request  {memory:6.1f} MiB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
