"""What survives a restart, what wins then, and that nothing that is wrong with the file ends the balancer."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import exposition
import pytest
from fleet import DemoBackend
from support import PYTHON, ROOT, Balancer, BalancerProcess, Clock, Served, fetch, fetch_json, ok, wait_until
from wire import WireBackend

from balancer import commandline
from balancer.config.settings import Settings
from balancer.edge import accepted
from balancer.loadbalancer import LoadBalancer, create_app
from balancer.state.store import MIGRATIONS, Store, StoreError

A, B, C = ({"id": name, "url": f"http://127.0.0.1:{port}"} for name, port in (("a", 1), ("b", 2), ("c", 3)))


def patch(balancer: Served, backend_id: str, **changes: Any) -> Any:
    answer = fetch_json(f"{balancer.url}/backends/{backend_id}", changes, "PATCH")
    assert "error" not in answer, answer
    return answer


def decided(balancer: Served) -> dict[str, Any]:
    """What GET /config says was decided at run time, by its name."""
    rows = fetch_json(f"{balancer.url}/config")["settings"]
    return {row["name"]: row for row in rows if row["source"] in ("api", "state")}


def values(balancer: Served) -> dict[str, str]:
    return {name: row["value"] for name, row in decided(balancer).items()}


def told(balancer: Served, *kinds: str) -> list[str]:
    events = fetch_json(f"{balancer.url}/events")["events"]
    return [event["message"] for event in events if event["kind"] in kinds]


def rows(file: Path, space: str) -> dict[str, Any]:
    """What a file has whose balancer is stopped."""
    store = Store(file)
    store.open()
    found = {key: json.loads(text) for key, text in store.load(space).items()}
    store.close()
    return found


# Killed.


def test_what_is_committed_survives_a_hundred_kills(tmp_path: Path) -> None:
    command = [PYTHON, str(ROOT / "tests" / "killed_writer.py"), str(tmp_path), "100"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.split()[:2] == ["100", "state.db"], done.stderr


def test_a_balancer_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    file, journal = tmp_path / "state.db", tmp_path / "state.db-wal"
    with WireBackend() as first, WireBackend() as second:
        flags = [f"--state-file={file}", f"--backend=a={first.url}", f"--backend=b={second.url}@2"]
        seq, total = 0, 0
        for weight in (7, 8):
            with BalancerProcess(*flags) as balancer:
                if weight > 7:
                    assert values(balancer) == {"backends.a.weight": str(weight - 1), "backends.b.admin_state": "drain"}
                    assert {row["source"] for row in decided(balancer).values()} == {"state"}
                status = balancer.status()
                assert status["statistics"]["total_requests"] == total and status["events_seq"] > seq
                patch(balancer, "b", admin_state="drain")
                for _ in range(5):
                    assert fetch(f"{balancer.url}/x")[0] == 200
                patch(balancer, "a", weight=weight)
                seq, total = balancer.status()["events_seq"], total + 5
                mark = f'"value": {weight}, "over": 1'.encode()
                wait_until(lambda at=mark: at in journal.read_bytes(), what="the last decision is written")
                balancer.send(signal.SIGKILL)
        assert rows(file, "decisions")["default a weight"]["by"] == "local"


# Counts, events, ejections.


def test_no_counter_falls_and_no_request_is_lost(tmp_path: Path) -> None:
    with DemoBackend("a") as first, DemoBackend("b") as second:
        flags = [f"--state-file={tmp_path}/s.db", f"--backend=a={first.url}", f"--backend=b={second.url}"]
        with Balancer(*flags) as balancer:
            for _ in range(10):
                fetch(f"{balancer.url}/x")
            fetch(f"{balancer.url}/reset", {})
            for _ in range(3):
                fetch(f"{balancer.url}/x")
            wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 0)
            before, status = exposition.scrape(balancer.url), balancer.status()
            events = fetch_json(f"{balancer.url}/events")["events"]
        with Balancer(*flags) as balancer:
            after, again = exposition.scrape(balancer.url), balancer.status()
            assert fetch_json(f"{balancer.url}/events")["events"][: len(events)] == events
    ours = ("lb_log_lines", "lb_admin_requests")  # of this process alone
    counters = {key for key in before if key[0].endswith(("_total", "_sum", "_count", "_bucket"))}
    fallen = [key for key in counters if not key[0].startswith(ours) and after.get(key, 0) < before[key]]
    assert fallen == []
    assert exposition.value(after, "lb_requests_total", code="200", method="GET") == 13
    for name in ("total_requests", "successful_requests", "start_time", "codes", "latency"):
        assert again["statistics"][name] == status["statistics"][name]
    assert again["statistics"]["total_requests"] == 3 and again["backend_servers"][0]["total_requests"] > 0


def test_an_ejection_lasts_until_its_end(tmp_path: Path) -> None:
    flags = [f"--state-file={tmp_path}/s.db", "--eject-after=2", "--retries=0"]
    with WireBackend() as bad, DemoBackend("good") as good:
        flags += [f"--backend=bad={bad.url}", f"--backend=good={good.url}"]
        with Balancer(*flags) as balancer:
            bad.answer(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
            while balancer.backend("bad")["state"] != "ejected":
                fetch(f"{balancer.url}/x")
            before = balancer.backend("bad")["ejection"]
        bad.answer(ok())
        with Balancer(*flags) as balancer:
            balancer.wait_healthy("bad")
            assert balancer.backend("bad")["state"] == "ejected"
            after = balancer.backend("bad")["ejection"]
            assert after["until"] == pytest.approx(before["until"], abs=0.2)
            assert (after["count"], after["reason"]) == (before["count"], before["reason"])


# Which wins.


class Restarted:
    """A balancer that is wired and serves nothing, each time with other settings and the same file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "state.db"

    @contextmanager
    def started(self, forget: bool = False, **settings: Any) -> Iterator[LoadBalancer]:
        app = create_app(Settings(**{"backends": [A, B], **settings, "state_file": self.file}))
        balancer: LoadBalancer = app.extensions["balancer"]
        assert balancer.memory is not None
        balancer.memory.start("decisions" if forget else None)
        yield balancer
        balancer.memory.stop()


