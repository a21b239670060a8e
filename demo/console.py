"""What a person at the terminal is told."""

import os
import shlex
import subprocess
import sys

# A terminal obeys these, and what is said may come from a log or from a backend.
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


class Failure(Exception):
    """Ends the program with one line on stderr and an exit code: 2 what the user can put right, 1 the rest."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message.translate(VISIBLE))
        self.code = code


def say(text: str = "") -> None:
    try:
        print(text.translate(VISIBLE), flush=True)
    except OSError:  # `start_all.sh | head`: nobody reads any longer, which is no reason to leave processes behind
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def printable_command(command: list[str]) -> str:
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
