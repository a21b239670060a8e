"""Several pools of backends: each with what it has of its own, and what becomes of them when the settings change."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from exposition import scrape, value
from support import Balancer, Clock, RawRequest, fetch, fetch_json, ok, options, wait_until
from test_reload import A, Asking, B, C, Wired, whats
from test_websocket import Echo, opened
from wire import WireBackend, hang_up

from balancer import poolwiring
from balancer.balancing import strategies
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.config import settings
from balancer.config.settings import Settings
from balancer.errors import NoRoom, SettingsError
from balancer.loadbalancer import LoadBalancer
from balancer.protocol.origin import Origin

ORIGIN = Origin("http", "127.0.0.1", 1)


Backends = dict[str, WireBackend]


def answering(name: str) -> WireBackend:
    backend = WireBackend()
    backend.answer(ok(name.encode()))
    return backend


@pytest.fixture
def backends() -> Iterator[dict[str, WireBackend]]:
    made = {name: answering(name) for name in ("main", "api_1", "api_2", "next_1")}
    yield made
    for backend in made.values():
        backend.close()


class File:
    """A configuration file with a pool `default`, and for each other one a route of its name."""

    def __init__(self, path: Path, backends: Backends) -> None:
        self.path, self._backends = path, backends

    def write(self, *, top: str = "health_interval = 0.1\nhealth_timeout = 5", **pools: str) -> None:
        """Backends belong to the pool whose name theirs begins with."""
        lines = [top, self._backend("backends", "main")]
        for name, own in pools.items():
            lines += ["[[pools]]", f'name = "{name}"', own]
            lines += [self._backend("pools.backends", each) for each in self._backends if each.startswith(name)]
            lines += ["[[routes]]", f'name = "{name}"', f'path = "/{name}"', f'pool = "{name}"']
        self.path.write_text("\n".join(lines), encoding="utf-8")

    def _backend(self, table: str, name: str) -> str:
        return f'[[{table}]]\nid = "{name}"\nurl = "{self._backends[name].url}"'


@pytest.fixture
def file(tmp_path: Path, backends: Backends) -> File:
    return File(tmp_path / "balancer.toml", backends)


API = 'algorithm = "round_robin"\nhealth_path = "/healthz"\nhealth_host = "checked.test"\nbackend_host = "api.test"'


@pytest.fixture
def balancer(file: File) -> Iterator[Balancer]:
    file.write(api=f"{API}\nsticky = true", next="retries = 0")
    with Balancer("--config", str(file.path), "--expose-backend") as balancer:
        for backend in ("api_1", "api_2", "next_1"):
            balancer.wait_healthy(backend)
        yield balancer


def checks(backend: WireBackend) -> list[RawRequest]:
    return [each for each in backend.requests if each.target == b"/healthz"]


def test_each_pool_has_what_it_has_of_its_own(balancer: Balancer, backends: Backends) -> None:
    seen = [fetch(f"{balancer.url}/api/x")[2] for _ in range(4)]
    assert sorted(seen) == [b"api_1", b"api_1", b"api_2", b"api_2"]
    assert fetch(f"{balancer.url}/x")[2] == b"main" and fetch(f"{balancer.url}/next")[2] == b"next_1"
    requests = [each for each in backends["api_1"].requests if each.target == b"/api/x"]
    assert [each.values(b"host") for each in requests] == [[b"api.test"]] * 2
    assert backends["main"].requests[-1].values(b"host") == [f"127.0.0.1:{balancer.port}".encode()]
    assert checks(backends["api_1"])[0].values(b"host") == [b"checked.test"]
    assert not checks(backends["main"]) and not checks(backends["next_1"])


def test_a_cookie_keeps_a_client_in_each_pool_and_reaches_no_backend(balancer: Balancer, backends: Backends) -> None:
    _, headers, first = fetch(f"{balancer.url}/api")
    cookie = headers["set-cookie"].partition(";")[0]
    assert cookie.startswith("lb_api=") and "set-cookie" not in fetch(f"{balancer.url}/x")[1]
    assert {fetch(f"{balancer.url}/api", Cookie=f"a=1; {cookie}")[2] for _ in range(4)} == {first}
    assert backends[first.decode()].requests[-1].values(b"cookie") == [b"a=1"]
    fetch(f"{balancer.url}/x", Cookie=f"a=1; {cookie}")
    assert backends["main"].requests[-1].values(b"cookie") == [b"a=1"]


def test_the_control_api_tells_and_changes_them(balancer: Balancer) -> None:
    url = balancer.url
    fetch(f"{url}/api")
    status = balancer.status()
    assert [(each["id"], each["pool"]) for each in status["backend_servers"]] == [
        ("main", "default"), ("api_1", "api"), ("api_2", "api"), ("next_1", "next"),
    ]  # fmt: skip
    assert status["algorithm"] == "weighted"
    assert [(each["name"], each["algorithm"], each["available"]) for each in status["pools"]] == [
        ("default", "weighted", 1), ("api", "round_robin", 2), ("next", "weighted", 1),
    ]  # fmt: skip
    assert status["pools"][1]["total_requests"] == 1 and not status["pools"][1]["leaving"]
    told = scrape(url)
    assert value(told, "lb_backend_up", backend="api_1", pool="api") == 1
    assert value(told, "lb_pool_info", pool="api", algorithm="round_robin") == 1
    assert value(told, "lb_pool_backends_available", pool="api") == 2

    assert fetch_json(f"{url}/algorithm", {"algorithm": "random", "pool": "api"})["current"] == "random"
    assert fetch_json(f"{url}/algorithm") | {"algorithms": []} == {
        "current": "weighted", "pools": {"default": "weighted", "api": "random", "next": "weighted"}, "algorithms": [],
    }  # fmt: skip
    rows = {row["name"]: (row["value"], row["source"].split()[0]) for row in fetch_json(f"{url}/config")["settings"]}
    assert rows["pools.api.algorithm"] == ("random", "api") and rows["pools.next.retries"] == ("0", "file")
    assert rows["pools"] == ("api, next", "file") and rows["algorithm"] == ("weighted", "default")

    added = fetch_json(f"{url}/backends", {"url": "http://127.0.0.1:9", "pool": "next"})
    assert (added["id"], added["pool"]) == ("backend_5", "next")
    assert [each["id"] for each in fetch_json(f"{url}/backends?pool=next")["backends"]] == ["next_1", "backend_5"]
    assert fetch_json(f"{url}/backends/backend_5", {"weight": 3}, "PATCH")["weight"] == 3
    assert fetch(f"{url}/backends/backend_5", method="DELETE")[0] == 200
    assert fetch(f"{url}/backends/backend_5")[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/algorithm", {"algorithm": "random", "pool": "x"}, 400, "no pool 'x', expected one of: default, api, next"),
        ("/backends", {"url": "http://a:1", "pool": "x"}, 422, "no pool 'x', expected one of: default, api, next"),
        ("/backends?pool=x", None, 400, "no pool 'x', expected one of: default, api, next"),
        ("/backends", {"url": "http://a:1", "pool": "next", "id": "api_1"}, 409, "'api_1' is taken"),
        ("/backends", {"url": "http://a:1", "id": "api_1"}, 409, "'api_1' is taken"),
    ],
)
def test_what_it_refuses(balancer: Balancer, path: str, body: Any, status: int, said: str) -> None:
    answer = fetch(balancer.url + path, body)
    assert answer[0] == status and said in answer[2].decode()


def test_what_is_in_flight_in_a_pool_can_be_cut_off(balancer: Balancer, backends: Backends) -> None:
    asked, done = threading.Event(), threading.Event()

    def hold(sock: socket.socket, request: RawRequest) -> None:
        asked.set()
        done.wait(60)
        hang_up(sock)

    backends["next_1"].script = hold
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(fetch, f"{balancer.url}/next", method="POST")
        assert asked.wait(60)
        assert fetch(f"{balancer.url}/backends/next_1?force=1", method="DELETE")[0] == 200
        assert answer.result()[0] == 502
    assert balancer.library.requests(1)[0]["reason"] == "backend_removed"
    done.set()


# Reloads.


def test_nothing_is_lost_while_pools_come_change_move_and_go(
    balancer: Balancer, file: File, backends: Backends
) -> None:
    with Asking(f"{balancer.url}/api/x") as asking:
        for step in range(12):
            file.write(
                **{"api": f'{API}\nalgorithm = "random"'.replace('algorithm = "round_robin"\n', "")}
                if step % 2
                else {},
                next=f"retries = {step}" if step < 10 else "retry_budget = 0.5",
            )
            before = asking.sent
            assert fetch(f"{balancer.url}/reload", method="POST")[0] == 200
            wait_until(lambda before=before: asking.sent > before + 40, "requests go on")
    assert asking.failed == [] and asking.bodies == {b"main", b"api_1", b"api_2"}
    assert {each["name"] for each in balancer.status()["pools"] if not each["leaving"]} == {"default", "api", "next"}
    assert balancer.is_ready()


def test_nothing_is_lost_while_a_pool_changes_its_name(balancer: Balancer, file: File, backends: Backends) -> None:
    """Its backends keep theirs: for a moment two pools have one of that id."""
    with Asking(f"{balancer.url}/api/x", clients=8) as asking:
        for step in range(12):
            file.write(api="", next="")
            if step % 2 == 0:
                text = file.path.read_text(encoding="utf-8")
                file.path.write_text(text.replace('"api"', '"other"'), encoding="utf-8")
            before = asking.sent
            assert fetch(f"{balancer.url}/reload", method="POST")[0] == 200
            ids = [backend["id"] for backend in balancer.status()["backend_servers"]]
            assert sorted(ids) == ["api_1", "api_2", "main", "next_1"]
            wait_until(lambda before=before: asking.sent > before + 40, "requests go on")
    assert asking.failed == []


def test_a_pool_that_has_left_serves_its_requests_to_their_end(
    balancer: Balancer, file: File, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also such as need another backend of it."""
    monkeypatch.setattr(poolwiring, "LEAVE_SECONDS", 0.0)
    asked, go = threading.Event(), threading.Event()

    def fail_later(sock: socket.socket, request: RawRequest) -> None:
        if request.target != b"/api/slow":  # a check
            sock.sendall(ok())
        elif asked.is_set():
            sock.sendall(ok(b"the other one"))
        else:
            asked.set()
            go.wait(60)
            hang_up(sock)

    for name in ("api_1", "api_2"):
        backends[name].script = fail_later
    with ThreadPoolExecutor(1) as clients:
        slow: Future[Any] = clients.submit(fetch, f"{balancer.url}/api/slow")
        assert asked.wait(60)
        file.write(next="")
        assert "pools.api" in whats(fetch_json(f"{balancer.url}/reload", method="POST"))
        assert fetch(f"{balancer.url}/api/slow")[2] == b"main"
        checks = balancer.library.pool.counts()["main"].checks
        wait_until(lambda: balancer.library.pool.counts()["main"].checks > checks + 4, "rounds go by")
        pool = balancer.status()["pools"][-1]
        assert (pool["name"], pool["leaving"], pool["backends"]) == ("api", True, 2)
        assert fetch(f"{balancer.url}/backends", {"url": "http://a:1", "pool": "api"})[0] == 422
        go.set()
        assert slow.result()[::2] == (200, b"the other one")
    wait_until(lambda: len(balancer.status()["pools"]) == 2, "the pool is gone")
    assert [each["id"] for each in balancer.status()["backend_servers"]] == ["main", "next_1"]
    assert [each.pool.name for each in balancer.library.pools.health.checked] == ["default", "next"]


