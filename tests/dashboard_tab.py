"""A browser tab with the dashboard in it, and the fixtures that the dashboard's tests share."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

from tests.dashboard_stub import PAGE, PAGE_TOKEN, Json, Stub, backend, down_backend, serving, status

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
# Four polls a second instead of one: a test waits for the next answer, not for what happens in between.
FASTER = "const real = setTimeout; window.setTimeout = (f, ms) => real(f, ms >= 900 && ms <= 1100 ? ms / 4 : ms);"
DASH = "\u2014"

expect.set_options(timeout=60_000)  # milliseconds; a slow machine is no finding


def three() -> Json:
    """Two healthy backends, one dead, some failures."""
    second = backend(2, weight=2, max_connections=50, failed_requests=4, expected_share=1 / 3)
    return status([backend(1, weight=3, expected_share=0.5), second, down_backend(3, failed_requests=12)], failed=16)


@dataclass
class Tab:
    """A page and what it did: a test ends by asking whether it behaved."""

    page: Page
    folder: Path  # as where the demo runs: the page, and beside it what lets it in
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    network_errors_expected: bool = False

    def watch(self) -> None:
        self.page.on("console", self.note_console)
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.page.on("dialog", self.note_dialog)
        self.page.on("request", self.note_request)

    def note_console(self, message: ConsoleMessage) -> None:
        if message.location["url"].partition("?")[0].endswith("/run/access.js"):
            return  # no demo runs: the page says so in its own words
        network = "Failed to load resource" in message.text or "blocked by CORS policy" in message.text
        if message.type in ("error", "warning") and not (network and self.network_errors_expected):
            self.errors.append(message.text)

    def note_dialog(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def note_request(self, request: Request) -> None:
        if not request.url.startswith(("file://", "data:")):
            self.requests.append(request.url)

    def from_disk(self, url: str, *others: str, token: str = PAGE_TOKEN) -> Tab:
        """Open the page as a double click does, where the balancers at these addresses were started."""
        self.grant(url, *others, token=token)
        return self.from_disk_alone(f"?lb={url}")

    def from_disk_alone(self, query: str = "") -> Tab:
        shutil.copy(PAGE, self.folder)
        self.page.goto((self.folder / PAGE.name).as_uri() + query)
        return self

    def grant(self, *urls: str, token: str = PAGE_TOKEN) -> None:
        (self.folder / "run").mkdir(exist_ok=True)
        entries = {"balancer-9000": {"urls": urls, "token": token}}
        (self.folder / "run" / "access.js").write_text(f"window.LB_ACCESS = {json.dumps(entries)};\n", encoding="ascii")

    def at(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def shows(self, selector: str, words: str | re.Pattern[str]) -> None:
        expect(self.at(selector)).to_contain_text(words)

    def pick(self, selector: str) -> None:
        """A choice, by keyboard: what is on its way under a mouse may be elsewhere when the button goes down."""
        self.page.focus(selector)
        self.page.keyboard.press("Space")
        expect(self.at(selector)).to_be_checked()

    def is_live(self) -> Tab:
        self.shows("#pill", "Live")
        return self

    def view(self, name: str) -> None:
        self.page.click(f"#tabs a[data-view={name}]")
        expect(self.at("body")).to_have_attribute("data-view", name)

    def use_gear(self) -> None:
        """What is seldom set is behind one button: address, refresh, theme, settings."""
        if not self.at("#gear").is_visible():
            self.page.click("#open-gear")

    def connect_to(self, address: str) -> None:
        self.use_gear()
        self.page.fill("#address", address)
        self.page.keyboard.press("Enter")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The one without windows, if it is there, takes a third of the CPU.
        program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(three()) as running:
        yield running


@pytest.fixture
def tab(chromium: Browser, stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A page of a fresh profile that must stay free of errors, dialogs and script warnings.

    It uses `stub` to be gone before it: a page that outlives its server reports refused connections.
    """
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.add_init_script(FASTER)
    tab = Tab(context.new_page(), tmp_path_factory.mktemp("disk"))
    tab.watch()
    yield tab
    context.close()
    assert tab.errors == []
