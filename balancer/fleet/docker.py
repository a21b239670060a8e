"""Containers that are labelled `lb.enable=true`, as Docker's API tells of them. It is only read."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Generator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface
from typing import Any
from urllib.parse import quote

from balancer.balancing.backends import MAX_WEIGHT
from balancer.balancing.pool import DEFAULT_POOL
from balancer.fleet.discovery import Found, Source, SourceFailed
from balancer.fleet.jsonapi import JsonApi
from balancer.protocol.origin import Origin

ROUND_SECONDS = 60.0  # after which all are listed again, whatever was told
PAUSE_SECONDS = 0.2  # between two rounds: the news may end at once
SELECTED = {"label": ["lb.enable=true"]}
END_SIGNALS = ("2", "3", "15")  # INT, QUIT, TERM: what `docker stop` sends, as the image has it
NOT_YET = ("(unhealthy)", "(health: starting)")


class DockerSource(Source):
    """Lists containers anew whenever one of them has started, ended or changed."""

    kind = "docker"
    longest_pause = 10.0

    def __init__(self, url: str, origin: Origin) -> None:
        super().__init__("docker", url, url)
        self._api, self._news = JsonApi(origin), JsonApi(origin)
        self._ending: set[str] = set()  # ids of containers that were told to end, in this round

    def stop(self) -> None:
        super().stop()
        self._api.stop()
        self._news.stop()

    def look(self) -> Generator[Sequence[Found], None, None]:
        while not self.stopping.is_set():
            self._ending = set()
            # Listened to first, so that nothing happens unheard between the list and the news.
            with self._news.watch(f"/events?filters={_filters(type=['container'])}", ROUND_SECONDS) as news:
                yield self._found()
                for told in news:
                    self._ending |= {each["Actor"]["ID"] for each in told if _is_end(each)}
                    yield self._found()
            self.stopping.wait(PAUSE_SECONDS)

    def _found(self) -> list[Found]:
        containers = self._api.get(f"/containers/json?filters={_filters(status=['running'])}")
        found, self.complaints = [], []
        for container in containers:
            if container["Id"] in self._ending or any(text in (container.get("Status") or "") for text in NOT_YET):
                continue
            name = _name(container)
            shown = name or container["Id"][:12]
            try:
                found.append(_backend(name, container))
            except (SourceFailed, ValueError) as error:
                self.complaints.append(f"{shown} is left out: {error}")
            except (AttributeError, LookupError, TypeError) as error:
                self.complaints.append(f"{shown} is left out: what the engine says of it makes no sense: {error!r}")
        return found


def _name(container: Mapping[str, Any]) -> str:
    """Its own, not one that a link from another container gives it (/OTHER/ALIAS); "" if it is being removed and has
    none any more."""
    names = [str(name)[1:] for name in container.get("Names") or ()]
    return next((name for name in names if "/" not in name), "")[:64]


def _is_end(told: Mapping[str, Any]) -> bool:
    """It is to end, and serves what it has; a signal of another kind asks for something else."""
    return told.get("Action") == "kill" and told["Actor"]["Attributes"].get("signal") in END_SIGNALS


def _filters(**more: Sequence[str]) -> str:
    return quote(json.dumps({**SELECTED, **more}))


def _backend(name: str, container: Mapping[str, Any]) -> Found:
    labels = container["Labels"]
    weight = labels.get("lb.weight", "1")
    if not re.fullmatch(r"[0-9]{1,3}", weight) or int(weight) > MAX_WEIGHT:
        raise SourceFailed(f"lb.weight {weight!r} is not a whole number from 0 to {MAX_WEIGHT}")
    address = _address(container["NetworkSettings"]["Networks"])
    origin = Origin("http", address, _port(labels, container), address)
    return Found(name, labels.get("lb.pool", DEFAULT_POOL), origin, int(weight))


def _port(labels: Mapping[str, str], container: Mapping[str, Any]) -> int:
    exposed = {str(port["PrivatePort"]) for port in container.get("Ports") or () if port["Type"] == "tcp"}
    port = labels.get("lb.port") or (exposed.pop() if len(exposed) == 1 else "")
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise SourceFailed(f"lb.port {port!r} is no port" if port else "it exposes not exactly one port, set lb.port")
    return int(port)


def _address(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """In a network that we are in as well, if there is one."""
    if "host" in networks:
        return "127.0.0.1"
    told = [(each["IPAddress"], each.get("IPPrefixLen") or 32) for each in networks.values() if each.get("IPAddress")]
    found = [IPv4Interface(f"{address}/{bits}") for address, bits in told]
    if not found:
        raise SourceFailed("it has no address")
    return str(next(filter(_is_near, found), found[0]).ip)


def _is_near(interface: IPv4Interface) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:  # nothing is sent
        try:
            sock.connect((str(interface.ip), 9))
        except OSError:
            return False
        return IPv4Address(sock.getsockname()[0]) in interface.network
