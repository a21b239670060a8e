"""The past on the dashboard: charts from /history, the log from /events, and what is shown without them."""

from __future__ import annotations

import json
import re
import time

from playwright.sync_api import expect
from support import wait_until

from tests.dashboard_stub import Json, Stub, backend, down_backend, event, explained, history, recent, status
from tests.dashboard_tab import Tab, chromium, stub, tab

__all__ = ["chromium", "stub", "tab"]  # fixtures

IDS = ["backend_1", "backend_2"]


def with_past(stub: Stub, failing: int = 0, count: int = 120) -> None:
    now = time.time()
    stub.answer = status([backend(1), backend(2)])
    stub.history = {
        1: history(IDS, count=count, failing=failing, now=now),
        10: history(IDS, step=10, count=60, now=now),
    }


def area_points(tab: Tab, chart: int = 0) -> int:
    """How many points the lowest area of a chart has along its upper edge."""
    path = tab.at(".chart").nth(chart).locator("path.area").first.get_attribute("d") or ""
    return (path.count("L") + 1) // 2


def test_the_past_is_there_at_once(tab: Tab, stub: Stub) -> None:
    with_past(stub, failing=10)
    tab.from_disk(stub.url).is_live()
    wait_until(lambda: area_points(tab) >= 58)
    keys = [re.compile("backend_1"), re.compile("backend_2"), "failed4.0"]
    expect(tab.at(".chart").nth(0).locator(".keys li")).to_have_text(keys)


def test_a_reload_of_the_page_keeps_charts_and_log(tab: Tab, stub: Stub) -> None:
    with_past(stub)
    stub.tell(event(1, "backend_down", "backend_1", "error"), event(2, "backend_up", "backend_1"))
    tab.from_disk(stub.url).is_live()
    for _ in range(2):
        wait_until(lambda: area_points(tab) >= 58)
        expect(tab.at("#event-rows li")).to_have_count(2)
        tab.page.reload()
        tab.is_live()


def test_only_what_is_new_is_asked_for(tab: Tab, stub: Stub) -> None:
    with_past(stub)
    stub.tell(event(7, "backend_up", "backend_1"))
    tab.from_disk(stub.url).is_live()
    newest = stub.history[1][-1]["at"]  # type: ignore[index]
    tab.shows("#event-rows", "up")
    fresh = history(IDS, count=1, now=newest + 2)
    stub.history[1].extend(fresh)  # type: ignore[index]
    stub.answer["now"] = newest + 2.5
    stub.tell(event(8, "backend_down", "backend_2", "error", message="timeout"))
    tab.shows("#event-rows", "down: timeout")
    wait_until(lambda: f"/history?step=1&since={newest}" in stub.asked)
    assert stub.asked.count("/history?step=1&since=0") == 1
    assert [it for it in stub.asked if it.startswith("/events")] == ["/events?since=0", "/events?since=7"]


def test_a_clock_that_is_set_back_leaves_no_hole_in_the_past(tab: Tab, stub: Stub) -> None:
    """Until it had caught up, nothing was asked for, and the charts stood still."""
    with_past(stub)
    tab.from_disk(stub.url).is_live()
    wait_until(lambda: area_points(tab) >= 58)
    earlier = time.time() - 3600
    stub.history = {1: history(["set_back"], now=earlier), 10: []}
    stub.answer["now"] = earlier
    expect(tab.at(".chart").first.locator(".keys li", has_text="set_back")).to_be_visible()


def test_an_odd_answer_ends_no_polls(tab: Tab, stub: Stub) -> None:
    with_past(stub)
    for point in stub.history[1]:  # type: ignore[index]
        point["times"] = [{}, [0.1, 3], None]
    tab.from_disk(stub.url).is_live()
    polls = stub.polls
    wait_until(lambda: stub.polls > polls + 3)
    wait_until(lambda: area_points(tab) >= 58)


CLOCK = "at => new Date(at * 1000).toLocaleTimeString('en-GB')"


