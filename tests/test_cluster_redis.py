"""Several balancers over a real Redis: what they share, and that none of them needs it."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fleet import DemoBackend
from redis_server import RedisServer, SlowWay
from support import Balancer, BalancerProcess, Served, fetch, fetch_json, free_port, ok, wait_until
from wire import WireBackend

from balancer import LoadBalancer
from balancer.cluster.link import Link, LinkError
from balancer.errors import SettingsError
from balancer.filters.sharedlimit import Charge
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

BACKENDS = ("--backend=a=http://127.0.0.1:1", "--backend=b=http://127.0.0.1:2")  # nobody listens there
REQUEST = Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", "192.0.2.1", [(b"host", b"a")])
SECRET = "a-password-of-redis"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this process notice sooner what is to be noticed."""
    monkeypatch.setattr("balancer.cluster.cluster.BEAT_SECONDS", 0.2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as started:
        yield started


@contextmanager
def several(*names: str, flags: tuple[str, ...] = BACKENDS, url: str = "") -> Iterator[list[Balancer]]:
    with ExitStack() as stack:
        balancers = [stack.enter_context(Balancer(f"--id={name}", f"--redis-url={url}", *flags)) for name in names]
        for one in balancers:
            wait_until(lambda each=one: cluster(each)["state"] == "together", "it is a member")
            wait_until(lambda each=one: members(each) >= set(names), "all know each other")
        yield balancers


def cluster(balancer: Served) -> Any:
    return balancer.status()["cluster"]


def members(balancer: Served) -> set[str]:
    return {each["id"] for each in fetch_json(f"{balancer.url}/cluster")["members"]}


def change(balancer: Served, method: str, path: str, **body: Any) -> None:
    status, _, answer = fetch(f"{balancer.url}{path}", body, method)
    assert status < 300, answer


def decided(balancer: Served) -> dict[str, tuple[str, str | None]]:
    """What was decided at run time: value and by whom."""
    rows = fetch_json(f"{balancer.url}/config")["settings"]
    return {row["name"]: (row["value"], row["by"]) for row in rows if row["source"] in ("api", "state")}


def agree(balancers: list[Balancer], wanted: dict[str, str]) -> None:
    for balancer in balancers:
        wait_until(
            lambda one=balancer: {name: value for name, (value, _) in decided(one).items()} == wanted,
            f"{wanted}, but {decided(balancer)}",
        )


def told(balancer: Served, kind: str) -> list[str]:
    events = fetch_json(f"{balancer.url}/events")["events"]
    return [event["message"] for event in events if event["kind"] == kind]


# Decisions.


def test_what_is_decided_on_one_holds_on_all_with_its_actor(server: RedisServer) -> None:
    with several("one", "two", url=server.url) as both:
        one, two = both
        change(one, "PATCH", "/backends/a", weight=7)
        agree(both, {"backends.a.weight": "7"})
        change(two, "PATCH", "/backends/a", weight=3, admin_state="drain")
        change(one, "POST", "/algorithm", algorithm="random")
        change(two, "POST", "/backends", id="c", url="http://127.0.0.1:3", weight=4)
        change(one, "DELETE", "/backends/b")
        every = {
            "algorithm": "random", "backends.a.weight": "3", "backends.a.admin_state": "drain", "backends.b": "removed",
            "backends.c": "http://127.0.0.1:3", "backends.c.weight": "4",
        }  # fmt: skip
        agree(both, every)
        assert {by for each in both for _, by in decided(each).values()} == {"local"}
        by = [event["by"] for event in two.library.events() if event["kind"] == "algorithm_changed"]
        assert by == ["local"]
        with several("three", url=server.url) as (three,):  # whoever comes later hears of it too
            agree([three], every)
        for path in ("/backends/c", "/backends/a"):
            change(two, "DELETE", path)
        agree(both, {"algorithm": "random", "backends.a": "removed", "backends.b": "removed"})


def test_what_is_undone_is_undone_on_all(server: RedisServer) -> None:
    with several("one", "two", url=server.url) as both:
        one, two = both
        change(one, "PATCH", "/backends/a", weight=7)
        agree(both, {"backends.a.weight": "7"})
        change(two, "PATCH", "/backends/a", weight=1)
        agree(both, {})
        change(one, "PATCH", "/backends/b", **{"weight": 0, "for": "1s"})
        wait_until(lambda: two.backend("b")["until"] is not None, "two knows that it is for a time")
        agree(both, {})
        assert [each.library.pool.get("b").weight for each in both] == [1, 1]  # type: ignore[union-attr]
    words = json.loads(server.ask("HGET lb:{default}:decisions 'default b weight'").split("\r\n")[1].split(" ", 2)[2])
    assert (words["value"], words["over"]) == (1, 1)


def test_the_later_word_counts_after_a_partition(server: RedisServer) -> None:
    with WireBackend() as backend, several(
        "one", "two", url=server.url, flags=(f"--backend=a={backend.url}", BACKENDS[1])
    ) as both:  # fmt: skip
        one, two = both
        server.send(signal.SIGSTOP)
        wait_until(lambda: [cluster(each)["state"] for each in both] == ["alone", "alone"], "both are alone")
        assert members(one) == {"one", "two"}  # as it knew them
        change(one, "PATCH", "/backends/a", weight=5)
        change(one, "PATCH", "/backends/b", admin_state="maint")
        change(two, "PATCH", "/backends/a", weight=6)
        assert fetch(f"{one.url}/x")[0] == 200
        server.send(signal.SIGCONT)
        returned = time.monotonic()
        agree(both, {"backends.a.weight": "6", "backends.b.admin_state": "maint"})
        assert time.monotonic() - returned < 20  # 2 s, unless the machine is busy
        for each in both:
            assert len(told(each, "cluster_lost")) == 1 and len(told(each, "cluster_found")) == 2


def test_a_server_that_starts_empty_is_told_again(server: RedisServer) -> None:
    with several("one", "two", url=server.url) as both:
        change(both[0], "PATCH", "/backends/a", weight=7)
        agree(both, {"backends.a.weight": "7"})
        server.stop()
        wait_until(lambda: cluster(both[0])["state"] == "alone", "it is lost")
        with server.again() as second, several("three", url=second.url) as (three,):
            agree([three], {"backends.a.weight": "7"})


@pytest.mark.parametrize(
    "word", ["zzzz", '9999999999.999999 x {"at":1,"before":null,"by":"","over":1,"until":null,"value":3}']
)
def test_what_is_no_word_is_the_last_one_on_nothing(server: RedisServer, word: str) -> None:
    with several("one", "two", url=server.url) as both:
        server.ask(f"HSET lb:{{default}}:decisions 'default a weight' '{word}'")
        for weight, each in ((7, both[0]), (8, both[1])):
            change(each, "PATCH", "/backends/a", weight=weight)
            agree(both, {"backends.a.weight": str(weight)})


def test_a_state_file_and_the_cluster_know_the_same_decisions(server: RedisServer, tmp_path: Path) -> None:
    """What was decided elsewhere while it was down is later than what it has kept."""
    flags = (*BACKENDS, f"--state-file={tmp_path}/state.db")
    with several("two", url=server.url) as (two,):
        with several("one", url=server.url, flags=flags) as (one,):
            wait_until(lambda: members(two) == {"one", "two"}, "they know each other")
            change(one, "PATCH", "/backends/a", weight=7, max_connections=5)
            change(one, "PATCH", "/backends/b", weight=9)
            agree([two], {"backends.a.weight": "7", "backends.a.max_connections": "5", "backends.b.weight": "9"})
        change(two, "PATCH", "/backends/a", weight=1)
        change(two, "PATCH", "/backends/b", weight=8)
        with several("one", url=server.url, flags=flags) as (one,):
            agree([one, two], {"backends.a.max_connections": "5", "backends.b.weight": "8"})


def test_another_configuration_keeps_its_own(server: RedisServer) -> None:
    with (
        several("one", url=server.url) as (one,),
        several("two", url=server.url, flags=("--backend=a=http://127.0.0.1:1@2",)) as (two,),
    ):
        change(one, "PATCH", "/backends/a", weight=7, admin_state="drain")
        change(one, "PATCH", "/backends/b", weight=7)
        agree([two], {"backends.a.admin_state": "drain"})
        (text,) = wait_until(lambda: told(two, "decision_left_out"), "it says what it leaves out")[:1]
        assert "backends.a.weight (the configuration has changed)" in text
        agree([one], {"backends.a.admin_state": "drain", "backends.a.weight": "7", "backends.b.weight": "7"})


# Members.


def test_a_member_that_is_killed_is_gone_soon_and_one_that_stops_at_once(server: RedisServer) -> None:
    with several("one", url=server.url) as (one,):
        with BalancerProcess("--id=two", f"--redis-url={server.url}", *BACKENDS, wait_ready=False) as two:
            wait_until(lambda: members(one) == {"one", "two"}, "it is there")
            wait_until(lambda: fetch_json(f"{one.url}/cluster")["members"][1]["lifecycle"] == "running", "it runs")
            shown = fetch_json(f"{one.url}/cluster")["members"][1]
            assert (shown["url"], shown["this"]) == (two.url, False)
            two.send(signal.SIGKILL)
            killed = time.time()
            wait_until(lambda: members(one) == {"one"}, "it is gone")
            assert time.time() - killed > 1  # else it was no heartbeat that was missed
        with several("three", url=server.url):
            wait_until(lambda: members(one) == {"one", "three"}, "another one is there")
        wait_until(lambda: members(one) == {"one"}, "it has left")
        assert [len(told(one, kind)) for kind in ("member_joined", "member_left")] == [2, 2]
        assert cluster(one)["members"] == 1


@pytest.mark.parametrize(
    "wrong", [{"processes": -5}, {"processes": 10**9}, {"rate": float("inf")}, {"url": "javascript:alert(1)"}, None]
)
def test_what_is_no_member_is_none(server: RedisServer, wrong: dict[str, Any] | None) -> None:
    """With figures that cannot be; or, for None, that was never seen."""
    with several("one", url=server.url) as (one,):
        link = Link(server.url, "default", "x")
        link.open()
        (figures,) = [text for text, _ in link.beat("{}").members.values() if text != "{}"]
        link.beat(json.dumps({**json.loads(figures), "id": "x"}))
        wait_until(lambda: members(one) == {"one", "x"}, "it is a member")
        link.beat(json.dumps({**json.loads(figures), "id": "x", **(wrong or {})}))
        if wrong is None:
            server.ask("ZREM lb:{default}:seen x")
        wait_until(lambda: members(one) == {"one"}, "it is none")
        link.close()


def test_one_at_a_unix_socket_is_a_member_too(server: RedisServer, tmp_path: Path) -> None:
    flags = (*BACKENDS, f"--host=unix:{tmp_path}/lb.sock")
    with several("one", url=server.url) as (one,):
        with BalancerProcess(f"--redis-url={server.url}", "--id=two", *flags, wait_ready=False):
            wait_until(lambda: members(one) == {"one", "two"}, "they know each other")


def test_figures_of_all_and_of_each(server: RedisServer) -> None:
    with DemoBackend("a") as backend:
        with several("one", "two", url=server.url, flags=(f"--backend=a={backend.url}",)) as (one, two):
            for balancer, count in ((one, 3), (two, 2)):
                for _ in range(count):
                    fetch(f"{balancer.url}/x")
            wait_until(lambda: fetch_json(f"{one.url}/cluster")["whole"]["total_requests"] == 5, "figures are told")
            view = fetch_json(f"{one.url}/cluster")
            assert [(each["id"], each["total_requests"]) for each in view["members"]] == [("one", 3), ("two", 2)]
            text = fetch(f"{one.url}/metrics")[2].decode()
            assert "lb_cluster_connected 1.0\n" in text and "lb_cluster_members 2.0\n" in text
    with Balancer(*BACKENDS) as alone:
        view = fetch_json(f"{alone.url}/cluster")
        assert view["cluster"]["state"] == "single" and len(view["members"]) == 1 and view["redis"] is None


def test_what_others_have_in_flight_counts_for_power_of_two(server: RedisServer) -> None:
    let_go = threading.Event()
    with WireBackend() as backend:
        backend.script = lambda sock, request: (let_go.wait(60), sock.sendall(ok()))
        flags = (f"--backend=a={backend.url}", f"--backend=b={backend.url}", "--algorithm=power_of_two")
        with several("one", "two", url=server.url, flags=flags) as (one, two), ThreadPoolExecutor(1) as client:
            change(one, "PATCH", "/backends/b", weight=0)
            answer = client.submit(fetch, f"{one.url}/x")
            pool = two.library.pool
            wait_until(lambda: pool.get("a").elsewhere == 1, "it is told")  # type: ignore[union-attr]
            assert fetch_json(f"{two.url}/cluster")["backends"] == {"a": 1}
            change(two, "PATCH", "/backends/b", weight=1)
            chosen = [pool.lease_now(REQUEST) for _ in range(8)]
            assert [lease.backend.id for lease in chosen[:1] if lease] == ["b"]
            for lease in chosen:
                assert lease is not None
                lease.release()
            server.send(signal.SIGSTOP)
            wait_until(lambda: pool.get("a").elsewhere == 0, "nothing is known any more")  # type: ignore[union-attr]
            server.send(signal.SIGCONT)
            let_go.set()
            assert answer.result()[0] == 200


@contextmanager
def dripping() -> Iterator[int]:
    """The port of a server that sends one byte after another of an answer that has no end."""
    is_over = threading.Event()

    def drip(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            while not is_over.wait(0.05):
                sock.sendall(b"+")

    def accept() -> None:
        with ThreadPoolExecutor() as drips, suppress(OSError):
            while True:
                drips.submit(drip, listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, name="dripping")
        thread.start()
        yield listener.getsockname()[1]
        is_over.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_an_answer_without_an_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.cluster.cluster.STUCK_SECONDS", 0.5)
    with dripping() as port, Balancer(*BACKENDS, f"--redis-url=redis://127.0.0.1:{port}", wait_ready=False) as one:
        wait_until(lambda: cluster(one)["last_error"] == "no whole answer came in time", "it is given up")


def test_what_one_finds_down_the_others_check_at_once(server: RedisServer) -> None:
    with WireBackend() as backend:
        flags = (f"--backend=a={backend.url}", "--health-interval=3600", "--health-fall=1", "--retries=0")
        with several("one", "two", url=server.url, flags=flags) as (one, two):
            for each in (one, two):
                each.wait_healthy("a")
            backend.close()
            fetch(f"{one.url}/x")
            one.wait_healthy("a", False)
            two.wait_healthy("a", False)


# Without Redis.


def is_refused(server: RedisServer) -> Any:
    server.stop()
    return server.again


def hangs(server: RedisServer) -> Any:
    server.send(signal.SIGSTOP)
    return lambda: server.send(signal.SIGCONT)


def may_only_be_read(server: RedisServer) -> Any:
    server.ask(f"REPLICAOF 127.0.0.1 {free_port()}")
    return lambda: server.ask("REPLICAOF NO ONE")


def is_full(server: RedisServer) -> Any:
    server.ask("CONFIG SET maxmemory 1")
    return lambda: server.ask("CONFIG SET maxmemory 0")


def wants_another_password(server: RedisServer) -> Any:
    server.ask(f"CONFIG SET requirepass {SECRET}", "CLIENT KILL TYPE normal SKIPME yes")
    return lambda: server.ask(f"AUTH {SECRET}", 'CONFIG SET requirepass ""')


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (is_refused, "Connection refused|closed"),
        (hangs, "Timeout"),
        (may_only_be_read, "read only replica"),
        (is_full, "maxmemory"),
        (wants_another_password, "Authentication required|unauthenticated"),
    ],
)
def test_without_it_each_goes_on_and_says_so_once(
    server: RedisServer, fault: Callable[[RedisServer], Any], said: str
) -> None:
    with WireBackend() as backend:
        with several("one", url=server.url, flags=(f"--backend=a={backend.url}",)) as (one,):
            repair = fault(server)
            wait_until(lambda: cluster(one)["state"] == "alone", "it is alone")
            for _ in range(20):
                assert fetch(f"{one.url}/x")[0] == 200
            error = cluster(one)["last_error"]
            assert any(word in error for word in said.split("|")), error
            started = repair()
            with ExitStack() as stack:
                if isinstance(started, RedisServer):
                    stack.enter_context(started)
                wait_until(lambda: cluster(one)["state"] == "together", "it is back")
                assert [len(told(one, f"cluster_{kind}")) for kind in ("lost", "found")] == [1, 2]


