"""--debug: one request, and everything that both sides said."""

import contextlib
import http.client

from loadtest.connection import READ_SIZE, Failed, clock, explain, open_socket, read_head
from loadtest.options import Options
from loadtest.problems import EXIT_FAILED, EXIT_UNREACHABLE, Problem, clean
from loadtest.screen import Screen, number, quantity
from loadtest.target import Identity, Target, request_method

SHOWN = 4096  # bytes of a body
SECRET = ("authorization", "proxy-authorization", "cookie", "set-cookie")


def show_exchange(options: Options, target: Target, screen: Screen) -> int:
    """Send the request once; the exit code says whether the answer is a good one. Raises Problem if none comes."""
    request = Identity(options, target, None).request
    head, _, body = request.partition(b"\r\n\r\n")
    for line in head.decode("latin-1").split("\r\n"):
        screen.line("> " + _without_secret(line))
    _show_body(screen, body, "> ")
    started = clock()
    try:
        with contextlib.closing(open_socket(target, options.connect_timeout, options.timeout)) as sock:
            connected = clock()
            sock.sendall(request)
            response = read_head(sock, request_method(options))
            first_byte = clock()
            answer, size = _read(response)
    except (OSError, http.client.HTTPException, Failed) as error:
        raise Problem(f"no answer: {explain(error, options.timeout)}", EXIT_UNREACHABLE) from None
    end = clock()
    screen.line(f"< HTTP/{response.version / 10:g} {response.status} {clean(response.reason)}")
    for name, value in response.getheaders():
        screen.line("< " + _without_secret(f"{name}: {value}"))
    _show_body(screen, answer, "< ")
    times = {"connect": connected - started, "first byte": first_byte - connected, "body": end - first_byte}
    shown = [f"{name} {number(seconds * 1000, 2)} ms" for name, seconds in times.items()]
    screen.line(f"\n{', '.join(shown)}, {quantity(size)} of body")
    good = response.status < 400 if options.expect_status is None else response.status in options.expect_status
    return 0 if good or options.exit_zero else EXIT_FAILED


def _read(response: http.client.HTTPResponse) -> tuple[bytes, int]:
    """The begin of the body and the size of all of it."""
    start, size = b"", 0
    while piece := response.read(READ_SIZE):
        size += len(piece)
        start = (start + piece)[: SHOWN + 1]
    if response.length:
        raise http.client.IncompleteRead(start, response.length)
    return start, size


def _show_body(screen: Screen, body: bytes, mark: str) -> None:
    if body:
        screen.line(mark.rstrip())
        for line in body[:SHOWN].decode("utf-8", "replace").splitlines():
            screen.line(mark + clean(line))
    if len(body) > SHOWN:
        screen.line(f"{mark}... ({SHOWN} bytes shown)")


def _without_secret(line: str) -> str:
    name, _, _ = line.partition(":")
    return f"{name}: (not shown)" if name.lower() in SECRET else clean(line)
