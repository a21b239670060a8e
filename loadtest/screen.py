"""Where text goes: a terminal, an old terminal, a file, or a pipe that is closed early."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from loadtest.problems import EXIT_INTERNAL, EXIT_USAGE, Problem, clean

STYLES = {"good": "32", "bad": "31", "warn": "33", "strong": "1", "faint": "2", "bar": "36"}
EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"
FULL = "\u2588"


def speaks_ansi(stream: TextIO | None) -> bool:
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    # The console that cmd.exe opens by itself would print the codes; Windows Terminal and Unix shells name themselves.
    return sys.platform != "win32" or bool(os.environ.get("WT_SESSION") or os.environ.get("TERM"))


class Screen:
    """Lines for a reader; `name` is a file, or "-" for standard output. Raises Problem if it cannot be opened."""

    def __init__(self, name: str = "-", no_color: bool = False) -> None:
        self._file = None if name == "-" else _open(name)
        out = self._file or sys.stdout
        self.is_terminal = out is not None and out.isatty()
        self.is_gone = False  # who reads this
        self._color = speaks_ansi(out) and not (no_color or os.environ.get("NO_COLOR"))
        self._has_blocks = encodes(out, EIGHTHS + FULL)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def write(self, text: str) -> None:
        out = self._file or sys.stdout
        try:
            encoding = getattr(out, "encoding", None) or "ascii"
            print(text.encode(encoding, "backslashreplace").decode(encoding), end="", file=out, flush=True)
        except OSError as error:
            # A reader that has gone is no fault, the checks still decide the exit code: a pipe (`| head`; Windows says
            # EINVAL), a terminal that was closed.
            self.is_gone = error.errno in (errno.EPIPE, errno.EINVAL) or (error.errno == errno.EIO and self.is_terminal)
            if not self.is_gone:
                with contextlib.suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
                raise Problem(f"cannot write the report: {error.strerror}", EXIT_INTERNAL) from error
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())

    def line(self, text: str = "") -> None:
        self.write(text.rstrip() + "\n")

    def field(self, name: str, text: str, width: int = 12, indent: int = 0) -> None:
        self.line(" " * indent + self.style(name.ljust(width - indent), "strong") + text)

    def style(self, text: str, name: str) -> str:
        return f"\x1b[{STYLES[name]}m{text}\x1b[0m" if self._color and text.strip() else text

    def bar(self, share: float, width: int) -> str:
        """A bar of `share` of the width, to an eighth of a column."""
        if not self._has_blocks:
            return self.style("#" * round(share * width), "bar")
        whole, eighths = divmod(round(share * width * 8), 8)
        return self.style(FULL * whole + EIGHTHS[eighths].strip(), "bar")


class Silence(Screen):
    """A screen for text that nobody wants."""

    def write(self, text: str) -> None:
        pass


def _open(name: str) -> TextIO:
    try:
        return open(name, "w", encoding="utf-8", newline="")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise Problem(f"cannot write to {name!r}: {why}", EXIT_USAGE) from None


def encodes(out: TextIO | None, text: str) -> bool:
    """Whether the stream can show these characters."""
    try:
        return bool(text.encode(getattr(out, "encoding", None) or "ascii"))
    except UnicodeError:
        return False


def complain(message: str) -> None:
    """One line on stderr."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"test_client.py: {clean(message)}", file=sys.stderr, flush=True)


def columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def number(value: float | None, digits: int = 1, sign: str = "") -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no "-0.0"


def plain(value: float) -> str:
    """Six digits, and never an exponent."""
    return f"{value:.0f}" if abs(value) >= 100_000 else f"{value:g}"


def quantity(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def label(name: str | None) -> str:
    """A backend's name, short enough for a table."""
    shown = "unnamed" if name is None else clean(name)
    return shown if len(shown) <= 24 else shown[:22] + ".."


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