@pytest.fixture
def restarted(tmp_path: Path) -> Restarted:
    return Restarted(tmp_path)


def made(balancer: LoadBalancer) -> dict[str, str]:
    return {name: each["value"] for name, each in balancer.control.decisions.describe().items()}


def news(balancer: LoadBalancer) -> str:
    """What the newest `state_restored` says."""
    return [event["message"] for event in balancer.events() if event["kind"] == "state_restored"][-1]


def decide(balancer: LoadBalancer, method: str, path: str, **body: Any) -> None:
    answer = balancer.app.test_client().open(path, method=method, json=body or None)
    assert answer.status_code < 300, answer.text


def test_the_file_wins_where_it_was_changed_and_nowhere_else(restarted: Restarted) -> None:
    with restarted.started() as balancer:
        decide(balancer, "PATCH", "/backends/a", weight=7, max_connections=5)
        decide(balancer, "PATCH", "/backends/b", admin_state="maint")
        decide(balancer, "POST", "/algorithm", algorithm="round_robin")
    with restarted.started(backends=[A | {"weight": 2}, B]) as balancer:
        assert made(balancer) == {
            "algorithm": "round_robin", "backends.a.max_connections": "5", "backends.b.admin_state": "maint",
        }  # fmt: skip
        assert balancer.pool.get("a").weight == 2  # type: ignore[union-attr]
        assert "left out: backends.a.weight 7 (the configuration has changed)" in news(balancer)
    with restarted.started(algorithm="random") as balancer:
        assert balancer.pool.algorithm == "random" and "algorithm" not in made(balancer)


def test_backends_that_were_added_or_removed_stay_so_until_the_file_says_something_of_them(
    restarted: Restarted,
) -> None:
    with restarted.started() as balancer:
        decide(balancer, "DELETE", "/backends/b")
        decide(balancer, "POST", "/backends", **C, weight=4)
    with restarted.started() as balancer:
        assert made(balancer) == {"backends.b": "removed", "backends.c": C["url"], "backends.c.weight": "4"}
        assert [each.id for each in balancer.pool.backends()] == ["a", "c"]
    with restarted.started(backends=[A, B | {"weight": 3}, C]) as balancer:
        assert made(balancer) == {}
        assert {each.id: each.weight for each in balancer.pool.backends()} == {"a": 1, "b": 3, "c": 1}


def test_what_a_reload_keeps_a_restart_keeps(restarted: Restarted) -> None:
    """Among it one that took the place of another; and what a reload keeps of what was decided before the start."""
    with restarted.started() as balancer:
        decide(balancer, "DELETE", "/backends/a")
        decide(balancer, "POST", "/backends", id="a", url=C["url"])
        decide(balancer, "PATCH", "/backends/b", admin_state="drain")
        kept = ["backends.a.url: http://127.0.0.1:3 (set by the API)", "backends.b.admin_state: drain (set by the API)"]
        assert reloaded(balancer) == kept
    with restarted.started() as balancer:
        assert made(balancer) == {"backends.a": C["url"], "backends.b.admin_state": "drain"}
        assert reloaded(balancer) == kept


