"""Reading the configuration again: what is applied, what is kept, what is refused, and that no request is lost."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import Balancer, BalancerProcess, another_value, fetch, fetch_json, ok, options, wait_until
from werkzeug.test import Client
from wire import WireBackend

from balancer.balancing import strategies
from balancer.config.settings import NEEDS_RESTART, Settings
from balancer.config.values import Values
from balancer.edge.bridge import Bridge
from balancer.edge.listener import ClientLimits
from balancer.edge.workers import WorkerPool
from balancer.errors import SettingsError
from balancer.loadbalancer import LoadBalancer, create_app

A, B, C = ({"id": name, "url": f"http://127.0.0.1:{port}"} for name, port in (("a", 1), ("b", 2), ("c", 3)))


class Wired:
    """A wired balancer that serves nothing; `wanted` is what its configuration says when it is read again."""

    def __init__(self, **start: Any) -> None:
        self.wanted: Settings | SettingsError = Settings(**start)
        self.balancer: LoadBalancer = create_app(self.wanted).extensions["balancer"]
        self.balancer.configuration.read = self._read
        self.pool = self.balancer.control.pool

    def _read(self) -> tuple[Settings, dict[str, str]]:
        if isinstance(self.wanted, SettingsError):
            raise self.wanted
        return self.wanted, dict.fromkeys(Settings.model_fields, "file balancer.toml")

    def reload(self, dry_run: bool = False, **wanted: Any) -> dict[str, Any]:
        self.wanted = Settings(**wanted)
        return self.balancer.reload(dry_run).describe(applied=not dry_run)

    def weights(self) -> dict[str, int]:
        return {backend.id: backend.weight for backend in self.pool.backends()}

    def events(self) -> list[tuple[str, str]]:
        return [(event["kind"], event["message"]) for event in self.balancer.control.events.since(0)[0]]


def whats(answer: dict[str, Any]) -> list[str]:
    return [change["what"] for change in answer["changes"]]


def test_nothing_changed_changes_nothing() -> None:
    wired = Wired(backends=[A, B])
    answer = wired.reload(backends=[A, B])
    answer.pop("hash")
    assert answer == {
        "applied": True, "changes": [], "kept": [], "needs_restart": [], "shares": {"a": 0.5, "b": 0.5},
    }  # fmt: skip
    assert wired.events()[-1] == ("config_reloaded", "nothing has changed")


def test_only_what_was_looked_at_is_applied() -> None:
    wired = Wired(backends=[A, B], sticky_secret="one-of-sixteen-signs-and-more")
    other = {"backends": [A | {"weight": 3}, B], "sticky_secret": "two-of-sixteen-signs-and-more"}
    looked_at = wired.reload(dry_run=True, **other)["hash"]
    assert wired.reload(dry_run=True, **other)["hash"] == looked_at
    client = Client(wired.balancer.control_app)

    def apply() -> int:
        headers = {"If-Match": f'"{looked_at}"'}
        return client.post("/reload", headers=headers, environ_base={"REMOTE_ADDR": "127.0.0.1"}).status_code

    for changed in ({"backends": [A, B]}, {"sticky_secret": "six-of-sixteen-signs-and-more"}):
        wired.wanted = Settings(**other | changed)
        assert (apply(), wired.weights(), wired.balancer.configuration.last_error) == (412, {"a": 1, "b": 1}, None)
    wired.wanted = Settings(**other)
    assert (apply(), wired.weights()) == (200, {"a": 3, "b": 1})


def test_backends_are_added_changed_and_removed() -> None:
    wired = Wired(backends=[A, B])
    answer = wired.reload(backends=[A | {"weight": 3}, C])
    assert whats(answer) == ["backends.a.weight", "backends.c", "backends.b"]
    assert answer["changes"][0] == {"what": "backends.a.weight", "from": 1, "to": 3}
    assert answer["shares"] == {"a": 0.75, "c": 0.25}
    assert wired.weights() == {"a": 3, "c": 1}


def test_a_removed_backend_finishes_what_it_has() -> None:
    wired = Wired(backends=[A, B])
    b = wired.pool.backends()[1]
    wired.pool.record_refused(wired.pool.backends()[0], "refused")
    b.health.status = "up"
    wired.pool.update("b", {"weight": 2})
    lease = wired.pool.lease(None)
    wired.reload(backends=[A])
    assert (b.is_leaving, b.active) == (True, 1)
    lease.release(0.01)
    assert wired.weights() == {"a": 1}


def test_a_backend_that_moves_is_unknown_until_it_is_checked_there() -> None:
    wired = Wired(backends=[A])
    a = wired.pool.backends()[0]
    wired.pool.record_refused(a, "refused")
    answer = wired.reload(backends=[A | {"url": "http://127.0.0.1:9"}])
    assert whats(answer) == ["backends.a.url"]
    assert (a.origin.port, a.health.status) == (9, "unknown")


def test_settings_of_every_part_are_applied() -> None:
    wired = Wired(backends=[A])
    answer = wired.reload(
        backends=[A],
        algorithm="round_robin",
        retries=0,
        connect_timeout=1.5,
        pool_idle_timeout=2,
        health_interval=9,
        health_fall=7,
        queue_limit=3,
        eject_after=1,
        expose_backend=True,
    )
    assert len(answer["changes"]) == 9 and answer["needs_restart"] == []
    balancer, adapter = wired.balancer, wired.balancer.pools.parts["default"].adapter
    assert (balancer.proxy.routes.usual.options.retries, len(balancer.proxy.routes.usual.answer)) == (0, 1)
    assert (adapter.timeouts.connect_timeout, adapter.timeouts.pool_idle_timeout) == (1.5, 2)
    assert [each.options.health_interval for each in balancer.pools.health.checked] == [9]
    assert wired.pool.algorithm == "round_robin"
    assert wired.pool.snapshot()[0]["health"]["fall"] == 7
    assert wired.pool._judge.options.queue_limit == 3 and wired.pool._judge.options.eject_after == 1


NOT_ALONE = {name for name in Settings.model_fields if name.startswith("tls_")} | {"http_redirect_port"}


@pytest.mark.parametrize("name", sorted(set(Values.model_fields) - NOT_ALONE - {"backends", "allow_file_origin"}))
def test_every_setting_is_either_applied_or_said_to_need_a_restart(name: str) -> None:
    """Whatever holds its own copy of a setting that can be reloaded must get the new one."""
    looked_up = {"id": "d", "url": "dns+http://api:1"}
    base: dict[str, Any] = {"backends": [A, looked_up], "access_log": name != "access_log", "sticky": name != "sticky"}
    wired = Wired(**base)
    balancer = wired.balancer
    balancer.bridges.append(Bridge(balancer.control_app, WorkerPool(1, 1, 1.0), options(ClientLimits)))
    wired.reload(**base)  # nobody has set the log level before
    before = held(balancer)
    answer = wired.reload(**base | {name: another_value(name)})
    if name in NEEDS_RESTART:
        assert (answer["needs_restart"], answer["changes"], held(balancer)) == ([name], [], before)
    else:
        assert answer["needs_restart"] == [] and whats(answer) == [name]
        assert held(balancer) != before, f"{name} is not applied"


def held(balancer: LoadBalancer) -> list[Any]:
    """What the running parts have of the settings."""
    heads, route, control = balancer.proxy.heads, balancer.proxy.routes.usual, balancer.control
    return [
        route.options, [vars(answer.__self__) for answer in route.answer], route.response_heads.rules,
        [done.__self__.options for done in route.done if hasattr(done, "__self__")],
        heads.trusted, heads.max_lines, heads.rules, heads.via, heads.host, route.adapter.server_name,
        control.pool._judge.options, control.pool.algorithm,
        control.pool._strategy.options, control.access.options, route.adapter.timeouts,
        balancer.pools.health.checked[0].options,
        balancer.bridges[0].limits, balancer.port_options, logging.getLogger().level,
        [watch.source.key for watch in control.discovery._watches.values()], control.settings.demo_faults,
    ]  # fmt: skip


def test_what_needs_a_restart_is_named_every_time_and_not_changed() -> None:
    wired = Wired(backends=[A])
    for _ in range(2):
        answer = wired.reload(backends=[A], port=9999, max_threads=7)
        assert sorted(answer["needs_restart"]) == ["max_threads", "port"] and answer["changes"] == []
    assert wired.balancer.settings.port == 9000


def test_a_bad_file_changes_nothing_says_why_and_is_an_event() -> None:
    wired = Wired(backends=[A])
    wired.wanted = SettingsError("retries = -1 (file): too small")
    with pytest.raises(SettingsError):
        wired.balancer.reload()
    assert wired.events()[-1] == ("config_refused", "retries = -1 (file): too small")
    assert wired.balancer.configuration.summary()["last_error"] == "retries = -1 (file): too small"
    with pytest.raises(SettingsError, match="unknown algorithm 'x'"):
        wired.reload(backends=[], algorithm="x")
    assert wired.weights() == {"a": 1}
    wired.reload(backends=[A])
    assert wired.balancer.configuration.summary()["last_error"] is None


def test_a_dry_run_answers_and_does_nothing() -> None:
    wired = Wired(backends=[A, B])
    before = wired.events()
    answer = wired.reload(dry_run=True, backends=[A | {"weight": 3}, B], algorithm="weighted", retries=1)
    assert answer["applied"] is False and whats(answer) == ["retries", "backends.a.weight"]
    assert answer["shares"] == {"a": 0.75, "b": 0.25}
    assert wired.weights() == {"a": 1, "b": 1} and wired.events() == before
    assert wired.balancer.proxy.routes.usual.options.retries == 2
    with pytest.raises(SettingsError):
        wired.reload(dry_run=True, algorithm="x")
    assert wired.balancer.configuration.summary()["last_error"] is None


# Which wins.


def test_what_the_api_set_stays_unless_the_file_changed_the_same_thing() -> None:
    wired = Wired(backends=[A, B], algorithm="weighted")
    wired.pool.update("a", {"weight": 7, "max_connections": 5})
    wired.pool.update("b", {"admin_state": "drain"})
    wired.pool.use(strategies.create("round_robin"))
    answer = wired.reload(backends=[A, B | {"weight": 2}], algorithm="weighted")
    assert whats(answer) == ["backends.b.weight"]
    assert answer["kept"] == [
        "algorithm: round_robin (set by the API)",
        "backends.a.weight: 7 (set by the API)",
        "backends.a.max_connections: 5 (set by the API)",
        "backends.b.admin_state: drain (set by the API)",
    ]
    assert wired.weights() == {"a": 7, "b": 2}
    assert [backend.admin_state for backend in wired.pool.backends()] == ["ready", "drain"]
    answer = wired.reload(backends=[A | {"weight": 9}, B | {"weight": 2}], algorithm="least_connections")
    assert whats(answer) == ["algorithm", "backends.a.weight"]
    assert (wired.weights()["a"], wired.pool.algorithm) == (9, "least_connections")


def test_backends_added_or_removed_by_the_api_stay_so() -> None:
    wired = Wired(backends=[A, B])
    wired.pool.remove("b")
    wired.pool.add("c", wired.pool.backends()[0].origin)
    answer = wired.reload(backends=[A, B])
    assert answer["kept"] == ["backends.b: removed (by the API)", "backends.c: added (by the API)"]
    assert set(wired.weights()) == {"a", "c"}


def test_a_backend_that_the_file_names_later_is_the_files_from_then_on() -> None:
    wired = Wired(backends=[A])
    wired.pool.add("b", wired.pool.backends()[0].origin, weight=9)
    answer = wired.reload(backends=[A, B])
    assert whats(answer) == ["backends.b.url", "backends.b.weight"]
    b = wired.pool.snapshot()[1]
    assert (b["source"], b["overrides"], b["weight"]) == ("file", {}, 1)


def test_who_set_what_is_visible() -> None:
    wired = Wired(backends=[A])
    wired.reload(backends=[A | {"weight": 2}])
    wired.pool.update("a", {"weight": 5})
    wired.pool.add("z", wired.pool.backends()[0].origin)
    a, z = wired.pool.snapshot()
    assert (a["source"], a["overrides"]) == ("file", {"weight": 2})
    assert (z["source"], z["overrides"]) == ("api", {})
    wired.pool.use(strategies.create("round_robin"))
    rows = {
        row["name"]: row for row in wired.balancer.configuration.describe(wired.balancer.control.decisions)["settings"]
    }
    since = rows["algorithm"].pop("since")
    assert rows["algorithm"] == {
        "name": "algorithm", "value": "round_robin", "source": "api", "by": None, "until": None, "needs_restart": False,
    }  # fmt: skip
    assert rows["backends.a.weight"]["value"] == "5" and since > rows["retries"]["since"]
    assert rows["port"]["needs_restart"] is True and rows["retries"]["source"].startswith("file")


def test_secrets_are_not_shown() -> None:
    wired = Wired(backends=[A], admin_token="hunter2-hunter2-")
    wired.reload(backends=[A], admin_token="hunter3-hunter3-")
    assert "hunter" not in str(wired.balancer.configuration.describe(wired.balancer.control.decisions)) + str(
        wired.events()
    )


# For real.


def answering(name: bytes) -> WireBackend:
    backend = WireBackend()
    backend.answer(ok(name))
    return backend


@pytest.fixture
def backends() -> Iterator[list[WireBackend]]:
    made = [answering(name) for name in (b"a", b"b", b"c")]
    yield made
    for backend in made:
        backend.close()


def toml(backends: list[WireBackend], **settings: str) -> str:
    lines = [f"{name} = {value}" for name, value in settings.items()]
    for backend in backends:
        lines += ["[[backends]]", f'id = "on-{backend.port}"', f'url = "{backend.url}"']
    return "\n".join(lines)


@pytest.fixture
def file(tmp_path: Path, backends: list[WireBackend]) -> Path:
    path = tmp_path / "balancer.toml"
    path.write_text(toml(backends[:2]), encoding="utf-8")
    return path


@pytest.fixture
def balancer(file: Path) -> Iterator[Balancer]:
    with Balancer("--config", str(file), "--retries=2") as balancer:
        yield balancer


@pytest.fixture
def process(file: Path) -> Iterator[BalancerProcess]:
    with BalancerProcess("--config", str(file)) as process:
        yield process


class Asking:
    """Clients that ask all the time while the block runs; `failed` holds every answer that was not 200."""

    def __init__(self, url: str, clients: int = 4) -> None:
        self._stop = threading.Event()
        self.sent, self.failed, self.bodies = 0, [], set()  # type: ignore[var-annotated]
        self._threads = [threading.Thread(target=self._run, args=(url,)) for _ in range(clients)]

    def _run(self, url: str) -> None:
        while not self._stop.is_set():
            status, _, body = fetch(url)
            self.sent += 1
            self.bodies.add(body)
            if status != 200:
                self.failed.append((status, body))

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_reload_on_sighup_under_load_loses_nothing(
    process: BalancerProcess, file: Path, backends: list[WireBackend]
) -> None:
    """All backends are exchanged for others, again and again: for a moment none has been checked yet."""
    with Asking(f"{process.url}/x") as asking:
        for round in range(6):
            chosen = backends[round % 3 :][:1]
            file.write_text(toml(chosen), encoding="utf-8")
            process.send(signal.SIGHUP)
            wanted = [f"on-{chosen[0].port}"]
            wait_until(lambda: [b["id"] for b in process.status()["backend_servers"]] == wanted)  # noqa: B023
            sent = asking.sent
            wait_until(lambda: asking.sent > sent + 20)  # noqa: B023
    assert asking.failed == [] and asking.bodies == {b"a", b"b", b"c"}


@pytest.mark.parametrize(("before", "after"), [(30, 0.5), (3, 30)], ids=["shortened", "lengthened"])
def test_a_response_timeout_is_that_of_the_time_when_the_request_was_sent(
    tmp_path: Path, before: float, after: float
) -> None:
    """On the express way: both requests go over kept connections, where no thread waits for them."""
    file, backend = tmp_path / "balancer.toml", WireBackend()
    go_on = backend.hold()

    def write(seconds: float) -> None:
        file.write_text(f"response_timeout = {seconds}\n" + toml([backend], retries="0", pool_idle_timeout="30"))

    write(before)
    with backend, Balancer("--config", str(file)) as balancer, ThreadPoolExecutor(2) as clients:

        def ask(path: str) -> Future[tuple[int, dict[str, str], bytes]]:
            count, asked = len(backend.requests), clients.submit(fetch, balancer.url + path, X_Request_ID=path[1:])
            wait_until(lambda: len(backend.requests) > count, what=f"{path} is under way")
            return asked

        warm = [ask("/one"), ask("/two")]
        go_on.set()
        assert [answer.result()[0] for answer in warm] == [200, 200]
        go_on.clear()
        asked = {"/old": ask("/old")}
        write(after)
        assert fetch_json(f"{balancer.url}/reload", {})["applied"]
        asked["/new"] = ask("/new")
        short, long = ("/new", "/old") if after < before else ("/old", "/new")
        assert asked[short].result()[0] == 504 and not asked[long].done()
        go_on.set()
        assert asked[long].result()[::2] == (200, long.encode())
        recent = {request["request_id"]: request for request in balancer.status()["recent_requests"]}
    (attempt,) = recent[short[1:]]["tried"]
    assert (attempt["outcome"], attempt["connect"]) == ("http_response_timeout", None)
    assert min(before, after) - 0.1 < attempt["seconds"] < max(before, after)
    assert len(set(backend.peers)) == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"health_fall = 0", "health_fall = 0"),
        (b"nonsense = 1", "unknown setting 'nonsense'"),
        (b"[[[", "config file"),
        (b"\xff\xfe", "config file"),
        (b'backends = []\nalgorithm = "x"', "unknown algorithm 'x'"),
        (b"", "names no backends any more"),
        (b"retries = 1", "names no backends any more"),
        (b"health_fall = " + b"9" * 5000, "config file"),
        (b"x = " + b"[" * 5000, "config file"),
        (b"#" * 1_100_000, "has more than 1048576 bytes"),
        (b'[[backends]]\nurl = "http://a/path"', "must not have a path"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_is_a_422_that_says_why(balancer: Balancer, file: Path, content: bytes | None, why: str) -> None:
    file.unlink() if content is None else file.write_bytes(content)
    for query in ("", "?dry_run=1"):
        status, _, body = fetch(f"{balancer.url}/reload{query}", {})
        assert status == 422 and why in body.decode()
    assert len(balancer.status()["backend_servers"]) == 2


def test_a_pipe_is_no_configuration_file_and_blocks_nothing(balancer: Balancer, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)
    status, _, body = fetch(f"{balancer.url}/reload", {})
    assert status == 422 and b"not a regular file" in body


@pytest.mark.parametrize("query", ["dryrun=1", "dry-run=1", "dry_run=1&x=1"])
def test_a_slip_of_the_pen_does_not_apply_for_real(balancer: Balancer, file: Path, query: str) -> None:
    file.write_text("backends = []", encoding="utf-8")
    assert fetch(f"{balancer.url}/reload?{query}", {})[0] == 400
    assert len(balancer.status()["backend_servers"]) == 2


def test_flags_still_win_over_the_file(balancer: Balancer, file: Path, backends: list[WireBackend]) -> None:
    file.write_text(toml(backends, retries="7"), encoding="utf-8")
    answer = fetch_json(f"{balancer.url}/reload?dry_run=1", {})
    assert whats(answer) == [f"backends.on-{backends[2].port}"]
    assert answer["shares"] == {f"on-{backend.port}": pytest.approx(1 / 3) for backend in backends}
    assert len(balancer.status()["backend_servers"]) == 2
    assert fetch_json(f"{balancer.url}/reload", {})["applied"] is True
    rows = {row["name"]: row for row in fetch_json(f"{balancer.url}/config")["settings"]}
    assert (rows["retries"]["value"], rows["retries"]["source"]) == ("2", "flag")
    assert balancer.status()["capabilities"]["reload"] is True


def test_without_a_file_there_is_nothing_to_reload_and_sighup_ends() -> None:
    with BalancerProcess(wait_ready=False) as balancer:
        status, _, body = fetch(f"{balancer.url}/reload", {})
        assert status == 422 and b"--config" in body
        assert balancer.status()["capabilities"]["reload"] is False
        balancer.send(signal.SIGHUP)
        assert balancer.wait() == 0
