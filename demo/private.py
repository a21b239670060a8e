"""Files that are ours alone: in folders of mode 0700, of mode 0600, and never through a symbolic link.

They tell who runs, and hold a token. Whoever could put a link in their place would choose what is overwritten, or read.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO

from demo.console import Failure

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # one is not there on Windows, one only there


def open_private(path: Path, flags: int) -> IO[bytes]:
    """The file opened with these flags of os.open(), made if it is not there. Raises Failure for a link."""
    make_folder(path.parent)
    refuse_link(path)
    try:
        descriptor = os.open(path, flags | os.O_CREAT | NO_FOLLOW, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:  # put there in this moment
            raise link_failure(path) from None
        raise
    file = os.fdopen(descriptor, "r+b" if flags & os.O_RDWR else "wb")
    if os.name == "posix":
        os.fchmod(descriptor, 0o600)  # one that was there before
    return file


def write_private(path: Path, text: str) -> None:
    """Whole or not at all: whoever reads it meanwhile gets the old text. Only one process may write it at a time."""
    refuse_link(path)
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # of a writer that was killed
    with open_private(new, os.O_WRONLY | os.O_EXCL) as file:
        file.write(text.encode("ascii"))
    os.replace(new, path)


def read_private(path: Path) -> str:
    """The text; empty if there is no such file, or something else in its place: a link, a folder, a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait
        with os.fdopen(descriptor, "rb") as file:
            return file.read().decode("ascii", "replace") if stat.S_ISREG(os.fstat(descriptor).st_mode) else ""
    except OSError:
        return ""


def make_folder(path: Path) -> None:
    refuse_link(path)
    path.mkdir(mode=0o700, exist_ok=True)
    if os.name == "posix" and path.stat().st_mode & 0o077:  # made by an earlier version, or by hand
        path.chmod(0o700)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise link_failure(path)


def link_failure(path: Path) -> Failure:
    return Failure(f"{path} is a symbolic link, which is not followed; remove it", 2)
