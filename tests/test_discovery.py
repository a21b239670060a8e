"""Sources of backends: what they find is brought into the pools; whatever goes wrong with one takes nobody away."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from fleet import DemoBackend
from pydantic import TypeAdapter
from support import Balancer, BalancerProcess, Served, fetch, fetch_json, options, wait_until

from balancer.balancing.backends import LastCheck
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.balancing.pools import Pools
from balancer.balancing.strategies import create
from balancer.fleet import backendsfile, discovery
from balancer.fleet.backendsfile import FileSource
from balancer.fleet.discovery import Discovery, Found, Source, SourceFailed, SourceView
from balancer.protocol.origin import Origin


class Fleet:
    """Backends a, b, c, ... that listen, and a `backends_file` that names some of them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.file = folder / "backends.toml"
        self._stack = stack
        self.backends: dict[str, DemoBackend] = {}

    def line(self, name: str, more: str = "") -> str:
        if name not in self.backends:
            self.backends[name] = DemoBackend(name)
            self._stack.callback(self.backends[name].kill)
        return f'[[backends]]\nid = "{name}"\nurl = "{self.backends[name].url}"\n{more}\n'

    def write(self, *names: str, more: str = "") -> None:
        """At once, as programs replace a file."""
        other = self.file.with_suffix(".new")
        other.write_text("".join(self.line(name, more) for name in names))
        other.replace(self.file)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backendsfile, discovery):
        for name in ("LOOK_SECONDS", "RETRY_SECONDS", "CONFIRM_SECONDS"):
            monkeypatch.setattr(module, name, 0.05, raising=False)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, stack)


@pytest.fixture
def balancer(fleet: Fleet) -> Iterator[Balancer]:
    """In front of a and b, which the file names."""
    fleet.write("a", "b")
    with Balancer(f"--backends-file={fleet.file}") as balancer:
        yield balancer


def ids(balancer: Served) -> set[str]:
    return {backend["id"] for backend in balancer.status()["backend_servers"]}


def source(balancer: Served, name: str = "backends_file") -> Any:
    return next(source for source in balancer.status()["sources"] if source["name"] == name)


def told(balancer: Served, kind: str) -> list[dict[str, Any]]:
    return [event for event in fetch_json(f"{balancer.url}/events")["events"] if event["kind"] == kind]


def test_backends_of_the_file_serve_and_come_and_go_with_it(balancer: Balancer, fleet: Fleet) -> None:
    assert ids(balancer) == {"a", "b"}  # and not the demo's
    assert json.loads(fetch(f"{balancer.url}/x")[2])["server_id"] in ("a", "b")
    assert balancer.backend("a")["source"] == "backends_file"
    fleet.write("b", "c")
    wait_until(lambda: ids(balancer) == {"b", "c"})
    balancer.wait_healthy("c")
    assert {event["by"] for kind in ("backend_added", "backend_removed") for event in told(balancer, kind)} == {
        "backends_file"
    }
    state = source(balancer)
    assert (state["kind"], state["pool"], state["state"], state["backends"]) == ("file", None, "good", 2)
    metrics = fetch(f"{balancer.url}/metrics")[2].decode()
    assert 'lb_source_backends{source="backends_file"} 2.0' in metrics
    assert 'lb_source_failures_total{source="backends_file"} 0.0' in metrics and "lb_source_age_seconds{" in metrics


