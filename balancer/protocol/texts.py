"""What others say, made fit to be kept, shown and logged: on one line, without control characters, and not too long."""

from __future__ import annotations

SHOWN = 200  # bytes of what a peer said; thousands of such texts are kept

_VISIBLE = bytes(range(0x20, 0x7F))


def printable(text: str) -> str:
    r"""`text` with all that a terminal or a reader of lines could act on as `\xNN`, `\uNNNN` or `\UNNNNNNNN`: control
    characters, separators of lines, marks that turn the direction, lone surrogates, blanks that are no space."""
    if text.isascii() and not text.encode().translate(None, _VISIBLE):  # a quarter of the time that the rest would take
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def shown(said: str | bytes, most: int = SHOWN) -> str:
    """What was said as printable text of at most `most` bytes of UTF-8, with three dots where it was cut."""
    head = said[: most + 1]  # whatever follows cannot be shown any more
    text = printable(head if isinstance(head, str) else head.decode("utf-8", "backslashreplace"))
    data = text.encode()
    return text if len(data) <= most else data[: most - 3].decode("utf-8", "ignore") + "..."


def quoted(value: str) -> str:
    """A value in an error: as `repr`, with three dots where it was cut."""
    return repr(value if len(value) <= SHOWN else value[:SHOWN] + "...")


def _escaped(char: str) -> str:
    number = ord(char)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
