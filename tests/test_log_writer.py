"""Lines come out in order and whole; what cannot be written is counted; nobody ever waits."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from support import wait_until

from balancer.observe.logrecords import MESSAGE_LOGGED, LogFormatter, LogHandler
from balancer.observe.logwriter import LogWriter, standard_output


class Pipe:
    """A pipe whose reader the test is."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def read(self) -> list[str]:
        """All lines until the writing end is closed."""
        self.close_writer()
        with open(self.reader, encoding="utf-8", closefd=False) as stream:
            return stream.read().splitlines()

    def close_writer(self) -> None:
        with suppress(OSError):
            os.close(self.writer)

    def close(self) -> None:
        self.close_writer()
        with suppress(OSError):
            os.close(self.reader)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def fill(descriptor: int) -> None:
    """Until a write would block."""
    os.set_blocking(descriptor, False)
    with suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"\n" * 4096)


def test_lines_come_out_in_order_and_whole_and_stop_writes_the_rest(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer)
    writer.start()
    for number in range(250):
        writer.add(f"line {number}" if number % 2 else lambda number=number: f"line {number}")
    writer.stop()
    assert pipe.read() == [f"line {number}" for number in range(250)]
    assert (writer.written, writer.dropped) == (250, 0)


def test_a_line_comes_out_soon_though_nothing_follows(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer)
    writer.start()
    writer.add("alone")
    assert os.read(pipe.reader, 100) == b"alone\n"
    writer.add("again")
    assert os.read(pipe.reader, 100) == b"again\n"
    writer.stop()


def test_the_thread_is_named_and_joined(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer)
    writer.start()
    assert "log-writer" in [thread.name for thread in threading.enumerate()]
    writer.stop()
    assert "log-writer" not in [thread.name for thread in threading.enumerate()]
    LogWriter(pipe.writer).stop()  # one that was never started


@pytest.fixture
def blocked(pipe: Pipe) -> Iterator[LogWriter]:
    """A writer whose first write blocks."""
    fill(pipe.writer)
    os.set_blocking(pipe.writer, True)
    writer = LogWriter(pipe.writer, limit=100)
    writer.start()
    is_taken = threading.Event()
    writer.add(lambda: is_taken.set() or "the one that blocks")
    assert is_taken.wait(60)
    yield writer
    pipe.close()  # the write fails, and the thread ends
    writer.stop()


def test_when_nobody_reads_nobody_waits_and_what_is_lost_is_counted(blocked: LogWriter) -> None:
    for number in range(1000):
        blocked.add(f"line {number}")  # for ever, if it waited
    assert blocked.dropped == 900


def test_stop_does_not_wait_for_a_write_that_blocks(blocked: LogWriter) -> None:
    blocked.stop()


def test_what_was_kept_is_written_when_somebody_reads_again(pipe: Pipe, blocked: LogWriter) -> None:
    for number in range(150):
        blocked.add(f"line {number}")
    received = b""
    while b"line 99\n" not in received:
        received += os.read(pipe.reader, 65536)
    assert received.strip().splitlines() == [b"the one that blocks", *(b"line %d" % number for number in range(100))]
    wait_until(lambda: blocked.written == 101, what="all are counted")
    assert blocked.dropped == 50


def test_a_pipe_made_non_blocking_by_somebody_loses_nothing_once_it_is_read(pipe: Pipe) -> None:
    fill(pipe.writer)
    writer = LogWriter(pipe.writer)
    writer.start()
    writer.add("line")
    received = b""
    while not received.endswith(b"line\n"):
        received += os.read(pipe.reader, 65536)
    writer.stop()
    assert (writer.written, writer.dropped) == (1, 0)


def test_a_non_blocking_pipe_that_nobody_reads_does_not_hold_up_the_end(pipe: Pipe) -> None:
    fill(pipe.writer)
    writer = LogWriter(pipe.writer)
    writer.start()
    writer.add("line")
    writer.stop()
    assert (writer.written, writer.dropped) == (0, 1)