def test_the_range_chooses_the_resolution(tab: Tab, stub: Stub) -> None:
    with_past(stub)
    tab.from_disk(stub.url).is_live()
    for seconds, step, least, apart in ((60, 1, 60, 15), (300, 1, 59, 60), (900, 10, 59, 300), (3600, 10, 59, 900)):
        tab.pick(f"#range input[value='{seconds}']")
        end = stub.history[step][-1]["at"] + step  # type: ignore[index]
        newest = (end - seconds // 10) // apart * apart  # round times, and none at the very edge
        label = tab.page.evaluate(CLOCK, newest)
        expect(tab.at(".chart").first.locator(".plot text", has_text=label[:5]).last).to_be_attached()
        assert least <= area_points(tab) <= 120


def test_more_slots_than_pixels_are_merged_without_loss(tab: Tab, stub: Stub) -> None:
    with_past(stub, count=300)
    for point in stub.history[1]:  # type: ignore[index]
        point |= {"requests": 40, "failed": 10, "p99": 0.3 if point["at"] % 50 == 0 else 0.1}
    tab.from_disk(stub.url).is_live()
    tab.pick("#range input[value='300']")
    wait_until(lambda: 60 <= area_points(tab) <= 160)
    expect(tab.at(".chart").nth(0).locator(".title-value")).to_have_text("40.0")
    expect(tab.at(".chart").nth(3).locator(".keys b")).to_have_text("25.0 %")
    tab.page.get_by_role("button", name="View Response time as table").click()
    worst = tab.at(".chart").nth(1).locator("tbody td:nth-child(2)").all_inner_texts()
    assert set(worst) == {"100 ms", "300 ms"}


def test_a_gap_is_drawn_as_a_gap(tab: Tab, stub: Stub) -> None:
    with_past(stub)
    del stub.history[1][-40:-20]  # type: ignore[index]
    tab.from_disk(stub.url).is_live()
    line = tab.at(".chart").nth(1).locator("path.stroke").first
    wait_until(lambda: (line.get_attribute("d") or "").count("M") == 2)


def test_events_are_marked_on_all_charts_and_named_under_the_cursor(tab: Tab, stub: Stub) -> None:
    with_past(stub)
    stub.tell(event(30, "backend_down", "backend_1", "error", message="refused"))
    tab.from_disk(stub.url).is_live()
    expect(tab.at(".plot .mark.sev-error")).to_have_count(4)
    tab.at(".chart").nth(2).scroll_into_view_if_needed()
    box = tab.at(".plot .mark.sev-error").nth(2).bounding_box()
    assert box
    tab.page.mouse.move(box["x"], box["y"] + 50)
    tab.shows("#readout", "backend_1 down: refused")
    tab.shows(".tip:visible", "backend_1 down: refused")
    expect(tab.at(".plot .cursor[visibility=visible]")).to_have_count(4)


def test_more_backends_than_colours_are_drawn_as_others(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(index) for index in range(1, 51)])
    stub.history = {1: history([f"backend_{index}" for index in range(1, 51)]), 10: []}
    tab.from_disk(stub.url).is_live()
    expect(tab.at(".chart").nth(0).locator(".keys li")).to_have_count(9)
    tab.shows(".chart >> nth=0", "43 others")


