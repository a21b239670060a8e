"""Containers as backends: Docker's API on a Unix socket, as it answers in its version 1.41."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from apiserver import ApiServer, News, Query
from fleet import DemoBackend
from support import Balancer, fetch, wait_until
from test_discovery import ids, source, told

from balancer.config.settings import given
from balancer.errors import SettingsError
from balancer.fleet import discovery, docker


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_SECONDS", "CONFIRM_SECONDS"):
        monkeypatch.setattr(discovery, name, 0.05)
    monkeypatch.setattr(docker, "PAUSE_SECONDS", 0.05)


def container(name: str, port: int, /, **labels: str) -> dict[str, Any]:
    """As `GET /containers/json` tells of one, shortened."""
    return {
        "Id": f"id-of-{name}",
        "Names": [f"/{name}"],
        "Image": "api:1",
        "State": "running",
        "Status": "Up 3 minutes (healthy)",
        "Ports": [{"PrivatePort": port, "Type": "tcp"}],
        "Labels": {"lb.enable": "true", "com.docker.compose.service": "api"}
        | {f"lb.{label}": value for label, value in labels.items()},
        "NetworkSettings": {
            "Networks": {
                "far": {"IPAddress": "198.51.100.7", "IPPrefixLen": 24, "Gateway": "198.51.100.1"},
                "shop_default": {"IPAddress": "127.0.0.1", "IPPrefixLen": 8, "Gateway": "127.0.0.1"},
            }
        },
    }


class Engine:
    """What its API tells: `containers`, and news."""

    def __init__(self, path: Path) -> None:
        self.containers: Any = []
        self.server = ApiServer(self._answer, path)

    def _answer(self, path: str, query: Query) -> Any:
        filters = json.loads(query["filters"])
        assert filters["label"] == ["lb.enable=true"]
        if path == "/events":
            assert filters["type"] == ["container"]
            return News()
        assert path == "/containers/json" and filters["status"] == ["running"]
        return self.containers

    def tell(self, containers: Any) -> None:
        self.containers = containers
        self.happens("start")

    def happens(self, action: str, name: str = "a", **attributes: str) -> None:
        actor = {"ID": f"id-of-{name}", "Attributes": {"name": name, **attributes}}
        self.server.news[-1].put({"Type": "container", "Action": action, "Actor": actor, "time": 1})


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path / "docker.sock")
    with engine.server:
        yield engine


@pytest.fixture
def backends() -> Iterator[list[DemoBackend]]:
    with ExitStack() as stack:
        made = [DemoBackend(name) for name in "abc"]
        for each in made:
            stack.callback(each.kill)
        yield made


def test_containers_come_and_go_as_they_are_told(engine: Engine, backends: list[DemoBackend], tmp_path: Path) -> None:
    a, b, c = (container(f"shop-{each.id}-1", each.port, weight="3") for each in backends)
    engine.containers = [a, b]
    with Balancer(f"--docker=unix://{tmp_path}/docker.sock") as balancer:
        assert ids(balancer) == {"shop-a-1", "shop-b-1"}
        found = balancer.backend("shop-a-1")
        assert (found["source"], found["weight"], found["url"]) == ("docker", 3, backends[0].url)
        assert fetch(f"{balancer.url}/x")[0] == 200
        engine.tell([b, c])
        wait_until(lambda: ids(balancer) == {"shop-b-1", "shop-c-1"})
        engine.containers = [a, b, c]
        engine.server.news[-1].end()  # cut off: it listens and lists again
        wait_until(lambda: len(ids(balancer)) == 3)
        engine.tell([a, b, {**c, "Status": "Up 3 minutes (unhealthy)"}])
        wait_until(lambda: len(ids(balancer)) == 2)
        engine.happens("kill", "shop-b-1", signal="1")  # HUP
        engine.happens("kill", "shop-a-1", signal="15")  # it still runs
        wait_until(lambda: ids(balancer) == {"shop-b-1"})
    assert not any(thread.name.startswith("source-") for thread in threading.enumerate())


WRONG = {
    "port": ({"port": "70000"}, "lb.port '70000' is no port"),
    "weight": ({"weight": "-1"}, "lb.weight '-1' is not a whole number"),
    "pool": ({"pool": "other"}, "there is no pool 'other'"),
}


def test_a_container_with_wrong_labels_is_left_out_alone(
    engine: Engine, backends: list[DemoBackend], tmp_path: Path
) -> None:
    a, b, _ = (container(each.id, each.port) for each in backends)
    many = {**container("many", 1), "Ports": [{"PrivatePort": port, "Type": "tcp"} for port in (1, 2)]}
    none = {**container("none", 1), "NetworkSettings": {"Networks": {"none": {"IPAddress": ""}}}}
    odd = {**container("odd", 1), "NetworkSettings": {"Networks": None}}
    removed = {**container("removed", 1), "Names": None}
    a["Names"] = ["/other/alias", "/a"]
    engine.containers = [
        a,
        many,
        none,
        odd,
        removed,
        *(container(name, 1, **labels) for name, (labels, _) in WRONG.items()),
    ]
    with Balancer(f"--docker=unix://{tmp_path}/docker.sock") as balancer:
        assert ids(balancer) == {"a"}
        error = source(balancer, "docker")["last_error"]
        assert all(f"{name} is left out: {text}" in error for name, (_, text) in WRONG.items())
        assert "odd is left out: what the engine says" in error and "'' cannot be an id" in error
        assert "many is left out: it exposes not exactly one port" in error and "none is left out" in error
        engine.tell([a, b])
        wait_until(lambda: ids(balancer) == {"a", "b"})
        assert source(balancer, "docker")["last_error"] is None


def test_whatever_the_engine_says_takes_nobody_away(
    engine: Engine, backends: list[DemoBackend], tmp_path: Path
) -> None:
    good = [container(each.id, each.port) for each in backends]
    engine.containers = good
    with Balancer(f"--docker=unix://{tmp_path}/docker.sock") as balancer:
        for odd in (
            [],
            500,
            404,
            b"{",
            b"[" * 100_000,
            {},
            {"a": 1},
            [7],
            [{"Names": []}],
            [{**good[0], "Labels": 3}],
            None,
        ):
            before = len(told(balancer, "source_failed"))
            engine.tell(odd)
            wait_until(lambda count=before: len(told(balancer, "source_failed")) > count, repr(odd)[:80])
            assert len(ids(balancer)) == 3
            engine.containers = good
            wait_until(lambda: source(balancer, "docker")["state"] == "good")
        assert told(balancer, "backend_removed") == []
        engine.server.news[-1].put(b"no JSON", b"\xff" * 99)
        wait_until(lambda: source(balancer, "docker")["state"] == "good")
        assert fetch(f"{balancer.url}/x")[0] == 200 and len(ids(balancer)) == 3


def test_an_engine_that_is_not_there_is_told(tmp_path: Path, backends: list[DemoBackend]) -> None:
    flags = (f"--backend=only={backends[0].url}", f"--docker=unix://{tmp_path}/docker.sock")
    with Balancer(*flags) as balancer:  # which has told that it failed, so nobody waits for it
        assert "No such file" in source(balancer, "docker")["last_error"] and ids(balancer) == {"only"}


@pytest.mark.parametrize("url", ["/var/run/docker.sock", "true", "unix:docker.sock", "ssh://host"])
def test_a_wrong_url_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(SettingsError, match=r"expected unix:///PATH or http://HOST:PORT"):
        given({"docker": url})
