"""Whoever starts backends instead of us is told so as it understands it: Docker, Kubernetes, a webhook."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from certificates import Files
from fleet import DemoBackend
from support import Balancer, RawRequest, fetch, fetch_json, wait_until
from test_scaling import Clients, healthy, kinds, quick, scaled, seen
from wire import WireBackend

__all__ = ["quick"]  # a fixture

pytestmark = pytest.mark.usefixtures("quick")


def answer(sock: socket.socket, status: int, body: Any = None) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    sock.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)


class Engine(WireBackend):
    """What Docker's API says of containers, each of which is a backend of this process."""

    def __init__(self, path: Path) -> None:
        self.exposed = {"8080/tcp": {}}
        self.images = ["api:1"]
        self.numbers = count(1)
        self.containers: dict[str, dict[str, Any]] = {}
        self.backends: dict[str, DemoBackend] = {}
        super().__init__(path)
        self.script = self._serve_api

    def _serve_api(self, sock: socket.socket, request: RawRequest) -> None:
        method, url = request.head.split(b" ", 1)[0].decode(), urlsplit(request.target.decode())
        kind, *names = url.path.strip("/").split("/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if kind == "images":
            if names[0] not in self.images:
                answer(sock, 404, {"message": f"No such image: {names[0]}"})
            else:
                answer(sock, 200, {"Config": {"ExposedPorts": self.exposed}})
        elif names == ["create"]:
            asked, key = json.loads(request.body), f"c{next(self.numbers)}"
            self.containers[key] = {"Id": key, "State": "created", "Status": "", **asked}
            answer(sock, 201, {"Id": key})
        elif names == ["json"]:
            labels = json.loads(query["filters"])["label"]
            answer(sock, 200, [each for each in self.containers.values() if self._has(each, labels)])
        elif names[0] not in self.containers:
            answer(sock, 404, {"message": "No such container"})
        elif method == "DELETE":
            self.end(names[0], "removed")
            answer(sock, 204, self.containers.pop(names[0]) and None)
        elif names[1] == "start":
            self.begin(names[0])
            answer(sock, 204)
        elif names[1] in ("stop", "kill"):
            was_running = self.containers[names[0]]["State"] == "running"
            self.end(names[0], "Exited (0) 1 second ago")
            answer(sock, 204 if was_running else 304)
        else:
            port = str(self.backends[names[0]].port)
            answer(sock, 200, {"NetworkSettings": {"Ports": {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": port}]}}})

    @staticmethod
    def _has(container: dict[str, Any], labels: list[str]) -> bool:
        return all(
            container["Labels"].get(name) == value for name, _, value in (each.partition("=") for each in labels)
        )

    def begin(self, key: str) -> None:
        self.containers[key]["State"] = "running"
        self.backends[key] = DemoBackend(self.containers[key]["Labels"]["load-balancer.id"])

    def end(self, key: str, status: str) -> None:
        self.containers[key] |= {"State": "exited", "Status": status}
        if key in self.backends:
            self.backends.pop(key).kill()

    def close(self) -> None:
        for backend in self.backends.values():
            backend.kill()
        super().close()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'docker.sock'}")
    with Engine(tmp_path / "docker.sock") as engine:
        yield engine


def test_containers_are_started_replaced_and_stopped(engine: Engine, tmp_path: Path) -> None:
    with scaled(tmp_path, command=None, docker_image="api:1", min=2) as balancer:
        wait_until(lambda: healthy(balancer) == 2, "two containers")
        assert json.loads(fetch(f"{balancer.url}/x")[2])["server_id"] in ("backend_1", "backend_2")
        (first, second) = engine.containers.values()
        assert first["HostConfig"] == {"PortBindings": {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}}
        engine.end(first["Id"], "Exited (137) 1 second ago")
        wait_until(lambda: first["Id"] not in engine.containers and healthy(balancer) == 2, "another one runs")
        assert "Exited (137)" in json.dumps(fetch_json(f"{balancer.url}/events"))
        assert second["Id"] in engine.containers
    assert engine.containers == {} == engine.backends


def test_containers_that_a_killed_balancer_has_left_are_taken_over(engine: Engine, tmp_path: Path) -> None:
    labels = {"load-balancer.name": "lb-1", "load-balancer.pool": "default", "load-balancer.id": "backend_7"}
    for key, ours, state in (("left", labels, "running"), ("dead", labels, "exited"), ("other", {}, "running")):
        engine.containers[key] = {"Id": key, "Labels": ours, "State": state, "Status": state}
    engine.begin("left")
    with scaled(tmp_path, command=None, docker_image="api:1") as balancer:
        assert json.loads(fetch(f"{balancer.url}/x")[2])["server_id"] == "backend_7"
        assert [*engine.containers] == ["left", "other"]
    assert [*engine.containers] == ["other"]


def test_what_docker_does_not_do_is_told(engine: Engine, tmp_path: Path) -> None:
    with scaled(tmp_path, command=None, docker_image="api:2") as balancer:
        wait_until(lambda: "No such image: api:2" in (seen(balancer)["last_error"] or ""), "the image is missing")
        engine.images, engine.exposed = ["api:2"], {"80/tcp": {}, "443/tcp": {}}
        wait_until(lambda: "exposes 80/tcp, 443/tcp; set docker_port" in (seen(balancer)["last_error"] or ""), "ports")
        engine.close()
        wait_until(lambda: kinds(balancer)["scaling_failed"] or "docker.sock" in seen(balancer)["last_error"], "gone")
        assert fetch(f"{balancer.url}/livez")[0] == 200


class Kubernetes(ThreadingHTTPServer):
    """The scale of a deployment, over TLS, for whoever has the token."""

    def __init__(self, files: Files) -> None:
        self.replicas = 1
        self.patches: list[tuple[str, dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), Scale)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        self.socket = context.wrap_socket(self.socket, server_side=True)


class Scale(BaseHTTPRequestHandler):
    server: Kubernetes

    def do_GET(self) -> None:
        is_right = self.path == "/apis/apps/v1/namespaces/shop/deployments/api/scale"
        is_right = is_right and self.headers["Authorization"] == "Bearer the-token"
        body = json.dumps({"kind": "Scale", "spec": {"replicas": self.server.replicas}}).encode()
        self.send_response(200 if is_right else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.patches.append((self.headers["Content-Type"], body))
        self.server.replicas = body["spec"]["replicas"]
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    files = Files(tmp_path)
    for name, text in (("token", "the-token"), ("namespace", "shop"), ("ca.crt", files.certificate.read_text())):
        (tmp_path / name).write_text(text)
    server = Kubernetes(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="kubernetes")
    thread.start()
    monkeypatch.setattr("balancer.fleet.kubernetes.ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_address[1]))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def pods(*names: str, delay: float = 0.0) -> Iterator[list[DemoBackend]]:
    found = [DemoBackend(name, delay) for name in names]
    yield found
    for backend in found:
        backend.kill()


def add(balancer: Balancer, backend: DemoBackend) -> None:
    """As discovery does."""
    assert fetch(f"{balancer.url}/backends", {"id": backend.id, "url": backend.url})[0] == 201
    balancer.wait_healthy(backend.id)


def test_the_replicas_of_a_deployment_are_set(
    kubernetes: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.fleet.replicas.LOOK_AGAIN_SECONDS", 0.1)
    table = {"command": None, "kubernetes": "deployment/api", "min": 1, "target_in_flight": 1, "down_after": 1}
    with scaled(tmp_path, **table) as balancer, pods("pod-1", "pod-2", delay=0.2) as (first, second):
        wait_until(lambda: seen(balancer)["starting"] == 1, "the replica that there is has not been found yet")
        add(balancer, first)
        clients = Clients(balancer.url, 2)
        wait_until(lambda: kubernetes.replicas == 2, "two requests need two")
        assert kubernetes.patches[0] == ("application/merge-patch+json", {"spec": {"replicas": 2}})
        add(balancer, second)
        clients.stop()
        assert set(clients.answers) == {200}
        wait_until(lambda: kubernetes.replicas == 1, "fewer, later")
        wait_until(lambda: seen(balancer)["why"].endswith("1 stay, min 1"), "both pods are there still")
        before = kinds(balancer)["scaled_down"]
        kubernetes.replicas = 3
        wait_until(lambda: kubernetes.replicas == 1, "somebody else has set it, and it is needed no more than before")
        wait_until(lambda: seen(balancer)["why"].endswith("1 stay, min 1"), "both pods are there still")
        assert kinds(balancer)["scaled_down"] == before + 1
    assert kubernetes.replicas == 1


def test_a_webhook_is_told_until_it_has_heard(tmp_path: Path) -> None:
    with WireBackend() as hook, pods("pod-1") as (first,):
        answers = iter([500, 200, 200])
        hook.script = lambda sock, request: answer(sock, next(answers))
        table = {"command": None, "webhook": f"{hook.url}/scale?key=hush", "min": 2}
        with scaled(tmp_path, **table) as balancer:
            assert seen(balancer)["wanted"] is None and hook.requests == []  # it is not known how many there are
            add(balancer, first)
            wait_until(lambda: kinds(balancer)["scaled_up"] == 1, "it was heard")
            told = [json.loads(request.body) for request in hook.requests]
            assert told[0] == told[1] and told[0].pop("reason").endswith("target 4: 1 -> 2, min 2")
            assert told[0] == {"pool": "default", "from": 1, "to": 2}
            assert hook.requests[0].target == b"/scale?key=hush"
            assert "answered 500" in (text := json.dumps(fetch_json(f"{balancer.url}/events")))
            assert "hush" not in text + json.dumps(fetch_json(f"{balancer.url}/config"))


def test_the_first_request_waits_for_what_others_start(tmp_path: Path) -> None:
    with WireBackend() as hook, pods("pod-1") as (first,):

        def script(sock: socket.socket, request: RawRequest) -> None:
            answer(sock, 200)
            add(balancer, first)

        hook.script = script
        with scaled(tmp_path, command=None, webhook=hook.url, min=0) as balancer:
            assert json.loads(fetch(f"{balancer.url}/x")[2])["server_id"] == "pod-1"
