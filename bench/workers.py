"""What a second worker process brings and costs, beside nginx and Caddy with as many: requests per second and CPU time
per request while load generator, backends and contender share this machine's CPUs, and memory.

Needs nginx, caddy and h2load; prints the medians.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product

from backends import fast_backends
from contenders import CONTENDERS, OURS, started
from processes import ALL_CPUS, START_TIMEOUT_SECONDS, BenchError, get, medians, wait_until
from script import Parser, at_least
from speed import MIB, cost, h2load

REQUESTS = 30_000


def are_all_ready(port: int, workers: int) -> bool:
    states = [each["state"] for each in json.loads(get(port, "/cluster")[1])["workers"]]
    return states == ["running"] * workers


def measure(name: str, workers: int, backends: list[int]) -> dict[str, float]:
    with started(CONTENDERS[name], backends, workers=workers, cpus=ALL_CPUS) as (service, place):
        if name == OURS and not wait_until(partial(are_all_ready, place.port, workers), START_TIMEOUT_SECONDS):
            raise BenchError("not all workers are ready")
        rate, us = cost(service, REQUESTS, lambda count: h2load("http", place.port, count, "--h1", "-c64"))
        return {"rate": rate, "us": us, "MiB": service.memory_bytes("Pss") / MIB}


def main(rounds: int) -> None:
    with fast_backends() as backends:
        cases = list(product((OURS, "nginx", "caddy"), (1, 2)))
        found = medians(rounds, cases, lambda case: measure(*case, backends.ports))
    for (name, workers), one in found.items():
        figures = f"{one['rate']:7.0f} req/s  {one['us']:6.1f} us CPU a request  {one['MiB']:6.1f} MiB"
        print(f"{name:9} {workers} workers  {figures}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("rounds", type=at_least(1), nargs="?", default=3, help="default 3")
    parser.start(main, "nginx", "caddy", "h2load")
