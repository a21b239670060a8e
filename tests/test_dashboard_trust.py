"""Who may, in a real browser against the real program: foreign pages, sandboxed frames, pages of backends, our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import launched
import pytest
from fleet import Demo
from playwright.sync_api import Browser, Page, expect
from support import PAGE_TOKEN, BackendProcess, Balancer, fetch_json, ok, wait_until
from wire import WireBackend

from tests.dashboard_tab import Tab, chromium, stub, tab

__all__ = ["chromium", "stub", "tab"]  # fixtures

# What a page tries that wants the balancer at `base`, and how each ended: an answer it could read, or "refused".
ATTEMPTS = """async (base) => {
  const added = JSON.stringify({id: "evil", url: "http://127.0.0.1:9"});
  const json = {"Content-Type": "application/json"}, plain = {"Content-Type": "text/plain"};
  const guess = {Authorization: "Bearer a-token-that-is-wrong"};
  const tries = {
    read: ["/status", {}],
    "read with a guess": ["/status", {headers: guess}],
    add: ["/backends", {method: "POST", headers: json, body: added}],
    "add with a guess": ["/backends", {method: "POST", headers: {...json, ...guess}, body: added}],
    "add as text": ["/backends", {method: "POST", headers: plain, body: added}],
    "add unseen": ["/backends", {method: "POST", mode: "no-cors", headers: plain, body: added}],
    remove: ["/backends/backend_1", {method: "DELETE"}],
    "reset unseen": ["/reset", {method: "POST", mode: "no-cors"}],
    "trouble unseen": ["/faults", {method: "POST", mode: "no-cors", headers: plain, body: '{"fail_health": true}'}],
  };
  const ended = {};
  for (const [name, [path, options]] of Object.entries(tries)) {
    try {
      const answer = await fetch(base + path, options);
      ended[name] = answer.type === "opaque" ? "unseen" : `${answer.status} ${(await answer.text()).slice(0, 60)}`;
    } catch { ended[name] = "refused"; }
  }
  return ended;
}"""
FOREIGN = """<!doctype html><title>foreign</title><script>
  addEventListener("message", (event) => { window.told = event.data; });
</script>"""
FRAMED = f"""<!doctype html><script>
  ({ATTEMPTS})("BASE").then((ended) => parent.postMessage({{ended, origin: self.origin}}, "*"));
</script>"""
FRAME = """frame => new Promise((done) => {
  const made = document.createElement("iframe");
  made.sandbox = "allow-scripts allow-forms";
  made.srcdoc = frame;
  addEventListener("message", (event) => done(event.data));
  document.body.append(made);
})"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Demo]:
    """A real backend alone: it has to refuse what the balancer hands on to it."""
    with BackendProcess("backend_1") as backend:
        with Balancer(f"--backend=backend_1={backend.url}", env={"LB_PAGE_TOKEN": PAGE_TOKEN}) as balancer:
            yield Demo(balancer, [backend])


@pytest.fixture(scope="module")
def foreign() -> Iterator[str]:
    """The address of a site of somebody else: another host name and another port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(FOREIGN.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """It has nothing to say."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), name="foreign-site", daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context()
    yield context.new_page()
    context.close()


@pytest.fixture
def untouched(shared: Demo) -> Iterator[None]:
    """Whatever is tried, the balancer and its backends are afterwards what they were before."""

    def facts() -> Any:
        status = shared.balancer.status()
        return (
            [(one["id"], one["weight"], one["admin_state"]) for one in status["backend_servers"]],
            status["algorithm"],
            status["statistics"]["start_time"],
            [fetch_json(f"{one.url}/faults") for one in shared.backends],
        )

    before = facts()
    yield
    assert facts() == before


def assert_all_refused(ended: dict[str, str]) -> None:
    assert (
        set(ended.values()) <= {"refused", "unseen"} and ended["read"] == ended["add"] == ended["remove"] == "refused"
    )


@pytest.mark.usefixtures("untouched")
def test_a_foreign_page_neither_reads_nor_writes(shared: Demo, foreign: str, page: Page) -> None:
    page.goto(foreign)
    assert_all_refused(page.evaluate(ATTEMPTS, shared.url))


@pytest.mark.usefixtures("untouched")
def test_a_name_that_was_made_to_lead_here_neither_reads_nor_writes(shared: Demo, page: Page) -> None:
    """DNS rebinding: to the browser the balancer is the page's own site."""
    page.goto(f"http://rebound.localhost:{shared.balancer.port}/page")
    ended = page.evaluate(ATTEMPTS, "")
    assert {answer[:3] for answer in ended.values()} <= {"401", "403", "415"}, ended