def reloaded(balancer: LoadBalancer) -> list[str]:
    """What is kept of what was decided, when the same configuration is read again."""
    configuration = balancer.configuration
    configuration.read = lambda: (configuration.settings, configuration.sources)
    return balancer.reload().kept


def test_pools_keep_their_own(restarted: Restarted) -> None:
    pools = [{"name": "api", "backends": [C]}]
    with restarted.started(pools=pools) as balancer:
        decide(balancer, "POST", "/algorithm", algorithm="random", pool="api")
        decide(balancer, "PATCH", "/backends/c", weight=0)
    with restarted.started(pools=pools) as balancer:
        assert made(balancer) == {"pools.api.algorithm": "random", "pools.api.backends.c.weight": "0"}
    with restarted.started() as balancer:
        assert made(balancer) == {} and "no such backend or pool" in news(balancer)


def test_forgotten_is_what_was_decided_and_nothing_else(restarted: Restarted) -> None:
    with restarted.started() as balancer:
        decide(balancer, "PATCH", "/backends/a", weight=7)
        seq = balancer.events()[-1]["seq"]
    with restarted.started(forget=True) as balancer:
        assert made(balancer) == {} and balancer.events()[-1]["seq"] == seq
    assert rows(restarted.file, "decisions") == {}


def test_forget_needs_something_to_forget(capsys: pytest.CaptureFixture[str]) -> None:
    assert commandline.main(["--forget"]) == 2
    assert capsys.readouterr().err.endswith(": --forget: nothing is kept, there is no state_file\n")


# For a time.


def until(balancer: LoadBalancer, backend_id: str) -> float | None:
    found: dict[str, float | None] = {each["id"]: each["until"] for each in balancer.control.backends()}
    return found[backend_id]


def test_what_was_decided_for_a_time_is_undone_to_what_was_before(restarted: Restarted) -> None:
    clock = Clock()
    with restarted.started() as balancer:
        decisions = balancer.control.decisions
        decisions._wall_clock = clock
        decide(balancer, "PATCH", "/backends/a", weight=7)
        decide(balancer, "PATCH", "/backends/a", **{"weight": 0, "admin_state": "drain", "for": "15m"})
        decide(balancer, "PATCH", "/backends/a", **{"weight": 3, "for": "20m"})  # comes back to what is for good
        decide(balancer, "PATCH", "/backends/b", **{"weight": 5, "for": "15m"})
        decide(balancer, "PATCH", "/backends/b", weight=5)  # after all
        decide(balancer, "POST", "/algorithm", **{"algorithm": "random", "for": "1h"})
        assert (until(balancer, "a"), until(balancer, "b")) == (clock.now + 900, None)
        status = balancer.app.test_client().get("/status").json
        assert status["pools"][0]["until"] == clock.now + 3600
        assert status["backend_servers"][0]["until"] == clock.now + 900
        told: list[bool] = []
        decisions.told = lambda: told.append(True)
        decisions.undo()
        assert not told  # nothing was decided
        clock.now += 900
        decisions.undo()
        assert made(balancer)["backends.a.weight"] == "3" and "backends.a.admin_state" not in made(balancer)
        clock.now += 300
        decisions.undo()
        assert made(balancer) == {"backends.a.weight": "7", "backends.b.weight": "5", "algorithm": "random"}
        assert [event["message"] for event in balancer.events() if event["kind"] == "change_undone"] == [
            "backends.a.admin_state ready again, drain was for a time",
            "backends.a.weight 7 again, 3 was for a time",
        ]


