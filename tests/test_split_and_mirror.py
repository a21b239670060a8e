"""Split and mirrored routes in a balancer that serves, with pools of real backends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exposition import scrape, value
from support import Balancer, exchange, fetch, fetch_json, get, ok, split_response, wait_until
from wire import WireBackend

from balancer.commandline import main
from balancer.filters.mirror import Copies
from balancer.observe import canary
from balancer.observe.routecounts import RouteCounts

POOLS = """
expose_backend = true
backends = []
[[pools]]
name = "stable"
[[pools.backends]]
id = "s1"
url = "%s"
[[pools]]
name = "next"
[[pools.backends]]
id = "n1"
url = "%s"
"""


class Setting:
    """Two pools of a backend each, and routes that a test writes."""

    def __init__(self, folder: Path) -> None:
        self.stable, self.next = WireBackend(), WireBackend()
        self.file = folder / "balancer.toml"
        self.pools = POOLS % (self.stable.url, self.next.url)

    def start(self, routes: str) -> Balancer:
        self.file.write_text(self.pools + routes, encoding="utf-8")
        self.balancer = Balancer("--config", str(self.file))
        return self.balancer

    def reload(self, routes: str) -> None:
        self.file.write_text(self.pools + routes, encoding="utf-8")
        assert fetch(f"{self.balancer.url}/reload", {})[0] == 200

    def served_by(self, *lines: bytes) -> str:
        status, got, _ = split_response(exchange(self.balancer.port, get(b"/", *lines)))
        assert status == 200
        return dict(got)[b"x-served-by"].decode()

    def route(self) -> Any:
        return self.balancer.status()["routes"][0]


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.balancer.stop()
    made.stable.close()
    made.next.close()


SPLIT = '[[routes]]\nname = "web"\nsplit = { stable = %d, next = %d }\nsplit_key = "header:X-User"\n'
USERS = [b"X-User: %d" % number for number in range(60)]


def test_a_split_keeps_each_user_in_a_pool_and_moves_some_when_it_changes(setting: Setting) -> None:
    setting.start(SPLIT % (70, 30))
    first = {user: setting.served_by(user) for user in USERS}
    assert first == {user: setting.served_by(user) for user in USERS}
    assert 5 <= list(first.values()).count("n1") <= 35
    assert setting.route()["split"] == {"stable": 70, "next": 30}
    setting.reload(SPLIT % (40, 60))
    moved = {user for user in USERS if setting.served_by(user) != first[user]}
    assert moved
    assert all(first[user] == "s1" for user in moved)
    setting.reload(SPLIT % (1, 0))
    assert {setting.served_by(user) for user in USERS} == {"s1"}
    assert setting.balancer.status(1)["recent_requests"][0]["pool"] == "stable"


def test_a_canary_that_fails_gets_nothing_any_more(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "ENOUGH", 20)
    monkeypatch.setattr(canary, "INTERVAL_SECONDS", 0.0)
    balancer = setting.start((SPLIT % (50, 50)) + "split_steps = [50, 100]\nretries = 0\n")
    setting.next.answer(ok().replace(b"200 OK", b"500 Oh"))
    assert setting.route()["canary"]["state"] == "growing"

    def returned() -> bool:
        for user in USERS:
            fetch(f"{balancer.url}/", **{"X-User": user.partition(b" ")[2].decode()})
        return bool(setting.route()["canary"]["state"] == "returned")

    wait_until(returned)
    assert {setting.served_by(user) for user in USERS} == {"s1"}
    event = next(e for e in fetch_json(f"{balancer.url}/events")["events"] if e["kind"] == "canary_returned")
    assert event["message"].startswith("route web: next gets nothing any more, it did worse: ")
    assert value(scrape(balancer.url), "lb_route_canary_share", route="web") == 0
    setting.reload((SPLIT % (50, 50)) + "split_steps = [50, 100]\nretries = 1\n")  # nothing of the split
    assert setting.route()["canary"]["state"] == "returned"


MIRROR = """[[routes]]
name = "web"
pool = "stable"
mirror = { pool = "next", max_in_flight = 2, methods = ["GET", "POST"] }
"""


def copies(balancer: Balancer, outcome: str) -> float:
    key = ("lb_route_copies_total", frozenset({"route": "web", "outcome": outcome}.items()))
    return scrape(balancer.url).get(key, 0)


def test_a_mirror_gets_what_the_backend_gets_and_is_seen_by_nobody(setting: Setting) -> None:
    balancer = setting.start(MIRROR)
    assert fetch(f"{balancer.url}/a?b=c", {"x": 1}, "POST", **{"X-Request-ID": "id-1"})[0] == 200
    wait_until(lambda: setting.next.requests)
    sent, copied = setting.stable.requests[0], setting.next.requests[0]
    assert copied.head.splitlines()[0] == sent.head.splitlines()[0] == b"POST /a?b=c HTTP/1.1"
    assert copied.body == sent.body
    assert b"\r\nx-request-id: id-1-mirror\r\nx-mirrored: 1\r\n" in copied.head
    wait_until(lambda: copies(balancer, "answered") == 1)
    status = balancer.status()
    assert status["statistics"]["total_requests"] == 1
    assert [backend["total_requests"] for backend in status["backend_servers"]] == [1, 0]
    assert all(backend["active_connections"] == 0 for backend in status["backend_servers"])


def test_a_mirror_that_hangs_or_fails_costs_no_client_anything(setting: Setting) -> None:
    balancer = setting.start(MIRROR)
    go = setting.next.hold()
    for _ in range(20):
        assert setting.served_by() == "s1"
    assert copies(balancer, "full") == 18  # only `max_in_flight` hang
    large = b"x" * 70_000
    assert fetch(f"{balancer.url}/", {"x": large.decode()}, "POST")[0] == 200
    assert copies(balancer, "too_large") == 1
    go.set()
    wait_until(lambda: copies(balancer, "answered") == 2)
    setting.next.script = lambda sock, request: sock.sendall(b"nonsense\r\n\r\n")
    assert setting.served_by() == "s1"
    wait_until(lambda: copies(balancer, "failed") == 1)
    setting.next.close()
    for _ in range(20):
        assert setting.served_by() == "s1"
    assert balancer.status()["statistics"]["failed_requests"] == 0
    balancer.wait_healthy("n1", False)
    before = copies(balancer, "no_backend")
    assert setting.served_by() == "s1"
    wait_until(lambda: copies(balancer, "no_backend") == before + 1)


def test_a_machine_without_threads_keeps_no_client_from_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    counts = RouteCounts()
    made = Copies(counts)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        made.add("web", 2, lambda copy: "answered")
    made.add("web", 2, lambda copy: "answered")
    wait_until(lambda: counts.copies() == {("web", "answered"): 2}, "both are brought")
    made.stop()


def test_the_end_does_not_wait_for_copies(setting: Setting) -> None:
    balancer = setting.start(MIRROR)
    release = setting.next.hold()
    assert setting.served_by() == "s1"
    wait_until(lambda: setting.next.requests)
    started = time.monotonic()
    balancer.stop()
    release.set()
    assert time.monotonic() - started < 8  # of the 10 s that a copy may take
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mirror")]


@pytest.mark.parametrize(
    ("route", "told"),
    [
        ("split = { stable = 1 }", "expected two pools or more"),
        ("split = { stable = 0, next = 0 }", "expected two pools or more"),
        ("split = { stable = 1, nowhere = 1 }", "pool 'nowhere' is unknown"),
        ('split = { stable = 1, next = 1 }\npool = "next"', "has pool and split"),
        ('pool = "stable"\nsplit_steps = [1]', "has split_steps without split"),
        ("split = { stable = 1, next = 1 }\nsplit_steps = [5, 1]", "expected growing shares in percent"),
        ("split = { stable = 1, next = -1 }", "expected a whole number from 0"),
        ('pool = "stable"\nmirror = { pool = "nowhere" }', "pool 'nowhere' is unknown"),
        ('pool = "stable"\nmirror = { pool = "next", share = 2 }', "expected a number from 0 to 1"),
        ('status = 200\nmirror = { pool = "next" }', "has mirror, but a status instead of a pool"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], route: str, told: str
) -> None:
    file = tmp_path / "balancer.toml"
    file.write_text(f'{POOLS % ("http://a:1", "http://b:1")}[[routes]]\nname = "web"\n{route}\n', encoding="utf-8")
    assert main(["--config", str(file), "--check-config"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_an_expectation_of_a_split_names_any_of_its_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "balancer.toml"
    expect = '[[expect]]\nrequest = "GET http://a/"\nroute = "web"\npool = "%s"\n'
    text = POOLS % ("http://a:1", "http://b:1") + SPLIT % (1, 1)
    file.write_text(text + expect % "next", encoding="utf-8")
    assert main(["--config", str(file), "--check-config"]) == 0
    file.write_text(text + expect % "default", encoding="utf-8")
    assert main(["--config", str(file), "--check-config"]) == 2
    assert "expected pool default, got route web, pool stable or next" in capsys.readouterr().err
