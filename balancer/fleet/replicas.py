"""Backends that somebody else starts and stops when told how many there are to be: Kubernetes, or a webhook.

They come to the pool, and leave it, by discovery.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import Protocol

from balancer.balancing.pool import BackendPool
from balancer.config.scaling import ScalingSettings
from balancer.fleet.discovery import SourceFailed
from balancer.fleet.jsonapi import JsonApi
from balancer.fleet.kubernetes import cluster, own_namespace
from balancer.fleet.scaling import Load, Note, Starts
from balancer.protocol.origin import Endpoint

LOOK_AGAIN_SECONDS = 15.0  # what is wanted may be changed by others
MERGE_PATCH = b"application/merge-patch+json"  # RFC 7396


class Replicator(Protocol):
    """Knows how many there are to be. Each may raise SourceFailed."""

    options: ScalingSettings

    def read(self) -> int | None:
        """None if it cannot tell."""

    def write(self, before: int, after: int, why: str) -> None: ...


class Replicas:
    """Those of one pool. A Provider."""

    def __init__(
        self,
        pool: BackendPool,
        options: ScalingSettings,
        replicator: Replicator,
        starts: Starts,
        note: Note,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self._pool = pool
        self._replicator = replicator
        self._starts = starts
        self._note = note
        self._clock = clock
        self._count: int | None = None  # that there are to be
        self._read: int | None = None  # as it was told last, if that can be
        self._has_written = False
        self._began = self._complete_at = clock()  # the latter: when there were so many
        self._look_at = 0.0

    def adopt(self) -> None:
        """They are nobody's."""

    def tend(self) -> None:
        self._replicator.options = self.options
        now = self._clock()
        healthy = self._healthy()
        if now >= self._look_at:
            self._look_at = now + LOOK_AGAIN_SECONDS
            self._read = self._replicator.read()
            self._count = self._count if self._read is None else self._read
        if self._read is None and not self._has_written and self._is_found(now, healthy):
            self._count = healthy
        if self._count is None or healthy >= self._count:
            self._complete_at = now
            self._starts.succeeded()
        elif now - self._complete_at > self.options.start_timeout:
            self._complete_at = now
            text = f"{healthy} of {self._count} are healthy after {self.options.start_timeout:g} s"
            self._starts.fail(text, now)
            self._note("start_failed", self._pool.name, None, text)

    def _is_found(self, now: float, healthy: int) -> bool:
        """Discovery has had the time for all that there are."""
        is_first_round_over = healthy > 0 and self._pool.has_had_first_round()
        return is_first_round_over or self._pool.waiting > 0 or now - self._began > self.options.start_timeout

    def _healthy(self) -> int:
        return sum(backend.is_ready for backend in self._pool.backends())

    def load(self) -> Load | None:
        """Those that do not come are counted as starting all the same: more of them would not come either. Those that
        are to go are not."""
        if self._count is None:
            return None
        healthy = min(self._healthy(), self._count)
        active = sum(backend.active for backend in self._pool.backends() if backend.is_wanted)
        return Load(active, self._pool.waiting, healthy, starting=self._count - healthy)

    def scale(self, load: Load, wanted: int, why: str) -> None:
        try:
            self._replicator.write(load.there, wanted, why)
        except SourceFailed as error:
            self._starts.fail(str(error), self._clock())
            raise
        self._note("scaled_up" if wanted > load.there else "scaled_down", self._pool.name, None, why)
        self._starts.started += max(0, wanted - load.there)
        self._count, self._complete_at, self._has_written = wanted, self._clock(), True

    def retire(self) -> None:
        """They are whoever's else."""

    is_empty = True

    def close(self) -> None:
        """They go on without us."""


class KubernetesScale:
    """The scale subresource of a deployment in our own namespace, as the service account of this pod may have it."""

    def __init__(self, options: ScalingSettings) -> None:
        self.options = options
        self._cluster = cluster()

    def read(self) -> int:
        return int(self._cluster.get(self._path)["spec"].get("replicas", 0))

    def write(self, before: int, after: int, why: str) -> None:
        self._cluster.send("PATCH", self._path, {"spec": {"replicas": after}}, MERGE_PATCH)

    @property
    def _path(self) -> str:
        assert self.options.kubernetes is not None
        name = self.options.kubernetes.removeprefix("deployment/")
        return f"/apis/apps/v1/namespaces/{own_namespace()}/deployments/{name}/scale"


class Webhook:
    """A POST that it takes with 2xx has been heard. One that it does not take is sent again, later and later."""

    def __init__(self, options: ScalingSettings, tls: ssl.SSLContext | None) -> None:
        self.options = options
        self._tls = tls

    def read(self) -> None:
        return None

    def write(self, before: int, after: int, why: str) -> None:
        assert self.options.webhook is not None
        told = {"pool": self.options.name, "from": before, "to": after, "reason": why}
        url = Endpoint.parse(self.options.webhook)
        JsonApi(url.origin, lambda: self._tls).send("POST", url.target.decode("ascii"), told)
