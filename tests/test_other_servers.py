"""The app is a Flask and WSGI app like any other: under waitress, on a test client, by the letter of PEP 3333."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from flask import Flask
from support import PYTHON, Process, RawRequest, fetch, fetch_json, free_port, is_good, ok, wait_until
from wire import WireBackend

from balancer.config.settings import Settings
from balancer.config.values import BackendSettings
from load_balancer import create_app


def echo(sock: object, request: RawRequest) -> None:
    """Answer with what came: the request line, the header lines that matter here, and the body."""
    method = request.head.split(b" ", 1)[0]
    seen = {
        "line": request.head.partition(b"\r\n")[0].decode("latin-1"),
        "host": [value.decode() for value in request.values(b"host")],
        "via": [value.decode() for value in request.values(b"via")],
        "custom": [value.decode() for value in request.values(b"x-custom")],
        "type": [value.decode() for value in request.values(b"content-type")],
        "length": len(request.body),
        "body": request.body[:100].decode("latin-1"),
    }
    answer = ok(
        json.dumps(seen).encode(),
        b"Content-Type: application/json",
        b"Set-Cookie: a=1",
        b"Set-Cookie: b=2",
        b"X-Method: " + method,
    )
    if method == b"HEAD":
        answer = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    sock.sendall(answer)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def echoing() -> Iterator[WireBackend]:
    with WireBackend() as backend:
        backend.script = echo
        yield backend


# Waitress.


@pytest.fixture(scope="module")
def waitress(echoing: WireBackend) -> Iterator[str]:
    """`waitress-serve load_balancer:app`, configured by the environment; its URL."""
    port = free_port()
    with Process(
        [PYTHON, "-m", "waitress", f"--listen=127.0.0.1:{port}", "--threads=8", "load_balancer:app"],
        {"LB_BACKENDS": f"only={echoing.url}@2", "LB_EXPOSE_BACKEND": "true", "LB_ID": "under-waitress"},
    ) as process:
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            assert process.popen.poll() is None, process.output
            return is_good(f"{url}/readyz")

        wait_until(is_ready, "waitress serves the app")
        yield url


def test_an_unknown_variable_is_told_where_there_is_no_command_line() -> None:
    with Process([PYTHON, "-c", "import load_balancer; load_balancer.app"], {"LB_ALGORITM": "weighted"}) as process:
        assert process.wait() == 0
    assert "LB_ALGORITM is ignored" in process.output and "Traceback" not in process.output


def test_waitress_forwards_a_get(waitress: str) -> None:
    status, headers, body = fetch(f"{waitress}/a%2Fb/%C3%A4?q=1&r=%20", X_Custom="yes")
    seen = json.loads(body)
    assert status == 200
    assert seen["line"] == "GET /a%2Fb/%C3%A4?q=1&r=%20 HTTP/1.1"
    assert seen["host"] == [waitress.partition("://")[2]] and seen["custom"] == ["yes"]
    assert headers["x-served-by"] == "only" and headers["x-request-id"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_waitress_forwards_bodies(waitress: str, method: str) -> None:
    _, _, body = fetch(f"{waitress}/x", b"data=1", method, Content_Type="text/custom")
    seen = json.loads(body)
    assert (seen["line"], seen["body"], seen["type"]) == (f"{method} /x HTTP/1.1", "data=1", ["text/custom"])


def test_waitress_forwards_a_large_body_and_head(waitress: str) -> None:
    assert fetch_json(f"{waitress}/x", b"x" * 3_000_000, "PUT", Content_Type="a/b")["length"] == 3_000_000
    status, headers, body = fetch(f"{waitress}/x", method="HEAD")
    assert (status, headers["x-method"], body) == (200, "HEAD", b"")


def test_waitress_serves_the_control_api(waitress: str) -> None:
    assert fetch(f"{waitress}/x")[0] == 200
    status = fetch_json(f"{waitress}/status")
    assert (status["load_balancer_id"], status["lifecycle"]) == ("under-waitress", "running")
    assert status["backend_servers"][0]["healthy"] and status["backend_servers"][0]["weight"] == 2
    whole = status["statistics"]
    assert whole["total_requests"] == whole["successful_requests"] > 0
    assert (whole["active_requests"], whole["unassigned_requests"]) == (0, 0)
    assert fetch_json(f"{waitress}/algorithm", {"algorithm": "round_robin"})["current"] == "round_robin"
    assert fetch(f"{waitress}/algorithm", b"{", "POST", Content_Type="application/json")[0] == 400


def test_waitress_passes_on_what_the_backend_gets_wrong(waitress: str, echoing: WireBackend) -> None:
    echoing.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    try:
        assert fetch(f"{waitress}/x")[2] == b"abcde"
        echoing.answer(b"nonsense\r\n\r\n", close=True)
        status, _, body = fetch(f"{waitress}/x")
        assert status == 502 and json.loads(body)["load_balancer_id"] == "under-waitress"
    finally:
        echoing.script = echo


def test_waitress_ends_quietly(echoing: WireBackend) -> None:
    """The health thread and the sockets to backends end with the process."""
    port = free_port()
    arguments = [PYTHON, "-m", "waitress", f"--listen=127.0.0.1:{port}", "load_balancer:app"]
    with Process(arguments, {"LB_BACKENDS": f"only={echoing.url}"}) as process:
        wait_until(lambda: "Serving" in process.output)
        assert fetch(f"http://127.0.0.1:{port}/health")[0] == 200
        process.send(signal.SIGINT)
        process.wait()
    assert "Traceback" not in process.output and "Exception" not in process.output


def test_a_wrong_setting_is_named_under_another_server_too() -> None:
    with Process([PYTHON, "-c", "from load_balancer import app"], {"LB_ALGORITHM": "fastest"}) as process:
        assert process.wait() != 0
    assert "fastest" in process.lines[-1] and "round_robin" in process.lines[-1]


# Flask's test client and the WSGI validator, in this process.


@pytest.fixture
def app(echoing: WireBackend) -> Iterator[Flask]:
    made = create_app(Settings(backends=(BackendSettings(id="only", url=echoing.url),), expose_backend=True))
    balancer = made.extensions["balancer"]
    balancer.start_parts()
    wait_until(balancer.control.is_serving)
    yield made
    balancer.stop_parts()


def test_the_test_client_forwards_and_controls(app: Flask) -> None:
    client = app.test_client()
    answer = client.get("/x?y=1", headers={"X-Custom": "1"})
    assert answer.status_code == 200 and answer.json is not None
    assert (answer.json["line"], answer.json["custom"]) == ("GET /x?y=1 HTTP/1.1", ["1"])
    assert answer.headers.getlist("Set-Cookie") == ["a=1", "b=2"]
    assert answer.headers["X-Served-By"] == "only"
    posted = client.post("/x", data=b"body", content_type="text/plain").json
    assert posted is not None and (posted["body"], posted["type"]) == ("body", ["text/plain"])
    assert client.head("/x").data == b""
    status = client.get("/status").json
    assert status is not None and status["statistics"]["successful_requests"] == 3
    assert status["statistics"]["active_requests"] == 0


def test_an_answer_that_is_not_read_gives_its_place_back(app: Flask, echoing: WireBackend) -> None:
    """The server closes the iterable early, as it does when its client has gone."""
    echoing.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 500_000)
    try:
        answer = app.test_client().get("/x", buffered=False)
        answer.close()
        whole = app.test_client().get("/status").json["statistics"]  # type: ignore[index]
        assert (whole["active_requests"], whole["aborted_requests"]) == (0, 1)
    finally:
        echoing.script = echo


@pytest.mark.parametrize("path", ["/x", "/status", "/health", "/dashboard", "/backends/nobody"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_the_app_keeps_to_the_letter_of_wsgi(app: Flask, path: str, method: str) -> None:
    environ: dict[str, object] = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    started: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> object:
        started.append((status, headers))
        return lambda data: None

    answer = validator(app.wsgi_app)(environ, start_response)
    try:
        body = b"".join(answer)
    finally:
        answer.close()
    assert len(started) == 1
    length = dict((name.lower(), value) for name, value in started[0][1])["content-length"]
    assert len(body) == (0 if method == "HEAD" else int(length))


def test_two_apps_in_one_process_share_nothing(echoing: WireBackend) -> None:
    backend = BackendSettings(id="only", url=echoing.url)
    one, two = (create_app(Settings(id=name, backends=(backend,))) for name in ("one", "two"))
    assert one.test_client().post("/algorithm", json={"algorithm": "round_robin"}).status_code == 200
    assert one.test_client().get("/x").status_code == 503  # not started: nothing is known to be up
    status = two.test_client().get("/status").json
    assert status is not None
    assert (status["load_balancer_id"], status["algorithm"]) == ("two", "weighted")
    assert status["statistics"]["total_requests"] == 0