def test_websockets_of_a_pool_that_has_left_have_their_time(tmp_path: Path, backends: Backends) -> None:
    with ExitStack() as stack:
        echo = Echo()
        stack.callback(echo.stop)
        file = File(tmp_path / "lb.toml", backends | {"ws_1": echo})  # type: ignore[dict-item]
        file.write(ws="request_timeout = 0.5\nbackend_drain_timeout = 0.5")
        with Balancer("--config", str(file.path), wait_ready=False) as balancer:
            balancer.wait_healthy("ws_1")
            with opened(balancer, "/ws") as client:
                client.send("abc")
                assert client.recv() == "abc"
                file.write()
                assert fetch(f"{balancer.url}/reload", method="POST")[0] == 200
                client.send("def")
                assert client.recv() == "def"
                wait_until(lambda: len(balancer.status()["pools"]) == 1, "its time is over")


def test_fifty_pools_have_one_thread_for_their_checks_and_are_reloaded_at_once(tmp_path: Path) -> None:
    backend, path = answering("x"), tmp_path / "balancer.toml"
    names = [f"pool_{number}" for number in range(50)]

    def write(own: str) -> None:
        path.write_text(
            "".join(
                f'[[pools]]\nname = "{name}"\n{own}\n[[pools.backends]]\nurl = "{backend.url}"\n'
                f'[[routes]]\nname = "{name}"\npath = "/{name}"\npool = "{name}"\n'
                for name in names
            ),
            encoding="utf-8",
        )

    write("retries = 1")
    with backend, Balancer("--config", str(path)) as balancer:
        assert all(fetch(f"{balancer.url}/{name}")[2] == b"x" for name in names)
        assert fetch(f"{balancer.url}/elsewhere")[0] == 404
        threads = [thread.name for thread in threading.enumerate()]
        assert threads.count("health") == 1 and sum(name.startswith("health-probe") for name in threads) <= 64
        write("retries = 2")
        answer = fetch_json(f"{balancer.url}/reload", method="POST")
        assert whats(answer) == [f"pools.{name}.retries" for name in names]
        assert [parts.settings.retries for parts in balancer.library.pools.parts.values()] == [2] * 51


