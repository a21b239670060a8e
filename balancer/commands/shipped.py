"""Files that come with the package: where they are in a checkout, and where they were installed."""

from __future__ import annotations

import sys
from pathlib import Path

PLACES = (Path(__file__).resolve().parents[2], Path(sys.prefix, "share", "load-balancer"))


def find(name: str) -> Path:
    """Where it would be in a checkout, if it is nowhere."""
    files = [place / name for place in PLACES]
    return next((file for file in files if file.exists()), files[0])
