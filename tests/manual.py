"""The manual page, from what --help says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from balancer import __version__
from balancer.commandline import EXAMPLES, INSTALLED, make_parser


def manual_page() -> str:
    """In the macros of man(7)."""
    parser = make_parser(INSTALLED)
    examples, _, more = EXAMPLES.format(command=INSTALLED).partition("\n\n")
    lines = [
        f'.TH LOAD-BALANCER 1 "" "load-balancer {__version__}" "User Commands"',
        *section("Name", f"{INSTALLED} - {lowered(parser.description)}"),
        *section("Synopsis"),
        rf"\fB{INSTALLED}\fR [\fIflags\fR]",
        *(
            f".br\n\\fB{INSTALLED}\\fR {rest}"
            for rest in (r"\fBdemo\fR [\fB\-\-help\fR]", r"\fBnew\-key\fR \fINAME\fR", r"\fBcompletion\fR \fISHELL\fR")
        ),
        *section("Description", more.replace("\n", " ")),
        *section("Flags"),
    ]
    for action in parser._actions:
        names = ", ".join(rf"\fB{escaped(name)}\fR" for name in action.option_strings)
        values = action.metavar or (f"{{{','.join(action.choices)}}}" if action.choices else "")
        value = f" {values}" if values and action.nargs is None else f" [{values}]" if values else ""
        lines += [".TP", names + escaped(value), escaped((action.help or "").replace("%%", "%"))]
    lines += section(
        "Exit status", "0 after SIGTERM, 130 after Ctrl-C, 2 for bad usage or configuration, 1 for the rest."
    )
    lines += section("Examples")
    for line in examples.splitlines()[1:]:
        command, _, comment = line.strip().partition("  # ")
        lines += [".TP", rf"\fB{escaped(command)}\fR", escaped(comment)]
    lines += section(
        "Files", "share/doc/load-balancer has all settings (settings.md) and what happens when (operations.md)."
    )
    return "\n".join(lines) + "\n"


def section(title: str, text: str = "") -> Iterator[str]:
    yield f".SH {title.upper()}"
    if text:
        yield escaped(text)


def lowered(text: str | None) -> str:
    return (text or "").removeprefix("A ").rstrip(".")


def escaped(text: str) -> str:
    """No character of it is roff's."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"(?m)^([.'])", r"\\&\1", text)
