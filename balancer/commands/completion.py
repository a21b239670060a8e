"""`completion SHELL`: a script that completes the command line, from the same parser as --help."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from balancer.balancing.strategies import REGISTRY
from balancer.config.values import Values

SHELLS = ("bash", "zsh", "fish")
COMMAND = "load-balancer"


class Flag(NamedTuple):
    """`words` are values that are known beforehand; `wants` says whether one has to follow."""

    name: str
    help: str
    words: Sequence[str]
    is_file: bool
    wants: bool


def script(shell: str, parser: argparse.ArgumentParser, commands: Sequence[str]) -> str:
    lines = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](list(_flags(parser)), commands)
    return "\n".join(lines)


def _flags(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    for action in parser._actions:
        field = Values.model_fields.get(action.dest)
        kinds = [] if field is None else _kinds(field.annotation)
        words = [str(choice) for choice in action.choices or ()] or [word for kind in kinds for word in _words(kind)]
        if action.dest == "algorithm":
            words = sorted(REGISTRY)
        is_file = action.type is Path or Path in kinds
        help_text = (action.help or "").replace("%%", "%")
        yield Flag(action.option_strings[-1], help_text, words, is_file, action.nargs is None)


def _kinds(annotation: Any) -> list[Any]:
    """The parts of a union, or the one type that it is."""
    return [annotation] if annotation is bool or get_origin(annotation) is Literal else list(get_args(annotation))


def _words(kind: Any) -> Sequence[str]:
    return ("true", "false") if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()


def _bash(flags: Sequence[Flag], commands: Sequence[str]) -> Iterator[str]:
    yield f"# {COMMAND} completion bash >~/.local/share/bash-completion/completions/{COMMAND}"
    yield "_load_balancer() {"
    yield '    local word="${COMP_WORDS[COMP_CWORD]}"'
    yield '    case "${COMP_WORDS[COMP_CWORD-1]}" in'
    for flag in flags:
        if flag.words:
            words = " ".join(flag.words)
            yield f'        {flag.name}) mapfile -t COMPREPLY < <(compgen -W "{words}" -- "$word"); return ;;'
        elif flag.is_file:
            yield f'        {flag.name}) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;'
        elif flag.wants:
            yield f"        {flag.name}) COMPREPLY=(); return ;;"
    yield f'        completion) mapfile -t COMPREPLY < <(compgen -W "{" ".join(SHELLS)}" -- "$word"); return ;;'
    yield "    esac"
    names = " ".join([*commands, *(flag.name for flag in flags)])
    yield f'    mapfile -t COMPREPLY < <(compgen -W "{names}" -- "$word")'
    yield "}"
    yield f"complete -o filenames -F _load_balancer {COMMAND}"


def _zsh(flags: Sequence[Flag], commands: Sequence[str]) -> Iterator[str]:
    yield f"#compdef {COMMAND}"
    yield f"# {COMMAND} completion zsh >a folder of $fpath/_{COMMAND}"
    yield "_arguments \\"
    for flag in flags:
        told = flag.help.translate({ord(char): f"\\{char}" for char in "[]:"}).replace("'", "'\\''")
        takes = f":value:({' '.join(flag.words)})" if flag.words else ":file:_files" if flag.is_file else ":value: "
        takes = takes if flag.wants else f":{takes}" if flag.words else ""
        several = "*" if flag.name == "--backend" else ""
        yield f"    '{several}{flag.name}[{told}]{takes}' \\"
    yield f"    '1::command:({' '.join(commands)})' '2::shell:({' '.join(SHELLS)})'"


def _fish(flags: Sequence[Flag], commands: Sequence[str]) -> Iterator[str]:
    yield f"# {COMMAND} completion fish >~/.config/fish/completions/{COMMAND}.fish"
    yield f"complete -c {COMMAND} -f"
    yield f"complete -c {COMMAND} -n __fish_use_subcommand -a '{' '.join(commands)}'"
    yield f"complete -c {COMMAND} -n '__fish_seen_subcommand_from completion' -a '{' '.join(SHELLS)}'"
    for flag in flags:
        told = flag.help.replace("\\", "\\\\").replace("'", "\\'")
        takes = f" -xa '{' '.join(flag.words)}'" if flag.words else " -rF" if flag.is_file else " -x" * flag.wants
        yield f"complete -c {COMMAND} -l {flag.name.removeprefix('--')} -d '{told}'{takes}"
