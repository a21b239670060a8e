"""The command line: `load_balancer.py --help` says how to use it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from balancer import __version__
from balancer.commands import completion, demo, newkey, probe
from balancer.config import settings, validation
from balancer.edge import handover, quota, upgrade
from balancer.errors import SettingsError
from balancer.protocol.texts import printable

if TYPE_CHECKING:
    from balancer.config.settings import Settings
    from balancer.loadbalancer import LoadBalancer

INSTALLED = "load-balancer"
# As it was started: the installed command, or the file of a checkout.
PROGRAM = INSTALLED if Path(sys.argv[0]).stem == INSTALLED else "load_balancer.py"
COMMANDS = ("completion", "demo", "new-key")  # the first word, instead of flags
UNKNOWN = "unrecognized arguments: "  # argparse says
EXAMPLES = """examples:
  {command} demo  # three backends and a balancer in front of them, to try it
  {command}  # the balancer alone; three backends on ports 5001 to 5003
  {command} --backend http://127.0.0.1:8080  # in front of one service of yours
  {command} --backend a=http://10.0.0.1:80@3 --backend b=http://10.0.0.2:80  # a gets 3 of 4
  {command} --backend dns+http://api:8080  # each address of a name
  {command} --config balancer.toml --check-config  # is that file right?
  {command} new-key acme  # an API key, and what stands in the file for it
  {command} completion bash  # a script for the shell: bash, zsh, fish

Every setting is a flag, a key of the TOML file and an environment variable: --health-path, health_path, LB_HEALTH_PATH;
backends are --backend, [[backends]] and LB_BACKENDS. Secrets are no flags, which every user of the machine could read:
admin_token, page_token and sticky_secret are LB_ADMIN_TOKEN, LB_PAGE_TOKEN and LB_STICKY_SECRET, or stand in the files
that LB_ADMIN_TOKEN_FILE, LB_PAGE_TOKEN_FILE and LB_STICKY_SECRET_FILE name.
A flag wins over the environment, that over the file, that over the default (in parentheses)."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Breaks no line at a hyphen: half a name is of no use to whoever copies it."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of forty flags."""

    def error(self, message: str) -> NoReturn:
        hint = "see --help"
        if message.startswith(UNKNOWN):
            word = message.removeprefix(UNKNOWN).partition(" ")[0].partition("=")[0]
            hint = validation.meant(word, [*COMMANDS, *self._option_string_actions])
        self.exit(2, f"{self.prog}: {printable(message)}; {hint}\n")


def make_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=program,
        description="A load balancer: HTTP/1.1 and HTTP/2 in, HTTP backends out.",
        epilog=EXAMPLES.format(command=program if program == INSTALLED else f"python {program}"),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"load-balancer {__version__}")
    parser.add_argument("--check-config", action="store_true", help="check all settings and exit")
    parser.add_argument("--print-config", action="store_true", help="print all settings and where each came from")
    parser.add_argument(
        "--probe",
        nargs="?",
        const=probe.PATHS[0],
        choices=probe.PATHS,
        help="ask the balancer that has these settings for this path (readyz); exit code 0 if it says 200, else 1",
    )
    parser.add_argument(
        "--forget", action="store_true", help="forget what was decided at run time, and start from the configuration"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    settings.add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after SIGTERM, 130 after Ctrl-C, 2 for bad usage or configuration, 1 if serving failed."""
    given = sys.argv[1:] if arguments is None else arguments
    warnings = settings.warnings()
    try:
        if given and given[0] in COMMANDS:
            return run_command(*given)
        parsed = vars(make_parser().parse_args(given))
        check, show, file = parsed.pop("check_config"), parsed.pop("print_config"), parsed.pop("config")
        probed, forget = parsed.pop("probe"), parsed.pop("forget")
        if file is None and (name := os.environ.get("LB_CONFIG", "").strip()):
            file = Path(name)
        handed, predecessor = upgrade.take(os.environ)
        load = partial(settings.load, parsed, file=file, handed=handover.settings_of(handed))
        config, sources = load()
        if probed is not None:
            code, told = probe.probe(config, probed)
            print(printable(told))
            return code
        from balancer.edge import process  # which takes as long again as all this

        if not show:
            balancer = make(config, sources)
            process.cpus(config.cpu_affinity)
            if forget and config.state_file is None:
                raise SettingsError("--forget: nothing is kept, there is no state_file")
            if not check:
                balancer.is_forgetful = forget and predecessor is None
                balancer.is_command, balancer.predecessor = True, predecessor
                if file is not None:
                    configuration = balancer.configuration
                    configuration.file, configuration.read = file, load
                return run(balancer, warnings, handed)
        _warn(warnings if show else [*warnings, *balancer.advice()])
        print(settings.describe(config, sources) if show else "configuration ok")
        return 0
    except SettingsError as error:
        _warn(warnings)
        print(f"{PROGRAM}: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{PROGRAM}: {printable(str(error))}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # else Python tries once more at its end
        return 1


def make(config: Settings, sources: Mapping[str, str]) -> LoadBalancer:
    """Raises SettingsError."""
    if quota.workers(config.workers) == 1:
        from balancer.loadbalancer import LoadBalancer

        return LoadBalancer(config=config, sources=sources)
    if not hasattr(os, "memfd_create"):
        raise SettingsError(f"workers = {config.workers}: several processes need Linux; expected 1")
    from balancer.processes.master import Master

    return Master(config, sources)


def run_command(name: str, *arguments: str) -> int:
    if name == "demo":
        return demo.run(arguments)
    parser = OneLineParser(prog=f"{PROGRAM} {name}", allow_abbrev=False)
    if name == "new-key":
        parser.description = newkey.__doc__
        parser.add_argument("name", metavar="NAME", type=newkey.checked, help="whose key it is")
        print(newkey.new_key(parser.parse_args(arguments).name))
        return 0
    parser.description = completion.__doc__
    parser.add_argument("shell", metavar="SHELL", choices=completion.SHELLS, help=", ".join(completion.SHELLS))
    print(completion.script(parser.parse_args(arguments).shell, make_parser(INSTALLED), COMMANDS))
    return 0


def run(balancer: LoadBalancer, warnings: list[str], handed: handover.Handed) -> int:
    """Serve until a signal. Raises SettingsError if it cannot listen, before it has warned of anything."""
    from balancer.observe import logrecords

    config = balancer.settings
    handler = logrecords.install(balancer.control.log, config.log_level, lambda: balancer.settings.access_log_format)
    balancer.listen(handed)
    titles = ["listening on"] + ["control API on"] * (config.control_port is not None) + ["redirecting on"]
    where = ", ".join([*map(" ".join, zip(titles, balancer.urls, strict=False)), *balancer.told()])

    # At once and whatever log_level says: somebody waits for it.
    def tell(stream: TextIO, logger: str, level: int, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, or nobody reads: no reason not to serve
            line = handler.format(logging.LogRecord(logger, level, "", 0, printable(text), None, None))
            print(line, file=stream, flush=True)

    for warning in [*warnings, *balancer.advice()]:
        tell(sys.stderr, "balancer.settings", logging.WARNING, warning)
    tell(sys.stdout, "balancer", logging.INFO, f"{config.id}: {where}")
    return balancer.serve()


def _warn(lines: list[str]) -> None:
    for line in lines:
        print(f"{PROGRAM}: warning: {printable(line)}", file=sys.stderr)
