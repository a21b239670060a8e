"""Who brings backends to a pool: by the setting that names it, and imported for that."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

from balancer.balancing.pool import BackendPool
from balancer.balancing.pools import Pools
from balancer.config.scaling import ScalingSettings
from balancer.fleet.scaling import Note, Provider, Starts

if TYPE_CHECKING:
    from balancer.fleet.started import Launcher


class Providers:
    """Makes them. `name` is this balancer's; `tls` is for webhooks, None for the system's CAs; `docker` tells where its
    API is. To be made before the process pins itself to a CPU."""

    def __init__(self, pools: Pools, name: str, tls: ssl.SSLContext | None, docker: Callable[[], str]) -> None:
        self._pools = pools
        self._name = name
        self._tls = tls
        self._docker = docker
        self._cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()

    def make(self, options: ScalingSettings, pool: BackendPool, starts: Starts, note: Note) -> Provider:
        from balancer.fleet.replicas import KubernetesScale, Replicas, Webhook
        from balancer.fleet.started import StartedBackends

        if options.kind == "kubernetes":
            return Replicas(pool, options, KubernetesScale(options), starts, note)
        if options.kind == "webhook":
            return Replicas(pool, options, Webhook(options, self._tls), starts, note)
        return StartedBackends(pool, self._pools, options, self._launcher(options), starts, note)

    def _launcher(self, options: ScalingSettings) -> Launcher:
        if options.kind == "docker_image":
            from balancer.fleet.containers import Containers

            return Containers(options, self._name, self._docker)
        from balancer.fleet.processes import Processes  # for Linux alone

        return Processes(options, self._cpus)
