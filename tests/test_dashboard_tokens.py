"""The dashboard's tokens: where it finds and keeps them, whom it sends them to, and what it says without one."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect
from support import PAGE_TOKEN, wait_until

from tests.dashboard_stub import Stub, serving, status
from tests.dashboard_tab import Tab, chromium, stub, tab

__all__ = ["chromium", "stub", "tab"]  # fixtures

OTHER_TOKEN = "another-token-of-a-test"
# What a page of the same origin finds in storage, and what is left where scripts and extensions look.
IN_REACH = """() => JSON.stringify([
  {...sessionStorage}, {...localStorage}, history.state, location.href, document.cookie, name,
  navigation.entries().map((one) => one.url), document.documentElement.outerHTML,
  [...document.querySelectorAll("input")].map((one) => one.value),
  Object.getOwnPropertyNames(window).map((it) => { try { return JSON.stringify(window[it]); } catch { return it; } }),
])"""


def in_reach(page: Page) -> str:
    found = page.evaluate(IN_REACH)
    assert "lb-1" in found  # it has looked
    return str(found)


def enter_token(tab: Tab, token: str) -> None:
    expect(tab.at("#token-dialog")).to_be_visible()
    tab.page.fill("#token", token)
    tab.page.keyboard.press("Enter")


def switch_algorithm(tab: Tab, name: str) -> None:
    tab.page.select_option("#algorithm", name)
    tab.page.click("#apply")


# ---- From disk


def test_a_double_click_reads_and_writes_at_whatever_port_the_demo_is(tab: Tab, stub: Stub) -> None:
    tab.grant(stub.url, f"http://localhost:{stub.port}")
    tab.from_disk_alone().is_live()
    expect(tab.at("#address")).to_have_value(stub.url)
    switch_algorithm(tab, "round_robin")
    tab.shows("#lb-algorithm", "Round robin")
    expect(tab.at("#write-note")).to_be_hidden()
    assert stub.writes == [("/algorithm", {"algorithm": "round_robin"})]
    assert PAGE_TOKEN not in in_reach(tab.page)


def test_from_disk_without_a_token_it_says_what_to_do(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    tab.from_disk_alone(f"?lb={stub.url}")
    tab.shows("#pill", "Token needed")
    for words in ("opened from disk", "./start_all.sh", "start_all.bat", f"{stub.url}/dashboard", "enter the token"):
        tab.shows("#banner-connection", words)
    expect(tab.at("#open-dashboard")).to_have_attribute("href", f"{stub.url}/dashboard")
    tab.page.click("#give-token")
    for words in (stub.url, "#token=", "run/access.js", "LB_PAGE_TOKEN"):
        tab.shows("#token-dialog", words)
    enter_token(tab, PAGE_TOKEN)
    tab.is_live()
    switch_algorithm(tab, "round_robin")
    tab.shows("#lb-algorithm", "Round robin")
    assert PAGE_TOKEN not in in_reach(tab.page)


def test_a_demo_that_is_started_later_or_anew_is_found(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    tab.from_disk(stub.url, token=OTHER_TOKEN)
    tab.shows("#banner-connection", f"This page's token is not accepted by {stub.url}")
    tab.shows("#banner-connection", "./start_all.sh")
    tab.grant(stub.url)
    tab.is_live()


def test_a_broken_access_file_is_as_good_as_none(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    tab.grant(stub.url)
    for code in ("window.LB_ACCESS = 5;", "throw 1;", 'window.LB_ACCESS = {"a": {"urls": [1]}};', "{"):
        (tab.folder / "run" / "access.js").write_text(code)
        tab.from_disk_alone(f"?lb={stub.url}")
        tab.shows("#banner-connection", "opened from disk")
    tab.errors.clear()  # the console tells of the script


def test_a_token_from_disk_never_goes_to_another_address(tab: Tab, stub: Stub) -> None:
    sent: list[str | None] = []
    tab.from_disk(stub.url).is_live()
    with serving(status([], load_balancer_id="other")) as other:
        other.page_token = None  # it lets everybody read, as earlier versions did
        tab.page.on(
            "request", lambda it: sent.append(it.headers.get("authorization")) if it.url.startswith(other.url) else None
        )
        tab.connect_to(other.url)
        tab.shows("#lb-id", "other")
        tab.page.close()
    assert sent and set(sent) == {None}


# ---- Served by the balancer


def test_the_printed_address_reads_and_writes_and_the_token_is_gone_from_it(tab: Tab, stub: Stub) -> None:
    tab.page.goto(f"{stub.url}/dashboard?x=1#token={PAGE_TOKEN}")
    tab.is_live()
    assert tab.page.url == f"{stub.url}/dashboard?x=1"
    expect(tab.at("#write-note")).to_be_hidden()
    switch_algorithm(tab, "round_robin")
    tab.shows("#lb-algorithm", "Round robin")
    assert PAGE_TOKEN not in in_reach(tab.page)
    assert not [target for target in stub.asked if PAGE_TOKEN in target]
    tab.page.reload()
    tab.is_live().shows("#write-note", "Changes need a token.")


def test_a_token_behind_the_address_is_taken_by_a_page_that_is_open_already(tab: Tab, stub: Stub) -> None:
    tab.page.goto(f"{stub.url}/dashboard")
    tab.is_live().shows("#write-note", "Changes need a token.")
    tab.page.goto(f"{stub.url}/dashboard#token={PAGE_TOKEN}")  # as typed into the address bar
    expect(tab.at("#write-note")).to_be_hidden()
    wait_until(lambda: tab.page.url == f"{stub.url}/dashboard")


def test_a_change_without_a_token_asks_for_it_and_is_then_done(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    for _ in range(2):  # a page that is loaded again has forgotten it
        stub.answer["algorithm"] = "weighted"
        tab.page.goto(f"{stub.url}/dashboard")
        tab.is_live().shows("#write-note", "Changes need a token.")
        switch_algorithm(tab, "round_robin")
        tab.shows("#token-error", "This change needs a token.")
        tab.shows("#token-dialog", "forgotten when this page is closed or loaded again")
        enter_token(tab, OTHER_TOKEN)
        tab.shows("#token-error", "This token was refused.")
        enter_token(tab, PAGE_TOKEN)
        tab.shows("#lb-algorithm", "Round robin")
        expect(tab.at("#write-note")).to_be_hidden()
        assert PAGE_TOKEN not in in_reach(tab.page)
    assert [name for name, _ in stub.writes] == ["/algorithm"] * 2


def test_where_reading_needs_a_token_a_wrong_one_is_sent_once(tab: Tab, stub: Stub) -> None:
    """Each time would count as a guess, and a balancer takes ten of them in a minute."""
    tab.network_errors_expected = True
    stub.token = OTHER_TOKEN
    sent: list[str | None] = []
    tab.page.on("request", lambda it: sent.append(it.headers.get("authorization")))
    tab.page.goto(f"{stub.url}/dashboard#token=not-the-right-token")
    tab.shows("#pill", "Token needed")
    tab.shows("#banner-connection", "This token was refused.")
    before = stub.polls
    wait_until(lambda: stub.polls > before)
    assert sent.count("Bearer not-the-right-token") == 1
    tab.page.click("#give-token")
    tab.shows("#token-error", "This token was refused.")
    enter_token(tab, OTHER_TOKEN)
    tab.is_live()
    assert OTHER_TOKEN not in in_reach(tab.page)


@pytest.mark.parametrize("how", ["query", "storage", "typed"])
def test_no_other_path_of_its_own_origin_is_taken_for_the_balancer(tab: Tab, stub: Stub, how: str) -> None:
    """A backend answers there: it could show what it likes, and be sent the token that somebody enters."""
    posing = f"{stub.url}/api/process"
    tab.page.goto(f"{stub.url}/dashboard" + (f"?lb={posing}" if how == "query" else ""))
    if how == "storage":
        tab.page.evaluate("posing => localStorage.setItem('lb.address', posing)", posing)
        tab.page.reload()
    tab.is_live()
    if how == "typed":
        tab.connect_to(posing)
        tab.is_live()
    expect(tab.at("#address")).to_have_value(stub.url)
    assert not [url for url in tab.requests if url.startswith(posing)]


def test_it_asks_for_no_file_beside_it_when_it_is_served(tab: Tab, stub: Stub) -> None:
    asked: list[str] = []
    tab.page.on("request", lambda it: asked.append(it.url))
    tab.page.goto(f"{stub.url}/elsewhere.html")
    tab.is_live()
    assert asked and not [url for url in asked if re.search("access|file:", url)]
