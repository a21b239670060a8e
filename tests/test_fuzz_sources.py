"""Whatever others say, sources find backends that can be asked, or nothing."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from fuzzing import SEED, fuzzing, mutations, patient, replay
from hypothesis import given, seed
from hypothesis import strategies as st
from test_docker_source import container
from test_kubernetes_source import endpoint

from balancer.balancing.backends import ID_PATTERN, MAX_WEIGHT
from balancer.config.values import BackendSettings
from balancer.errors import SettingsError
from balancer.fleet.backendsfile import found_in
from balancer.fleet.discovery import Found
from balancer.fleet.docker import DockerSource
from balancer.fleet.kubernetes import KubernetesSource
from balancer.protocol.origin import Discovered, Origin

__all__ = ["replay"]
PIECES = [
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"-1",
    b"99999",
    b"null",
    b"\\u0000",
    b"\xff",
    b"\n",
    b"true",
    b'"id"',
    b"1e400",
]
FILES = [
    b'[[backends]]\nid = "a"\nurl = "http://127.0.0.1:80"\nweight = 3\npool = "x"\n',
    b'[{"id": "a", "url": "http://[::1]:80", "max_connections": 3}, "b=http://api:80@3"]',
]
CONTAINERS = [json.dumps([container("a", 80, weight="3"), container("b", 81, port="82")]).encode()]
SLICE = {"addressType": "IPv4", "endpoints": [endpoint(1), endpoint(2)], "ports": [{"name": "http", "port": 80}]}
SLICES = [json.dumps({"s": SLICE, "t": {**SLICE, "addressType": "IPv6"}}).encode()]


def check(found: list[Found]) -> None:
    for each in found:
        assert re.fullmatch(ID_PATTERN, each.id) and 0 <= each.weight <= MAX_WEIGHT
        each.origin.authority.encode("ascii")
        assert each.origin.is_unix or 0 < each.origin.port < 65536
        assert Origin.parse(each.origin.url).port == each.origin.port


@patient
@seed(SEED)
@fuzzing
@given(mutations(FILES, PIECES))
def test_a_file(data: bytes) -> None:
    found: list[Found] = []
    with suppress(SettingsError):  # what is wrong with a file is told as such
        found = found_in(data)
    check(found)


def asked(data: bytes) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(data)
    return None


@patient
@seed(SEED)
@fuzzing
@given(mutations(CONTAINERS, PIECES))
def test_containers(data: bytes) -> None:
    source = DockerSource("unix:///x", Origin.parse("http+unix:///x"))
    source._api.get = lambda target: asked(data)  # type: ignore[method-assign]
    found: list[Found] = []
    with suppress(Exception):
        found = source._found()
    check(found)


@patient
@seed(SEED)
@fuzzing
@given(mutations(SLICES, PIECES), st.sampled_from(["http", "80", ""]))
def test_slices(data: bytes, port: str) -> None:
    url = "kubernetes+http://api" + (f":{port}" if port else "")
    where = Discovered.parse(url)
    assert where is not None
    source = KubernetesSource("default", BackendSettings(id="api", url=url), where)
    found: list[Found] = []
    with suppress(Exception):
        found = source._found(asked(data))
    check(found)
