"""Pods as backends: EndpointSlices, listed and watched, from a server that plays the API."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from apiserver import ApiServer, News, Query
from certificates import Files, make_pair
from support import ROOT, Balancer, fetch, wait_until
from test_discovery import ids, source, told
from test_dns_source import Everywhere

from balancer.fleet import discovery, kubernetes

PATH = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_SECONDS", "CONFIRM_SECONDS"):
        monkeypatch.setattr(discovery, name, 0.05)
    monkeypatch.setattr(kubernetes, "PAUSE_SECONDS", 0.05)


class Cluster:
    """Its API has `slices` by their names, and news of them. `status` answers instead of watches, `listing` instead of
    lists."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.slices: dict[str, Any] = {}
        self.status: int | None = None
        self.listing: Any = None
        self.version = 100
        self.server = ApiServer(self._answer, tls=tls)

    def _answer(self, path: str, query: Query) -> Any:
        assert (path, query["labelSelector"]) == (PATH, "kubernetes.io/service-name=api")
        if "watch" in query:
            assert int(query["resourceVersion"]) <= self.version and query["allowWatchBookmarks"] == "true"
            return self.status or News()
        if self.listing is not None:
            return self.listing
        return {"metadata": {"resourceVersion": str(self.version)}, "items": list(self.slices.values())}

    def watches(self) -> int:
        return len(self.server.news)

    def has(self, name: str, *endpoints: Any, **fields: Any) -> dict[str, Any]:
        """A slice from now on, without a word to those who watch."""
        self.version += 1
        self.slices[name] = {
            "metadata": {"name": name, "namespace": "shop", "resourceVersion": str(self.version)},
            "addressType": "IPv4",
            "endpoints": [each if isinstance(each, dict) else endpoint(each) for each in endpoints],
            **fields,
        }
        return self.slices[name]

    def tell(self, kind: str, what: Any) -> None:
        self.server.news[-1].put({"type": kind, "object": what})


def endpoint(number: int, **conditions: bool) -> dict[str, Any]:
    known = {"ready": True, "serving": True, "terminating": False}
    return {"addresses": [f"127.0.0.{number}"], "conditions": known | conditions, "targetRef": {"kind": "Pod"}}