# What a reload compares, without serving.


def pool(name: str, *backends: dict[str, Any], **own: Any) -> dict[str, Any]:
    return {"name": name, "backends": list(backends), **own}


def live(wired: Wired) -> dict[str, list[str]]:
    return {each.name: [backend.id for backend in each.backends()] for each in wired.balancer.control.pools}


def test_pools_are_compared_one_by_one() -> None:
    wired = Wired(backends=[A], pools=[pool("api", B, retries=1), pool("old")], retries=2)
    answer = wired.reload(
        backends=[A],
        pools=[pool("api", B | {"weight": 3}, C, algorithm="random"), pool("new", {"id": "n", "url": "http://n:1"})],
        retries=2,
        health_interval=9,
    )
    assert whats(answer) == [
        "health_interval", "pools.old", "pools.api.algorithm", "pools.api.retries", "pools.api.backends.b.weight",
        "pools.api.backends.c", "pools.new",
    ]  # fmt: skip
    assert answer["changes"][3] == {"what": "pools.api.retries", "from": 1, "to": 2}
    assert answer["shares"]["n"] == answer["shares"]["a"] == 1.0
    assert live(wired) == {"default": ["a"], "api": ["b", "c"], "new": ["n"], "old": []}
    assert [each.options.health_interval for each in wired.balancer.pools.health.checked] == [9, 9, 9, 0.5]
    assert ("backend_added", "http://n:1, weight 1, pool new") in wired.events()
    assert ("algorithm_changed", "random, pool api") in wired.events()


