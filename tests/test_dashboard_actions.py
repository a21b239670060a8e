"""What the dashboard changes: who asks first, what is sent, how it is undone, and what a refusal looks like."""

from __future__ import annotations

import re

from playwright.sync_api import Route, expect
from support import PAGE_TOKEN, wait_until

from tests.dashboard_stub import Stub, backend, explained, recent, status
from tests.dashboard_tab import Tab, chromium, stub, tab

__all__ = ["chromium", "stub", "tab"]  # fixtures

PREVIEW = {
    "changes": [
        {"what": "backend_1.weight", "from": 3, "to": 5},
        {"what": "backend_4", "from": None, "to": "http://127.0.0.1:5004"},
    ],
    "shares": {"backend_1": 0.625, "backend_2": 0.25, "backend_4": 0.125},
    "kept": ["backend_2.weight"],
    "needs_restart": ["port"],
}


def choose(tab: Tab, index: int, words: str) -> None:
    """An entry of a row's menu."""
    tab.page.locator("#backend-rows .c-menu button").nth(index).click()
    tab.page.get_by_role("menuitem", name=words).click()


# ---- State of a backend


def test_a_drained_backend_is_put_back_by_undo(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    choose(tab, 0, "Drain")
    tab.shows("#toasts", "backend_1 gets no new requests.")
    tab.shows("#backend-rows tr >> nth=0", "Draining (1 left)")
    tab.page.get_by_role("button", name="Undo").click()
    tab.shows("#backend-rows tr >> nth=0", "Up")
    assert stub.writes == [
        ("PATCH /backends/backend_1", {"admin_state": "drain"}),
        ("PATCH /backends/backend_1", {"admin_state": "ready"}),
    ]


def test_the_last_backend_is_only_taken_away_after_asking(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(1), backend(2, state="maint", admin_state="maint", healthy=False)])
    tab.from_disk(stub.url).is_live()
    choose(tab, 0, "Maintenance")
    tab.shows("#confirm", "no backend takes traffic")
    tab.page.keyboard.press("Escape")
    expect(tab.at("#confirm")).to_be_hidden()
    assert stub.writes == []
    choose(tab, 0, "Maintenance")
    tab.page.click("#confirm-yes")
    tab.shows("#toasts", "backend_1 is in maintenance.")
    assert stub.writes == [("PATCH /backends/backend_1", {"admin_state": "maint"})]


def test_ejected_backends_that_would_be_used_are_named_before_the_last_healthy_one_goes(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(1), backend(2, state="ejected", expected_share=0.0)])
    tab.from_disk(stub.url).is_live()
    choose(tab, 0, "Drain")
    tab.shows("#confirm", "only ejected backends are left, they are used: backend_2")
    assert "503" not in tab.at("#confirm").inner_text()
    tab.page.keyboard.press("Escape")
    assert stub.writes == []


def test_the_last_of_a_pool_is_the_last_whatever_other_pools_have(tab: Tab, stub: Stub) -> None:
    """Drained together with one of another pool it was gone without a question, and others "took over its traffic"."""
    stub.answer = status([backend(1, pool="api"), backend(2, pool="web"), backend(3, pool="web")])
    stub.answer["pools"] = [{"name": "api"}, {"name": "web"}]
    tab.from_disk(stub.url).is_live()
    for index in (0, 1):
        tab.at("#backend-rows input[type=checkbox]").nth(index).check()
    tab.page.click("#bulk-drain")
    tab.shows("#confirm", "no backend takes traffic in the pool api, and every request there is answered with 503")
    tab.page.keyboard.press("Escape")
    choose(tab, 0, "Remove")
    tab.shows("#confirm", "No other backend takes traffic in the pool api")
    tab.page.keyboard.press("Escape")
    assert stub.writes == []
    stub.answer["backend_servers"][0] |= {"state": "down", "healthy": False}
    tab.shows("#sentence", "No healthy backend in the pool api. Clients get 503.")
    stub.answer["backend_servers"][1] |= {"state": "down", "healthy": False}
    tab.page.click("#open-notices")
    tab.shows("#notices", "Its traffic goes to 1 other")