@pytest.mark.parametrize("kind", ["web", "silent", "nobody", "redis"])
def test_what_is_no_redis_or_wants_another_password_is_told_once_and_the_password_never(
    kind: str, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with WireBackend() as web, socket.create_server(("127.0.0.1", 0)) as silent:
        web.on_head = lambda sock, request: sock.close() or True  # type: ignore[func-returns-value]
        ports = {"web": web.port, "silent": silent.getsockname()[1], "nobody": free_port(), "redis": server.port}
        env = {"LB_REDIS_URL": f"redis://user:{SECRET}@127.0.0.1:{ports[kind]}/0"}
        with Balancer(*BACKENDS, env=env, wait_ready=False) as balancer:
            wait_until(lambda: cluster(balancer)["last_error"], "it says why it is alone")
            tries = balancer.library.cluster
            assert tries is not None
            wait_until(lambda: tries.age > 0.01, "it has tried")
            paths = ("status", "cluster", "config", "events", "metrics", "history")
            answers = b"".join(fetch(f"{balancer.url}/{path}")[2] for path in paths).decode()
        assert SECRET not in answers + caplog.text
        assert caplog.text.count("cluster_lost: ") == 1


# Limits.


def limited(folder: Path, backend: WireBackend, limit: str) -> tuple[str, ...]:
    file = folder / "balancer.toml"
    file.write_text(
        f'backends = [{{ id = "a", url = "{backend.url}" }}]\n[[limits]]\nname = "all"\nkey = "global"\n{limit}\n'
        '[[routes]]\nname = "r"\npath = "/"\npool = "default"\nlimits = ["all"]\n',
        encoding="utf-8",
    )
    return (f"--config={file}",)


def hammer(balancer: Served, seconds: float) -> int:
    """How many were let through, of as many as can be asked."""
    until, passed = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        passed += fetch(f"{balancer.url}/x")[0] == 200
    return passed


def test_two_hold_a_rate_together_and_one_alone_has_all_of_it(server: RedisServer, tmp_path: Path) -> None:
    with WireBackend() as backend:
        flags = limited(tmp_path, backend, 'rate = "40/s"\nburst = 10')
        with several("one", "two", url=server.url, flags=flags) as both:
            for used in (both, both[:1]):
                started = time.monotonic()
                with ThreadPoolExecutor(2) as clients:
                    passed = sum(clients.map(lambda each: hammer(each, 1.2), used))
                lasted = time.monotonic() - started
                assert passed <= 10 + 40 * lasted * 1.1
                assert passed >= 25, "less than half of it"


def test_no_request_waits_for_a_server_that_takes_two_seconds(server: RedisServer, tmp_path: Path) -> None:
    """Nor is one refused. Else there would be as many answers of Redis."""
    with WireBackend() as backend, SlowWay(server) as way:
        flags = limited(tmp_path, backend, 'rate = "1000/s"\nburst = 1000')
        with several("one", url=way.url, flags=flags) as (one,):
            way.delay, before = 2.0, way.answers
            wait_until(lambda: fetch(f"{one.url}/x")[0] == 200 and cluster(one)["state"] == "alone", "it is alone")
            assert [fetch(f"{one.url}/x")[0] for _ in range(60)] == [200] * 60
            assert way.answers - before < 30
            way.delay = 0.0
            wait_until(lambda: cluster(one)["state"] == "together", "it is back")


def test_what_holds_while_it_is_alone(server: RedisServer, tmp_path: Path) -> None:
    rules = {"local": 3, "open": 20, "closed": 0}
    with WireBackend() as backend:
        file = tmp_path / "balancer.toml"
        limits = [
            f'[[limits]]\nname = "{rule}"\nkey = "global"\nrate = "1/h"\nburst = 6\non_store_failure = "{rule}"\n'
            f'[[routes]]\nname = "{rule}"\npath = "/{rule}"\npool = "default"\nlimits = ["{rule}"]\n'
            for rule in rules
        ]
        file.write_text(f'backends = [{{ url = "{backend.url}" }}]\n{"".join(limits)}', encoding="utf-8")
        with several("one", "two", url=server.url, flags=(f"--config={file}",)) as (one, _):
            server.send(signal.SIGSTOP)
            wait_until(lambda: cluster(one)["state"] == "alone", "it is alone")
            for rule, passed in rules.items():
                answers = [fetch(f"{one.url}/{rule}")[0] for _ in range(20)]
                assert answers.count(200) == passed and set(answers) <= {200, 429}
            server.send(signal.SIGCONT)


def test_the_script_charges_what_was_taken_and_counts_who_shares(server: RedisServer) -> None:
    links = [Link(server.url, "c", name) for name in ("x", "y")]
    for link in links:
        link.open()
    x, y = links
    second = 1_000_000_000
    asked = Charge("l", "k", 3600 * second, 4 * 3600 * second, 2)
    (first,) = x.charge("", [asked])
    assert first.sharing == 1 and 7199 * second < first.owed <= 7200 * second
    (other, none) = y.charge("", [asked._replace(taken=1), asked._replace(key="other", taken=0)])
    assert other.sharing == 2 and 10798 * second < other.owed <= 10800 * second
    assert (none.owed, none.sharing) == (0, 1)
    assert y.charge("", [asked._replace(taken=9)])[0].owed <= asked.most
    server.ask("HSET lb:{c}:limit:l:k '' nonsense y nonsense", "SET lb:{c}:limit:l:other nonsense")
    for key in ("k", "other"):
        assert x.charge("", [asked._replace(key=key)])[0].sharing == 1
    for link in links:
        link.close()
    assert "-1" not in [server.ask(f"TTL {key}") for key in ("lb:{c}:limit:l:k", "lb:{c}:limit:l:other")]


def test_a_server_that_repeats_the_password_does_not_make_us_tell_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as client:
                client.recv(1000)
                client.sendall(f"-ERR {SECRET} is what I was told\r\n".encode())

        thread = threading.Thread(target=answer)
        thread.start()
        link = Link(f"redis://:{SECRET}@127.0.0.1:{server.getsockname()[1]}/0", "c", "x")
        with pytest.raises(LinkError, match="told") as raised:
            link.open()
        thread.join()
    link.close()
    assert SECRET not in str(raised.value)


# Settings.


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("redis", "balancer.cluster.link", "balancer.cluster.cluster"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match=r"extra redis: pip install 'python-load-balancer\[redis\]'"):
        LoadBalancer(redis_url="redis://127.0.0.1")


@pytest.mark.parametrize("url", ["http://x", "redis://", f"redis://u:{SECRET}@h:99999", "unix://", "redis://h/first"])
def test_what_is_no_address_of_a_redis_is_refused_without_a_word_of_it(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        LoadBalancer(redis_url=url)
    assert str(refused.value).startswith("redis_url = (hidden) (program): expected redis://")
