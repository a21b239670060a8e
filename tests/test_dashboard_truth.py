"""What the dashboard tells is so: of backends that come and go, of what is not there, of times, of what others do."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from playwright.sync_api import Route, expect
from support import wait_until

from tests.dashboard_stub import PAGE, Json, Stub, backend, down_backend, event, history, recent, status
from tests.dashboard_tab import DASH, Tab, chromium, stub, tab
from tests.test_dashboard_actions import PREVIEW, choose

__all__ = ["chromium", "stub", "tab"]  # fixtures

IDS = ["backend_1", "backend_2", "backend_3"]


def three_up(stub: Stub, **changes: Any) -> None:
    stub.answer = status([backend(1), backend(2), backend(3)], **changes)
    stub.history = {1: history(IDS, count=120), 10: history(IDS, step=10)}


def colours(tab: Tab) -> dict[str, str]:
    rows = "rows => rows.map((row) => [row.querySelector('.name').textContent, row.querySelector('.swatch').className])"
    return dict(tab.at("#backend-rows tr").evaluate_all(rows))


def top_of(tab: Tab, selector: str) -> float:
    return float(tab.at(selector).evaluate("it => it.getBoundingClientRect().top"))


# ---- Backends that go and come


def test_a_removed_backend_keeps_its_past_and_all_keep_their_colours(tab: Tab, stub: Stub) -> None:
    """Half of the past went with a backend, and the others took on its colours."""
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    keys = tab.at(".chart").first.locator(".keys li")
    expect(keys).to_have_count(4)
    before, swatches = colours(tab), tab.at(".chart .area").evaluate_all("all => all.map((it) => it.className.baseVal)")
    first = stub.answer["backend_servers"].pop(0)
    expect(keys.filter(has_text="backend_1 (removed)")).to_be_visible()
    assert sorted(tab.at(".chart .area").evaluate_all("all => all.map((it) => it.className.baseVal)")) == sorted(
        swatches
    )
    assert colours(tab).items() < before.items()
    stub.answer["backend_servers"].append(first)  # at another place
    expect(tab.at("#backend-rows tr")).to_have_count(3)
    assert colours(tab) == before


def test_the_flow_map_gives_what_a_dead_backend_had_to_the_others(tab: Tab, stub: Stub) -> None:
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    labels = tab.at("#flow .node")
    for index, name in enumerate(IDS):
        expect(labels.nth(index)).to_contain_text(re.compile(rf"{name}[\d.]+/s . [\d.]+ %, expected 33.3 %"))
    thick = "it => { const box = it.getBBox(); return box.height; }"
    before = float(tab.at("#flow .ribbon").first.evaluate(thick))
    stub.answer["backend_servers"][1] |= down_backend(2) | {"expected_share": 0.0}
    expect(labels.nth(1)).to_have_text("backend_2Down")
    expect(tab.at("#flow svg")).to_have_attribute("aria-label", re.compile("backend_2 Down"))
    wait_until(lambda: float(tab.at("#flow .ribbon").first.evaluate(thick)) > before)
    tab.page.locator("#flow .node").nth(1).click()
    expect(tab.at("#drawer-title")).to_have_text("backend_2")


def test_an_open_menu_names_its_backend_and_stays_with_its_row(tab: Tab, stub: Stub) -> None:
    """A banner moved the rows by 56 px, but not the menu."""
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    tab.at("#backend-rows tr").nth(1).scroll_into_view_if_needed()
    place = top_of(tab, "#backend-rows tr >> nth=1")
    tab.page.locator("#backend-rows .c-menu button").nth(1).click()
    expect(tab.at("#menu-name")).to_have_text("backend_2")
    stub.answer["panic"] = True
    tab.shows("#sentence", "Fail-open is on.")
    assert top_of(tab, "#backend-rows tr >> nth=1") == place
    away = top_of(tab, "#menu") - top_of(tab, "#backend-rows .c-menu button >> nth=1")
    tab.page.mouse.wheel(0, -60)
    wait_until(lambda: top_of(tab, "#backend-rows tr >> nth=1") > place)
    assert abs(top_of(tab, "#menu") - top_of(tab, "#backend-rows .c-menu button >> nth=1") - away) < 2
    stub.answer["backend_servers"][1]["admin_state"] = "drain"
    ready = tab.page.get_by_role("menuitem", name="Ready")
    expect(ready).not_to_have_attribute("aria-disabled", "true")
    red = "it => getComputedStyle(it).color"
    danger = tab.page.get_by_role("menuitem", name="Remove")
    allowed = danger.evaluate(red)
    stub.answer["capabilities"]["writes"] = False
    expect(danger).to_have_attribute("aria-disabled", "true")
    assert danger.evaluate(red) != allowed


def test_what_the_filter_hides_is_not_selected(tab: Tab, stub: Stub) -> None:
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    for index in range(3):
        tab.page.locator("#backend-rows input[type=checkbox]").nth(index).check()
    tab.page.fill("#filter", "backend_2")
    tab.shows("#bulk-note", "1 selected")
    tab.page.click("#bulk-drain")
    tab.shows("#toasts", "backend_2 gets no new requests.")
    assert [name for name, _ in stub.writes] == ["PATCH /backends/backend_2"]


def test_an_undo_leaves_alone_what_somebody_else_has_set(tab: Tab, stub: Stub) -> None:
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    weight = tab.at("#backend-rows .weight").first
    weight.fill("8")
    weight.press("Enter")
    undo = tab.page.get_by_role("button", name="Undo")
    undo.focus()  # which keeps it on the screen
    stub.answer["backend_servers"][0]["weight"] = 30
    expect(weight).to_have_value("30")
    undo.click()
    tab.shows("#toasts", "Not undone")
    assert [body for _, body in stub.writes] == [{"weight": 8}]


def test_the_focus_stays_when_a_row_goes(tab: Tab, stub: Stub) -> None:
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    choose(tab, 2, "Remove")
    tab.page.click("#confirm-yes")
    expect(tab.at("#backend-rows tr")).to_have_count(2)
    assert tab.page.evaluate("() => document.activeElement.id") == "h-backends"


def test_pools_and_routes_are_told_where_there_are_some(tab: Tab, stub: Stub) -> None:
    """What a backend should get is of its pool, and so is what it gets."""
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    expect(tab.at("#pools")).to_be_hidden()
    for one, pool, share in zip(
        stub.answer["backend_servers"], ("default", "default", "api"), (0.5, 0.5, 1.0), strict=True
    ):
        one |= {"pool": pool, "expected_share": share}
    pool = {"algorithm": "weighted", "panic": False, "leaving": False, "active_connections": 1, "waiting_requests": 0}
    pool |= {"backends": 2, "available": 2, "total_requests": 300, "failed_requests": 0}
    stub.answer["pools"] = [pool | {"name": "default"}, pool | {"name": "api", "leaving": True}]
    route = {"host": None, "methods": [], "pool": None, "split": None, "redirect": None, "answers_with": None}
    route |= {"auth": [], "limits": [], "total_requests": 0, "failed_requests": 0, "latency": {}, "mirror": None}
    stub.answer["routes"] = [
        route | {"name": "v1", "path": "/v1/", "pool": "api", "auth": ["staff"]},
        route | {"name": "old", "host": "old.example", "path": "/", "redirect": "https://new.example"},
        route | {"name": "try", "path": "/try", "split": {"api": 1, "default": 9}, "methods": ["GET"]},
    ]
    for words in (
        "api; guarded by staff",
        "old.example/",
        "redirect to https://new.example",
        "GET /try",
        "api 1, default 9",
    ):
        tab.shows("#route-table", words)
    tab.shows("#pool-table", "api (leaving)")
    rows = tab.at("#backend-rows tr")
    for index, words in enumerate(("33.3 %exp. 50.0 %, -16.7 pt", "66.7 %", "100.0 %exp. 100.0 %, +0.0 pt")):
        expect(rows.nth(index).locator(".share-text")).to_contain_text(
            re.compile(words.replace("%", "%\\s*", 1).replace("+", "\\+"))
        )
    tab.shows("#backend-rows tr >> nth=2", "api: http://127.0.0.1:5003")


def test_a_hundred_routes_and_pools_leave_what_is_below_in_reach(tab: Tab, stub: Stub) -> None:
    three_up(stub)
    names = [f"pool-{index}" for index in range(100)]
    stub.answer["pools"] = [{"name": name} for name in names]
    stub.answer["routes"] = [{"name": name, "path": f"/{name}/", "pool": name} for name in names]
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    expect(tab.at("#route-table tbody tr")).to_have_count(100)
    assert top_of(tab, "#backends") <= 1600
    tab.page.get_by_role("region", name="Pools table").focus()
    tab.page.keyboard.press("End")
    expect(tab.at("#pool-table tbody tr").last).to_be_in_viewport()


# ---- The past


def test_one_failed_question_for_the_past_is_no_older_balancer(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    three_up(stub)
    past, stub.history = stub.history, {1: "not yet"}  # type: ignore[dict-item]  # the connection breaks off
    tab.from_disk(stub.url).is_live()
    wait_until(lambda: sum("/history" in path for path in stub.asked) > 1)
    expect(tab.at("#foot-history")).to_be_hidden()
    stub.history = past
    expect(tab.at(".chart").first.locator(".keys li")).to_have_count(4)


def test_nothing_failed_draws_no_line_and_a_gap_stays_a_gap_in_small_lines_too(tab: Tab, stub: Stub) -> None:
    three_up(stub)
    del stub.history[1][-40:-20]  # type: ignore[index]
    tab.from_disk(stub.url).is_live()
    expect(tab.at(".chart").first.locator(".keys li")).to_have_count(4)
    for path in tab.at(".plot .c-bad").all():
        expect(path).to_have_attribute("d", "M0 0")
    line = tab.at("#s-rate .line").get_attribute("d") or ""
    before, after = line.split("M")[1:]
    ends = float(re.findall(r"[\d.]+", before)[-2]), float(re.findall(r"[\d.]+", after)[0])
    assert ends[1] - ends[0] == pytest.approx(100 * 21 / 59, abs=4)


def test_the_cursor_stays_under_a_mouse_that_stands_still_and_dragging_zooms(tab: Tab, stub: Stub) -> None:
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    chart = tab.at(".chart").first
    chart.scroll_into_view_if_needed()
    box = chart.locator(".plot").bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + 80
    tab.page.mouse.move(x, y)
    cursor = chart.locator(".cursor")
    expect(cursor).to_have_attribute("visibility", "visible")
    readout = tab.at("#readout").inner_text()
    newest = stub.history[1][-1]["at"]  # type: ignore[index]
    stub.history[1].extend(history(IDS, count=6, now=newest + 7))  # type: ignore[index]
    stub.answer["now"] = newest + 8
    expect(tab.at("#readout")).not_to_have_text(readout)
    assert abs(box["x"] + float(cursor.get_attribute("x1") or 0) - x) < 12
    tab.page.mouse.down()
    tab.page.mouse.move(x + 120, y, steps=4)
    tab.page.mouse.up()
    expect(tab.at("#unzoom")).to_be_visible()
    wait_until(lambda: "zoom=" in tab.page.url)
    tab.page.reload()
    tab.is_live()
    tab.page.click("#unzoom")
    wait_until(lambda: "zoom=" not in tab.page.url)


# ---- The connection and the page


def test_a_slow_link_connects(tab: Tab, stub: Stub) -> None:
    """At a refresh of 1 s an answer that took 2.5 s was never waited for."""
    tab.page.route("**/status*", lambda route: (time.sleep(2.5), route.continue_()))  # the link, not the test
    tab.from_disk(stub.url).is_live()
    tab.page.unroute_all(behavior="ignoreErrors")


def test_a_tab_in_the_background_goes_on_slowly_and_tells_by_its_title(tab: Tab, stub: Stub) -> None:
    """It was titled "Stale" for as long as it was there."""
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    tab.page.clock.install()
    icon = tab.at("#icon").get_attribute("href")
    tab.page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    wait_until(lambda: stub.running["poll"] == 0)
    stub.answer = status([down_backend(1), down_backend(2)])
    for _ in range(4):
        tab.page.clock.run_for(5_000)
    wait_until(lambda: tab.page.title() == "No healthy backend - lb-1")
    assert tab.at("#icon").get_attribute("href") != icon


def test_a_refusal_goes_with_the_balancer_that_refused(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    stub.refuse_writes = True
    tab.from_disk(stub.url).is_live()
    choose(tab, 0, "Drain")
    tab.shows("#write-note", "Read-only here")
    stub.answer = status([backend(1, total_requests=1)], uptime=1.0)
    tab.shows("#sentence", "The balancer was restarted.")
    expect(tab.at("#write-note")).to_be_hidden()


def test_what_was_looked_at_is_what_is_loaded(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    three_up(stub)
    stub.reload_answer = PREVIEW | {"hash": "abc"}
    tab.page.goto(f"{stub.url}/dashboard#view=system&token={stub.page_token}")
    tab.is_live()
    tab.page.click("#reload")
    with tab.page.expect_request(lambda it: it.url.endswith("/reload")) as asked:
        tab.page.click("#confirm-yes")
    assert asked.value.headers["if-match"] == '"abc"'
    tab.shows("#toasts", "Configuration reloaded, 2 changes.")
    tab.page.route("**/reload", lambda route: route.fulfill(status=412, json={"error": "something else by now"}))
    tab.page.click("#reload")
    tab.page.click("#confirm-yes")
    tab.shows(".toast.bad", "something else by now")
    expect(tab.at("#confirm")).to_be_visible()  # with what it would do now, and the toast lies above it
    assert tab.page.evaluate(
        "() => { const box = document.querySelector('.toast').getBoundingClientRect();"
        " return document.elementFromPoint(box.x + 20, box.y + 10).closest('.toast') !== null; }"
    )


def test_another_address_does_not_block_a_later_visit(tab: Tab, stub: Stub) -> None:
    tab.network_errors_expected = True
    tab.page.goto(f"{stub.url}/dashboard")
    tab.is_live()
    tab.connect_to("http://127.0.0.1:1")
    tab.shows("#sentence", "may only talk to the balancer that served it")
    tab.page.goto("about:blank")
    tab.page.goto(f"{stub.url}/dashboard")
    tab.is_live()
    tab.errors.clear()  # the console tells of the policy


def test_what_has_changed_is_told_first_when_something_is_wrong_and_can_be_saved(tab: Tab, stub: Stub) -> None:
    now = time.time()
    stub.answer = status([backend(1), down_backend(2, reason="a|b")])
    stub.tell(
        event(1, "backend_up", "backend_2", timestamp=now - 1000),
        event(2, "backend_changed", "backend_2", timestamp=now - 60, message="weight set to 9 by the API"),
    )
    tab.from_disk(stub.url).is_live()
    tab.shows("#sentence", "backend_2 down for 7 s (a|b).")
    tab.page.click("#open-notices")
    tab.shows("#changed-rows", "backend_2 changed: weight set to 9 by the API")
    assert tab.at("#changed-rows li").count() == 1
    with tab.page.expect_download() as caught:
        tab.page.click("#incident")
    saved = caught.value.path().read_text(encoding="utf-8")
    for words in ("# lb-1, 20", "- **backend_2 down for", "| backend_2 | Down | a\\|b |", "weight set to 9"):
        assert words in saved


# ---- Words and numbers

TOLD: list[tuple[str, str]] = [
    ("time(0.0000004)", "0.4 \u00b5s"), ("time(0.0003)", "0.3 ms"), ("time(0.9995)", "1 s"), ("time(59.999)", "60 s"),
    ("time(0.0521)", "52 ms"), ("time(0)", "0 ms"), ("time(null)", DASH), ("plural(1, 'request')", "1 request"),
    ("list(['a', 'b', 'c'])", "a, b, and c"), ("reason('destination_unavailable')", "destination unavailable"),
    ("success(0.99996)", "99.99 %"), ("errors(0.00001)", "<0.1 %"),
]  # fmt: skip


def test_numbers_and_words_are_as_a_person_would_say_them(tab: Tab, stub: Stub) -> None:
    started = time.time() - 3 * 86400
    stub.answer["statistics"]["start_time"] = started
    tab.from_disk(stub.url).is_live()
    assert [tab.page.evaluate(f"() => format.{call}") for call, _ in TOLD] == [words for _, words in TOLD]
    day = tab.page.evaluate(
        "at => new Date(at * 1000).toLocaleDateString('en-GB', {day: 'numeric', month: 'short'})", started
    )
    tab.shows("#t-total-since", f"since {day}, ")
    stub.answer = status([backend(1)])
    tab.page.click("#dismiss-restart")
    tab.shows("#sentence", "All good: 1 of 1 backend serves, 42.5 requests/s, p95 64 ms.")
    stub.answer = status([backend(1, state="drained", admin_state="drain", weight=1)])
    tab.shows("#sentence", "No backend takes traffic. Clients get 503")


# ---- Room


def many(count: int) -> Json:
    return status([backend(index, state="up") for index in range(1, count + 1)])


@pytest.mark.parametrize(("count", "width", "most"), [(12, 390, 1600), (60, 1440, 2000)])
def test_many_backends_fit(tab: Tab, stub: Stub, count: int, width: int, most: int) -> None:
    """60 backends took 23,050 px on a phone, and 168 events made a page of 5,966 px whose footer ended at 2,627."""
    stub.answer = many(count)
    ids = [f"backend_{index}" for index in range(1, count + 1)]
    stub.history = {1: history(ids), 10: history(ids, step=10)}
    stub.tell(*(event(seq, "backend_up", f"backend_{seq % count + 1}") for seq in range(1, 169)))
    tab.page.set_viewport_size({"width": width, "height": 800})
    tab.from_disk(stub.url).is_live()
    tab.shows("#events-note", "5 of 168")
    for view, at_most in (("overview", most), ("system", 2 * most)):
        tab.view(view)
        height = tab.page.evaluate("() => document.documentElement.scrollHeight")
        end = tab.page.evaluate("() => document.querySelector('footer').getBoundingClientRect().bottom + scrollY")
        assert height <= max(at_most, 800) and height - end < 60, (view, height, end)
    assert tab.page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_of_very_many_backends_those_near_sight_are_drawn_and_asked_about(tab: Tab, stub: Stub) -> None:
    stub.answer = many(200)
    tab.from_disk(stub.url).is_live()
    tab.page.click("#backends-more")
    rows = tab.at("#backend-rows tr")
    expect(rows).to_have_count(200)
    wait_until(lambda: any("backend_9%2C" in path and "backend_200" not in path for path in stub.asked))
    stub.answer["backend_servers"][-1]["weight"] = 7
    rows.last.scroll_into_view_if_needed()
    expect(rows.last.locator(".weight")).to_have_value("7")
    tab.page.emulate_media(reduced_motion="no-preference")  # but each step of a movement would be drawn
    assert rows.last.locator(".fill").evaluate("it => getComputedStyle(it).transitionDuration") == "0s"


def test_of_very_many_commands_only_the_first_are_listed(tab: Tab, stub: Stub) -> None:
    stub.answer = status([backend(index) for index in range(1, 501)])
    tab.from_disk(stub.url).is_live()
    tab.page.keyboard.press("Control+k")
    expect(tab.at("#palette-rows li")).to_have_count(50)
    tab.page.fill("#palette-input", "show backend_499")
    tab.page.keyboard.press("Enter")
    expect(tab.at("#drawer-title")).to_have_text("backend_499")


def test_many_backends_are_a_heat_map_and_few_are_none(tab: Tab, stub: Stub) -> None:
    stub.answer = many(12)
    ids = [f"backend_{index}" for index in range(1, 13)]
    stub.history = {1: history(ids), 10: []}
    tab.from_disk(stub.url).is_live()
    tab.view("traffic")
    rows = tab.at("#heat svg")
    expect(rows).to_have_count(12)
    expect(rows.first).to_have_attribute("aria-label", re.compile(r"backend_1: at most \d+"))
    darkest = rows.first.locator("path").last
    wait_until(lambda: (darkest.get_attribute("d") or "").count("v12") > 3)
    tab.page.select_option("#heat-field", "p95")
    expect(rows.first).to_have_attribute("aria-label", "backend_1: at most 50 ms")
    tab.page.select_option("#heat-field", "failed")
    expect(darkest).to_have_attribute("d", "M0 0")
    three_up(stub)
    expect(tab.at("#heat-panel")).to_be_hidden()
    newest = history(ids, now=time.time() + 2)[-1] | {"times": [[0.01, 50], [0.2, 7]]}
    stub.history[1].append(newest)
    stub.answer["now"] += 10
    tab.page.select_option("#heat-field", "times")
    expect(tab.at("#heat span")).to_have_text(["200 ms", "10 ms"])  # two humps
    expect(rows.nth(1)).to_have_attribute("aria-label", "10 ms: at most 50.0/s")


def test_the_address_holds_what_is_shown(tab: Tab, stub: Stub) -> None:
    three_up(stub)
    stub.answer["recent_requests"] = [recent(1)]
    tab.page.goto(f"{stub.url}/dashboard#view=overview&range=300&sort=p95&backend=backend_2&window=300&filter=back")
    tab.is_live()
    expect(tab.at("#range input:checked")).to_have_value("300")
    expect(tab.at("#window input:checked")).to_have_value("300")
    expect(tab.at("#drawer-title")).to_have_text("backend_2")
    expect(tab.at("#filter")).to_have_value("back")
    assert tab.at("th[aria-sort=descending]").inner_text() == "p95"
    tab.page.keyboard.press("Control+k")
    tab.page.fill("#palette-input", "go traf")
    tab.page.keyboard.press("Control+k")
    tab.page.keyboard.press("Enter")
    expect(tab.at("#recent-rows tr")).to_have_count(1)
    tab.page.go_back()
    expect(tab.at("#charts")).to_be_visible()
    tab.page.evaluate("() => { location.hash = 'zoom=1-1e300&sort=__proto__&range=no'; }")  # as somebody has sent it
    expect(tab.at("#range input:checked")).to_have_value("60")
    expect(tab.at("#unzoom")).to_be_hidden()


def test_another_view_keeps_what_was_set(tab: Tab, stub: Stub) -> None:
    """What was typed as filter, the window, the range and the order were lost with each click on a view."""
    three_up(stub)
    tab.from_disk(stub.url).is_live()
    tab.page.fill("#filter", "back")
    tab.pick("#window input[value='300']")
    tab.pick("#range input[value='900']")
    tab.view("system")
    tab.view("traffic")
    expect(tab.at("#filter")).to_have_value("back")
    expect(tab.at("#window input:checked")).to_have_value("300")
    tab.page.go_back()
    tab.page.go_back()
    expect(tab.at("body")).to_have_attribute("data-view", "overview")
    expect(tab.at("#filter")).to_have_value("back")
    expect(tab.at("#range input:checked")).to_have_value("900")


def test_settings_that_did_not_come_once_come_with_the_next_poll(tab: Tab, stub: Stub) -> None:
    lost = []

    def lose(route: Route) -> None:
        lost.append(route.request.url)
        if len(lost) == 1:
            route.fulfill(status=503, body="{}")
        else:
            route.continue_()

    tab.network_errors_expected = True
    tab.page.route("**/config", lose)
    tab.page.goto(f"{stub.url}/dashboard#view=system")
    tab.shows("#settings-in-force", "weighted")
    assert len(lost) == 2


BLOCKS = [
    "format",
    "model",
    "net",
    "store",
    "kit",
    "charts",
    "actions",
    "lessons",
    "views",
    "panels",
    "dialogs",
    "start",
]
BEGINNING = re.compile(r"^( *)(?:async )?(?:function \w+|\w+)\(.*\) \{$")  # of a function or a method


def test_the_file_is_in_blocks_that_go_in_one_direction_and_short_functions() -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = page.splitlines()
    assert max(map(len, lines)) <= 140
    for number, line in enumerate(lines):
        if begun := BEGINNING.match(line):
            ends = (index for index, other in enumerate(lines[number:]) if other.startswith(f"{begun[1]}}}"))
            length = next(ends) + 1
            assert length <= 40, (line, length)
    blocks = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert [re.findall(r"^const (\w+) = \(\(\)", block, re.M) for block in blocks] == [
        [name] if name != "start" else [] for name in BLOCKS
    ]
    for number, block in enumerate(blocks):
        code = re.sub(r"//.*", "", block)
        later = [name for name in BLOCKS[number + 1 :] if re.search(rf"(?<![\w.\"-]){name}\.[a-zA-Z]", code)]
        assert later == [], (BLOCKS[number], later)