def test_a_closed_pipe_and_a_full_disk_are_counted_and_nothing_is_raised(
    pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    os.close(pipe.reader)
    with open("/dev/full", "wb", buffering=0) as full:
        for descriptor in (pipe.writer, full.fileno(), None):
            writer = LogWriter(descriptor)
            writer.start()
            for number in range(150):
                writer.add(f"line {number}")
            writer.stop()
            assert (writer.written, writer.dropped) == (0, 150)
    assert capfd.readouterr() == ("", "")


def test_a_line_that_cannot_be_made_is_counted_and_the_next_comes(pipe: Pipe) -> None:
    def fail() -> str:
        raise ValueError("surprise")

    writer = LogWriter(pipe.writer)
    writer.add(fail)
    writer.add("next \ud800")  # not UTF-8
    writer.start()
    writer.stop()
    assert pipe.read() == ["next \\ud800"]
    assert (writer.written, writer.dropped) == (1, 1)


def test_nothing_is_lost_or_doubled_while_many_threads_add(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer, limit=50)
    writer.start()
    with ThreadPoolExecutor(9) as threads:
        reader = threads.submit(pipe_lines, pipe.reader)
        adders = [threads.submit(add_many, writer, name) for name in "abcdefgh"]
        for adder in adders:
            adder.result()
        writer.stop()
        pipe.close_writer()
        lines = reader.result()
    assert len(lines) == len(set(lines)) == writer.written
    assert writer.written + writer.dropped == 8 * 500
    for name in "abcdefgh":
        numbers = [int(line[1:]) for line in lines if line[0] == name]
        assert numbers == sorted(numbers)


def add_many(writer: LogWriter, name: str) -> None:
    for number in range(500):
        writer.add(f"{name}{number}")


def pipe_lines(reader: int) -> list[str]:
    with open(reader, encoding="utf-8", closefd=False) as stream:
        return stream.read().splitlines()


def test_log_records_go_through_it_and_a_bad_one_fails_nobody(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    writer = LogWriter(pipe.writer)
    handler = LogHandler(writer)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    for message, arguments in (("hello %s", ("you",)), ("%d", ("no number",))):
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, message, arguments, None))
    writer.start()
    writer.stop()
    assert pipe.read() == ["INFO hello you"]


def logged(pipe: Pipe, log: Callable[[logging.Logger], object]) -> list[str]:
    """What comes out of a handler as the balancer has it."""
    writer, logger = LogWriter(pipe.writer), logging.Logger("some.library")
    handler = LogHandler(writer)
    handler.setFormatter(LogFormatter(lambda: "text"))
    logger.addHandler(handler)
    log(logger)
    writer.start()
    writer.stop()
    return pipe.read()


FORGED = "\n2026-01-01 00:00:00,000 ERROR balancer: forged\x1b[31m\x7f\x9b\u2028\ud800"
ESCAPED = "\\x0a2026-01-01 00:00:00,000 ERROR balancer: forged\\x1b[31m\\x7f\\x9b\\u2028\\ud800"


@pytest.mark.parametrize("message", ["Exception on /backends/a%s [PATCH]", "%s"])
def test_a_message_is_one_line_whoever_logs_it(pipe: Pipe, message: str) -> None:
    (line,) = logged(pipe, lambda logger: logger.error(message, FORGED))
    assert line.endswith(f" ERROR some.library: {message % ESCAPED}")


def test_a_traceback_cannot_pass_for_a_record(pipe: Pipe) -> None:
    """Only a record begins at the margin."""

    def log(logger: logging.Logger) -> None:
        try:
            raise ValueError(FORGED)
        except ValueError:
            logger.exception("failed", stack_info=True)

    first, *more = logged(pipe, log)
    assert first.endswith("ERROR some.library: failed")
    assert all(line.startswith("    ") and line.isprintable() for line in more)
    assert any("Traceback" in line for line in more) and any("Stack" in line for line in more)
    assert "    " + ESCAPED.removeprefix("\\x0a") in more


def test_as_json_a_record_with_its_traceback_is_one_object(pipe: Pipe) -> None:
    def log(logger: logging.Logger) -> None:
        logger.handlers[0].setFormatter(LogFormatter(lambda: "json"))
        try:
            raise ValueError(FORGED)
        except ValueError:
            logger.exception("failed: %s", "a\nb")

    (line,) = logged(pipe, log)
    told = json.loads(line)
    assert list(told) == ["time", "level", "logger", "message", "traceback"]
    assert (told["level"], told["logger"], told["message"]) == ("error", "some.library", "failed: a\\x0ab")
    assert told["traceback"].startswith("Traceback") and told["traceback"].endswith(f"ValueError: {FORGED}")


def test_a_message_of_any_length_takes_little_room_while_it_waits(pipe: Pipe) -> None:
    (line,) = logged(pipe, lambda logger: logger.error("x" * 1_000_000))
    assert len(line) < MESSAGE_LOGGED + 100


def test_other_handlers_get_a_record_as_it_is(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    def log(logger: logging.Logger) -> None:
        logger.addHandler(caplog.handler)
        logger.error("a%s", "\n")

    logged(pipe, log)
    assert [(record.msg, record.args) for record in caplog.records] == [("a%s", ("\n",))]


def test_what_is_added_by_itself_cannot_pass_for_another_line_either(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer)
    writer.add("a\nb\x1b")
    writer.add(lambda: "c\u2029\nd")
    writer.start()
    writer.stop()
    assert pipe.read() == ["a", "    b\\x1b", "c\\u2029", "    d"]


def test_a_standard_output_that_is_not_there_has_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert standard_output() is None
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert standard_output() is None