@pytest.fixture
def backend() -> Iterator[Everywhere]:
    with Everywhere() as backend:
        yield backend


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    files = Files(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.certificate, files.key)
    for name, content in (("token", b"one\n"), ("namespace", b"shop"), ("ca.crt", files.certificate.read_bytes())):
        (tmp_path / name).write_bytes(content)
    made = Cluster(context)
    monkeypatch.setattr(kubernetes, "ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(made.server.port))
    with made.server:
        yield made


def ports(backend: Everywhere) -> dict[str, Any]:
    return {"ports": [{"name": "http", "port": backend.port, "protocol": "TCP"}, {"name": "metrics", "port": 9}]}


def pods(balancer: Balancer) -> set[int]:
    """The last numbers of their addresses."""
    return {int(each.rpartition(".")[2]) for each in ids(balancer)}


def test_pods_come_and_go_as_the_watch_tells(cluster: Cluster, backend: Everywhere, tmp_path: Path) -> None:
    unready, ends = endpoint(8, ready=False), endpoint(9, ready=False, terminating=True)
    cluster.has("api-1", 1, 2, unready, ends, **ports(backend))
    cluster.has("api-2", 3, **ports(backend))
    with Balancer("--backend=kubernetes+http://api:http@2") as balancer:
        assert ids(balancer) == {"api-127.0.0.1", "api-127.0.0.2", "api-127.0.0.3"}
        found = balancer.backend("api-127.0.0.1")
        assert (found["source"], found["weight"]) == ("kubernetes:api", 2)
        assert fetch(f"{balancer.url}/x")[2].startswith(b"127.0.0.")
        wait_until(cluster.watches)
        cluster.tell(
            "MODIFIED", cluster.has("api-1", 1, endpoint(2, ready=False, terminating=True), 4, **ports(backend))
        )
        wait_until(lambda: pods(balancer) == {1, 3, 4})
        cluster.tell("ADDED", cluster.has("api-3", 5, **ports(backend)))
        wait_until(lambda: pods(balancer) == {1, 3, 4, 5})
        cluster.tell("DELETED", cluster.slices.pop("api-2"))
        wait_until(lambda: pods(balancer) == {1, 4, 5})
        # It goes on from the last version, also if that came without any change, with the token that is there now.
        (tmp_path / "token").write_bytes(b"two")
        cluster.version += 5
        cluster.tell("BOOKMARK", {"metadata": {"resourceVersion": str(cluster.version)}})
        watches = cluster.watches()
        cluster.server.news[-1].end()
        wait_until(lambda: cluster.watches() > watches)
        assert cluster.server.asked[-1][1]["resourceVersion"] == str(cluster.version)
        assert (cluster.server.tokens[0], cluster.server.tokens[-1]) == ("Bearer one", "Bearer two")
        assert sum("watch" not in query for _, query in cluster.server.asked) == 1  # listed once
        assert told(balancer, "source_failed") == []
    assert not any(thread.name.startswith("source-") for thread in threading.enumerate())


def test_a_watch_may_be_slow_silent_or_cut(
    cluster: Cluster, backend: Everywhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(kubernetes, "LATE_SECONDS", 0.0)
    cluster.has("api-1", 1, **ports(backend))
    with Balancer("--backend=kubernetes+http://api:http") as balancer:
        wait_until(cluster.watches)
        line = json.dumps({"type": "ADDED", "object": cluster.has("api-2", 2, **ports(backend))}).encode() + b"\n"
        for piece in (line[:9], line[9:99], line[99:], line[:50]):
            cluster.server.news[-1].lines.put(piece)
        wait_until(lambda: pods(balancer) == {1, 2})
        cluster.server.news[-1].end()  # in the middle of a line
        wait_until(lambda: cluster.watches() >= 2)
        wait_until(lambda: cluster.watches() >= 3)  # though that one says nothing, and does not end
        assert told(balancer, "source_failed") == []


@pytest.mark.parametrize("how", ["status", "event"])
def test_what_is_too_old_to_be_watched_is_listed_again(cluster: Cluster, backend: Everywhere, how: str) -> None:
    cluster.has("api-1", 1, 2, **ports(backend))
    with Balancer("--backend=kubernetes+http://api.shop") as balancer:
        wait_until(cluster.watches)
        cluster.has("api-1", 1, 3, **ports(backend))
        if how == "status":
            cluster.status = 410
            cluster.server.news[-1].end()
        else:
            cluster.tell("ERROR", {"kind": "Status", "code": 410, "reason": "Expired"})
        wait_until(lambda: pods(balancer) == {1, 3})
        assert told(balancer, "source_failed") == []


def test_whatever_the_api_says_takes_nobody_away(cluster: Cluster, backend: Everywhere) -> None:
    cluster.has("api-1", 1, 2, **ports(backend))
    with Balancer("--backend=kubernetes+http://api:http") as balancer:
        listed: list[Any] = [[], [{}], [{"metadata": {"name": "x"}, "addressType": "IPv4", "endpoints": 3}]]
        lists = [{"metadata": {"resourceVersion": "1"}, "items": items} for items in listed]
        for odd in (500, 403, b"{", b"[" * 100_000, [], {}, *lists):
            before = len(told(balancer, "source_failed"))
            cluster.listing = odd
            wait_until(lambda: cluster.server.news)
            cluster.tell("ERROR", {"code": 410})
            wait_until(lambda count=before: len(told(balancer, "source_failed")) > count, repr(odd)[:80])
            assert pods(balancer) == {1, 2}
            cluster.listing = None
            watches = cluster.watches()
            wait_until(lambda count=watches: cluster.watches() > count)
        for odd in (b"no JSON", b"[]", b'{"type": "MODIFIED"}', b'{"type": "ERROR", "object": {"code": 500}}'):
            watches = cluster.watches()
            cluster.server.news[-1].put(odd)
            wait_until(lambda count=watches: cluster.watches() > count, repr(odd))
        wait_until(lambda: source(balancer, "kubernetes:api")["state"] == "good")
        assert pods(balancer) == {1, 2} and fetch(f"{balancer.url}/x")[0] == 200
        assert told(balancer, "backend_removed") == []


def test_a_service_with_several_ports_needs_the_name_of_one(cluster: Cluster, backend: Everywhere) -> None:
    cluster.has("api-1", 1, ports=[{"name": "a", "port": 1}, {"name": "b", "port": backend.port}])
    with Balancer("--backend=kubernetes+http://api") as balancer:
        assert "no port is chosen of: a 1, b" in source(balancer, "kubernetes:api")["last_error"]
    with Balancer(f"--backend=kubernetes+http://api:{backend.port}") as balancer:
        assert pods(balancer) == {1}


def test_another_servers_certificate_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(make_pair().certificate)
    with Balancer("--backend=kubernetes+http://api") as balancer:
        assert "CERTIFICATE_VERIFY_FAILED" in source(balancer, "kubernetes:api")["last_error"]
    assert cluster.server.tokens == []


@pytest.mark.parametrize(
    ("missing", "text"), [("token", "does the pod have a service account?"), ("", "this is no pod of Kubernetes")]
)
def test_what_is_missing_is_told(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, text: str
) -> None:
    if missing:
        (tmp_path / missing).unlink()
    else:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with Balancer("--backend=kubernetes+http://api") as balancer:
        assert text in source(balancer, "kubernetes:api")["last_error"]


def test_the_role_of_the_overlay_is_what_is_asked_for_and_no_more() -> None:
    overlay = ROOT / "deploy" / "kubernetes" / "overlays" / "discovery"
    role, _ = yaml.safe_load_all((overlay / "role.yaml").read_text(encoding="utf-8"))
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]
