"""Containers of Docker, or of what speaks its API, over its Unix socket. Their labels say whose they are: those that a
balancer leaves, because it was killed, are taken over by the next one of its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from balancer.config.scaling import ScalingSettings
from balancer.config.values import docker_url
from balancer.fleet.discovery import SourceFailed
from balancer.fleet.jsonapi import JsonApi, Refused
from balancer.protocol.origin import Origin

STOP_SECONDS = 5  # after SIGTERM
DONE_ALREADY = (304, 404, 409)  # it is not running, or gone
BALANCER, POOL, ID = "load-balancer.name", "load-balancer.pool", "load-balancer.id"  # labels


class Containers:
    """Those of one pool. A Launcher. `name` is this balancer's, `docker` tells where the API is."""

    def __init__(self, options: ScalingSettings, name: str, docker: Callable[[], str]) -> None:
        self.options = options
        self._name = name
        self._docker = docker
        self._containers: dict[str, str] = {}  # by our id, theirs

    def found(self) -> Mapping[str, Origin]:
        origins: dict[str, Origin] = {}
        for container in self._listed():
            backend_id = container["Labels"].get(ID, "")
            if container["State"] == "running":
                self._containers[backend_id] = container["Id"]
                origins[backend_id] = self._origin(container["Id"])
            else:
                self._remove(container["Id"])
        return origins

    def start(self, backend_id: str) -> Origin:
        options, port = self.options, self._port()
        host: dict[str, Any] = {"NetworkMode": options.docker_network} if options.docker_network else {}
        if not options.docker_network:
            host = {"PortBindings": {port: [{"HostIp": "127.0.0.1", "HostPort": ""}]}}
        wanted: dict[str, Any] = {
            "Image": options.docker_image,
            "Labels": {BALANCER: self._name, POOL: options.name, ID: backend_id},
            "ExposedPorts": {port: {}},
            "HostConfig": host,
        }
        container = str(json.loads(self._api.send("POST", "/containers/create", wanted))["Id"])
        try:
            self._api.send("POST", f"/containers/{container}/start")
            origin = self._origin(container)
        except BaseException:
            with suppress(SourceFailed):
                self._remove(container)
            raise
        self._containers[backend_id] = container
        return origin

    def ended(self) -> Mapping[str, str]:
        states = {container["Id"]: container for container in self._listed()}
        gone = {"State": "gone", "Status": "its container was removed"}
        found = {backend_id: states.get(container, gone) for backend_id, container in self._containers.items()}
        return {key: each["Status"] for key, each in found.items() if each["State"] not in ("created", "running")}

    def stop(self, backend_id: str) -> None:
        container = self._containers[backend_id]
        self._have("POST", f"/containers/{container}/stop?t={STOP_SECONDS}")
        self._remove(container)
        del self._containers[backend_id]

    def close(self) -> None:
        """All are told at once, so that none has to wait for another one."""
        for container in self._containers.values():
            with suppress(SourceFailed):
                self._have("POST", f"/containers/{container}/kill?signal=SIGTERM")
        for backend_id in [*self._containers]:
            with suppress(SourceFailed):  # the next balancer finds it
                self.stop(backend_id)

    def _port(self) -> str:
        """In the container, as Docker has it: 8080/tcp."""
        if self.options.docker_port is not None:
            return f"{self.options.docker_port}/tcp"
        image = self._api.get(f"/images/{quote(self.options.docker_image or '', safe='/:@')}/json")
        exposed = [*(image["Config"].get("ExposedPorts") or {})]
        if len(exposed) != 1:
            told = ", ".join(exposed) or "no port"
            raise SourceFailed(f"the image {self.options.docker_image} exposes {told}; set docker_port")
        return str(exposed[0])

    def _origin(self, container: str) -> Origin:
        network = self._api.get(f"/containers/{container}/json")["NetworkSettings"]
        port = self._port()
        if self.options.docker_network:
            return Origin(
                "http", network["Networks"][self.options.docker_network]["IPAddress"], int(port.split("/")[0])
            )
        return Origin("http", "127.0.0.1", int(network["Ports"][port][0]["HostPort"]))

    def _listed(self) -> list[dict[str, Any]]:
        """All of ours, running or not."""
        labels = {"label": [f"{BALANCER}={self._name}", f"{POOL}={self.options.name}"]}
        return list(self._api.get(f"/containers/json?all=1&filters={quote(json.dumps(labels))}"))

    def _remove(self, container: str) -> None:
        self._have("DELETE", f"/containers/{container}?force=1&v=1")

    def _have(self, method: str, target: str) -> None:
        try:
            self._api.send(method, target)
        except Refused as error:
            if error.status not in DONE_ALREADY:
                raise

    @property
    def _api(self) -> JsonApi:
        return JsonApi(Origin.parse(docker_url(self._docker())))
