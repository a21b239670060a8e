"""Named tokens for the control API: a role each, and events say who did what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control import FOREIGN, TOKEN, bearer
from guarded import digest
from support import Balancer, fetch, fetch_json, free_port, wait_until

READER, WRITER = "the-token-of-a-reader", "the-token-of-a-writer"
TABLES = f"""
[[control_tokens]]
name = "grafana"
role = "read"
sha256 = "{digest(READER)}"
"""
WRITES = f"""
[[control_tokens]]
name = "deploy"
role = "write"
sha256 = "{digest(WRITER)}"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "balancer.toml"
    path.write_text(
        f'[[backends]]\nid = "a"\nurl = "http://127.0.0.1:{free_port()}"\n{TABLES}{WRITES}', encoding="utf-8"
    )
    return path


@pytest.fixture
def balancer(file: Path) -> Iterator[Balancer]:
    env = {"LB_ADMIN_TOKEN": TOKEN}
    with Balancer(f"--config={file}", "--control-reads=token", env=env, wait_ready=False) as started:
        yield started


def write(balancer: Balancer, *, weight: int, **headers: str) -> int:
    return fetch(f"{balancer.url}/backends/a", {"weight": weight}, "PATCH", **headers)[0]


def events(balancer: Balancer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = fetch_json(f"{balancer.url}/events", **bearer(TOKEN))["events"]
    return found


def test_who_may_what(balancer: Balancer) -> None:
    for path in ("/status", "/metrics", "/config"):
        answers = [
            fetch(balancer.url + path, **who)[0] for who in ({}, bearer("wrong" * 5), bearer(READER), bearer(WRITER))
        ]
        assert answers == [401, 401, 200, 200]
    assert write(balancer, weight=5) == write(balancer, weight=5, **bearer("wrong" * 5)) == 401
    assert write(balancer, weight=5, **bearer(READER)) == 403
    assert write(balancer, weight=5, **bearer(WRITER), Origin=FOREIGN) == 403  # no token makes that page ours
    assert write(balancer, weight=6, **bearer(WRITER)) == write(balancer, weight=7, **bearer(TOKEN)) == 200
    told = [(event["message"], event["by"]) for event in events(balancer) if event["kind"] == "backend_changed"]
    assert [by for _, by in told] == ["deploy", "admin_token"] and "weight" in told[0][0]
    assert [event["by"] for event in events(balancer) if event["kind"] == "write_refused"] == [None]  # counted as one
    for who, writes in ((READER, False), (WRITER, True)):
        capabilities = fetch_json(f"{balancer.url}/status", **bearer(who))["capabilities"]
        assert (capabilities["writes"], capabilities["authorized"]) == (writes, True)


def test_what_happens_by_itself_is_nobodys(balancer: Balancer) -> None:
    fetch(f"{balancer.url}/reset", {}, "POST", **bearer(WRITER))
    wait_until(lambda: any(event["kind"] == "backend_down" for event in events(balancer)))
    found = {event["kind"]: event["by"] for event in events(balancer)}
    assert found == {"statistics_reset": "deploy", "backend_down": None}


def test_a_token_that_is_taken_out_of_the_file_ends_at_once(balancer: Balancer, file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8").replace(WRITES, ""), encoding="utf-8")
    plan = fetch_json(f"{balancer.url}/reload", {}, "POST", **bearer(WRITER))
    assert [change["what"] for change in plan["changes"]] == ["control_tokens.deploy"]
    assert fetch(f"{balancer.url}/status", **bearer(WRITER))[0] == 401
    assert fetch(f"{balancer.url}/status", **bearer(READER))[0] == 200
    reloaded = next(event for event in events(balancer) if event["kind"] == "config_reloaded")
    assert reloaded["by"] == "deploy"
    shown = fetch(f"{balancer.url}/config", **bearer(READER))[2].decode() + str(events(balancer)) + str(plan)
    assert READER not in shown and WRITER not in shown and digest(READER) not in shown


@pytest.mark.parametrize(("tables", "code"), [("", 200), (TABLES, 200), (WRITES, 401)])
def test_local_programs_need_a_token_once_there_is_one_that_writes(tmp_path: Path, tables: str, code: int) -> None:
    path = tmp_path / "balancer.toml"
    path.write_text(f'[[backends]]\nid = "a"\nurl = "http://127.0.0.1:{free_port()}"\n{tables}', encoding="utf-8")
    with Balancer(f"--config={path}", wait_ready=False) as started:
        assert write(started, weight=5) == code and fetch(f"{started.url}/status")[0] == 200
        changed = [event for event in started.library.events() if event["kind"] == "backend_changed"]
        assert [event["by"] for event in changed] == (["local"] if code == 200 else [])
