"""What was opened follows the state of now: it was worked out once, and a menu opened before the page was connected
said "Not connected." for as long as it was open. What somebody has typed there stays theirs."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, expect
from support import PAGE_TOKEN, wait_until

from tests.dashboard_stub import Stub, backend, down_backend, explained, recent, serving, status
from tests.dashboard_tab import Tab, chromium, stub, tab
from tests.test_dashboard_actions import PREVIEW, choose

__all__ = ["chromium", "stub", "tab"]  # fixtures


def lose(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.stop()
    tab.shows("#pill", "Disconnected")


def find(tab: Tab, stub: Stub) -> None:
    """Connected again, without a click that would close a menu."""
    stub.start()
    tab.page.evaluate("document.getElementById('retry').click()")
    tab.is_live()


def is_blocked(button: Locator, reason: str | None = None) -> None:
    expect(button).to_have_attribute("aria-disabled", "true")
    if reason:
        expect(button).to_have_attribute("title", reason)


def is_allowed(button: Locator) -> None:
    expect(button).not_to_have_attribute("aria-disabled", "true")
    expect(button).not_to_have_attribute("title", re.compile("."))


def test_a_menu_opened_first_works_once_connected(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    lose(tab, stub)
    tab.page.locator("#backend-rows .c-menu button").first.click()
    drain = tab.page.get_by_role("menuitem", name="Drain")
    is_blocked(drain, "Not connected.")
    find(tab, stub)
    is_allowed(drain)
    expect(drain).to_be_focused()
    drain.click()
    tab.shows("#toasts", "backend_1 gets no new requests.")


def test_an_open_menu_tells_what_was_lost_changed_and_removed(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.locator("#backend-rows .c-menu button").first.click()
    drain, copy = (tab.page.get_by_role("menuitem", name=name) for name in ("Drain", "Copy URL"))
    stub.answer["backend_servers"][0]["admin_state"] = "drain"
    expect(drain).to_have_text("Drain: no new requests (now)")
    is_blocked(drain, "It is so already.")
    stub.answer["backend_servers"][0]["admin_state"] = "ready"
    is_allowed(drain)
    lose(tab, stub)
    is_blocked(drain, "Not connected.")
    del stub.answer["backend_servers"][0]
    find(tab, stub)
    is_blocked(drain, "backend_1 was removed.")
    is_allowed(copy)
    tab.page.keyboard.press("Tab")
    expect(tab.at("#main")).to_be_focused()


def test_a_question_is_about_the_backend_as_it_is_now(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    choose(tab, 1, "Remove")
    tab.shows("#confirm", "1 request in flight")
    stub.answer["backend_servers"][1] |= {"active_connections": 4, "weight": 7}
    tab.shows("#confirm", "4 requests in flight")
    lose(tab, stub)
    tab.shows("#confirm-note", "Not connected.")
    is_blocked(tab.at("#confirm-yes"))
    tab.page.click("#confirm-yes", force=True)
    find(tab, stub)
    expect(tab.at("#confirm-note")).to_be_empty()
    tab.page.click("#confirm-yes")
    tab.page.get_by_role("button", name="Undo").click()
    wait_until(lambda: len(stub.writes) == 2)
    assert [name for name, _ in stub.writes] == ["DELETE /backends/backend_2", "/backends"]
    assert stub.writes[1][1]["weight"] == 7


def test_a_question_that_was_answered_elsewhere_says_so(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(1), down_backend(2)])
    tab.from_disk(stub.url).is_live()
    choose(tab, 0, "Maintenance")
    tab.shows("#confirm", "no backend takes traffic")
    stub.answer = status([backend(1), backend(2)])
    tab.shows("#confirm", "other backends have come up")
    stub.answer = status([backend(1, admin_state="maint", state="maint"), backend(2)])
    tab.shows("#confirm-note", "There is nothing left to change.")
    is_blocked(tab.at("#confirm-yes"))
    tab.page.keyboard.press("Escape")
    choose(tab, 1, "Remove")
    del stub.answer["backend_servers"][1]
    tab.shows("#confirm-note", "backend_2 was removed.")
    tab.page.click("#confirm-yes", force=True)
    tab.page.click("#confirm-no")
    assert stub.writes == []


def test_counts_to_be_reset_and_a_preview_are_those_of_now(tab: Tab, stub: Stub) -> None:
    stub.reload_answer = PREVIEW
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    tab.page.click("#reset")
    stub.answer["statistics"]["total_requests"] = 4321
    tab.shows("#confirm", "total (4,321)")
    tab.page.click("#confirm-no")
    tab.page.click("#reload")
    is_allowed(tab.at("#confirm-yes"))
    stub.answer["backend_servers"][0] |= {"weight": 9, "expected_share": 0.75}
    tab.shows("#confirm-note", "Something was changed meanwhile.")
    tab.shows("#confirm", "75.0 %")
    is_blocked(tab.at("#confirm-yes"))


def test_a_limit_follows_the_balancer_until_another_one_is_typed(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    choose(tab, 1, "Limit connections")
    limit, save, note = tab.at("#new-max"), tab.at("#backend-yes"), tab.at("#backend-hint")
    stub.answer["backend_servers"][1]["max_connections"] = 60
    expect(limit).to_have_value("60")
    limit.fill("70")
    stub.answer["backend_servers"][1]["max_connections"] = 65
    expect(note).to_have_text("Meanwhile it was changed to 65.")
    lose(tab, stub)
    expect(note).to_have_text("Not connected.")
    limit.press("Enter")
    find(tab, stub)
    is_allowed(save)
    expect(limit).to_have_value("70")
    limit.press("Enter")
    tab.shows("#toasts", "backend_2: at most 70 connections.")
    assert stub.writes == [("PATCH /backends/backend_2", {"max_connections": 70})]


def test_a_limit_for_a_backend_that_is_gone_adds_none(tab: Tab, stub: Stub) -> None:
    """It was sent as a new backend without a URL."""
    tab.from_disk(stub.url).is_live()
    choose(tab, 1, "Limit connections")
    tab.page.fill("#new-max", "70")
    del stub.answer["backend_servers"][1]
    tab.shows("#backend-hint", "backend_2 was removed.")
    tab.page.press("#new-max", "Enter")
    is_blocked(tab.at("#backend-yes"))
    expect(tab.at("#backend-dialog")).to_be_visible()
    assert stub.writes == []


def test_a_backend_half_typed_survives_a_lost_connection(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.click("#add-backend")
    tab.page.fill("#new-url", "http://127.0.0.1:5004")
    lose(tab, stub)
    is_blocked(tab.at("#backend-yes"))
    find(tab, stub)
    tab.page.press("#new-url", "Enter")
    tab.shows("#toasts", "backend_4 was added")
    assert stub.writes[0][1]["url"] == "http://127.0.0.1:5004"


def test_the_dialog_of_the_token_tells_a_refusal_that_came_later(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    tab.page.goto(f"{stub.url}/dashboard#token={PAGE_TOKEN}")
    tab.is_live()
    tab.use_gear()
    tab.page.click("#gear-token")
    tab.page.fill("#token", "half-typed")
    expect(tab.at("#token-forget")).to_be_visible()
    stub.page_token = "another-token-by-now"
    tab.shows("#token-error", "This token was refused.")
    expect(tab.at("#token-forget")).to_be_hidden()
    expect(tab.at("#token")).to_have_value("half-typed")


def test_details_of_a_request_opened_first_come_once_connected(tab: Tab, stub: Stub) -> None:
    stub.requests["request-1"] = explained("request-1")
    stub.answer["recent_requests"] = [recent(1, attempts=2)]
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    lose(tab, stub)
    tab.page.get_by_role("button", name=re.compile("^Why this backend: GET")).click()
    tab.shows("#request-dialog", "Not connected")
    find(tab, stub)
    tab.shows("#request-dialog", "Not considered: backend_3 (down).")
    expect(tab.at("#request-dialog")).not_to_contain_text("Not connected")
    assert stub.asked.count("/requests/request-1") == 1


def test_details_of_a_backend_opened_first_are_renewed_and_tell_its_removal(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    lose(tab, stub)
    tab.page.get_by_role("button", name="Details of backend_1").click()
    stub.answer["backend_servers"][0] |= {"weight": 9, "source": "api"}
    find(tab, stub)
    tab.shows("#drawer", "api")
    del stub.answer["backend_servers"][0]
    tab.shows("#drawer-badge", "Removed")


def test_an_undo_is_for_the_balancer_where_it_was_done(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    choose(tab, 0, "Drain")
    undo = tab.page.get_by_role("button", name="Undo")
    undo.focus()  # which keeps it on the screen
    with serving(status([backend(1)], load_balancer_id="other")) as other:
        other.page_token = None
        tab.connect_to(other.url)
        tab.shows("#lb-id", "other")
        is_blocked(undo, "This was at another balancer.")
        undo.click(force=True)
        tab.connect_to(stub.url)
        tab.shows("#lb-id", "lb-1")
        is_allowed(undo)
        assert other.writes == []


def test_an_undo_waits_for_the_connection(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    choose(tab, 0, "Drain")
    undo = tab.page.get_by_role("button", name="Undo")
    is_allowed(undo)
    undo.focus()  # which keeps it on the screen
    lose(tab, stub)
    is_blocked(undo, "Not connected.")
    undo.click(force=True)
    find(tab, stub)
    is_allowed(undo)
    undo.click()
    wait_until(lambda: len(stub.writes) == 2)
