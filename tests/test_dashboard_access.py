"""The dashboard for everybody: axe-core, contrast, keyboard alone, every width, print, forced colours."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.dashboard_stub import PAGE, Stub, backend, event, explained, history, recent, status
from tests.dashboard_tab import Tab, chromium, stub, tab

__all__ = ["chromium", "stub", "tab"]  # fixtures

SERIOUS = ("serious", "critical")
STATES = ["up", "checking", "down", "unknown", "drain", "maint", "ejected", "trial", "drained"]


def findings(page: Page, part: str | None = None, rule: str | None = None) -> list[str]:
    """What axe-core finds serious, in words: on the whole page or in the part that a selector names; by all of its
    rules or by one."""
    options = {"runOnly": {"type": "rule", "values": [rule]}} if rule else None
    answer = Axe().run(page, part, options).response
    assert answer["passes"]
    return [
        f"{it['id']}: {node['target']} {node['failureSummary']}"
        for it in answer["violations"]
        if it["impact"] in SERIOUS
        for node in it["nodes"]
    ]


def has_fleet(stub: Stub) -> None:
    """More than one process, a source of backends, two machines."""
    source = {"name": "backends.toml", "kind": "file", "state": "good", "backends": 3, "age": 2.0, "last_error": None}
    stub.answer["sources"] = [source]
    workers = [
        {"id": number, "pid": 4000 + number, "since": stub.answer["now"], "state": "running"} for number in (0, 1)
    ]
    members = [
        {"seen": stub.answer["now"], "rate": 60.6363636, "backends": {}, "name": name, "this": name == "lb-1"}
        for name in ("lb-1", "lb-2")
    ]
    together = {"name": "shop", "state": "together", "last_error": None}
    stub.cluster = {"workers": workers, "members": members, "cluster": together}


def test_what_there_is_beside_backends_is_told_where_it_is(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.view("system")
    expect(tab.at("#h-fleet")).to_be_hidden()
    has_fleet(stub)
    expect(tab.at("#fleet h3")).to_have_text(["Members", "Workers", "Sources"])
    tab.shows("#fleet-note", "cluster shop: together")
    for words in ("lb-2", "60.6", "4001", "backends.toml", "2 s ago"):
        tab.shows("#fleet", words)
    expect(tab.at("#fleet table").first.locator("th[scope=col]")).to_have_text(["Name", "This", "Seen", "Rate"])
    stub.cluster["members"].pop()
    expect(tab.at("#fleet h3")).to_have_text(["Workers", "Sources"])


def busy(stub: Stub) -> None:
    """A balancer that shows as much as there is to show."""
    backends = [backend(index, state=state, failed_requests=index) for index, state in enumerate(STATES, 1)]
    backends[2]["healthy"] = False
    stub.answer = status(backends, failed=45)
    stub.answer["panic"] = stub.answer["capabilities"]["faults"] = True
    has_fleet(stub)
    stub.answer["config"]["last_error"] = "line 3: weight must be a whole number"
    stub.answer["recent_requests"] = [recent(1), recent(2, status=404), recent(3, status=503, attempts=2, reason="x")]
    stub.requests["request-1"] = explained("request-1")
    ids = [one["id"] for one in backends]
    stub.history = {1: history(ids, failing=20), 10: history(ids, step=10)}
    stub.tell(
        event(1, "algorithm_changed"),
        event(2, "write_refused", None, "warning"),
        event(30, "backend_down", "backend_3", "error"),
    )


CONTRAST = """() => {
  const parse = (it) => (it.match(/[\\d.]+/g) || []).map(Number);
  const linear = (it) => (it <= 0.03928 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (node) => {
    if (!node) return [255, 255, 255];
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour.length === 3 || colour[3] === 1 ? colour : behind(node.parentElement);
  };
  const ratio = (node) => {
    const [low, high] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, words = walker.currentNode.data.trim();
    if (!words || !node.checkVisibility() || node.closest(".sr, script, style, option, .skip")) continue;
    if (ratio(node) < 4.5) found.push([node.className, words, ratio(node)]);
  }
  return found;
}"""
LINES_OF_TEXT = """cells => cells.map((it) => {
  const all = new Range();
  all.selectNodeContents(it);
  return all.getClientRects().length;
})"""
UNNAMED_FIELDS = """() => [...document.querySelectorAll("input, select")]
  .filter((it) => !it.labels.length && !it.ariaLabel && !it.hasAttribute("aria-labelledby")).length"""


def test_text_has_contrast_in_both_themes(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    tab.page.emulate_media(reduced_motion="reduce")
    stub.answer = status(
        [backend(index, state=state, failed_requests=1) for index, state in enumerate(STATES, 1)], failed=100
    )
    stub.answer["recent_requests"] = [recent(1), recent(2, status=404), recent(3, status=503, attempts=2)]
    tab.from_disk(stub.url).is_live()
    for is_stopped in (False, True):
        if is_stopped:
            stub.stop()
            tab.shows("#pill", "Disconnected")
        for theme in ("light", "dark"):
            tab.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            assert tab.page.evaluate(CONTRAST) == [], (theme, is_stopped)


def test_nothing_runs_out_of_the_page(tab: Tab, stub: Stub) -> None:
    busy(stub)
    for one in stub.answer["backend_servers"]:
        one |= {"id": f"a-rather-long-name-of-{one['id']}", "active_connections": 1234, "total_requests": 9_999_999}
    tab.from_disk(stub.url).is_live()
    for width in (320, 400, 719, 720, 899, 900, 1080, 1199, 1200, 1279, 1280, 1366, 1440, 1920):
        tab.page.set_viewport_size({"width": width, "height": 800})
        for view, box in (
            ("system", "#log"),
            ("lab", "#mix-rows"),
            ("traffic", "#recent-scroll"),
            ("overview", "#backends-scroll"),
        ):
            tab.view(view)
            for one in ("html", box):
                over = tab.at(one).evaluate("it => it.scrollWidth - it.clientWidth")
                assert over <= 0, (width, one)


def test_text_of_twice_the_size_has_room(tab: Tab, stub: Stub) -> None:
    busy(stub)
    tab.from_disk(stub.url).is_live()
    tab.page.context.new_cdp_session(tab.page).send("Page.setFontSizes", {"fontSizes": {"standard": 32, "fixed": 26}})
    tab.page.reload()
    tab.is_live()
    assert tab.at("html").evaluate("it => getComputedStyle(it).fontSize") == "32px"
    for view in ("overview", "traffic", "lab", "system"):
        tab.view(view)
        assert tab.page.evaluate("() => document.documentElement.scrollWidth") <= 1280, view
        cut = "all => all.filter((it) => it.scrollWidth > it.clientWidth + 1).length"
        assert tab.at(".tile:visible, .head:visible").evaluate_all(cut) == 0, view


def test_the_page_is_built_of_real_landmarks_and_tables(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    for selector in ("h1", "main", "header", "footer", "[role=status]", "[role=alert]:not(dialog *)", "[role=log]"):
        assert tab.at(selector).count() == 1, selector
    tab.view("system")
    assert tab.at("main table:visible > caption").count() == tab.at("main table:visible").count() == 1
    assert tab.at("main thead th:not([scope=col]), main tbody th:not([scope=row])").count() == 0
    assert tab.at("nav [aria-current=page]").all_inner_texts() == ["System"]
    assert tab.page.evaluate(UNNAMED_FIELDS) == 0
    assert not re.search(r"\s(style|on\w+)=\"", PAGE.read_text(encoding="utf-8"))


def test_every_control_is_reached_by_the_keyboard(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.locator("body").click(position={"x": 1, "y": 1})
    reached = set()
    for view in ("overview", "traffic", "lab", "system"):
        tab.view(view)
        for _ in range(45):
            tab.page.keyboard.press("Tab")
            reached.add(tab.page.evaluate("() => document.activeElement.id || document.activeElement.name"))
    tab.page.focus("#open-gear")
    tab.page.keyboard.press("Enter")
    for _ in range(8):
        tab.page.keyboard.press("Tab")
        reached.add(tab.page.evaluate("() => document.activeElement.id"))
    assert {
        "pause", "interval", "theme", "address", "algorithm", "apply", "amount", "traffic-path", "send", "reset",
        "add-backend", "reload", "settings", "range", "window", "filter", "only-problems",
        "event-severity", "recent-kind",
    } <= reached  # fmt: skip


@pytest.mark.parametrize(("theme", "rule"), [("light", None), ("dark", "color-contrast")])
def test_axe_finds_nothing_serious(tab: Tab, stub: Stub, theme: str, rule: str | None) -> None:
    """By all rules in the light theme; what the dark one changes are the colours."""
    tab.page.emulate_media(reduced_motion="reduce")
    busy(stub)
    tab.from_disk(stub.url).is_live()
    tab.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    tab.shows("#event-rows", "algorithm changed")
    tab.page.get_by_role("button", name="View Requests/s as table", exact=True).click()
    tab.page.locator("#backend-rows input[type=checkbox]").first.check()
    for view in ("traffic", "lab", "system", "overview"):
        tab.view(view)
        assert findings(tab.page, None, rule) == [], view
    tab.page.get_by_role("button", name="Details of backend_3", exact=True).click()
    assert findings(tab.page, "#drawer", rule) == []
    tab.page.keyboard.press("Escape")
    parts = {
        "#backend-rows .c-menu button": "#menu", "#open-gear": "#gear", "#settings": "#settings-dialog",
        "#open-notices": "#notices", "#add-backend": "#backend-dialog", "#tabs a[data-view=traffic]": "#recent-scroll",
        "#recent-rows .c-why button": "#request-dialog", "#tabs a[data-view=system]": "#config-facts",
        "#reset": "#confirm",
    }  # fmt: skip
    for opener, part in parts.items():
        if opener == "#settings":
            tab.use_gear()
        tab.page.locator(opener).first.click()
        expect(tab.at(part)).to_be_visible()
        assert findings(tab.page, part, rule) == [], part
        tab.page.keyboard.press("Escape")


def test_axe_finds_nothing_serious_on_a_phone_and_when_disconnected(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    tab.page.emulate_media(reduced_motion="reduce")
    busy(stub)
    tab.page.set_viewport_size({"width": 320, "height": 700})
    tab.from_disk(stub.url).is_live()
    assert findings(tab.page) == []
    stub.stop()
    tab.shows("#pill", "Disconnected")
    assert findings(tab.page) == []


def test_a_finding_is_found(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.evaluate("() => { store.hooks.draw = () => {}; }")  # it would put back what is taken away
    tab.page.evaluate("() => document.querySelector('#filter').removeAttribute('aria-label')")
    tab.page.evaluate("() => document.querySelector('#filter').removeAttribute('placeholder')")
    assert any(it.startswith("label") for it in findings(tab.page, rule="label"))


def test_the_keyboard_alone_drains_a_backend_and_undoes_it(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.locator("#backend-rows .c-menu button").nth(1).focus()
    for key in ("Enter", "Enter"):
        tab.page.keyboard.press(key)
    tab.shows("#toasts", "backend_2 gets no new requests.")
    assert stub.writes == [("PATCH /backends/backend_2", {"admin_state": "drain"})]
    expect(tab.at("#backend-rows .c-menu button").nth(1)).to_be_focused()
    tab.page.get_by_role("button", name="Undo").focus()
    tab.page.keyboard.press("Enter")
    tab.shows("#toasts", "backend_2 takes traffic again.")
    assert stub.writes[-1] == ("PATCH /backends/backend_2", {"admin_state": "ready"})


def test_the_menu_is_walked_with_arrows_and_left_with_escape(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    opener = tab.at("#backend-rows .c-menu button").first
    opener.focus()
    tab.page.keyboard.press("Enter")
    walk = {"ArrowDown": "Maintenance", "End": "Remove", "Home": "Drain", "ArrowUp": "Remove"}
    for key, focused in walk.items():
        tab.page.keyboard.press(key)
        assert focused in tab.page.evaluate("() => document.activeElement.textContent")
    tab.page.keyboard.press("Escape")
    expect(tab.at("#menu")).to_be_hidden()
    expect(opener).to_be_focused()
    assert stub.writes == []


def test_shortcuts_work_outside_of_fields_and_can_be_switched_off(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    press = tab.page.keyboard.press
    press("2")
    expect(tab.at("#range input[value='300']")).to_be_checked()
    press("t")
    expect(tab.at("#theme")).to_have_value("light")
    press("g")
    press("e")
    expect(tab.at("#h-events")).to_be_focused()
    press("/")
    expect(tab.at("#filter")).to_be_focused()
    tab.page.keyboard.type("p3")
    expect(tab.at("#filter")).to_have_value("p3")
    expect(tab.at("#pill")).to_have_text("Live")
    tab.page.fill("#filter", "")
    tab.page.focus("#main")
    press("?")
    expect(tab.at("#help-dialog")).to_be_visible()
    press("Escape")
    tab.use_gear()
    tab.page.click("#settings")
    tab.page.uncheck("#shortcuts")
    tab.page.click("#settings-form button[type=submit]")
    tab.page.focus("#main")
    press("1")
    press("p")
    press("?")
    expect(tab.at("#range input[value='300']")).to_be_checked()
    expect(tab.at("#pill")).to_have_text("Live")
    expect(tab.at("#help-dialog")).to_be_hidden()


def test_charts_are_read_by_keyboard_and_as_tables(tab: Tab, stub: Stub) -> None:
    busy(stub)
    tab.from_disk(stub.url).is_live()
    tab.shows("#event-rows", "algorithm changed")
    chart = tab.at(".chart").nth(1)
    chart.focus()
    tab.page.keyboard.press("Home")
    tab.page.keyboard.press("ArrowRight")
    first = stub.history[1][0]["at"]  # type: ignore[index]
    shown = tab.at("#readout").inner_text()
    assert tab.page.evaluate("at => new Date(at * 1000).toLocaleTimeString('en-GB')", first + 1) in shown
    expect(tab.at(".plot .cursor[visibility=visible]")).to_have_count(4)
    expect(chart.locator("svg.plot")).to_have_attribute("aria-label", re.compile(r"Response time at .*p99 \d+ ms, p95"))
    tab.page.keyboard.press("Escape")
    expect(tab.at(".plot .cursor[visibility=visible]")).to_have_count(0)
    chart.get_by_role("button").click()
    expect(chart.locator("tbody tr")).to_have_count(60)
    expect(chart.locator("thead th")).to_have_text(["Time", "p99", "p95", "p50"])
    tab.page.set_viewport_size({"width": 1440, "height": 900})
    tab.page.get_by_role("button", name="View Requests/s as table").click()
    cells = tab.at(".chart tbody td")  # a clock time used to break inside, beside columns of backends with long names
    assert set(cells.evaluate_all(LINES_OF_TEXT)) == {1}


def test_print_forced_colours_and_less_motion_are_obeyed(tab: Tab, stub: Stub) -> None:
    tab.from_disk(stub.url).is_live()
    tab.page.emulate_media(media="print")
    for selector in ("#send", "#pause", "#range", "#backend-rows .c-menu button", "#tabs", "#filter", "#open-notices"):
        expect(tab.at(selector).first).to_be_hidden()
    for selector in ("#t-total", "#backend-rows", ".plot", "#printed"):
        expect(tab.at(selector).first).to_be_visible()
    tab.page.emulate_media(media="screen", forced_colors="active", reduced_motion="reduce")
    bar = tab.at("#backend-rows .fill").first
    assert bar.evaluate("it => getComputedStyle(it).backgroundColor") != "rgba(0, 0, 0, 0)"
    assert tab.at("#backend-rows .badge").first.evaluate("it => getComputedStyle(it).borderTopStyle") == "solid"
    durations = "() => [...document.querySelectorAll('*')].map(it => getComputedStyle(it).transitionDuration)"
    assert set(tab.page.evaluate(durations)) == {"0s"}