def test_several_are_changed_and_undone_together(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(index) for index in range(1, 6)])
    tab.from_disk(stub.url).is_live()
    for index in (1, 3):
        tab.page.locator("#backend-rows input[type=checkbox]").nth(index).check()
    tab.shows("#bulk-note", "2 selected")
    tab.page.click("#bulk-drain")
    tab.shows("#toasts", "backend_2 and backend_4 get no new requests.")
    expect(tab.at("#bulk")).to_be_hidden()
    tab.page.get_by_role("button", name="Undo").click()
    wait_until(lambda: len(stub.writes) == 4)
    assert [name for name, body in stub.writes if body == {"admin_state": "ready"}] == [
        "PATCH /backends/backend_2",
        "PATCH /backends/backend_4",
    ]


def test_a_change_that_half_worked_says_so(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.answer = status([backend(index) for index in range(1, 4)])
    stub.failing_writes = {"/backends/backend_2"}
    tab.from_disk(stub.url).is_live()
    for index in (0, 1):
        tab.page.locator("#backend-rows input[type=checkbox]").nth(index).check()
    tab.page.click("#bulk-drain")
    tab.shows(".toast.bad", "1 of 2 done: backend_2: that value is wrong")


def test_a_change_to_what_is_already_so_sends_nothing(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.locator("#backend-rows input[type=checkbox]").first.check()
    tab.page.click("#bulk-ready")
    tab.shows(".toast.calm", "Nothing changed")
    assert stub.writes == []


# ---- Weight and limit


def test_a_weight_is_typed_checked_and_undone(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    weight = tab.at("#backend-rows .weight").first
    weight.fill("257")
    weight.press("Enter")
    expect(weight).to_have_attribute("aria-invalid", "true")
    tab.shows("#backend-rows .o-weight >> nth=0", "0 to 256")
    weight.press("Escape")
    expect(weight).to_have_value("3")
    weight.fill("8")
    weight.press("Enter")
    tab.shows("#toasts", "backend_1: weight 8.")
    expect(weight).to_have_value("8")
    expect(weight).to_be_focused()
    tab.page.get_by_role("button", name="Undo").click()
    tab.shows("#toasts", "backend_1: weight 3.")
    assert [body for _, body in stub.writes] == [{"weight": 8}, {"weight": 3}]


def test_a_weight_being_typed_stays_until_it_is_applied_or_dropped(tab: Tab, stub: Stub) -> None:
    """Tab dropped it without a word."""
    tab.from_disk(stub.url).is_live()
    weight = tab.at("#backend-rows .weight").first
    weight.fill("77")
    stub.answer["backend_servers"][0]["weight"] = 9
    stub.answer["statistics"]["total_requests"] = 4321
    tab.shows("#t-total", "4,321")
    expect(weight).to_have_value("77")
    tab.page.keyboard.press("Tab")
    expect(weight).to_have_value("77")
    tab.shows("#backend-rows .o-weight >> nth=0", "Enter applies")
    weight.press("Escape")
    expect(weight).to_have_value("9")
    assert stub.writes == []


def test_connections_are_limited_in_a_dialog(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    choose(tab, 1, "Limit connections")
    expect(tab.at("#new-max")).to_have_value("50")
    expect(tab.at("#field-url")).to_be_hidden()
    tab.page.fill("#new-max", "0")
    tab.page.keyboard.press("Enter")
    tab.shows("#backend-error", "from 1 to 1,000,000")
    tab.page.fill("#new-max", "")
    tab.page.keyboard.press("Enter")
    tab.shows("#toasts", "backend_2: no limit of connections.")
    tab.page.get_by_role("button", name="Undo").click()
    wait_until(lambda: len(stub.writes) == 2)
    assert [body for _, body in stub.writes] == [{"max_connections": None}, {"max_connections": 50}]


# ---- Add and remove


def test_a_backend_is_added_and_a_refusal_stays_in_the_dialog(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.failing_writes = {"/backends"}
    tab.from_disk(stub.url).is_live()
    tab.page.click("#add-backend")
    tab.page.fill("#new-url", "http://127.0.0.1:5004")
    tab.page.keyboard.press("Enter")
    tab.shows("#backend-error", "that value is wrong")
    stub.failing_writes = set()
    tab.page.fill("#new-weight", "2")
    tab.page.keyboard.press("Enter")
    tab.shows("#toasts", "backend_4 was added")
    expect(tab.at("#backend-rows tr")).to_have_count(4)
    added = {"url": "http://127.0.0.1:5004", "weight": 2, "max_connections": None}
    assert stub.writes == [("/backends", added)]


def test_what_became_of_a_backend_whose_dialog_was_left_is_told_beside_the_next(tab: Tab, stub: Stub) -> None:
    """A refusal was lost, and a success closed whatever the dialog was about by then."""
    held: list[Route] = []
    tab.from_disk(stub.url).is_live()
    tab.network_errors_expected = True  # the refusal
    tab.page.route("**/backends", lambda route: held.append(route))
    for outcome in ("backend_4 was added", "that value is wrong"):
        tab.page.click("#add-backend")
        tab.page.fill("#new-url", "http://127.0.0.1:5004")
        tab.page.keyboard.press("Enter")
        tab.page.keyboard.press("Escape")
        choose(tab, 1, "Limit")
        tab.page.fill("#new-max", "12")
        held.pop().continue_()
        tab.shows("#toasts", outcome)
        expect(tab.at("#new-max")).to_have_value("12")
        expect(tab.at("#backend-error")).to_be_empty()
        tab.page.keyboard.press("Escape")
        stub.failing_writes.add("/backends")


def test_a_backend_is_removed_after_asking_and_undo_adds_it_again(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    choose(tab, 1, "Remove")
    tab.shows("#confirm", "1 request in flight may finish first")
    tab.page.click("#confirm-no")
    assert stub.writes == []
    choose(tab, 1, "Remove")
    tab.page.click("#confirm-yes")
    tab.shows("#toasts", "backend_2 removed")
    expect(tab.at("#backend-rows tr")).to_have_count(2)
    tab.page.get_by_role("button", name="Undo").click()
    tab.shows("#toasts", "backend_2 is back")
    again = {"id": "backend_2", "url": "http://127.0.0.1:5002", "weight": 2, "max_connections": 50}
    assert stub.writes == [("DELETE /backends/backend_2", {}), ("/backends", again)]


# ---- Token and refusal


def test_a_change_asks_for_the_token_and_goes_on(tab: Tab, stub: Stub) -> None:
    """A wrong one is told in the dialog and nowhere else."""
    tab.network_errors_expected = True
    tab.page.goto(f"{stub.url}/dashboard")
    tab.is_live()
    tab.shows("#write-note", "Changes need a token.")
    tab.page.click("#pause")
    choose(tab, 0, "Drain")
    tab.shows("#token-error", "This change needs a token.")
    tab.page.fill("#token", "with blank")
    tab.page.keyboard.press("Enter")
    expect(tab.at("#token")).to_have_attribute("aria-invalid", "true")
    tab.page.fill("#token", "wrong")
    tab.page.keyboard.press("Enter")
    tab.shows("#token-error", "This token was refused.")
    expect(tab.at("#token-dialog")).to_be_visible()
    expect(tab.at(".toast")).to_have_count(0)
    tab.page.fill("#token", PAGE_TOKEN)
    tab.page.keyboard.press("Enter")
    tab.shows("#toasts", "backend_1 gets no new requests.")
    expect(tab.at("#token-dialog")).to_be_hidden()
    assert stub.writes == [("PATCH /backends/backend_1", {"admin_state": "drain"})]
    assert PAGE_TOKEN not in tab.page.evaluate("() => JSON.stringify({...localStorage})")


def test_a_refused_change_makes_the_page_read_only_until_asked_otherwise(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.refuse_writes = True
    tab.from_disk(stub.url).is_live()
    choose(tab, 0, "Drain")
    tab.shows(".toast.bad", "changes are off")
    tab.shows("#write-note", "Read-only here")
    expect(tab.at("#add-backend")).to_have_attribute("aria-disabled", "true")
    tab.page.locator("#backend-rows .c-menu button").first.click()
    expect(tab.page.get_by_role("menuitem", name="Drain")).to_have_attribute("aria-disabled", "true")
    tab.page.keyboard.press("Escape")
    stub.refuse_writes = False
    tab.page.click("#write-again")
    tab.page.select_option("#algorithm", "round_robin")
    tab.page.click("#apply")
    tab.shows("#lb-algorithm", "Round robin")


# ---- The laboratory, and traffic that goes on


def test_weights_are_tried_before_they_are_applied(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(1, weight=1), backend(2, weight=1)])
    tab.from_disk(stub.url).is_live()
    tab.view("lab")
    rows = tab.at("#mix-rows li")
    expect(tab.at("#mix-apply")).to_have_attribute("aria-disabled", "true")
    rows.nth(0).locator("input").fill("9")
    expect(rows.nth(0)).to_contain_text("50.0 % now, 90.0 % then")
    expect(rows.nth(1)).to_contain_text("50.0 % now, 10.0 % then")
    assert stub.writes == []
    tab.page.click("#mix-reset")
    expect(rows.nth(0)).to_contain_text("50.0 % now, 50.0 % then")
    rows.nth(0).locator("input").fill("3")
    tab.page.click("#mix-apply")
    tab.shows("#toasts", "backend_1: weight 3.")
    assert stub.writes == [("PATCH /backends/backend_1", {"weight": 3})]


def test_traffic_goes_on_until_it_is_stopped(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(1), backend(2)])
    tab.from_disk(stub.url).is_live()
    expect(tab.at("#field-rate")).to_be_hidden()
    tab.pick("input[name=amount][value='on']")
    tab.page.fill("#traffic-rate", "50")
    tab.page.click("#send")
    tab.shows("#traffic-result", re.compile(r"\d+ sent; last 10 s: \d+ answered, 0 failed, p95 [\d.]+ ms"))
    wait_until(lambda: stub.traffic > 20)
    assert stub.most_at_once["traffic"] <= 5
    tab.page.click("#cancel")
    tab.shows("#traffic-result", re.compile(r"\d+ requests in .* ok, 0 failed"))
    sent = stub.traffic
    tab.shows("#traffic-counts", "backend_2")
    wait_until(lambda: stub.running["traffic"] == 0)
    assert stub.traffic == sent


# ---- Configuration


def test_a_reload_is_previewed_before_it_is_applied(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.answer["config"] = {"file": "/etc/balancer.toml", "loaded_at": None, "last_error": None}
    stub.reload_answer = PREVIEW
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    tab.page.click("#reload")
    for words in ("/etc/balancer.toml", "backend_1.weight", "5", "62.5 %", "50.0 %", "backend_2.weight", "port"):
        tab.shows("#confirm", words)
    assert stub.writes == [("/reload?dry_run=1", {})]
    tab.page.click("#confirm-no")
    tab.page.click("#reload")
    tab.page.click("#confirm-yes")
    tab.shows("#toasts", "Configuration reloaded, 2 changes.")
    assert stub.writes == [("/reload?dry_run=1", {}), ("/reload?dry_run=1", {}), ("/reload", {})]
    stub.failing_writes = {"/reload?dry_run=1"}
    tab.page.click("#reload")
    tab.shows(".toast.bad", "that value is wrong")
    expect(tab.at("#confirm")).to_be_hidden()
    stub.answer["capabilities"]["reload"] = False
    expect(tab.at("#reload")).to_be_hidden()


def test_a_reload_without_changes_cannot_be_applied(tab: Tab, stub: Stub) -> None:
    stub.reload_answer = {"changes": [], "shares": None, "kept": [], "needs_restart": []}
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    tab.page.click("#reload")
    tab.shows("#confirm", "Nothing would change.")
    tab.page.click("#confirm-yes")
    expect(tab.at("#confirm")).to_be_hidden()
    assert stub.writes == [("/reload?dry_run=1", {})]


# ---- Looking closer


def test_a_request_tells_why_this_backend(tab: Tab, stub: Stub) -> None:
    stub.requests["request-1"] = explained("request-1")
    stub.answer["recent_requests"] = [recent(1, attempts=2)]
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    opener = tab.page.get_by_role("button", name=re.compile("^Why this backend: GET"))
    opener.click()
    dialog = tab.at("#request-dialog")
    for words in (
        "request-1", "Least connections", "1. backend_1: connect (connection refused)", "0.667",
        "Not considered: backend_3 (down).", "2. backend_2: 200", "backend_1 (already tried)", "connected in 0.3 ms",
        "backend_1 was chosen because 0.667 is the lowest score; next backend_2 with 1.50.",
        "backend_2 was chosen because no other backend could take it.",
    ):  # fmt: skip
        expect(dialog).to_contain_text(words)
    expect(dialog.locator("tr.chosen")).to_have_count(2)
    tab.page.keyboard.press("Escape")
    expect(opener).to_be_focused()


def test_a_request_that_is_no_longer_kept_shows_what_is_known(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.answer["recent_requests"] = [recent(1, status=502, reason="no answer", tried=[])]
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    tab.page.get_by_role("button", name=re.compile("^Why this backend: GET")).click()
    tab.shows("#request-dialog", "no longer keeps the details")
    tab.shows("#request-dialog", "no answer")
    tab.shows("#request-dialog", "No backend was tried.")


def test_rows_stay_while_somebody_points_at_them(tab: Tab, stub: Stub) -> None:
    stub.answer["recent_requests"] = [recent(1, path="/old")]
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    tab.at("#recent-rows tr").hover()
    tab.shows("#recent-note", "held while in use")
    stub.answer["recent_requests"] = [recent(2, path="/new")]
    stub.answer["statistics"]["total_requests"] = 4321
    tab.shows("#t-total", "4,321")
    tab.shows("#recent-rows", "/old")
    tab.page.mouse.move(0, 0)
    tab.shows("#recent-rows", "/new")


def test_failed_retried_or_slow_requests_are_asked_for_and_six_rows_are_shown(tab: Tab, stub: Stub) -> None:
    trouble = [recent(2, status=503), recent(3, attempts=2), recent(4, complete=False), recent(5, response_time=0.9)]
    stub.answer["recent_requests"] = [recent(1), *trouble, *(recent(index) for index in range(6, 20))]
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    expect(tab.at("#recent-rows tr")).to_have_count(6)
    tab.pick("#recent-kind input[value='trouble']")
    expect(tab.at("#recent-rows tr")).to_have_count(4)
    wait_until(lambda: any(path.startswith("/status?recent=100&window=60&") for path in stub.asked))
    tab.pick("#recent-kind input[value='all']")
    tab.page.click("#recent-more")
    expect(tab.at("#recent-rows tr")).to_have_count(19)


def test_backends_are_sorted_filtered_and_keep_the_focus(tab: Tab, stub: Stub) -> None:
    weights = [3, 1, 10, 2]
    stub.answer = status([backend(index, weight=weight) for index, weight in enumerate(weights, 1)])
    tab.from_disk(stub.url).is_live()
    names = tab.at("#backend-rows .name")
    heading = tab.page.get_by_role("button", name="Weight", exact=True)
    for order, sort in (
        (["3", "1", "4", "2"], "descending"),
        (["2", "4", "1", "3"], "ascending"),
        (list("1234"), None),
    ):
        heading.click()
        expect(names).to_have_text([f"backend_{number}" for number in order])
        assert heading.locator("..").get_attribute("aria-sort") == sort
    tab.page.get_by_role("button", name="Backend", exact=True).click()
    tab.page.fill("#filter", "5003")
    expect(names).to_have_text(["backend_3"])
    tab.page.fill("#filter", "none of them")
    tab.shows("#backends-empty", "No backend matches the filter.")
    tab.page.check("#only-problems")
    tab.shows("#backends-empty", "No backend has a problem")
    tab.page.focus("#filter")
    tab.page.keyboard.press("Escape")
    tab.shows("#backends-empty", "There are no problems")
    stub.answer["backend_servers"][3] |= {"state": "down", "healthy": False}
    expect(names).to_have_text(["backend_4"])
    tab.page.uncheck("#only-problems")
    heading.click()
    tab.at("#backend-rows .c-menu button").last.focus()
    stub.answer["backend_servers"][1]["weight"] = 99
    expect(names.first).to_have_text("backend_2")
    assert tab.page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "Actions for backend_2"
