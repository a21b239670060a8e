"""Makes the dashboard's screenshots again: .venv/bin/python docs/images/make.py (about two minutes, needs Chromium).

They show the real thing: a balancer and three demo backends on free ports, five clients of uneven pace, one backend
that was drained and put back, one that answers some errors for a while, and one that was killed.
"""

from __future__ import annotations

import http.client
import random
import shutil
import socket
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "tests")]

from fleet import Demo, start_demo  # noqa: E402
from support import PAGE_TOKEN, fetch  # noqa: E402
from wire import RawRequest, Script  # noqa: E402

WIDTH, HEIGHT = 1440, 1700
PATHS = ("/api/process", "/api/process?page=2", "/orders/1701", "/orders", "/login")


def browse(demo: Demo, stop: threading.Event, pace: float) -> None:
    """One client: requests of random pause around `pace` seconds until it is told to stop."""
    rng = random.Random(pace)
    connection = http.client.HTTPConnection("127.0.0.1", demo.balancer.port, timeout=10)
    while not stop.wait(rng.expovariate(1 / pace)):
        connection.request("GET", rng.choices(PATHS, (9, 3, 1, 1, 1))[0])
        connection.getresponse().read()
    connection.close()


def unsteady(usual: Script) -> Script:
    """As usual, but one in twenty is answered with an error."""
    rng = random.Random(1)

    def answer(sock: socket.socket, request: RawRequest) -> None:
        if rng.random() < 0.05:
            sock.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        else:
            usual(sock, request)

    return answer


def live(demo: Demo, stop: threading.Event) -> None:
    """What happens in the minute and a half before the picture is taken."""
    first, second, third = demo.backends

    def set_state(admin_state: str) -> None:
        fetch(f"{demo.url}/backends/{second.id}", {"admin_state": admin_state}, method="PATCH")

    stop.wait(40)
    set_state("drain")
    stop.wait(10)
    set_state("ready")
    stop.wait(8)
    usual, first.script = first.script, unsteady(first.script)
    stop.wait(8)
    first.script = usual
    stop.wait(4)
    third.kill()
    stop.wait(12)


def take_pictures(url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for theme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
            page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            page.goto(f"{url}/dashboard#token={PAGE_TOKEN}")
            page.locator("#event-rows li").first.wait_for()
            page.locator(".plot path.area").first.wait_for(state="attached")
            bottom = page.locator("#log").bounding_box()  # the last whole panel; what is below is more of the same
            assert bottom is not None
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": bottom["y"] + bottom["height"] + 8}
            page.screenshot(path=HERE / f"dashboard-{theme}.png", clip=clip)
            page.close()
        browser.close()


def main() -> None:
    demo = start_demo("--id=lb-demo")
    for backend, delay in zip(demo.backends, (0.012, 0.02, 0.035), strict=True):
        backend.delay = delay
    stop = threading.Event()
    clients = [threading.Thread(target=browse, args=(demo, stop, pace)) for pace in (0.02, 0.03, 0.05, 0.05, 0.08)]
    try:
        for client in clients:
            client.start()
        live(demo, stop)
        take_pictures(demo.url)
    finally:
        stop.set()
        for client in clients:
            client.join()
        demo.stop()


if __name__ == "__main__":
    main()
