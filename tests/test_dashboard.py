"""The dashboard in a real browser: every state against a stub, then the real program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import Demo, start_demo
from playwright.sync_api import expect
from support import PAGE_TOKEN, Balancer, nginx_before, wait_until
from wire import WireBackend

from tests.dashboard_stub import (
    Json,
    Stub,
    backend,
    down_backend,
    event,
    explained,
    history,
    recent,
    serving,
    status,
)
from tests.dashboard_tab import DASH, Tab, chromium, stub, tab

__all__ = ["chromium", "stub", "tab"]  # fixtures

VALUES = "#tiles .value"
HOSTILE = "<img src=x onerror=alert(1)>"
NOT_A_VALUE = re.compile(r"\b(NaN|undefined|null|Infinity|\[object)")


# ---- What /status says ----------------------------------------------------------------------------------------------


def test_live_values_are_shown_and_renewed_in_the_same_rows(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tiles = {
        "rate": "42.5", "success": "97.3 %", "p50": "5.2 ms", "p95": "64 ms", "p99": "1.27 s",
        "active": "2", "up": "2 / 3", "total": "600",
    }  # fmt: skip
    assert {name: tab.at(f"#t-{name}").inner_text() for name in tiles} == tiles
    shown = {
        "#lb-id": "lb-1", "#lb-algorithm": "Weighted", "#lb-uptime": "up 12 m 34 s", "#t-total-note": "16 failed",
        "#t-success-note": "16 of 600 failed", "#t-latency-note": "since reset",
        "#sentence": "backend_3 down for 7 s (refused). Its traffic goes to 2 others; 16 requests failed since",
    }  # fmt: skip
    for selector, words in shown.items():
        tab.shows(selector, words)
    expect(tab.at("#alarm")).to_be_empty()
    rows = tab.at("#backend-rows tr")
    expect(rows).to_have_count(3)
    for words in (
        "backend_2", "http://127.0.0.1:5002", "Up", "33.3 %", "exp. 33.3 %", "1 / 50", "4.1 ms", "62 ms", "120 ms",
        "2.0 %", "200 in 3 ms",
    ):  # fmt: skip
        expect(rows.nth(1)).to_contain_text(words)
    for words in ("Down", "refused", "no answer in 1 ms", "12"):
        expect(rows.nth(2)).to_contain_text(words)
    assert tab.at("#backend-rows .badge svg").count() == 3
    kept = rows.nth(1).element_handle()
    tab.page.focus("#traffic-path")
    tab.page.evaluate("() => getSelection().selectAllChildren(document.querySelector('#backend-rows .name'))")
    stub.answer = status([backend(1), backend(2, total_requests=777)])
    tab.shows("#t-total", "877")
    assert kept.evaluate("node => node.isConnected && node.textContent.includes('777')")
    assert tab.page.evaluate("() => getSelection().toString()") == "backend_1"
    expect(tab.at("#traffic-path")).to_be_focused()
    expect(rows).to_have_count(2)


def test_shares_are_compared_with_what_is_expected(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(1, total_requests=60), backend(2, total_requests=40)])
    tab.from_disk(stub.url).is_live()
    rows = tab.at("#backend-rows tr")
    for words in ("60.0 %", "exp. 50.0 %, +10.0 pt"):
        expect(rows.nth(0)).to_contain_text(words)
    expect(rows.nth(1)).to_contain_text("-10.0 pt")


def test_recent_requests_include_failures_and_keep_their_rows(tab: Tab, stub: Stub) -> None:
    failed = recent(9, status=502, server_id=None, attempts=3, reason="connection refused", path="/orders?x=1")
    stub.answer["recent_requests"] = [failed]
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    row = tab.at("#recent-rows tr").first
    for words in ("502", "/orders?x=1", "3", "connection refused", DASH):
        expect(row).to_contain_text(words)
    kept = row.element_handle()
    stub.answer["recent_requests"] = [recent(1), failed]
    expect(tab.at("#recent-rows tr")).to_have_count(2)
    assert kept.evaluate("node => node.isConnected && node.previousElementSibling !== null")


def test_any_number_of_backends(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    for count in (0, 1, 50):
        stub.answer = status([backend(index) for index in range(1, count + 1)])
        tab.shows("#t-up", f"{count} / {count}")
        if count > 12:  # some of them, until all are asked for
            expect(tab.at("#backend-rows tr")).to_have_count(8)
            tab.page.click("#backends-more")
        expect(tab.at("#backend-rows tr")).to_have_count(count)
        expect(tab.at("#backends-empty")).to_be_visible(visible=count == 0)
        names = tab.at("#backend-rows .name").all_inner_texts()
        assert names == [f"backend_{index}" for index in range(1, count + 1)]


WORDS: list[tuple[str, Json]] = [
    ("Checking 1/2", {"state": "checking", "health": {"status": "up", "consecutive_failures": 1, "fall": 2}}),
    ("Draining (3 left)", {"state": "drain", "admin_state": "drain", "active_connections": 3}),
    ("Maintenance", {"state": "maint", "admin_state": "maint", "healthy": False}),
    ("Unknown", {"state": "unknown", "healthy": False, "health": None}),
    ("Ejected for now", {"state": "ejected_for_now"}),
    ("Ejected", {"state": "ejected"}),
    ("On trial", {"state": "trial"}),
    ("Drained", {"state": "drained", "admin_state": "drain", "drained": True}),
    ("Warming up 40 %", {"admission": 0.4}),
    ("Up, weight 0", {"weight": 0}),
    ("Up", {"state": None, "admin_state": None}),
    ("Draining (1 left)", {"state": None, "admin_state": "drain"}),
    ("Unknown", {"state": None, "admin_state": None, "healthy": None}),
]


HELD: list[tuple[str, Json]] = [
    ("for 4 m", {}),
    ("up for 4 m", {"state": "drain", "admin_state": "drain"}),
    ("up for 4 m", {"state": "drained", "admin_state": "drain"}),
    ("", {"state": "maint", "admin_state": "maint"}),
    ("up for 4 m", {"state": "trial"}),
]


def test_every_backend_state_has_a_word(tab: Tab, stub: Stub) -> None:
    """Only the health check's own states last as long: one second after a drain the page said "Drained for 11 m"."""
    stub.answer = status([backend(index, **changes) for index, (_, changes) in enumerate(WORDS)])
    tab.from_disk(stub.url).is_live()
    tab.page.click("#backends-more")
    assert tab.at("#backend-rows .badge").all_inner_texts() == [word for word, _ in WORDS]
    stub.answer = status([backend(index, **changes) for index, (_, changes) in enumerate(HELD)])
    held = [re.compile(f"^{words}" if words else "^$") for words, _ in HELD]
    expect(tab.at("#backend-rows .c-state .sub")).to_have_text(held)