def test_what_the_api_has_set_in_a_pool_is_kept() -> None:
    wired = Wired(pools=[pool("api", A, B)])
    pools = wired.balancer.control.pools
    api = pools.get("api")
    assert api is not None
    api.use(strategies.create("random"))
    api.update("a", {"weight": 7})
    api.remove("b")
    pools.add(api, "c", ORIGIN)
    answer = wired.reload(pools=[pool("api", A, B)], queue_limit=9)
    assert answer["kept"] == [
        "pools.api.algorithm: random (set by the API)",
        "pools.api.backends.a.weight: 7 (set by the API)",
        "pools.api.backends.b: removed (by the API)",
        "pools.api.backends.c: added (by the API)",
    ]
    assert live(wired)["api"] == ["a", "c"] and api.algorithm == "random"


def test_a_backend_moves_to_another_pool_and_one_of_the_api_gives_way() -> None:
    wired = Wired(backends=[A], pools=[pool("api", B)])
    pools = wired.balancer.control.pools
    pools.default.get("a").health.status = "up"  # type: ignore[union-attr]
    pools.default.update("a", {"weight": 2})
    lease = pools.default.lease(None)  # type: ignore[arg-type]
    pools.add(pools.default, "c", ORIGIN)
    answer = wired.reload(backends=[], pools=[pool("api", B, A, C)])
    assert whats(answer) == ["backends.a", "backends.c", "pools.api.backends.a", "pools.api.backends.c"]
    assert answer["kept"] == [] and live(wired) == {"default": [], "api": ["b", "a", "c"]}
    lease.release(0.01)
    assert pools.default.is_empty and [each["pool"] for each in pools.snapshot()] == ["api"] * 3


def test_a_pool_follows_the_top_level_in_what_it_has_not_of_its_own() -> None:
    wired = Wired(algorithm="weighted", backends=[A], pools=[pool("api", B), pool("own", C, algorithm="random")])
    wired.reload(algorithm="round_robin", backends=[A], pools=[pool("api", B), pool("own", C, algorithm="random")])
    assert [each.algorithm for each in wired.balancer.control.pools] == ["round_robin", "round_robin", "random"]


