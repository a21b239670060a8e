"""Lessons: what is done to a backend of the demo, and that all is put back as it was."""

from __future__ import annotations

from threading import Thread

from control import assert_error, make_app
from playwright.sync_api import Locator, expect
from support import free_port, wait_until
from werkzeug.serving import make_server

import backend_server
from balancer.config.values import BackendSettings
from tests.dashboard_stub import Stub, backend, serving, status
from tests.dashboard_tab import Tab, chromium, stub, tab

__all__ = ["chromium", "stub", "tab"]  # fixtures


def open_lesson(tab: Tab, stub: Stub, title: str) -> Locator:
    """Of a demo's three backends, in the lab."""
    stub.answer = status([backend(1, weight=2), backend(2), backend(3, state="drain", admin_state="drain")])
    stub.answer["capabilities"]["faults"] = True
    tab.from_disk(stub.url).is_live()
    tab.view("lab")
    return tab.at("#lesson-rows li").filter(has_text=title)


def test_a_lesson_tells_what_came_of_it_and_puts_everything_back(tab: Tab, stub: Stub) -> None:
    lesson = open_lesson(tab, stub, "Three times the weight")
    run = lesson.get_by_role("button", name="Run")
    expect(run).to_have_attribute("aria-disabled", "true")
    lesson.get_by_label("All").check()
    run.click()
    wait_until(lambda: stub.traffic >= 6)
    expect(run).to_have_attribute("aria-disabled", "true")
    tab.page.click("#cancel")
    expect(lesson.get_by_role("status")).to_contain_text('It was "A third": backend_1 got ')
    soon = {"for": "1m"}
    assert stub.writes == [
        ("/algorithm", {"algorithm": "weighted"} | soon),
        ("PATCH /backends/backend_1", {"weight": 3} | soon),
        ("PATCH /backends/backend_2", {"weight": 1} | soon),
        ("PATCH /backends/backend_3", {"weight": 1} | soon),
        ("/algorithm", {"algorithm": "weighted"}),
        ("PATCH /backends/backend_1", {"weight": 2}),
        ("PATCH /backends/backend_2", {"weight": 1}),
        ("PATCH /backends/backend_3", {"weight": 1}),
    ]


def test_what_a_lesson_began_is_ended_where_it_began(tab: Tab, stub: Stub) -> None:
    """It was ended at whatever balancer was looked at by then; and two clicks in a row were two lessons."""
    lesson = open_lesson(tab, stub, "Maintenance")
    with serving(status([backend(1)], load_balancer_id="other")) as other:
        other.page_token = None
        lesson.get_by_label("None").check()
        lesson.get_by_role("button", name="Run").evaluate("it => { it.click(); it.click(); }")
        wait_until(lambda: stub.traffic >= 3)
        tab.connect_to(other.url)
        tab.shows("#lb-id", "other")
        wait_until(lambda: len(stub.writes) == 2)
        assert other.writes == []
        tab.page.close()
    changes = [body["admin_state"] for _, body in stub.writes]
    assert changes == ["drain", "ready"]


def test_what_could_not_be_put_back_is_told(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    lesson = open_lesson(tab, stub, "Maintenance")
    lesson.get_by_label("None").check()
    lesson.get_by_role("button", name="Run").click()
    wait_until(lambda: stub.traffic >= 3)
    stub.failing_writes = {"/backends/backend_1"}
    tab.page.click("#cancel")
    expect(lesson.get_by_role("status")).to_have_text("Not all put back: that value is wrong.")


def test_a_fault_is_ended_and_a_refusal_told(tab: Tab, stub: Stub) -> None:
    stub.failing_writes = {"/backends/backend_1/faults"}
    tab.network_errors_expected = True
    lesson = open_lesson(tab, stub, "A backend that answers 503")
    lesson.get_by_label("None").check()
    lesson.get_by_role("button", name="Run").click()
    expect(lesson.get_by_role("status")).to_have_text("Not done: that value is wrong.")
    stub.failing_writes.clear()
    lesson.get_by_role("button", name="Run").click()
    wait_until(lambda: stub.traffic >= 3)
    tab.page.click("#cancel")
    expect(lesson.get_by_role("status")).to_contain_text("As you said")
    assert [name for name, _ in stub.writes] == [
        "/backends/backend_1/faults",
        "DELETE /backends/backend_1/faults",
    ]


def test_whoever_may_write_troubles_the_backends_of_the_demo_and_no_others() -> None:
    state = backend_server.BackendState(backend_server.Settings())
    server = make_server("127.0.0.1", 0, backend_server.create_app(state=state))
    thread = Thread(target=server.serve_forever)
    thread.start()
    urls = {"there": server.port, "gone": free_port()}
    backends = tuple(BackendSettings(id=name, url=f"http://127.0.0.1:{port}") for name, port in urls.items())
    client = make_app(backends=backends, demo_faults=True).test_client()
    try:
        assert client.post("/backends/there/faults", json={"added_latency": 0.5}).json["added_latency"] == 0.5
        assert state.faults.added_latency == 0.5
        assert_error(client.post("/backends/there/faults", json={"added_latency": "x"}), 422, "there refused")
        assert client.delete("/backends/there/faults", json={}).status_code == 200
        assert state.faults.added_latency == 0
        assert_error(client.delete("/backends/gone/faults", json={}), 409, "gone did not answer")
        assert_error(client.post("/backends/nobody/faults", json={}), 404, "nobody")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert_error(make_app().test_client().post("/backends/a/faults", json={}), 404, "demo_faults")


def test_without_the_demo_there_are_no_lessons(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.view("lab")
    expect(tab.at("#h-lessons")).to_be_hidden()
