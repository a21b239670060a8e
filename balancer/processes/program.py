"""The program's own files: a worker that is started later must be of the same ones as its master."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IS_ANOTHER = 75  # exit code of a worker whose files are not its master's (sysexits.h: try again later)


def state() -> str:
    """Another one once a file has been replaced."""
    found = sorted(ROOT.glob("balancer/**/*.py"))
    facts = [(str(file), status.st_mtime_ns, status.st_size) for file in found if (status := file.stat())]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
