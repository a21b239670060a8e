"""Files that others write: read whole, if they are regular and small."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MOST_BYTES = 1_048_576  # room for ten thousand backends or users, and for the CAs of a whole system
_NONBLOCK = int(getattr(os, "O_NONBLOCK", 0))


def read_whole(path: Path, expected: str = "") -> bytes:
    """Raises ValueError, in words."""
    try:
        # A pipe, or a device, could keep us waiting for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("is not a regular file")
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"has more than {MOST_BYTES} bytes{expected and f'; expected {expected}'}")
    return data


def utf8(data: bytes) -> str:
    """Raises ValueError, in words. Windows' editor puts a mark in front."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; save it in that encoding") from None