def test_parts_of_a_pool_go_by_its_own_settings() -> None:
    own = {"hash_key": "path", "connect_timeout": 9, "backend_sni": "b.test", "health_timeout": 7, "queue_limit": 3}
    wired = Wired(backends=[A], pools=[pool("api", B, algorithm="consistent_hash", **own)])
    for _ in range(2):
        default, api = wired.balancer.pools.parts.values()
        checked = [each.options.health_timeout for each in wired.balancer.pools.health.checked]
        assert api.pool._strategy.options.hash_key == "path" and checked == [0.4, 7]
        assert (api.adapter.timeouts.connect_timeout, default.adapter.timeouts.connect_timeout) == (9, 3)
        assert (api.adapter.server_name, default.adapter.server_name) == ("b.test", None)
        assert (api.pool._judge.options.queue_limit, default.pool._judge.options.queue_limit) == (3, 500)
        wired.reload(backends=[A], pools=[pool("api", B, algorithm="consistent_hash", **own)], retries=9)


def test_an_unknown_algorithm_is_told_with_its_pool() -> None:
    with pytest.raises(SettingsError, match=r"^pools.api.algorithm: unknown algorithm 'x', expected one of: "):
        LoadBalancer(pools=[pool("api", A, algorithm="x")])
    wired = Wired(pools=[pool("api", A)])
    with pytest.raises(SettingsError, match="pools.api.algorithm"):
        wired.reload(pools=[pool("api", A, algorithm="x"), pool("new", B)])
    assert live(wired) == {"default": [], "api": ["a"]}


def test_a_file_that_names_nothing_any_more_does_not_bring_the_demo() -> None:
    wired = Wired(pools=[pool("api", A)])
    wired.balancer.configuration.read = lambda: settings.load({}, {})
    with pytest.raises(SettingsError, match="names no backends any more"):
        wired.balancer.reload()
    assert live(wired) == {"default": [], "api": ["a"]}


def test_it_is_ready_after_the_first_round_of_all_and_no_later_pool_changes_that() -> None:
    wired = Wired(backends=[A], pools=[pool("api", B)])
    pools = wired.balancer.control.pools
    pools.default.record_refused(pools.default.backends()[0], "refused")
    assert not wired.balancer.control.is_serving()
    api = pools.pool_of("b")
    assert api is not None
    api.record_refused(api.backends()[0], "refused")
    assert wired.balancer.control.is_serving()
    wired.reload(backends=[A], pools=[pool("api", B), pool("new", C)])
    assert wired.balancer.control.is_serving()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backends": [A], "pools": [pool("api", A)]}, "two backends have the id 'a'; ids must differ over all pools"),
        ({"pools": [pool("api"), pool("api")]}, "two have the name 'api'; names must differ"),
        ({"pools": [pool("default", A)]}, "is the pool of the backends at the file's top level"),
        ({"pools": [pool("api", admin_token="x")]}, "unknown setting 'pools.api.admin_token'"),
    ],
)
def test_settings_that_are_no_pools_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        LoadBalancer(**given)
    assert said in str(refused.value)


# What pools share.


def test_those_who_wait_are_counted_over_all_pools() -> None:
    wired = Wired(backends=[A], pools=[pool("api", B)], max_threads=4, queue_timeout=60)
    default, api = wired.balancer.control.pools
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(default.lease, None) for _ in range(2)]  # type: ignore[arg-type]
        wait_until(lambda: default.waiting == 2, "half of the threads wait")
        with pytest.raises(NoRoom):
            api.lease(None)  # type: ignore[arg-type]
        default.record_refused(default.backends()[0], "refused")  # nothing to wait for any more
        assert all(each.exception(60) is not None for each in waiting)


def test_retries_have_a_share_of_their_pools_requests_alone() -> None:
    clock = Clock()
    made = BackendPool(strategies.create("round_robin"), options(PoolOptions), clock=clock)
    for name in ("a", "b"):
        made.add(name, ORIGIN).health.status = "up"
    made.update("a", {"weight": 2})

    def choose(count: int) -> int:
        for _ in range(count):
            made.lease(None).release()  # type: ignore[arg-type]
        return made.recent_choices()

    assert choose(6) == 6
    for _ in range(12):
        clock.now += 1
        made.sweep()
    assert choose(4) == 4
    made.remove("a")
    assert made.recent_choices() == 2


def test_checking_a_configuration_shows_what_pools_have_of_their_own() -> None:
    config = Settings(pools=[pool("api", A, retries=1)])
    told = settings.describe(config, dict.fromkeys(Settings.model_fields, "file x"))
    assert re.search(r"^pools +api +file x$", told, re.M) and re.search(r"^pools.api.retries +1 +file x$", told, re.M)
