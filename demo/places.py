"""Where things are, and what the logs say."""

import os
from pathlib import Path
from typing import IO

from demo.private import open_private

HERE = Path(__file__).resolve().parents[1]
VENV = HERE / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOGS = HERE / "logs"
RUN = HERE / "run"
SCRIPT = "start_all.bat" if os.name == "nt" else "./start_all.sh"


def open_log(path: Path) -> IO[bytes]:
    return open_private(path, os.O_WRONLY | os.O_TRUNC)


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"
