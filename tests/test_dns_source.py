"""Backends that DNS names: one for each address, and whatever a name server does takes nobody away."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Files, make_pair
from nameserver import NameServer
from support import Balancer, fetch, ok, wait_until
from test_discovery import ids, source, told
from wire import WireBackend

from balancer.config.settings import given
from balancer.errors import SettingsError
from balancer.fleet import discovery, dnsrecords
from balancer.loadbalancer import LoadBalancer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_SECONDS", "CONFIRM_SECONDS"):
        monkeypatch.setattr(discovery, name, 0.05)
    for name in ("SHORTEST_SECONDS", "LONGEST_SECONDS", "LOST_SECONDS"):
        monkeypatch.setattr(dnsrecords, name, 0.05)
    monkeypatch.setattr(dnsrecords, "ANSWER_SECONDS", 1.0)


@pytest.fixture
def server() -> Iterator[NameServer]:
    with NameServer() as server:
        yield server


class Everywhere(WireBackend):
    """Listens on all of 127.0.0.0/8, and says in its answers where it was asked."""

    def listen(self) -> None:
        self.listener = socket.create_server(("0.0.0.0", self.port), backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.script = lambda sock, request: sock.sendall(ok(sock.getsockname()[0].encode()))
        self._thread = threading.Thread(target=self._accept, name="scripted-backend", daemon=True)
        self._thread.start()


@pytest.fixture
def backend() -> Iterator[Everywhere]:
    with Everywhere() as backend:
        yield backend


def start(server: NameServer, url: str, *flags: str) -> Balancer:
    return Balancer(f"--backend={url}", f"--dns-servers=127.0.0.1:{server.port}", "--algorithm=round_robin", *flags)


def ways(balancer: Balancer) -> list[str]:
    """Where six requests went."""
    return sorted(fetch(f"{balancer.url}/x")[2].decode() for _ in range(6))


def test_each_address_is_a_backend_and_keeps_its_id(server: NameServer, backend: Everywhere) -> None:
    server.ttl = 86400  # that is too long to be believed
    server.records["api.test", "A"] = ["127.0.0.2", "127.0.0.1"]
    with start(server, f"api=dns+http://api.test:{backend.port}@3") as balancer:
        assert ids(balancer) == {"api-127.0.0.1", "api-127.0.0.2"}
        found = balancer.backend("api-127.0.0.2")
        assert (found["source"], found["weight"], found["url"]) == ("dns:api", 3, f"http://127.0.0.2:{backend.port}")
        assert ways(balancer) == ["127.0.0.1"] * 3 + ["127.0.0.2"] * 3
        assert (state := source(balancer, "dns:api"))["state"] == "good" and state["pool"] == "default"
        server.records["api.test", "A"] = ["127.0.0.2", "127.0.0.3"]
        wait_until(lambda: ids(balancer) == {"api-127.0.0.2", "api-127.0.0.3"})
        balancer.wait_healthy("api-127.0.0.3")
        assert ways(balancer) == ["127.0.0.2"] * 3 + ["127.0.0.3"] * 3  # a kept connection to the first one too is left


def test_checks_and_requests_know_the_name(server: NameServer, backend: Everywhere) -> None:
    server.records["api.test", "A"] = ["127.0.0.1"]
    with start(server, f"dns+http://api.test:{backend.port}", "--health-path=/check") as balancer:
        assert ids(balancer) == {"api.test-127.0.0.1"}
        assert backend.requests[0].values(b"host") == [f"api.test:{backend.port}".encode()]


def test_the_certificate_must_be_that_of_the_name(server: NameServer, backend: Everywhere, tmp_path: Path) -> None:
    files = Files(tmp_path, make_pair("api.test"))
    server.records["api.test", "A"] = server.records["other.test", "A"] = ["127.0.0.1"]
    with Balancer(f"--backend=only={backend.url}", *files.flags, wait_ready=False) as tls:
        urls = [f"--backend=dns+https://{name}.test:{tls.port}" for name in ("api", "other")]
        servers = f"--dns-servers=127.0.0.1:{server.port}"
        flags = (servers, f"--ca-file={files.certificate}", "--health-path=/livez")
        with Balancer(*urls, *flags) as balancer:
            balancer.wait_healthy("api.test-127.0.0.1")
            wait_until(lambda: "certificate" in (balancer.backend("other.test-127.0.0.1")["health"]["reason"] or ""))


def test_whatever_a_name_server_does_takes_nobody_away(server: NameServer, backend: Everywhere) -> None:
    good = {("api.test", "A"): ["127.0.0.1", "127.0.0.2"]}
    server.records = dict(good)
    with start(server, f"api=dns+http://api.test:{backend.port}") as balancer:
        for failure, text in (
            ({"rcode": "SERVFAIL"}, "api.test: no name server could answer"),
            ({"rcode": "REFUSED"}, "api.test: no name server could answer"),
            ({"records": {}}, "api.test: there is no such name"),
            ({"records": {("api.test", "SRV"): ["0 0 1 a."]}}, "api.test: it has no such records"),
            ({"is_odd": True}, "api.test: no name server"),
            ({"is_silent": True}, "api.test: no name server answered in time"),
        ):
            before = len(told(balancer, "source_failed"))
            vars(server).update(failure)
            wait_until(
                lambda count=before, text=text: any(
                    text in event["message"] for event in told(balancer, "source_failed")[count:]
                ),
                text,
            )
            assert source(balancer, "dns:api")["state"] == "failing" and len(ids(balancer)) == 2
            assert fetch(f"{balancer.url}/x")[0] == 200
            vars(server).update(rcode=None, is_silent=False, is_odd=False, records=dict(good))
            wait_until(lambda: source(balancer, "dns:api")["state"] == "good")
        assert told(balancer, "backend_removed") == []


def test_an_answer_too_large_for_udp_comes_over_tcp(server: NameServer, backend: Everywhere) -> None:
    server.records["api.test", "A"], server.is_cut = ["127.0.0.1"], True
    with start(server, f"api=dns+http://api.test:{backend.port}") as balancer:
        assert ids(balancer) == {"api-127.0.0.1"}


def test_a_silent_name_server_delays_neither_the_start_of_others_nor_the_end(
    server: NameServer, backend: Everywhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOOK_SECONDS", "ANSWER_SECONDS", "SERVER_SECONDS"):
        monkeypatch.setattr(dnsrecords, name, 300.0)
    monkeypatch.setattr(discovery, "JOIN_SECONDS", 60.0)
    server.is_silent = True
    flags = (f"--backend=only={backend.url}", f"--dns-servers=127.0.0.1:{server.port}")
    with Balancer(*flags, "--backend=dns+http://api.test:1", wait_ready=False) as balancer:
        balancer.wait_healthy("only")
        assert fetch(f"{balancer.url}/x")[0] == 200
        wait_until(lambda: server.asked)
        balancer.library.control.discovery.stop()
        assert not any(thread.name.startswith("source-") for thread in threading.enumerate())


def test_a_lower_priority_is_used_while_all_of_the_better_are_lost(server: NameServer, backend: Everywhere) -> None:
    """RFC 2782; weights are those of the records."""
    with Everywhere() as spare:
        server.records = {
            ("_http._tcp.api.test", "SRV"): [
                f"10 60 {backend.port} a.test.",
                f"10 0 {backend.port} b.test.",
                f"20 5 {spare.port} a.test.",
            ],
            ("a.test", "A"): ["127.0.0.1"],
            ("b.test", "AAAA"): ["::ffff:127.0.0.2"],
        }
        with start(server, "api=srv+http://_http._tcp.api.test", "--health-path=/health") as balancer:
            a, b = f"api-127.0.0.1-{backend.port}", f"api---ffff-127.0.0.2-{backend.port}"
            c = f"api-127.0.0.1-{spare.port}"

            def weights() -> dict[str, int]:
                return {each["id"]: each["weight"] for each in balancer.status()["backend_servers"]}

            assert weights() == {a: 60, b: 1, c: 0}
            backend.is_healthy = False
            wait_until(lambda: weights() == {a: 60, b: 1, c: 5})
            assert fetch(f"{balancer.url}/x")[0] == 200
            backend.is_healthy = True
            wait_until(lambda: weights() == {a: 60, b: 1, c: 0})
            server.records |= {("a.test", "A"): [], ("b.test", "AAAA"): []}  # what has no address is not there
            wait_until(lambda: source(balancer, "srv:api")["state"] == "failing")
            assert weights()  # what was named last stays: of both, or of one if a round of questions came between


def test_large_weights_are_brought_into_range(server: NameServer, backend: Everywhere) -> None:
    port = backend.port
    server.records = {
        ("api.test", "SRV"): [f"1 65535 {port} a.test.", f"1 655 {port} b.test.", f"1 1 {port} c.test."],
        **{(f"{name}.test", "A"): [f"127.0.0.{number}"] for number, name in enumerate("abc", 1)},
    }
    with start(server, "api=srv+http://api.test") as balancer:
        assert sorted(each["weight"] for each in balancer.status()["backend_servers"]) == [1, 3, 256]


@pytest.mark.parametrize(
    "url",
    ["dns+http://10.0.0.1:80", "dns+ftp://api:1", "dns+http://api:x", "dns+http://api/path", "srv+http://api:80",
     "dns+http://api:70000", "kubernetes+http://a.b.c:80", "dns+http+unix:///run/x"],
)  # fmt: skip
def test_a_wrong_url_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        given({"backends": [{"url": url}]})
    assert "expected dns+http://NAME:PORT" in str(caught.value) and "\n" not in str(caught.value)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "balancer.fleet.dnsrecords", None)
    with pytest.raises(SettingsError, match=r"pip install 'python-load-balancer\[dns\]'"):
        LoadBalancer("dns+http://api:1")