@pytest.mark.usefixtures("untouched")
def test_a_sandboxed_frame_neither_reads_nor_writes(shared: Demo, foreign: str, page: Page) -> None:
    """Its origin is null, as that of a page from disk. It could read and write everything."""
    page.goto(foreign)
    told = page.evaluate(FRAME, FRAMED.replace("BASE", shared.url))
    assert told["origin"] == "null"
    assert_all_refused(told["ended"])


@pytest.mark.usefixtures("untouched")
def test_a_form_of_a_foreign_page_writes_nothing(shared: Demo, foreign: str, page: Page) -> None:
    for path in ("/reset", "/backends", "/faults", "/simulate-load"):
        page.goto(foreign)
        page.set_content(
            f'<form method="post" enctype="text/plain" action="{shared.url}{path}">'
            """<input name='{"hang": true, "url": "http://127.0.0.1:9", "x' value='": 1}'><button>go</button></form>"""
        )
        with page.expect_navigation():
            page.click("button")
        assert "error" in page.content()


def test_a_page_of_the_web_cannot_load_the_token_from_disk(tab: Tab, foreign: str) -> None:
    tab.grant("http://127.0.0.1:9000")
    tab.network_errors_expected = True
    tab.page.goto(foreign)
    load = """url => new Promise((done) => {
      const script = document.createElement("script");
      script.onload = () => done("loaded");
      script.onerror = () => done("refused");
      script.src = url;
      document.head.append(script);
    })"""
    assert tab.page.evaluate(load, (tab.folder / "run" / "access.js").as_uri()) == "refused"
    assert tab.page.evaluate("window.LB_ACCESS") is None
    tab.errors.clear()  # "not allowed to load local resource"


def test_a_double_click_on_the_page_of_a_demo_that_runs(tmp_path: Path, tab: Tab) -> None:
    """The whole way, by start_all.sh, in a folder whose name needs quoting."""
    tree = tmp_path / "a path with (blanks) & 'quotes' #1"
    tree.mkdir()
    launched.copy_project(tree)
    launched.borrow_venv(tree)
    started = launched.Demo(tree, tmp_path)
    try:
        assert started.ready("--detach").end() == 0
        tab.page.goto((tree / "dashboard.html").as_uri())
        tab.is_live()
        change_and_undo(tab)
        tab.page.close()
    finally:
        assert started.start("stop").end() == 0


def test_the_page_from_disk_without_a_token_says_what_to_do(shared: Demo, tab: Tab) -> None:
    tab.network_errors_expected = True
    tab.from_disk_alone(f"?lb={shared.url}")
    tab.shows("#banner-connection", "This page was opened from disk and needs a token")
    tab.page.click("#give-token")
    tab.page.fill("#token", PAGE_TOKEN)
    tab.page.keyboard.press("Enter")
    tab.is_live()
    change_and_undo(tab)


def test_the_dashboard_without_a_token_reads_and_asks_for_it_when_it_writes(shared: Demo, tab: Tab) -> None:
    tab.network_errors_expected = True
    tab.page.goto(f"{shared.url}/dashboard")
    tab.is_live().shows("#write-note", "Changes need a token.")
    tab.page.select_option("#algorithm", "round_robin")
    tab.page.click("#apply")
    tab.shows("#token-error", "This change needs a token.")
    tab.page.fill("#token", "a-token-that-is-wrong")
    tab.page.keyboard.press("Enter")
    tab.shows("#token-error", "This token was refused.")
    assert shared.balancer.status()["algorithm"] == "weighted"
    tab.page.fill("#token", PAGE_TOKEN)
    tab.page.keyboard.press("Enter")
    tab.shows("#lb-algorithm", "Round robin")
    tab.page.click(".toast >> text=Undo")
    tab.shows("#lb-algorithm", "Weighted")


def change_and_undo(tab: Tab) -> None:
    tab.page.select_option("#algorithm", "round_robin")
    tab.page.click("#apply")
    tab.shows("#lb-algorithm", "Round robin")
    tab.page.click(".toast >> text=Undo")
    tab.shows("#lb-algorithm", "Weighted")


# ---- The page of a backend, which has the origin of /dashboard


OPENER_POLICIES = ["unsafe-none", "same-origin", "noopener-allow-popups"]


def a_page(opener_policy: str = "unsafe-none") -> bytes:
    policy = f"Cross-Origin-Opener-Policy: {opener_policy}"
    return ok(FOREIGN.encode(), b"Content-Type: text/html", policy.encode())


@pytest.fixture(scope="module")
def owned_balancer() -> Iterator[tuple[Balancer, WireBackend]]:
    backend = WireBackend()
    balancer = Balancer(f"--backend=only={backend.url}", env={"LB_PAGE_TOKEN": PAGE_TOKEN})
    yield balancer, backend
    balancer.stop()
    backend.close()


