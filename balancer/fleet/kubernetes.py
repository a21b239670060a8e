"""Pods behind a Service, as the EndpointSlices of Kubernetes tell of them: listed, and then watched.

Only endpoints that are ready are backends; one that terminates, or is not ready any more, goes, and so drains. The API
is asked with the token of the pod's service account, whose files are read anew each time, since they are renewed.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from balancer.config.values import BackendSettings
from balancer.fleet.discovery import Found, Source, SourceFailed, id_of
from balancer.fleet.jsonapi import JsonApi, Refused
from balancer.protocol.messages import Line
from balancer.protocol.origin import Discovered, Origin
from balancer.upstream.dialer import tls_context

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_SECONDS = 60.0  # asked for; so long after it would have ended one that is silent is given up
LATE_SECONDS = 10.0
PAUSE_SECONDS = 0.5  # between two watches: one may end at once
GONE = 410  # what was listed is too old to be watched: list again

Slice = Mapping[str, Any]


class KubernetesSource(Source):
    """`kubernetes+http://SERVICE.NAMESPACE:PORT`; the namespace is that of the pod unless it is named, PORT the number
    or the name of the port, and may be left out if there is one, or one named as the scheme."""

    kind = "kubernetes"
    longest_pause = 30.0

    def __init__(self, pool: str, entry: BackendSettings, where: Discovered) -> None:
        super().__init__(f"kubernetes:{entry.id}", where.url, (pool, entry), pool)
        self._pool, self._entry, self._where = pool, entry, where
        self._api = cluster()

    def stop(self) -> None:
        super().stop()
        self._api.stop()

    def look(self) -> Generator[Sequence[Found], None, None]:
        target = self._target()
        listed = self._api.get(target)
        slices: dict[str, Slice] = {each["metadata"]["name"]: each for each in listed["items"]}
        version = str(listed["metadata"]["resourceVersion"])
        yield self._found(slices)
        while not self.stopping.is_set():
            wanted = f"&watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS:.0f}&resourceVersion={version}"
            try:
                with self._api.watch(target + wanted, WATCH_SECONDS + LATE_SECONDS) as news:
                    yield self._found(slices)
                    for told in news:
                        for each in told:
                            version = self._note(slices, each["type"], each["object"])
                        yield self._found(slices)
            except Refused as error:
                if error.status == GONE:
                    return
                raise
            self.stopping.wait(PAUSE_SECONDS)

    def _note(self, slices: dict[str, Slice], kind: str, found: Slice) -> str:
        """Returns the version to go on from. Raises Refused if the watch is over."""
        if kind == "ERROR":
            raise Refused(self._api.origin, int(found["code"]))
        if kind == "DELETED":
            slices.pop(found["metadata"]["name"], None)
        elif kind != "BOOKMARK":  # ADDED or MODIFIED; a bookmark has a version alone
            slices[found["metadata"]["name"]] = found
        return str(found["metadata"]["resourceVersion"])

    def _target(self) -> str:
        service, _, namespace = self._where.name.partition(".")
        namespace = namespace or own_namespace()
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        return f"{path}?labelSelector=kubernetes.io/service-name%3D{service}"

    def _found(self, slices: Mapping[str, Slice]) -> list[Found]:
        """Those of IPv4; those of IPv6 only if there are none, for each pod is to be one backend."""
        self.complaints = []
        for family in ("IPv4", "IPv6"):
            if found := {each.id: each for name in sorted(slices) for each in self._of_slice(slices[name], family)}:
                return list(found.values())
        return []

    def _of_slice(self, found: Slice, family: str) -> list[Found]:
        addresses = [each["addresses"][0] for each in found.get("endpoints") or () if _is_ready(each)]
        if found["addressType"] != family or not addresses:
            return []
        port = self._port(found.get("ports") or ())
        if port is None:
            known = ", ".join(f"{each.get('name')} {each.get('port')}" for each in found.get("ports") or ())
            self.complaints.append(f"no port is chosen of: {known}; name it as in kubernetes+http://SERVICE:PORT")
            return []
        entry, where = self._entry, self._where
        limits = (entry.weight, entry.max_connections, entry.drain_timeout)
        return [
            Found(id_of(entry.id, address), self._pool, where.origin(address, port), *limits) for address in addresses
        ]

    def _port(self, ports: Sequence[Mapping[str, Any]]) -> int | None:
        wanted = self._where.port or self._where.scheme
        tcp = [each for each in ports if each.get("protocol", "TCP") == "TCP" and each.get("port")]
        named = [each for each in tcp if wanted in (each.get("name"), str(each["port"]))]
        if not named and not self._where.port and len(tcp) == 1:
            named = tcp
        return int(named[0]["port"]) if named else None


def _is_ready(endpoint: Mapping[str, Any]) -> bool:
    """What is not known counts as ready."""
    conditions = endpoint.get("conditions") or {}
    return conditions.get("ready") is not False and not conditions.get("terminating")


def cluster() -> JsonApi:
    """The API of the cluster that this pod is in."""
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    return JsonApi(Origin("https", host, int(port) if port.isdecimal() else 443), _tls, _authorization)


def own_namespace() -> str:
    return _read("namespace").decode()


def _read(name: str) -> bytes:
    if not os.environ.get("KUBERNETES_SERVICE_HOST"):
        raise SourceFailed("this is no pod of Kubernetes: KUBERNETES_SERVICE_HOST is not set")
    try:
        return (ACCOUNT / name).read_bytes().strip()
    except OSError as error:
        raise SourceFailed(f"{ACCOUNT / name}: {error.strerror}; does the pod have a service account?") from None


def _authorization() -> list[Line]:
    return [(b"authorization", b"Bearer " + _read("token"))]


def _tls() -> ssl.SSLContext:
    try:
        return tls_context(cadata=_read("ca.crt").decode())
    except (ssl.SSLError, ValueError) as error:
        raise SourceFailed(f"{ACCOUNT / 'ca.crt'}: {error}") from None