def test_of_what_was_undone_no_more_is_kept_than_a_cluster_may_ask_for(
    restarted: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be none, so nobody asks."""
    monkeypatch.setattr("balancer.config.decisions.UNDONE_KEPT", 2)
    with restarted.started() as balancer:
        for number in range(4):
            decide(balancer, "POST", "/backends", id=f"n{number}", url="http://127.0.0.1:1")
            decide(balancer, "DELETE", f"/backends/n{number}")
        assert {key.backend for key in balancer.control.decisions._undone} == {"n2", "n3"}


def test_the_time_goes_on_while_the_balancer_is_off(restarted: Restarted) -> None:
    with restarted.started() as balancer:
        decide(balancer, "PATCH", "/backends/a", **{"weight": 0, "for": "1h"})
        decide(balancer, "PATCH", "/backends/b", weight=7)
        decide(balancer, "PATCH", "/backends/b", **{"weight": 0, "for": "1s"})
        balancer.control.decisions._made = {
            key: {**each, "until": 1.0} if each["until"] is not None and key.backend == "b" else each
            for key, each in balancer.control.decisions._made.items()
        }
    with restarted.started() as balancer:
        assert {each.id: each.weight for each in balancer.pool.backends()} == {"a": 0, "b": 7}
        assert until(balancer, "a") is not None and until(balancer, "b") is None


def test_it_is_undone_by_itself(tmp_path: Path) -> None:
    """Also without a file."""
    with DemoBackend("a") as backend, Balancer(f"--backend=a={backend.url}") as balancer:
        answer = patch(balancer, "a", **{"weight": 9, "for": "1s"})
        assert answer["until"] == balancer.backend("a")["until"] > answer["health"]["since"]
        assert decided(balancer)["backends.a.weight"]["until"] == answer["until"]
        wait_until(lambda: told(balancer, "change_undone"), what="it is undone")
        assert balancer.backend("a")["weight"] == 1 and balancer.backend("a")["until"] is None
        assert fetch(f"{balancer.url}/backends/a", {"for": "1s"}, "PATCH")[0] == 422
        assert fetch(f"{balancer.url}/backends/a", {"weight": 1, "for": "1y"}, "PATCH")[0] == 422


# Whatever is wrong with the file.


def damage(file: Path) -> None:
    file.write_bytes(b"SQLite format 3\0" + os.urandom(8192))


def make_newer(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()


def make_another(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()


def make_folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said", "is_kept"),
    [
        (damage, "malformed|not a database|damaged|btree", True),
        (lambda file: file.write_bytes(b"no database, but a letter\n" * 100), "is not a database", True),
        (make_newer, "a newer version of the balancer has written it", False),
        (make_another, "is another program's", False),
        (make_folder, "is no regular file", False),
        (lambda file: file.symlink_to("/nowhere/state.db"), "No such file or directory", False),
    ],
    ids=["damaged", "no database", "newer", "another's", "folder", "nowhere"],
)
def test_a_file_that_cannot_be_used_is_told_once_and_the_balancer_runs(
    tmp_path: Path, spoil: Callable[[Path], None], said: str, is_kept: bool
) -> None:
    file = tmp_path / "state.db"
    spoil(file)
    before = file.read_bytes() if file.is_file() else None
    with DemoBackend("a") as backend, Balancer(f"--state-file={file}", f"--backend=a={backend.url}") as balancer:
        (message,) = told(balancer, "state_failed")
        assert any(word in message for word in said.split("|")) and message.startswith("state_file state.db: ")
        patch(balancer, "a", weight=7)
        assert fetch(f"{balancer.url}/x")[0] == 200
        assert (balancer.status()["state"]["last_error"] is None) is is_kept
    aside = [each for each in tmp_path.iterdir() if ".damaged-" in each.name]
    if is_kept:
        assert [each.read_bytes() for each in aside] == [before]
        assert rows(file, "decisions")["default a weight"]["value"] == 7
    else:
        assert aside == [] and (file.read_bytes() if file.is_file() else None) == before


def test_another_process_that_has_it_is_left_in_peace(tmp_path: Path) -> None:
    flags = [f"--state-file={tmp_path}/state.db", "--backend=a=http://127.0.0.1:9"]
    with Balancer(*flags) as first:
        for connections in accepted.slices(
            ("127.0.0.1", first.port)
        ):  # looks at every descriptor, and must not touch it
            list(connections)
        with BalancerProcess(*flags, wait_ready=False) as second:
            assert told(first, "state_failed") == []
            found = told(second, "state_failed", "state_restored")
            assert [message.partition(": ")[2] for message in found] == [
                "database is locked; the balancer runs without it"
            ]
            wait_until(lambda: "state_failed: state_file" in second.output, "the log says so too")
            patch(second, "a", weight=9)
        patch(first, "a", weight=7)
    assert rows(tmp_path / "state.db", "decisions")["default a weight"]["value"] == 7


def test_one_that_may_only_be_read_is_read(restarted: Restarted, monkeypatch: pytest.MonkeyPatch) -> None:
    with restarted.started() as balancer:
        decide(balancer, "PATCH", "/backends/a", weight=7)
    before = restarted.file.read_bytes()
    monkeypatch.setattr("balancer.state.store.os.access", lambda path, mode: False)  # whom may root not write to?
    with restarted.started() as balancer:
        assert made(balancer) == {"backends.a.weight": "7"}
        assert balancer.memory is not None and "may only be read" in (balancer.memory.last_error or "")
        decide(balancer, "PATCH", "/backends/a", weight=8)
    assert restarted.file.read_bytes() == before


def test_what_a_full_disk_has_no_room_for_is_written_later(tmp_path: Path) -> None:
    """The system's limit for files stands in for the disk: a write that exceeds it fails in the same place."""
    file = tmp_path / "state.db"
    flags = [f"--state-file={file}", "--backend=a=http://127.0.0.1:9"]
    with BalancerProcess(*flags, wait_ready=False) as balancer:
        wait_until(lambda: balancer.status()["state"]["last_error"] is None and file.exists(), "it is kept")
        _, hard = resource.prlimit(balancer.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(balancer.pid, resource.RLIMIT_FSIZE, (1, hard))
        patch(balancer, "a", weight=7)
        wait_until(lambda: told(balancer, "state_failed"), "it cannot be written")
        patch(balancer, "a", weight=8)
        assert balancer.status()["state"]["last_error"]
        resource.prlimit(balancer.pid, resource.RLIMIT_FSIZE, (hard, hard))
        wait_until(lambda: told(balancer, "state_written"), "it is written again")
        assert len(told(balancer, "state_failed")) == 1 and balancer.output.count("state_failed") == 1
        balancer.send(signal.SIGKILL)
        balancer.wait()
    assert rows(file, "decisions")["default a weight"]["value"] == 8


def test_one_that_is_removed_meanwhile_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    with Balancer(f"--state-file={file}", "--backend=a=http://127.0.0.1:9", wait_ready=False) as balancer:
        patch(balancer, "a", weight=7)
        wait_until(lambda: b'"value": 7' in Path(f"{file}-wal").read_bytes(), "it is written")
        file.unlink()
        wait_until(file.exists, "it is there again")
    assert rows(file, "decisions")["default a weight"]["value"] == 7


def test_one_that_turns_out_to_be_damaged_gives_way_too(restarted: Restarted, monkeypatch: pytest.MonkeyPatch) -> None:
    with restarted.started() as balancer:
        decide(balancer, "PATCH", "/backends/a", weight=7)
        memory = balancer.memory
        assert memory is not None
        with monkeypatch.context() as patched:
            patched.setattr(Store, "save", lambda self, changes: raise_damaged())
            memory._look()
    assert rows(restarted.file, "decisions")["default a weight"]["value"] == 7
    assert sum(".damaged-" in each.name for each in restarted.file.parent.iterdir()) >= 1


def raise_damaged() -> None:
    raise StoreError("database disk image is malformed", is_damaged=True)


def test_values_that_make_no_sense_are_left_out(restarted: Restarted) -> None:
    with restarted.started() as balancer:
        decide(balancer, "PATCH", "/backends/a", weight=7)
        decide(balancer, "PATCH", "/backends/b", weight=7)
        decide(balancer, "POST", "/backends", **C)
    decisions = rows(restarted.file, "decisions")
    spoilt = {
        "decisions": {
            "default a weight": json.dumps(decisions["default a weight"] | {"value": 10**9}),
            "default b weight": "[" * 1000,
            "default c ": json.dumps(decisions["default c "] | {"value": "ftp://x"}),
            "default a origin": json.dumps(decisions["default a weight"]),
        },
        "requests": {"whole": '{"totals": 7}'},
        "events": {"1": json.dumps({"event": {"seq": "one"}, "public": ""})},
        "refusals": {"all": '[[["a", "b"], "many"]]'},
        "routes": {"since x": "null"},
        "ejections": {"a": "{}"},
        "backends": {"default a": '{"selected": true}'},
    }
    store = Store(restarted.file)
    store.open()
    store.save(spoilt)
    store.close()
    with restarted.started() as balancer:
        assert made(balancer) == {} and balancer.control.statistics.snapshot()[0]["total_requests"] == 0
        assert "not possible" in news(balancer)
        failed = [event["message"] for event in balancer.events() if event["kind"] == "state_failed"]
        assert len(failed) == 7 and all("make no sense, and are left out" in message for message in failed)
    assert rows(restarted.file, "ejections") == {}
