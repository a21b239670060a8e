"""What was asked for, from the flags and the environment variables LB_TEST_*: flag > environment > default."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.flags import DEFAULT_PORT, PREFIX, Parser, build_parser, variable
from loadtest.problems import EXIT_USAGE, Problem

# Any of them makes it a load run instead of the check; --clients too, as the check's shares mean nothing with them.
LOAD_OPTIONS = (
    "requests",
    "duration",
    "concurrency",
    "rate",
    "ramp_up",
    "warmup",
    "wait",
    "compare",
    "clients",
    "slow",
)
NOT_SHOWN = ("token", "user", "header", "data", "data_file", "against")  # in the report: secrets and bodies


@dataclass(slots=True)
class Options:
    """What was asked for. Times in seconds, shares from 0 to 1, error rate and tolerance in percent and points."""

    url: str
    requests: int | None
    duration: float | None
    concurrency: int | None
    rate: float | None
    ramp_up: float | None
    warmup: int | None
    timeline: bool
    wait: bool | None
    path: str | None
    method: str | None
    header: list[tuple[str, str]]
    data: bytes | None
    data_file: bytes | None
    content_type: str | None
    timeout: float
    connect_timeout: float
    user: str | None
    insecure: bool
    no_keepalive: bool
    expect_status: frozenset[int] | None
    control: str | None
    algorithm: str | None
    compare: list[str]
    slow: dict[str, float]
    clients: int | None
    backend_field: str | None
    backend_header: str | None
    expect: dict[str, float]
    expect_weights: bool
    tolerance: float | None
    preflight_only: bool
    no_preflight: bool
    token: str | None
    max_error_rate: float
    max_p50: float | None
    max_p95: float | None
    max_p99: float | None
    min_rps: float | None
    against: dict[str, Any] | None
    max_regression: float
    output: str
    output_file: str
    buckets: list[float]
    no_progress: bool
    no_color: bool
    time_unit: str
    verbose: bool
    debug: bool
    exit_zero: bool

    @property
    def body(self) -> bytes | None:
        return self.data if self.data is not None else self.data_file

    @property
    def is_load(self) -> bool:
        return (
            self.no_preflight
            or self.timeline
            or any(getattr(self, name) not in (None, [], {}) for name in LOAD_OPTIONS)
        )

    def shown(self) -> dict[str, Any]:
        """What may be shown: no token, no header values, no body."""
        shown = {name: value for name, value in asdict(self).items() if name not in NOT_SHOWN}
        return shown | {"expect_status": sorted(self.expect_status) if self.expect_status else None}


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Raises Problem with one line for anything that makes no sense. SystemExit only for --help and --version."""
    parser = build_parser()
    found, unknown = parser.parse_known_args(argv, _from_environment(parser, environ))
    if unknown:
        parser.error(_unknown(unknown[0], parser.known()))
    found.url = found.url or _default_url(environ)
    options = Options(**vars(found))
    if conflict := _conflict(options):
        parser.error(conflict)
    return options


def _default_url(environ: Mapping[str, str]) -> str:
    """Of the balancer that start_all starts with the same variables; cmd.exe leaves a trailing blank in them."""
    if url := environ.get("LB_URL", "").strip():
        return url
    port = environ.get("LB_PORT", "").strip() or str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65_535):
        raise Problem(f"LB_PORT: {port!r} is not a port from 1 to 65535 (see --help)", EXIT_USAGE)
    return f"http://127.0.0.1:{port}"


def _from_environment(parser: Parser, environ: Mapping[str, str]) -> argparse.Namespace:
    """Each variable is parsed as the flag it stands for, one at a time, so that an error can name it."""
    found = argparse.Namespace()
    for name, value in sorted(environ.items()):
        if not name.startswith(PREFIX) or not value.strip():
            continue
        action = parser.mirrored.get(name)
        if action is None:
            parser.error(_unknown(name, list(parser.mirrored)))
        try:
            parser.parse_args(_as_flag(name, action, value.strip()), found)
        except Problem as problem:
            raise Problem(f"{name}: {problem}", EXIT_USAGE) from None
    return found


def _as_flag(name: str, action: argparse.Action, value: str) -> list[str]:
    option = next(option for option in action.option_strings if variable(option) == name)
    if action.nargs != 0:
        return [f"{option}={value}"]
    wanted = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(value.lower())
    if wanted is None:
        raise Problem(f"{value!r} is neither true nor false", EXIT_USAGE)
    if isinstance(action, argparse.BooleanOptionalAction):
        return [option if wanted else option.replace("--", "--no-", 1)]
    return [option] if wanted else []


def _bare(name: str) -> str:
    """Without what all names have in common, which is no likeness."""
    return name.removeprefix("--").removeprefix(PREFIX)


def _unknown(wrong: str, known: Sequence[str]) -> str:
    name = wrong.partition("=")[0]
    bare = {_bare(option): option for option in known}
    near = difflib.get_close_matches(_bare(name), bare, n=1)
    return f"unknown {name!r}" + (f", did you mean {bare[near[0]]}?" if near else "")


def _conflict(options: Options) -> str | None:
    """Options that contradict each other."""
    pairs = {
        "--data and --data-file": options.data is not None and options.data_file is not None,
        "--expect and --expect-weights": bool(options.expect) and options.expect_weights,
        "--algorithm and --compare": bool(options.algorithm) and bool(options.compare),
        "--backend-field and --backend-header": bool(options.backend_field) and bool(options.backend_header),
        "--no-preflight and --preflight-only": options.no_preflight and options.preflight_only,
        "--no-preflight and --algorithm": options.no_preflight and bool(options.algorithm),
        "--no-preflight and --compare": options.no_preflight and bool(options.compare),
        "--no-preflight and --slow": options.no_preflight and bool(options.slow),
        "--compare and --against": bool(options.compare) and options.against is not None,
        "--compare and --timeline": bool(options.compare) and options.timeline,
        "--no-preflight and --expect-weights": options.no_preflight and options.expect_weights,
        "--compare and --output csv": bool(options.compare) and options.output == "csv",
    }
    if found := next((pair for pair, both in pairs.items() if both), None):
        return f"{found} cannot be used together"
    if options.wait is not None and options.duration is None:
        return "--wait and --no-wait say what happens at the end of --duration, which is not given"
    if options.content_type and options.body is None:
        return "--content-type needs a body: --data or --data-file"
    return None
