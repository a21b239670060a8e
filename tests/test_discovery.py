"""Sources of backends: what they find is brought into the pools; whatever goes wrong with one takes nobody away."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet import DemoBackend
from support import Balancer, fetch, fetch_json, wait_until

from balancer.fleet import backendsfile, discovery
from balancer.fleet.backendsfile import FileSource
from balancer.fleet.discovery import SourceFailed


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


def ids(balancer: Balancer) -> set[str]:
    return {backend["id"] for backend in balancer.status()["backend_servers"]}


def source(balancer: Balancer, name: str = "backends_file") -> Any:
    return next(source for source in balancer.status()["sources"] if source["name"] == name)


def told(balancer: Balancer, kind: str) -> list[dict[str, Any]]:
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