def test_a_balancer_without_history_is_watched_from_now_on(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True  # /history is answered with 404
    stub.history = None
    tab.from_disk(stub.url).is_live()
    tab.shows("#foot-history", "keeps no history")
    stub.answer["statistics"]["total_requests"] += 50
    tab.shows("#readout", "what this page saw")
    expect(tab.at(".chart").nth(0).locator(".title-value")).not_to_have_text("")
    assert len([it for it in stub.asked if it.startswith("/history")]) == 1


def in_window(stub: Stub, failed: int = 60, p95: float = 0.08) -> None:
    """What the window that is asked for came to: 600 requests, of which `failed` failed."""
    figures = {"p50": 0.03, "p95": p95, "p99": 0.15}
    stub.answer["statistics"]["window"] = {"seconds": 64, "requests": 600, "failed": failed, **figures}
    for one, requests in zip(stub.answer["backend_servers"], (420, 180), strict=True):
        one["window"] = {"requests": requests, "failed": failed if requests == 420 else 0, **figures}


def test_one_window_is_chosen_for_all_figures_and_named(tab: Tab, stub: Stub) -> None:
    """A row's figures were of its whole life, those beside of 10 s, and shares "since reset" were beside "now"."""
    with_past(stub)
    in_window(stub)
    stub.answer["backend_servers"][0] |= {"failed_requests": 9}
    tab.from_disk(stub.url).is_live()
    expect(tab.at("#t-success")).to_have_text("90.0 %")
    tab.shows("#sentence", "10.0 % of the requests of the last 1 m failed (limit 5 %).")
    tab.shows("#window-note", "last 1 m")
    row = tab.at("#backend-rows tr").nth(0)
    for words in ("70.0 %", "exp. 50.0 %, +20.0 pt", "30 ms", "80 ms", "150 ms", "60", "14.3 %"):
        expect(row).to_contain_text(words)
    expect(tab.at("#backend-rows .c-errors .is-bad")).to_have_text(["60"])
    tab.pick("#window input[value='300']")
    wait_until(lambda: any(path.startswith("/status?window=300&") for path in stub.asked))
    tab.pick("#window input[value='0']")
    tab.shows("#window-note", "since reset")
    expect(row).to_contain_text("4.1 ms")
    expect(row.locator(".c-errors .is-bad")).to_have_text("9")


def test_limits_are_remembered_and_can_be_switched_off(tab: Tab, stub: Stub) -> None:
    with_past(stub)
    in_window(stub)
    tab.from_disk(stub.url).is_live()
    tab.shows("#banner-traffic", "limit 5 %")
    tab.use_gear()
    tab.page.click("#settings")
    tab.page.fill("#limit-errors", "many")
    tab.page.click("#settings-form button[type=submit]")
    expect(tab.at("#limit-errors")).to_have_attribute("aria-invalid", "true")
    tab.page.fill("#limit-errors", "")
    tab.page.fill("#limit-p95", "1,5")
    tab.page.click("#settings-form button[type=submit]")
    tab.shows("#banner-traffic", "(limit 1.5 ms)")
    tab.page.reload()
    tab.shows("#banner-traffic", "(limit 1.5 ms)")


# ---- The log


def log_of(stub: Stub) -> None:
    stub.tell(
        event(1, "backend_down", "backend_1", "error", message="refused"),
        event(2, "write_refused", None, "warning", message="POST /reset", count=3),
        event(3, "backend_up", "backend_1", message="answers"),
        event(4, "backend_drained", "backend_2", message=""),
    )


def test_the_log_is_newest_first_filtered_and_held(tab: Tab, stub: Stub) -> None:
    log_of(stub)
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    expect(tab.at("#event-rows .what")).to_have_text(
        ["drained", "up: answers", "write refused: POST /reset (3 times)", "down: refused"]
    )
    assert tab.at("#event-rows .sign .sr").all_inner_texts() == ["info", "info", "warning", "error"]
    expect(tab.at("#event-rows .when").first).to_have_attribute("title", re.compile(r"^20\d\d-.*Z$"))
    tab.page.select_option("#event-severity", "warning")
    expect(tab.at("#event-rows li")).to_have_count(2)
    tab.page.select_option("#event-backend", "backend_1")
    expect(tab.at("#event-rows .what")).to_have_text(["down: refused"])
    tab.page.select_option("#event-severity", "all")
    tab.page.click("#event-pause")
    stub.tell(event(5, "backend_slow", "backend_1", "warning"))
    tab.shows("#announcer", "backend_1 slow")
    expect(tab.at("#event-rows li")).to_have_count(2)
    tab.page.click("#event-pause")
    expect(tab.at("#event-rows li")).to_have_count(3)


def test_refusals_that_are_counted_on_stay_one_line(tab: Tab, stub: Stub) -> None:
    log_of(stub)
    stub.tell(event(5, "write_refused", None, "warning"))
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    expect(tab.at("#event-rows li")).to_have_count(5)
    stub.events.pop()
    stub.tell(event(6, "write_refused", None, "warning", count=2))
    tab.shows("#event-rows", "(2 times)")
    expect(tab.at("#event-rows li")).to_have_count(5)


def test_the_log_is_exported(tab: Tab, stub: Stub) -> None:
    log_of(stub)
    stub.tell(event(5, "backend_slow", "backend_1", message='=cmd|"x"'))
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    expect(tab.at("#event-rows li")).to_have_count(5)
    exported = {}
    for kind in ("json", "csv"):
        with tab.page.expect_download() as caught:
            tab.page.click(f"#export-{kind}")
        exported[kind] = caught.value.path().read_text(encoding="utf-8")
    rows: list[Json] = json.loads(exported["json"])
    assert [row["seq"] for row in rows] == [5, 4, 3, 2, 1]
    lines = exported["csv"].splitlines()
    assert lines[0] == "seq,time,severity,kind,backend,message,count"
    assert '"\'=cmd|""x"""' in lines[1] and len(lines) == 6


def test_events_go_on_after_a_restart(tab: Tab, stub: Stub) -> None:
    log_of(stub)
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    expect(tab.at("#event-rows li")).to_have_count(4)
    stub.events = []
    stub.answer = status([backend(1, total_requests=1)], uptime=1.0)
    stub.tell(event(1, "backend_up", "backend_1", message="again"))
    tab.shows("#event-rows li >> nth=0", "up: again")
    tab.shows("#event-rows li >> nth=1", "the balancer was restarted")
    expect(tab.at("#event-rows li")).to_have_count(6)


# ---- Health over time


def test_an_opened_backend_tells_its_time_up_and_its_codes(tab: Tab, stub: Stub) -> None:
    now = time.time()
    one = backend(
        1, codes={"1xx": 0, "2xx": 90, "3xx": 0, "4xx": 9, "5xx": 1}, overrides={"weight": 3}, source="flag",
    )  # fmt: skip
    ejected = {
        "status": "ejected",
        "consecutive_failures": 5,
        "count": 2,
        "until": now + 25,
        "reason": "5 failures in a row",
    }
    stub.answer = status([one, backend(2, state="ejected", ejection=ejected), down_backend(3)])
    stub.answer["recent_requests"] = [recent(1), explained("request-2")]
    stub.tell(
        event(1, "backend_down", "backend_1", "error", timestamp=now - 30),
        event(2, "backend_up", "backend_1", timestamp=now - 15),
    )
    tab.from_disk(stub.url).is_live()
    tab.page.get_by_role("button", name="Details of backend_1").click()
    detail = tab.at("#drawer")
    for words in (
        "90, 90.0 %",
        "9, 9.0 %",
        "weight (configured: 3)",
        "connect 1",
        "100.0 % of the newest 1 attempt",
        "flag",
        re.compile(r"Healthy 7\d\.\d % of the last 1 m, 1 time down, 15 s in all"),
    ):
        expect(detail).to_contain_text(words)
    expect(detail.locator(".strip rect")).to_have_count(3)
    row = tab.at("#backend-rows tr").filter(has_text="backend_2")
    expect(row).to_contain_text(re.compile(r"back on trial in 2\d s"))
    expect(row).to_contain_text("5 failures in a row")
    tab.shows("#banner-backends", "2 of 3 backends down or ejected.")
    tab.page.keyboard.press("Escape")
    tab.page.get_by_role("button", name="Details of backend_2").click()
    tab.shows("#drawer", "2 times, now ejected")
