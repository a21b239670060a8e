"""A browser tab with the dashboard in it, and the fixtures that the dashboard's tests share."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

from tests.dashboard_stub import PAGE, Json, Stub, backend, down_backend, serving, status

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
# Four polls a second instead of one: a test waits for the next answer, not for what happens in between.
FASTER = "const real = setTimeout; window.setTimeout = (f, ms) => real(f, ms >= 900 && ms <= 1100 ? ms / 4 : ms);"
DASH = "\u2014"


def three() -> Json:
    """Two healthy backends, one dead, some failures."""
    second = backend(2, weight=2, max_connections=50, failed_requests=4, expected_share=1 / 3)
    return status([backend(1, weight=3, expected_share=0.5), second, down_backend(3, failed_requests=12)], failed=16)


@dataclass
class Tab:
    """A page and what it did: a test ends by asking whether it behaved."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    network_errors_expected: bool = False

    def watch(self) -> None:
        self.page.on("console", self.note_console)
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.page.on("dialog", self.note_dialog)
        self.page.on("request", self.note_request)

    def note_console(self, message: ConsoleMessage) -> None:
        network = "Failed to load resource" in message.text or "blocked by CORS policy" in message.text
        if message.type in ("error", "warning") and not (network and self.network_errors_expected):
            self.errors.append(message.text)

    def note_dialog(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def note_request(self, request: Request) -> None:
        if not request.url.startswith(("file://", "data:")):
            self.requests.append(request.url)

    def from_disk(self, url: str) -> Tab:
        self.page.goto(f"{PAGE.as_uri()}?lb={url}")
        return self

    def at(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def shows(self, selector: str, words: str | re.Pattern[str], timeout: float = 6000) -> None:
        expect(self.at(selector)).to_contain_text(words, timeout=timeout)

    def is_live(self) -> Tab:
        self.shows("#pill", "Live")
        return self


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(three()) as running:
        yield running


@pytest.fixture
def tab(chromium: Browser, stub: Stub) -> Iterator[Tab]:
    """A page of a fresh profile that must stay free of errors, dialogs and script warnings.

    It uses `stub` to be gone before it: a page that outlives its server reports refused connections.
    """
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(FASTER)
    tab = Tab(context.new_page())
    tab.watch()
    yield tab
    context.close()
    assert tab.errors == []
