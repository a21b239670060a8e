"""What it costs: CPU time of everybody who takes part, read before and after."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from backends import Backends, count_requests
from processes import Service, machine_busy_seconds


@dataclass(frozen=True)
class Meter:
    """Readings that only ever rise; two of them make a measurement."""

    contender_cpu: float
    backend_cpu: float
    own_cpu: float  # this script and its finished children: wrk
    machine_cpu: float
    backend_requests: int
    at: float  # seconds

    def others_share(self, before: Meter) -> float:
        """Of the machine's CPU time since then, what neither contender, backend nor generator spent."""
        machine = self.machine_cpu - before.machine_cpu
        known = self.contender_cpu + self.backend_cpu + self.own_cpu
        known -= before.contender_cpu + before.backend_cpu + before.own_cpu
        return max(0.0, machine - known) / ((self.at - before.at) * (os.cpu_count() or 1))


def read_meter(service: Service | None, backends: Backends) -> Meter:
    own = os.times()
    return Meter(
        service.cpu_seconds() if service else 0.0,
        backends.service.cpu_seconds(),
        own.user + own.system + own.children_user + own.children_system,
        machine_busy_seconds(),
        count_requests(backends),
        time.monotonic(),
    )
