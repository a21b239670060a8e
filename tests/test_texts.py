"""What others say, fit to be kept, shown and logged."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Start, StartProcess, exchange, fetch, fetch_json, get, wait_until
from wire import WireBackend, resident_bytes

from balancer.errors import BackendError
from balancer.observe.events import MESSAGE_KEPT, Events
from balancer.protocol.texts import SHOWN, printable, shown

LONG = 60_000  # bytes; a response head may have 64 KiB


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("a b~", "a b~"),
        ("Größe 漢字", "Größe 漢字"),
        ("a\nb\r\tc\0", "a\\x0ab\\x0d\\x09c\\x00"),
        ("\x1b[31m\x7f\x9b31m\x85", "\\x1b[31m\\x7f\\x9b31m\\x85"),
        ("a\u2028b\u2029c\u202ed\ud800\U000e0001", "a\\u2028b\\u2029c\\u202ed\\ud800\\U000e0001"),
    ],
)
def test_what_is_not_printable_is_escaped(said: str, text: str) -> None:
    assert printable(said) == text


def test_bytes_are_shown_as_utf_8_where_they_are() -> None:
    assert shown("Größe".encode() + b"\xff\x1b\n") == "Größe\\xff\\x1b\\x0a"


@given(st.text(max_size=400) | st.binary(max_size=400))
def test_a_text_is_one_line_and_never_too_long(said: str | bytes) -> None:
    text = shown(said)
    assert text.isprintable() and len(text.encode()) <= SHOWN
    if len(said) <= SHOWN // 10:  # one character takes ten at most
        assert not text.endswith("...") or said[-3:] in ("...", b"...")


@pytest.mark.parametrize("char", ["x", "é", "漢", "\U0001f600"])
def test_a_cut_does_not_go_through_a_character(char: str) -> None:
    text = shown(char * LONG)
    assert set(text[:-3]) == {char} and text.endswith("...")
    assert SHOWN - 4 < len(text.encode()) <= SHOWN
    assert shown((char * LONG).encode()) == text


def test_a_backend_s_error_is_cut_whoever_makes_its_text() -> None:
    text = str(BackendError("it said \n" + "x" * LONG))
    assert text.startswith("it said \\x0axxx") and len(text) == SHOWN


def test_a_message_of_an_event_is_cut() -> None:
    events = Events()
    events.add("write_refused", None, "Host \x1b" + "x" * LONG)
    (event,), _ = events.since(0)
    assert event["message"].startswith("Host \\x1bxxx") and len(event["message"]) == MESSAGE_KEPT


# From a hostile backend, to all places where it is kept.


def test_what_a_hostile_backend_says_is_cut_wherever_it_is_kept(
    start_process: StartProcess, scripted: WireBackend
) -> None:
    """Kept whole, the answers to these requests would take 100 MB, and `/status` would show 25 of them."""
    balancer = start_process("--eject-after=3", "--access-log")
    scripted.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: z\xe2\x80\xa8\x9b" + b"y" * LONG + b"\r\n\r\n")

    def send(requests: int) -> None:
        for number in range(requests):
            assert fetch(f"{balancer.url}/{number}")[0] == 502

    send(20)
    before = resident_bytes(balancer.pid)
    send(400)
    assert resident_bytes(balancer.pid) - before < 12_000_000
    newest = balancer.status(1)["recent_requests"][0]
    explained = fetch_json(f"{balancer.url}/requests/{newest['request_id']}")
    for text in (newest["tried"][0]["error"], explained["error"], explained["tried"][0]["error"]):
        assert "framing z\\u2028\\x9byyy" in text and len(text) == SHOWN
    everything = [fetch(f"{balancer.url}/{path}")[2].decode() for path in ("status?recent=100", "events", "metrics")]
    wait_until(lambda: any("/399 " in line for line in balancer.lines), what="the log is written")
    assert not any("y" * (SHOWN + 1) in text for text in [*everything, *balancer.lines])


def test_reasons_of_health_and_ejection_are_cut(start: Start, scripted: WireBackend) -> None:
    with WireBackend() as other:
        balancer = start(f"--backend=other={other.url}", "--eject-after=2", "--algorithm=round_robin", "--retries=0")
        balancer.wait_healthy("only")
        scripted.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + b"y" * LONG + b"\r\n\r\n")

        def ejection() -> dict[str, object]:
            fetch(f"{balancer.url}/")
            found: dict[str, object] = balancer.backend("only")["ejection"]
            return found if found["status"] == "ejected" else {}

        reason = wait_until(ejection, what="it is ejected")["reason"]
        assert "framing yyy" in reason and len(reason) < SHOWN + 50
        assert max(len(e["message"]) for e in fetch_json(f"{balancer.url}/events")["events"]) < SHOWN + 80


def test_a_method_as_long_as_a_head_is_kept_nowhere(start: Start, scripted: WireBackend) -> None:
    """Why there was no further attempt names the method, and anybody may make one up."""
    balancer = start()
    scripted.answer(b"nonsense\r\n\r\n")
    assert b" 502 " in exchange(balancer.port, get(b"/", method=b"M" * 8000))
    newest = balancer.status(1)["recent_requests"][0]
    assert newest["not_retried"] == "M" * 32 + " may have had its effect"
    assert len(json.dumps(balancer.status(1))) < 10_000