@pytest.fixture
def owned(
    owned_balancer: tuple[Balancer, WireBackend],
) -> tuple[Balancer, WireBackend]:
    """A balancer with a token in front of a backend whose every answer is a page, or a service worker."""
    balancer, backend = owned_balancer
    backend.answer(a_page())
    balancer.wait_healthy("only")
    return balancer, backend


def test_the_page_of_a_backend_writes_nothing(owned: tuple[Balancer, WireBackend], page: Page) -> None:
    balancer, _ = owned
    page.goto(f"{balancer.url}/page")
    ended = page.evaluate(ATTEMPTS, "")
    for name in ("read with a guess", "add", "add with a guess", "add as text", "add unseen", "remove", "reset unseen"):
        assert ended[name].startswith(("401", "415")), name
    status = balancer.status()
    assert [one["id"] for one in status["backend_servers"]] == ["only"]
    assert any(one["kind"] == "write_refused" for one in fetch_json(f"{balancer.url}/events")["events"])


def test_the_page_of_a_backend_finds_no_token(owned: tuple[Balancer, WireBackend], page: Page) -> None:
    balancer, _ = owned
    page.goto(f"{balancer.url}/dashboard#token={PAGE_TOKEN}")
    expect(page.locator("#pill")).to_contain_text("Live")
    other = page.context.new_page()
    other.goto(f"{balancer.url}/page")
    stored = (
        "async () => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, await caches.keys()])"
    )
    assert PAGE_TOKEN not in other.evaluate(stored)
    page.goto(f"{balancer.url}/page")  # in the tab that had it
    assert PAGE_TOKEN not in page.evaluate(stored) + page.evaluate("JSON.stringify([history.state, document.referrer])")
    assert PAGE_TOKEN not in page.evaluate("JSON.stringify(navigation.entries().map((one) => one.url))")


@pytest.mark.parametrize("policy", OPENER_POLICIES)
def test_the_page_of_a_backend_gets_no_hold_of_the_dashboard(
    owned: tuple[Balancer, WireBackend], page: Page, policy: str
) -> None:
    """Whatever policy it has itself: one that says same-origin as the dashboard did kept its hold."""
    balancer, backend = owned
    backend.answer(a_page(policy))
    page.goto(f"{balancer.url}/page")
    with page.expect_popup() as popup:
        page.evaluate("() => { window.held = window.open('/dashboard'); }")
    expect(popup.value.locator("#pill")).to_contain_text("Live")
    assert popup.value.evaluate("window.opener") is None
    wait_until(lambda: page.evaluate("window.held.closed"))
    framed = """() => new Promise((done) => {
      const frame = document.createElement("iframe");
      frame.src = "/dashboard";
      frame.onload = () => done(Boolean(frame.contentDocument?.querySelector("#token")));
      document.body.append(frame);
    })"""
    assert page.evaluate(framed) is False


@pytest.mark.parametrize("policy", OPENER_POLICIES)
def test_a_window_of_a_backend_gets_no_hold_of_the_tab_that_goes_on_to_the_dashboard(
    owned: tuple[Balancer, WireBackend], page: Page, policy: str
) -> None:
    """As its opener it read the token in the tab's own record of where it went."""
    balancer, backend = owned
    backend.answer(a_page(policy))
    page.goto(f"{balancer.url}/page")
    with page.expect_popup() as popup:
        page.evaluate("() => { window.open('/page'); }")
    popup.value.wait_for_load_state()
    page.goto(f"{balancer.url}/dashboard#token={PAGE_TOKEN}")
    expect(page.locator("#pill")).to_contain_text("Live")
    assert popup.value.evaluate("() => window.opener === null || window.opener.closed")


@pytest.mark.parametrize(("script", "scope"), [("/sw.js", "/"), ("/api/sw.js", "/"), ("/sw.js", "/dashboard")])
def test_no_backend_gets_a_service_worker_over_the_dashboard(
    owned: tuple[Balancer, WireBackend], page: Page, script: str, scope: str
) -> None:
    """It would answer in the balancer's place, for as long as the browser keeps it."""
    balancer, backend = owned
    page.goto(f"{balancer.url}/page")
    worker = b"onfetch = (event) => event.respondWith(new Response('taken over'));"
    backend.answer(ok(worker, b"Content-Type: text/javascript", b"Service-Worker-Allowed: /"))
    register = """([script, scope]) => navigator.serviceWorker.register(script, {scope})
      .then(() => "registered", (error) => error.name)"""
    assert page.evaluate(register, [script, scope]) in ("TypeError", "SecurityError")
    assert page.evaluate("() => navigator.serviceWorker.getRegistrations().then((all) => all.length)") == 0
    page.goto(f"{balancer.url}/dashboard")
    expect(page.locator("#pill")).to_contain_text("Live")
    assert json.loads(page.evaluate("() => fetch('/livez').then((it) => it.text())"))["status"] == "healthy"