# ---- States of the page ----------------------------------------------------------------------------------------------


def test_first_load_shows_a_skeleton_and_no_numbers(tab: Tab, stub: Stub) -> None:
    stub.gate.clear()
    tab.from_disk(stub.url)
    tab.shows("#pill", "Connecting")
    expect(tab.at("#tiles")).to_have_class(re.compile("skeleton"))
    assert not re.search(r"\d", "".join(tab.at(VALUES).all_inner_texts()))
    for control in ("#apply", "#send", "#add-backend"):
        expect(tab.at(control)).to_have_attribute("aria-disabled", "true")
    stub.gate.set()
    tab.is_live()
    expect(tab.at("#tiles")).not_to_have_class(re.compile("skeleton"))


def test_disconnected_keeps_the_last_data_and_recovers(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    tab.from_disk(stub.url).is_live()
    stub.stop()
    tab.shows("#pill", "Disconnected")
    tab.shows("#sentence", "start_all.sh")
    tab.shows("#sentence", re.compile(r"Next try in \d+ s"))
    tab.shows("#alarm", "not reachable")
    tab.shows("#updated", "data from")
    tab.shows("#t-total", "600")
    expect(tab.at("html")).to_have_class(re.compile("is-old"))
    expect(tab.at("#send")).to_have_attribute("aria-disabled", "true")
    stub.start()
    tab.page.click("#retry")
    tab.is_live()
    expect(tab.at("#banner-connection")).to_be_hidden()
    expect(tab.at("main")).to_be_focused()


def test_disconnected_from_the_start_shows_dashes(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.stop()
    tab.from_disk(stub.url)
    tab.shows("#pill", "Disconnected")
    assert set(tab.at(VALUES).all_inner_texts()) == {DASH}
    stub.start()
    tab.is_live()


def test_blocked_by_cors_is_told_from_disconnected(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.cors = False
    with serving(status([])) as other:
        tab.page.goto(f"{other.url}/elsewhere.html?lb={stub.url}")
        tab.shows("#pill", "Blocked")
        tab.shows("#banner-connection", "Something answers there, but it is no balancer, or does not let this page")
        expect(tab.at("#open-dashboard")).to_have_attribute("href", f"{stub.url}/dashboard")
        expect(tab.at("#give-token")).to_be_hidden()
        tab.page.close()


def test_no_answer_in_time(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    stub.gate.clear()
    tab.shows("#pill", "No answer")
    tab.shows("#banner-connection", "waited 5 s")


def test_old_data_is_dimmed_and_dated(tab: Tab, stub: Stub) -> None:
    tab.page.clock.install()
    tab.from_disk(stub.url).is_live()
    stub.gate.clear()
    tab.page.clock.fast_forward(14_000)
    tab.shows("#pill", "Stale")
    tab.shows("#updated", re.compile(r"data from 1[4-6] s ago"))
    expect(tab.at("html")).to_have_class(re.compile("is-old"))


def test_errors_and_bad_answers_are_shown_and_polling_goes_on(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.status_code = 500
    tab.from_disk(stub.url)
    tab.shows("#pill", "Error 500")
    stub.status_code = 200
    for body in (b"<html>hello", b"null", b'{"hello": 1}'):
        tab.is_live()
        stub.raw_body = body
        tab.shows("#pill", "Bad answer")
        stub.raw_body = None
    tab.is_live()


def test_paused_polls_no_more_and_says_how_old_the_data_is(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.click("#pause")
    tab.shows("#pill", "Paused")
    wait_until(lambda: stub.running["poll"] == 0)
    polls = stub.polls
    tab.shows("#updated", re.compile(r"data from [2-9] s ago"))
    assert stub.polls == polls
    tab.page.click("#pause")
    tab.is_live()


def test_a_hidden_tab_rests_and_a_shown_one_asks_at_once(tab: Tab, stub: Stub) -> None:
    hide = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); " + (
        "document.dispatchEvent(new Event('visibilitychange')); }"
    )
    tab.from_disk(stub.url).is_live()
    tab.page.evaluate(hide, True)
    wait_until(lambda: stub.running["poll"] == 0)
    polls = stub.polls
    tab.shows("#updated", re.compile(r"[2-9] s ago"))
    assert stub.polls == polls
    tab.page.evaluate(hide, False)
    wait_until(lambda: stub.polls > polls)


def test_polls_never_overlap(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    stub.gate.clear()
    wait_until(lambda: stub.running["poll"] == 1)
    for _ in range(6):
        tab.page.click("#pause")
    stub.gate.set()
    wait_until(lambda: stub.polls >= 4)
    assert stub.most_at_once["poll"] == 1


def test_all_down_is_an_alarm_with_causes(tab: Tab, stub: Stub) -> None:
    stub.answer = status([down_backend(1), down_backend(2, reason="timeout")])
    tab.from_disk(stub.url).is_live()
    tab.shows("#banner-backends", "No healthy backend.")
    tab.shows("#banner-backends", "backend_1 (refused), backend_2 (timeout)")
    tab.shows("#alarm", "No backend is healthy.")
    tab.shows("#t-up", "0 / 2")


def test_ejected_backends_that_are_used_are_no_outage(tab: Tab, stub: Stub) -> None:
    """The page claimed that every request was answered with 503."""
    ejection = {"status": "ejected", "consecutive_failures": 9, "count": 1, "until": None, "reason": "5 x 503"}
    stub.answer = status([backend(1), down_backend(2)])
    stub.answer["backend_servers"][0] |= {"state": "ejected", "ejection": ejection}
    tab.from_disk(stub.url).is_live()
    for share in (None, 1.0):  # an older balancer tells none
        stub.answer["backend_servers"][0]["expected_share"] = share
        tab.shows("#backend-rows tr >> nth=0", f"exp. {'100.0' if share else DASH}")
        tab.shows("#banner-backends", "Only ejected backends are left, they are used. backend_1 (5 x 503)")
        tab.shows("#t-up", "1 / 2")
        expect(tab.at("#alarm")).to_be_empty()
    stub.answer["backend_servers"].append(backend(3))
    stub.answer["backend_servers"][0]["expected_share"] = 0.0
    tab.shows("#banner-backends", "2 of 3 backends down or ejected")


def test_no_traffic_yet_is_no_success_rate(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(1, total_requests=0, latency=None)])
    tab.from_disk(stub.url).is_live()
    expect(tab.at("#t-success")).to_have_text(DASH)
    expect(tab.at("#t-p95")).to_have_text(DASH)
    expect(tab.at("#t-total")).to_have_text("0")
    tab.view("traffic")
    tab.shows("#recent-empty", "No requests yet.")
    stub.history = {1: history(["backend_1"]), 10: []}  # from before a reset
    wait_until(lambda: sum("/history" in path for path in stub.asked) > 3)
    expect(tab.at("#t-success")).to_have_text(DASH)
    tab.page.click("#first-traffic")
    tab.view("overview")
    tab.shows("#traffic-result", "10 ok, 0 failed")


@pytest.mark.parametrize(
    ("uptime", "words"), [(1.0, "The balancer was restarted."), (9999.0, "The statistics were reset.")]
)
def test_counters_that_fall_are_explained_and_no_rate_is_negative(
    tab: Tab, stub: Stub, uptime: float, words: str
) -> None:
    stub.answer["statistics"]["requests_per_second"] = None
    tab.from_disk(stub.url).is_live()
    stub.answer = status([backend(1, total_requests=5), backend(2, total_requests=4)], uptime=uptime)
    stub.answer["statistics"] |= {"requests_per_second": None, "start_time": stub.answer["now"]}
    tab.shows("#banner-restart", words)
    expect(tab.at("#t-rate")).to_have_text(re.compile(f"^({DASH}|0.0)$"))
    tab.page.click("#dismiss-restart")
    expect(tab.at("#banner-restart")).to_be_hidden()


def test_the_certificate_is_named_and_warned_of_in_time(tab: Tab, stub: Stub) -> None:
    names = ["lb.example", "<b>.example", "a.example", "c.example"]
    stub.answer["tls"] = {"names": names, "expires_at": 4102444800.5, "last_error": None}
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    tab.shows("#config-facts", "lb.example, <b>.example, a.example and 1 more, until 2100-01-01")
    stub.answer["tls"]["pending"] = True
    tab.shows("#config-facts", "until 2100-01-01; its renewal is waiting")
    expect(tab.at("#banner-certificate")).to_be_hidden()
    stub.answer["tls"]["last_error"] = "tls_key 'key.pem': is empty"
    tab.shows(
        "#banner-certificate", "Another certificate was refused; the old one goes on. tls_key 'key.pem': is empty"
    )
    stub.answer["tls"] |= {"last_error": None, "expires_at": stub.answer["now"] + 13 * 86400 + 60}
    tab.shows("#banner-certificate", "The certificate expires in 13 d")
    stub.answer["tls"]["expires_at"] = stub.answer["now"] - 1
    tab.shows("#banner-certificate", "The certificate has expired.")
    stub.answer["tls"] = None
    expect(tab.at("#banner-certificate")).to_be_hidden()


def test_lifecycle_panic_a_refused_configuration_and_waiting_requests_are_told(tab: Tab, stub: Stub) -> None:
    stub.answer["lifecycle"] = "draining"
    tab.from_disk(stub.url).is_live()
    tab.shows("#banner-lifecycle", "finishes 2 requests in flight")
    stub.answer |= {"lifecycle": "starting", "panic": True}
    stub.answer["config"]["last_error"] = "balancer.toml line 3: weight"
    stub.answer["statistics"] |= {"waiting_requests": 7, "queued_requests": 0}
    tab.shows("#banner-lifecycle", "first health checks")
    tab.shows("#banner-panic", "Fail-open is on.")
    tab.shows("#banner-config", "balancer.toml line 3: weight")
    tab.shows("#t-active-note", "waiting: 7 for a backend")
    stub.answer["statistics"]["websockets"] = 3
    tab.shows("#t-active-note", "3 WebSockets; waiting: 7 for a backend")
    stub.answer["statistics"]["waiting_requests"] = None
    tab.shows("#t-active-note", "none waiting")
    assert DASH not in tab.at("#t-active-note").inner_text()


STRANGE: list[Json] = [
    {"statistics": None, "backend_servers": [{}, None, 7], "recent_requests": [{}, "x"]},
    {"backend_servers": "many", "statistics": [], "capabilities": 5, "algorithm": {}, "uptime": "long"},
    {
        "backend_servers": [{"id": 5, "weight": "3", "health": [], "latency": 1}],
        "statistics": {"total_requests": -1},
    },
    {"backend_servers": [{"id": "a"}, {"id": "a"}], "now": 1e300, "uptime": 1e300, "schema_version": 99},
    {
        "backend_servers": [{"id": "a", "health": {"since": -1e300, "last_check": {}}}],
        "recent_requests": [{"timestamp": 1e300}],
    },
]


def test_missing_and_strange_fields_become_dashes(tab: Tab, stub: Stub) -> None:
    for answer in STRANGE:
        stub.answer = answer
        tab.from_disk(stub.url).is_live()
        shown = tab.at("body").inner_text()
        assert not NOT_A_VALUE.search(shown), shown
        assert DASH in shown


def test_another_schema_is_told_and_shown_as_far_as_it_goes(tab: Tab, stub: Stub) -> None:
    stub.answer |= {"schema_version": 2, "new_field": {"x": 1}}
    tab.from_disk(stub.url).is_live()
    tab.shows("#foot-schema", "status schema 2")
    tab.shows("#t-total", "600")


def test_hostile_text_is_only_text(tab: Tab, stub: Stub) -> None:
    hostile = down_backend(1, reason=HOSTILE, id=HOSTILE, url="javascript:alert(1)", state="<b>up")
    stub.answer = status([hostile, backend(2, id="x" * 5000), backend(3, id="\u202eevil\u0000")])
    stub.answer |= {"load_balancer_id": HOSTILE, "algorithm": HOSTILE, "version": HOSTILE, "lifecycle": HOSTILE}
    stub.answer["recent_requests"] = [
        recent(1, path="<script>alert(1)</script>", reason=HOSTILE, method=HOSTILE, request_id="hostile")
    ]
    stub.answer["capabilities"]["algorithms"] = [{"name": HOSTILE, "description": HOSTILE}]
    stub.answer["config"]["last_error"] = HOSTILE
    stub.history = {1: history([HOSTILE, "__proto__"]), 10: []}
    stub.tell(event(1, HOSTILE, HOSTILE, HOSTILE, message=HOSTILE))
    stub.requests["hostile"] = explained(HOSTILE) | {"reason": HOSTILE, "method": HOSTILE}
    tab.from_disk(stub.url).is_live()
    expect(tab.at("#backend-rows .name").first).to_have_text(HOSTILE)
    expect(tab.at("#event-rows .who")).to_have_text(HOSTILE)
    tab.page.locator("#backend-rows .c-menu button").first.click()
    tab.page.keyboard.press("Escape")
    tab.page.locator("#backend-rows .name").first.click()
    expect(tab.at("#drawer-title")).to_have_text(HOSTILE)
    tab.page.keyboard.press("Escape")
    tab.view("system")
    tab.view("traffic")
    expect(tab.at("#recent-rows .c-path")).to_have_text("<script>alert(1)</script>")
    tab.page.locator("#recent-rows .c-why button").click()
    expect(tab.at("#request-title")).to_contain_text(HOSTILE)
    tab.page.keyboard.press("Escape")
    assert tab.at("img, a[href^='javascript'], #backend-rows b").count() == 0
    assert tab.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


# ---- Controls --------------------------------------------------------------------------------------------------------


def test_algorithms_come_from_the_balancer(tab: Tab, stub: Stub) -> None:
    stub.answer["capabilities"]["algorithms"] = [
        {"name": "weighted", "description": "By weight."},
        {"name": "moon_phase", "description": "New. " * 150},
    ]
    tab.from_disk(stub.url).is_live()
    assert tab.at("#algorithm option").all_inner_texts() == ["Weighted", "Moon phase"]
    tab.shows("#algorithm-about", "By weight.")
    tab.page.select_option("#algorithm", "moon_phase")
    tab.shows("#algorithm-about", "New. " * 150)  # it was cut in mid-sentence


def test_a_choice_is_not_overwritten_and_apply_sends_it(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.select_option("#algorithm", "least_connections")
    stub.answer["algorithm"] = "round_robin"
    tab.shows("#lb-algorithm", "Round robin")
    expect(tab.at("#algorithm")).to_have_value("least_connections")
    assert stub.writes == []
    tab.page.click("#apply")
    tab.shows("#toasts", "Algorithm is now least_connections")
    tab.shows("#announcer", "Algorithm is now least_connections")
    tab.shows("#lb-algorithm", "Least connections")
    assert stub.writes == [("/algorithm", {"algorithm": "least_connections"})]
    expect(tab.at("#apply")).to_have_attribute("aria-disabled", "true")


def test_a_list_that_has_the_focus_follows_the_balancer(tab: Tab, stub: Stub) -> None:
    """It kept the old value for as long as it had the focus."""
    tab.from_disk(stub.url).is_live()
    tab.page.focus("#algorithm")
    stub.answer["algorithm"] = "round_robin"
    expect(tab.at("#algorithm")).to_have_value("round_robin")


def test_reset_asks_first_and_says_what_goes(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    tab.page.focus("#reset")
    tab.page.keyboard.press("Enter")
    expect(tab.at("#confirm")).to_be_visible()
    tab.shows("#confirm", "total (600)")
    tab.shows("#confirm", "Prometheus counters")
    expect(tab.at("#confirm-no")).to_be_focused()
    tab.page.keyboard.press("Escape")
    expect(tab.at("#reset")).to_be_focused()
    assert stub.writes == []
    tab.page.keyboard.press("Enter")
    tab.page.press("#confirm-yes", "Enter")
    tab.shows("#toasts", "Statistics reset")
    assert stub.writes == [("/reset", {})]


def test_a_read_only_balancer_offers_no_changes(tab: Tab, stub: Stub) -> None:
    stub.answer["capabilities"]["writes"] = False
    tab.from_disk(stub.url).is_live()
    tab.shows("#write-note", "Read-only")
    tab.page.select_option("#algorithm", "round_robin")
    for control in ("#apply", "#add-backend"):
        expect(tab.at(control)).to_have_attribute("aria-disabled", "true")
    assert tab.at("#backend-rows .weight").first.get_attribute("readonly") is not None
    tab.page.locator("#backend-rows .c-menu button").first.click()
    assert tab.at("#menu button:not([aria-disabled])").all_inner_texts() == ["Copy URL", "Show its events"]
    expect(tab.at("#send")).not_to_have_attribute("aria-disabled", "true")


def test_test_traffic_is_counted_per_backend_and_failures_are_named(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.answer = status([backend(1), backend(2)])
    tab.from_disk(stub.url).is_live()
    tab.page.fill("#traffic-path", "//elsewhere.example/")
    tab.page.click("#send")
    tab.shows("#traffic-result", "the path must begin with one slash")
    expect(tab.at("#traffic-path")).to_have_attribute("aria-invalid", "true")
    assert stub.traffic == 0
    tab.page.fill("#traffic-path", "/api/process")
    tab.page.click("#send")
    for words in ("10 requests in", "10 ok, 0 failed", re.compile(r"p95 [\d.]+ m?s")):
        tab.shows("#traffic-result", words)
    assert tab.at("#traffic-counts li").all_inner_texts() == ["backend_1: 5 (50.0 %)", "backend_2: 5 (50.0 %)"]
    assert stub.traffic == 10
    stub.traffic_code = 503
    tab.page.click("#send")
    tab.shows("#traffic-result", "0 ok, 10 failed")
    tab.shows("#traffic-counts", "503 from backend_1")
    tab.page.click("#pause")
    stub.stop()
    tab.page.click("#send")
    tab.shows("#traffic-counts", "no answer: 10")
    tab.shows("#traffic-result", "0 ok, 10 failed")


def test_the_control_port_offers_no_test_traffic(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(1, total_requests=0)])
    del stub.answer["capabilities"]["traffic"]  # of an older balancer
    tab.from_disk(stub.url).is_live()
    expect(tab.at("#send")).not_to_have_attribute("aria-disabled", "true")
    stub.answer["capabilities"]["traffic"] = False
    tab.shows("#traffic-result", "This is the control port: it forwards nothing.")
    for field in ("#traffic-path", "input[name=amount][value='10']"):
        expect(tab.at(field)).to_be_disabled()
    for button in ("#send", "#first-traffic"):
        expect(tab.at(button)).to_have_attribute("aria-disabled", "true")
        tab.page.click(button, force=True)
        tab.view("traffic")
    assert stub.traffic == 0


def test_unreadable_test_traffic_is_no_failure_and_the_balancer_is_asked(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.traffic_cors = False
    tab.from_disk(stub.url).is_live()
    stub.count_traffic = True
    tab.page.click("#send")
    tab.shows("#traffic-result", "10 answered, but this page may not read the answers")
    assert "failed" not in tab.at("#traffic-result").inner_text()
    assert tab.at("#traffic-counts li").all_inner_texts() == [
        "backend_1: 3 (30.0 %)", "backend_2: 4 (40.0 %)", "backend_3: 3 (30.0 %)",
    ]  # fmt: skip
    assert stub.traffic == 10


def test_test_traffic_is_bounded_leaves_room_for_polls_and_can_be_cancelled(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    stub.traffic_gate.clear()
    tab.pick("input[name=amount][value='100']")
    tab.page.click("#send")
    tab.shows("#traffic-result", "0 of 100 answered")
    stub.answer["statistics"]["total_requests"] = 4321
    tab.shows("#t-total", "4,321")
    tab.page.click("#cancel")
    tab.shows("#traffic-result", "Cancelled: 0 requests")
    expect(tab.at("#send")).to_be_focused()
    assert 1 < stub.most_at_once["traffic"] <= 6


# ---- Address, theme, privacy, accessibility ------------------------------------------------------------------------


def test_the_address_is_checked_and_remembered(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    for wrong in ("ftp://example", "javascript:alert(1)", "http://user:word@127.0.0.1", "http://"):
        tab.connect_to(wrong)
        expect(tab.at("#address-error")).not_to_be_empty()
        expect(tab.at("#address")).to_have_attribute("aria-invalid", "true")
    with serving(status([], load_balancer_id="other")) as other:
        tab.from_disk(stub.url, other.url).is_live()
        tab.connect_to(f" {other.url.removeprefix('http://')}/dashboard ")
        tab.shows("#lb-id", "other")
        tab.from_disk_alone()
        tab.shows("#lb-id", "other")
        expect(tab.at("#address")).to_have_value(other.url)
        tab.page.close()


def test_theme_and_refresh_are_remembered(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.use_gear()
    tab.page.select_option("#theme", "dark")
    tab.page.select_option("#interval", "5")
    tab.page.reload()
    tab.is_live()
    expect(tab.at("html")).to_have_attribute("data-theme", "dark")
    expect(tab.at("#interval")).to_have_value("5")


def test_the_page_needs_nothing_that_a_strict_policy_forbids(tab: Tab, stub: Stub) -> None:
    tab.page.goto(f"{stub.url}/dashboard")
    tab.is_live()
    expect(tab.at("#address")).to_have_value(stub.url)
    tab.page.click("#send")
    tab.shows("#traffic-result", "10 ok")
    assert {re.sub(r"^/(status.*since=).*", r"/\1", url.removeprefix(stub.url)) for url in tab.requests} == {
        "/dashboard", "/status?window=60&since=", "/api/process", "/history?step=1&since=0", "/history?step=10&since=0",
    }  # fmt: skip


def test_under_a_strict_policy_another_address_is_explained(tab: Tab, stub: Stub) -> None:
    tab.page.goto(f"{stub.url}/dashboard?lb=http://127.0.0.1:1")
    tab.shows("#banner-connection", "may only talk to the balancer that served it")
    assert tab.errors
    assert all("Content Security Policy" in text for text in tab.errors)
    tab.errors.clear()


# ---- The real program ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> Iterator[Demo]:
    """A demo that several tests use: each puts back what it changes. It outlives every page."""
    started = start_demo()
    yield started
    started.stop()


@pytest.mark.parametrize("prefix", ["", "/own"])
def test_under_a_path_of_a_proxy_all_requests_stay_below_it(tab: Tab, tmp_path: Path, prefix: str) -> None:
    """*Send* went to the root. `control_prefix` is no path of what is forwarded."""
    with WireBackend() as backend:
        flags = (f"--backend=only={backend.url}", f"--control-prefix={prefix}")
        with Balancer(*flags, env={"LB_PAGE_TOKEN": PAGE_TOKEN}, wait_ready=False) as balancer:
            with nginx_before(tmp_path, balancer, "", at="/lb/") as url:
                tab.page.goto(f"{url}/lb{prefix}/dashboard#token={PAGE_TOKEN}")
                tab.is_live()
                tab.page.click("#send")
                tab.shows("#traffic-result", "10 ok, 0 failed")
                links = [link.get_attribute("href") or "" for link in tab.at("a[href^=http]").all()]
                assert len(links) >= 5 and all(link.startswith(f"{url}/lb{prefix}/") for link in links)
                tab.page.goto("about:blank")
            assert [request.target for request in backend.requests] == [b"/api/process"] * 10
            assert tab.requests.count(f"{url}/lb/api/process") == 10
            assert not [asked for asked in tab.requests if not asked.startswith(f"{url}/lb/")]


# `demo` comes first among the arguments, so that the page is closed before the balancer is stopped.


def open_demo(tab: Tab, demo: Demo, from_disk: bool) -> None:
    tab.network_errors_expected = from_disk  # a backend need not send CORS headers with what it answers
    if from_disk:
        tab.from_disk(demo.url)
    else:
        tab.page.goto(f"{demo.url}/dashboard#token={PAGE_TOKEN}")
    tab.is_live()


@pytest.mark.parametrize("from_disk", [True, False], ids=["disk", "served"])
def test_real_balancer_shows_traffic_switches_the_algorithm_and_resets(shared: Demo, tab: Tab, from_disk: bool) -> None:
    open_demo(tab, shared, from_disk)
    if not from_disk:
        assert tab.page.url == f"{shared.url}/dashboard"  # without the token behind it
    expect(tab.at("#write-note")).to_be_hidden()
    expect(tab.at("#backend-rows tr")).to_have_count(len(shared.backends))
    for one in shared.backends:
        expect(tab.at("#backend-rows tr").filter(has_text=one.id)).to_contain_text("Up")
    before = int(tab.at("#t-total").inner_text().replace(",", ""))
    tab.page.click("#send")
    tab.shows("#traffic-result", "10 requests in")
    tab.shows("#traffic-counts", shared.backends[0].id)
    assert "10 failed" not in tab.at("#traffic-result").inner_text()
    expect(tab.at("#t-total")).to_have_text(f"{before + 10:,}")
    tab.view("traffic")
    tab.shows("#recent-rows", "/api/process")
    tab.view("overview")

    names = tab.at("#algorithm option").evaluate_all("nodes => nodes.map((node) => node.value)")
    assert {"round_robin", "weighted", "least_connections", "least_response_time"} <= set(names)
    tab.page.select_option("#algorithm", "round_robin")
    tab.page.click("#apply")
    tab.shows("#toasts", "round_robin")
    tab.shows("#lb-algorithm", "Round robin")
    assert tab.at(".toast.bad").count() == 0
    tab.page.click(".toast >> text=Undo")
    tab.shows("#lb-algorithm", "Weighted")

    tab.view("system")
    tab.page.click("#reset")
    tab.page.click("#confirm-yes")
    tab.view("overview")
    expect(tab.at("#t-total")).to_have_text("0")
    expect(tab.at("#t-success")).to_have_text(DASH)
    assert tab.requests and [url for url in tab.requests if not url.startswith(f"{shared.url}/")] == []


def test_real_balancer_shows_a_killed_backend_down_and_up_again(demo: Demo, tab: Tab) -> None:
    open_demo(tab, demo, from_disk=True)
    victim = demo.backends[0]
    row = tab.at("#backend-rows tr").filter(has_text=victim.id)
    expect(row).to_contain_text("Up")
    victim.kill()
    try:
        expect(row).to_contain_text("Down")
        tab.shows("#sentence", f"{victim.id} down")
    finally:
        victim.start()
    expect(row).to_contain_text("Up")


def test_real_balancer_explains_drains_and_keeps_the_past(shared: Demo, tab: Tab) -> None:
    open_demo(tab, shared, from_disk=False)
    tab.page.click("#send")
    tab.shows("#traffic-result", "10 ok, 0 failed")
    tab.view("traffic")
    tab.page.locator("#recent-rows .c-why button").first.click()
    for words in ("Weighted", "Candidate", "chosen", "was chosen because"):
        tab.shows("#request-dialog", words)
    tab.page.keyboard.press("Escape")
    tab.view("overview")
    row = tab.at("#backend-rows tr").nth(1)
    row.locator(".c-menu button").click()
    tab.page.get_by_role("menuitem", name="Drain").click()
    expect(row).to_contain_text("Drained")
    tab.shows("#event-rows", "admin_state set to drain")
    undo = tab.page.get_by_role("button", name="Undo")
    undo.focus()  # which keeps it on the screen
    tab.view("system")
    with tab.page.expect_download():  # which the policy of the served page must allow
        tab.page.click("#export-json")
    tab.view("overview")
    undo.click()
    expect(row.locator(".badge")).to_have_text("Up")
    tab.page.reload()
    tab.is_live()
    tab.shows("#event-rows", "admin_state set to ready")
    area = tab.at(".chart").first.locator("path.area").first
    wait_until(lambda: (area.get_attribute("d") or "").count("L") > 2)


def test_real_balancer_reloads_its_configuration(tmp_path: Path, scripted: WireBackend, tab: Tab) -> None:
    file = tmp_path / "balancer.toml"
    lines = f'[[backends]]\nid = "one"\nurl = "{scripted.url}"\nweight = '
    file.write_text(f"{lines}1\n", encoding="utf-8")
    with Balancer(f"--config={file}") as balancer:
        tab.page.goto(f"{balancer.url}/dashboard")
        tab.is_live()
        tab.view("system")
        file.write_text(f"{lines}7\n", encoding="utf-8")
        tab.page.click("#reload")
        tab.shows("#confirm", "backends.one.weight")
        tab.page.click("#confirm-yes")
        tab.shows("#toasts", "Configuration reloaded, 1 change.")
        tab.view("overview")
        expect(tab.at("#backend-rows .weight")).to_have_value("7")
        tab.view("system")
        file.write_text("algorithm = 5", encoding="utf-8")
        tab.network_errors_expected = True
        tab.page.click("#reload")
        tab.shows(".toast.bad", "algorithm")
        tab.page.close()
