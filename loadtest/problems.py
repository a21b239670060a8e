"""What ends the program early, and with which exit code."""

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERNAL, EXIT_INTERRUPTED = 1, 2, 3, 4, 130
EXIT_UNREAD = 141  # as a shell says it of a program that SIGPIPE ended


class Problem(Exception):
    """Ends the program with one line on stderr and an exit code."""

    def __init__(self, message: str, code: int = EXIT_UNREACHABLE) -> None:
        super().__init__(message)
        self.code = code


def clean(text: str) -> str:
    """One line without control characters: names come from servers, and terminals obey what they print."""
    return "".join(char if char.isprintable() else "?" for char in text)
