"""Log records as lines beside those of the access log: in the same format, by the same clock."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable

from balancer.observe.accesslog import timestamp
from balancer.observe.logwriter import LogWriter
from balancer.protocol.texts import shown

MESSAGE_LOGGED = 8192  # bytes: lines wait in a queue, and nobody must be able to fill the memory with it

_to_json = json.JSONEncoder(separators=(",", ":")).encode


class LogFormatter(logging.Formatter):
    """As text: time, level, logger and message, a traceback in lines after it. As JSON: one object of the same names,
    which has no `request_id`, and so is no request."""

    def __init__(self, access_log_format: Callable[[], str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._access_log_format = access_log_format  # may change at any time

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return timestamp(record.created)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self._access_log_format() == "text":
            return text
        said = {"time": record.asctime, "level": record.levelname.lower(), "logger": record.name}
        said["message"] = record.message
        if record.exc_text or record.stack_info:
            said["traceback"] = "\n".join(filter(None, (record.exc_text, record.stack_info)))
        return _to_json(said)


def install(writer: LogWriter, level: str, access_log_format: Callable[[], str]) -> LogHandler:
    """From now on the log of this process goes there."""
    handler = LogHandler(writer)
    handler.setFormatter(LogFormatter(access_log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("_granian").setLevel(logging.WARNING)  # it tells of every client that leaves
    return handler


class LogHandler(logging.Handler):
    """Log records of the `logging` module, through a LogWriter. A message is one line; a traceback may follow it."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            single = copy.copy(record)  # other handlers get it as it is
            single.msg, single.args = shown(record.getMessage(), MESSAGE_LOGGED), None
            self._writer.add(self.format(single))
        except Exception:  # a message that does not fit its arguments must not fail who logs it
            self.handleError(record)