def no_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "No such file"),
    "half_written": (lambda file: file.write_text('[[backends]]\nid = "c"\nurl = "http:'), "Unterminated string"),
    "garbage": (lambda file: file.write_bytes(b"\xff\0" + os.urandom(99)), "backends.toml: "),
    "no_list": (lambda file: file.write_text("backends = 7"), "backends expected a list"),
    "no_url": (lambda file: file.write_text('[[backends]]\nid = "c"'), "backends.0.url is missing"),
    "unknown_field": (lambda file: file.write_text('[[backends]]\nurl = "http://c"\nsize = 3'), "backends.0.size"),
    "looked_up": (lambda file: file.write_text('[[backends]]\nurl = "dns+http://c:1"'), "backends.0.url"),
    "twice": (
        lambda file: file.write_text('[[backends]]\nid = "c"\nurl = "http://c"\n' * 2),
        "two backends have the id",
    ),
    "deep": (lambda file: file.write_text("backends = " + "[" * 99999), "backends.toml"),
    "large": (lambda file: file.write_bytes(b"#" * 1_048_577), "has more than 1048576 bytes"),
    "pipe": (no_pipe, "is not a regular file"),
    "folder": (lambda file: (file.unlink(), file.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize(("break_it", "text"), BAD_FILES.values(), ids=list(BAD_FILES))
def test_what_is_wrong_with_a_file_is_told_in_one_line(
    tmp_path: Path, break_it: Callable[[Path], object], text: str
) -> None:
    file = tmp_path / "backends.toml"
    file.write_text("")
    break_it(file)
    with pytest.raises(SourceFailed) as caught:
        next(FileSource(file).look())
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_or_empty_file_takes_nobody_away(balancer: Balancer, fleet: Fleet) -> None:
    for break_it, text in (
        (Path.unlink, "No such file"),
        (lambda file: file.write_text(""), "the 2 that it named stay"),
    ):
        before = len(told(balancer, "source_failed"))
        break_it(fleet.file)
        (event,) = wait_until(lambda count=before: told(balancer, "source_failed")[count:], text)
        assert text in event["message"] and event["severity"] == "warning"
        assert source(balancer)["state"] == "failing" and text in source(balancer)["last_error"]
        assert ids(balancer) == {"a", "b"} and fetch(f"{balancer.url}/x")[0] == 200
        fleet.write("a", "b")
        wait_until(lambda: source(balancer)["state"] == "good")
    assert len(told(balancer, "source_failed")) == len(told(balancer, "source_recovered")) == 2
    assert told(balancer, "backend_removed") == []


# What any source says, whoever it is.


class Told(Source):
    """Says what a test lets it say."""

    kind = "told"

    def __init__(self, name: str = "told:x", key: object = 1) -> None:
        super().__init__(name, "here", key, "default")
        self.says: Sequence[Found] | Exception = []
        self.in_turn: Iterator[Sequence[Found]] | None = None  # instead
        self.looks = 0

    def look(self) -> Generator[Sequence[Found], None, None]:
        while not self.stopping.is_set():
            self.looks += 1
            if isinstance(self.says, Exception):
                raise self.says
            yield self.says if self.in_turn is None else next(self.in_turn)
            self.stopping.wait(0.01)


def found(name: str, number: int = 1, **fields: Any) -> Found:
    return Found(name, fields.pop("pool", "default"), Origin("http", f"127.0.0.{number}", 1), **fields)


class Bench:
    """Pools without anything around them, and one source."""

    def __init__(self) -> None:
        self.pools = Pools()
        self.pool = BackendPool(create("weighted"), options(PoolOptions))
        self.pools.apply({"default": self.pool}, {})
        self.notes: list[tuple[str, str]] = []
        self.discovery = Discovery(self.pools, lambda kind, text: self.notes.append((kind, text)))
        self.source = Told()

    def __enter__(self) -> Bench:
        self.discovery.use([self.source])
        self.discovery.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.discovery.stop()
        assert not any(thread.name.startswith("source-") for thread in threading.enumerate())

    def say(self, *told: Found) -> None:
        """And wait until it has been looked at twice."""
        self.source.says = told
        self.look()

    def look(self) -> None:
        looks = self.source.looks
        wait_until(lambda: self.source.looks > looks + 2)

    @property
    def ids(self) -> list[str]:
        return sorted(backend.id for backend in self.pool.backends() if not backend.is_leaving)

    @property
    def state(self) -> SourceView:
        return self.discovery.describe()[0]


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


A, B, C, D, E = (found(name, number) for number, name in enumerate("abcde", 1))


def test_a_large_change_must_come_twice(bench: Bench) -> None:
    bench.say(A, B, C, D)
    assert bench.ids == ["a", "b", "c", "d"]
    bench.say(A, B)  # half of them at once
    assert bench.ids == ["a", "b"]
    bench.source.in_turn = cycle([[D], [E]])
    bench.look()
    assert bench.state["state"] == "doubtful" and bench.ids == ["a", "b", "d", "e"]  # who comes need not wait
    bench.source.in_turn = cycle([[E], [D, E]])  # a and b are gone for four times, but never the same is said
    bench.look()
    assert bench.ids == ["a", "b", "d", "e"]
    bench.source.says, bench.source.in_turn = [D, E], None
    wait_until(lambda: bench.ids == ["d", "e"])
    assert bench.notes == [] and bench.state["state"] == "good"


@pytest.mark.parametrize(
    "odd", [SourceFailed("no way"), OSError("no way"), RecursionError(), [], [7], [None]], ids=repr
)
def test_whatever_a_source_does_takes_nobody_away(bench: Bench, odd: Any) -> None:
    bench.say(A, B)
    bench.source.says = odd
    wait_until(lambda: bench.state["failures"] > 2)
    assert bench.ids == ["a", "b"] and bench.state["state"] == "failing"
    assert [kind for kind, _ in bench.notes] == ["source_failed"]  # once
    bench.say(A, B)
    assert [kind for kind, _ in bench.notes] == ["source_failed", "source_recovered"]
    assert bench.state["last_error"] is None


def test_who_goes_drains_and_may_come_back(bench: Bench) -> None:
    bench.say(A, B, C)
    wait_until(lambda: bench.ids)
    for backend in bench.pool.backends():
        bench.pool.record_check(backend, LastCheck(1.0, 0.1, 200, None))
    lease = bench.pool.lease(None, exclude=("b", "c"))
    bench.say(B, C)
    (leaving,) = [backend for backend in bench.pool.backends() if backend.is_leaving]
    assert leaving.id == "a" and leaving.active == 1
    bench.say(A, B, C)
    assert bench.pool.get("a") is leaving and not leaving.is_leaving and leaving.admin_state == "ready"
    bench.say(B, C)
    lease.release(0.1)
    assert bench.pool.get("a") is None


def test_what_the_operator_decides_holds_until_the_source_says_something_else(bench: Bench) -> None:
    bench.say(A, B, C)
    bench.pool.update("a", {"weight": 9, "admin_state": "drain"})
    bench.pool.remove("b")
    bench.say(A, B, C, D)
    a = bench.pool.get("a")
    assert a is not None and (a.weight, a.admin_state, a.overrides) == (9, "drain", {"weight": 1})
    assert bench.ids == ["a", "c", "d"]
    bench.say(found("a", 1, weight=3), B, C, D)
    assert (a.weight, a.admin_state, a.overrides) == (3, "drain", {})
    bench.say(found("a", 1, weight=3), C, D)
    bench.say(found("a", 7, weight=3), B, C, D)
    assert bench.ids == ["a", "b", "c", "d"] and a.origin.host == "127.0.0.7"


def test_ids_of_others_and_unknown_pools_are_left_out(bench: Bench) -> None:
    bench.pools.add(bench.pool, "a", A.origin)
    bench.say(A, B, found("x", pool="none"))
    assert bench.ids == ["a", "b"] and bench.pool.get("a").source == "api"  # type: ignore[union-attr]
    ((kind, text),) = bench.notes
    assert kind == "source_failed" and "a is left out: another backend has its id" in text
    assert "x is left out: there is no pool 'none'" in text and bench.state["state"] == "good"
    bench.pool.remove("a")
    bench.say(A, B)
    assert bench.pool.get("a").source == "told:x"  # type: ignore[union-attr]
    assert [kind for kind, _ in bench.notes] == ["source_failed", "source_recovered"]


def test_sources_are_replaced_while_it_runs(bench: Bench) -> None:
    bench.say(A, B)
    other = Told("told:y")
    other.says = [C]
    bench.discovery.use([bench.source, other])
    wait_until(lambda: bench.ids == ["a", "b", "c"])
    changed = Told(key=2)
    changed.says = SourceFailed("not yet")
    bench.discovery.use([changed, other])  # whose first word counts, not what goes wrong before
    wait_until(lambda: changed.looks > 2)
    assert bench.ids == ["a", "b", "c"] and bench.source.stopping.is_set()
    changed.says = [A]
    wait_until(lambda: bench.ids == ["a", "c"])
    bench.discovery.use([changed])
    assert bench.ids == ["a"]
    other_pool = BackendPool(create("weighted"), options(PoolOptions), "other")
    bench.pools.apply({"default": bench.pool, "other": other_pool}, {})
    bench.source = Told(key=3)
    bench.source.pool, bench.source.says = "other", SourceFailed("not now")
    bench.discovery.use([bench.source])  # what is known of it moves with it
    assert bench.ids == [] and [backend.id for backend in other_pool.backends()] == ["a"]


def test_what_was_found_last_is_there_after_a_restart(bench: Bench) -> None:
    bench.say(A, found("b", 2, weight=7))
    kept = TypeAdapter(dict[str, list[Found]]).validate_json(json.dumps(bench.discovery.kept()))
    bench.discovery.stop()
    with Bench() as again:
        again.discovery.stop()
        elsewhere = Told(key=2)
        elsewhere.place = "elsewhere"
        for source, wanted in ((elsewhere, []), (Told(key=3), ["a", "b"])):
            again.discovery.use([source])
            again.discovery.restore(kept)
            assert again.ids == wanted
        assert again.pool.get("b").weight == 7  # type: ignore[union-attr]


def test_decisions_about_what_a_source_has_found_hold_over_a_restart(fleet: Fleet, tmp_path: Path) -> None:
    fleet.write("a", "b")
    flags = (f"--backends-file={fleet.file}", f"--state-file={tmp_path / 'state.db'}")
    with Balancer(*flags) as balancer:
        fetch(f"{balancer.url}/backends/a", {"weight": 9}, "PATCH")
    fleet.file.unlink()
    with Balancer(*flags) as balancer:
        assert ids(balancer) == {"a", "b"} and source(balancer)["state"] == "failing"
        assert balancer.backend("a")["weight"] == 9 and balancer.backend("a")["source"] == "backends_file"
        assert fetch(f"{balancer.url}/x")[0] == 200


def test_a_reload_brings_and_takes_sources(fleet: Fleet, tmp_path: Path) -> None:
    """The file names pools: one that comes later gets its backends then."""
    fleet.write("a", "b")
    listed = tmp_path / "more"
    more = {"id": "m", "url": fleet.backends["a"].url, "pool": "more"}
    listed.write_text(json.dumps([more, f"{fleet.backends['b'].url}@3"]))
    config = tmp_path / "balancer.toml"
    config.write_text(f'backends_file = "{fleet.file}"')
    with Balancer(f"--config={config}") as balancer:
        for text, wanted in (
            (f'backends_file = "{listed}"', {f"127.0.0.1-{fleet.backends['b'].port}"}),
            (f'backends_file = "{listed}"\n[[pools]]\nname = "more"', {f"127.0.0.1-{fleet.backends['b'].port}", "m"}),
            (f'[[backends]]\nid = "own"\nurl = "{fleet.backends["a"].url}"', {"own"}),
        ):
            config.write_text(text)
            plan = fetch_json(f"{balancer.url}/reload", {}, "POST")
            assert plan["kept"] == []
            wait_until(lambda wanted=wanted: ids(balancer) == wanted, text)
        config.write_text("")
        assert fetch(f"{balancer.url}/reload", {}, "POST")[0] == 422  # which would bring the demo's
        assert ids(balancer) == {"own"}


def test_worker_processes_are_told_of_what_the_master_finds(fleet: Fleet) -> None:
    fleet.write("a", "b")
    with BalancerProcess(f"--backends-file={fleet.file}", "--workers=2") as balancer:
        fleet.write("b", "c")
        wait_until(lambda: ids(balancer) == {"b", "c"})
        balancer.wait_healthy("c")
        served: set[str] = set()
        wait_until(lambda: served.add(json.loads(fetch(f"{balancer.url}/x")[2])["server_id"]) or "c" in served)
        assert served <= {"b", "c"}


def test_what_no_route_matches_goes_to_what_a_source_has_found(fleet: Fleet, tmp_path: Path) -> None:
    fleet.write("a")
    config = tmp_path / "balancer.toml"
    expected = '[[expect]]\nrequest = "GET http://x/y"\npool = "default"'
    config.write_text(
        f'backends_file = "{fleet.file}"\n[[routes]]\nname = "old"\npath = "/old"\nstatus = 410\n{expected}'
    )
    with Balancer(f"--config={config}") as balancer:
        assert fetch(f"{balancer.url}/x")[0] == 200 and fetch(f"{balancer.url}/old")[0] == 410
