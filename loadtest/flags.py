"""The flags: their names, values, defaults and help."""

import argparse
import os
from functools import partial
from typing import Any, NoReturn

from loadtest import VERSION, values
from loadtest.problems import EXIT_USAGE, Problem

DEFAULT_PORT = 9000
DEFAULT_REQUESTS = 200
DEFAULT_CONCURRENCY = 10
DEFAULT_OPEN_CONCURRENCY = 100  # with --rate connections are opened as needed, so this is only a limit
DEFAULT_WARMUP = 20
PREFIX = "LB_TEST_"

EXAMPLES = """examples:
  test_client.py                                      check the balancer on port 9000: does it work?
  test_client.py http://10.0.0.5:8080/shop            another balancer, another path
  test_client.py --control http://127.0.0.1:9001      control_port = 9001; with control_prefix: http://host:9000/lb
  test_client.py -n 10k -c 50                         load: 10000 requests over 50 connections
  test_client.py -z 30s -q 500                        500 requests a second for 30 s, each sent when it is due
  test_client.py -n 2k --compare round_robin,least_connections --slow backend_2=200ms
  test_client.py -z 1m -q 200 --max-p95 200ms --json  for a pipeline: threshold, exit code, JSON
  test_client.py -z 1m -q 200 --against old.json      is it worse than it was?
  test_client.py --clients 50 -n 1k                   50 browsers with cookies: does stickiness hold?
  test_client.py --no-preflight -n 1k http://127.0.0.1:5001/api/process      any HTTP server

"""
EPILOG = """A TIME is 200ms, 10s or 1m. Without a unit it is in seconds, but --max-pN and --buckets want one.
Every option can be set in the environment: --max-p95 is LB_TEST_MAX_P95; a flag wins. Without any option of
the group "load" the balancer is checked: sequential and concurrent requests, distribution, response times. With one,
that load is sent. Exit codes: 0 all checks hold, 1 a check failed, 2 wrong usage, 3 not reachable or not a balancer,
4 internal error, 130 interrupted."""


class Parser(argparse.ArgumentParser):
    """Examples first in --help, one line for an error, the nearest option for a mistyped one."""

    def __init__(self) -> None:
        shape = partial(argparse.HelpFormatter, max_help_position=34, width=100)
        usage = "%(prog)s [options] [URL]"
        super().__init__("test_client.py", usage, epilog=EPILOG, formatter_class=shape, allow_abbrev=False)
        self.mirrored: dict[str, argparse.Action] = {}  # environment variable -> option

    def format_help(self) -> str:
        return EXAMPLES + super().format_help()

    def error(self, message: str) -> NoReturn:
        raise Problem(f"{message} (see --help)", EXIT_USAGE)

    def section(self, title: str, description: str | None = None) -> Any:
        group = self.add_argument_group(title, description)

        def add(*names: str, **details: Any) -> None:
            action = group.add_argument(*names, **details)
            for name in action.option_strings:
                if name.startswith("--") and not name.startswith("--no-wait"):
                    self.mirrored[variable(name)] = action

        return add

    def known(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]


def variable(option: str) -> str:
    return PREFIX + option.lstrip("-").replace("-", "_").upper()


def build_parser() -> Parser:
    parser = Parser()
    default = f"$LB_URL, else http://127.0.0.1:$LB_PORT, else port {DEFAULT_PORT}"
    help_url = f"the balancer (default: {default}); its path is the one to request"
    parser.add_argument("url", nargs="?", metavar="URL", help=help_url)
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {VERSION}")
    _add_load(parser.section("load"))
    _add_request(parser.section("request"))
    _add_balancer(parser.section("balancer"))
    _add_thresholds(parser.section("thresholds", "times and rate: of the load, or of the check's response times"))
    _add_output(parser.section("output"))
    return parser


def _add_load(add: Any) -> None:
    count = values.count(values.MAX_REQUESTS)
    add("-n", "--requests", metavar="N", type=count, help="requests, 10k is 10000 (default: 200, or no limit with -z)")
    add(
        "-z", "--duration", metavar="TIME", type=values.duration, help="send for so long; with -n: whichever ends first"
    )
    concurrency = f"connections (default: {DEFAULT_CONCURRENCY}); with -q: at most ({DEFAULT_OPEN_CONCURRENCY})"
    add("-c", "--concurrency", metavar="N", type=values.count(values.MAX_CONCURRENCY), help=concurrency)
    rate = "requests a second in all, sent when due; latency counts from then, so that waiting is not omitted"
    add("-q", "--rate", metavar="R", type=values.rate, help=rate)
    add("--ramp-up", metavar="TIME", type=values.duration, help="reach all connections, or the rate, after this time")
    warmup = f"requests before the measured ones (default: {DEFAULT_WARMUP}, or one per connection)"
    add("--warmup", metavar="N", type=values.count(1_000_000, least=0), help=warmup)
    add("--timeline", action="store_true", help="also each second: answers, failures, percentiles")
    wait = "at the end of -z, wait for the answers under way, or cut them off uncounted (default: wait)"
    add("--wait", action=argparse.BooleanOptionalAction, default=None, help=wait)


def _add_request(add: Any) -> None:
    add("--path", type=values.path, help="path to request (default: that of the URL, else /api/process)")
    add("-m", "--method", type=values.method, help="method (default: GET, with a body POST)")
    add("-H", "--header", metavar="'N: V'", type=values.header, action="append", default=[], help="header, repeatable")
    add("-d", "--data", type=os.fsencode, metavar="TEXT", help="request body")
    add("-D", "--data-file", type=values.body_file, metavar="FILE", help="request body from a file, - for stdin")
    add("-T", "--content-type", type=values.text, metavar="TYPE", help="of the body (default: application/json)")
    add("-t", "--timeout", metavar="TIME", type=values.duration, default=10.0, help="for an answer (default: 10s)")
    add("--connect-timeout", metavar="TIME", type=values.duration, default=3.0, help="to connect (default: 3s)")
    user = "NAME:PASSWORD for Basic authentication; other users of this machine can read flags, not LB_TEST_USER"
    add("-u", "--user", metavar="N:P", type=values.credentials, help=user)
    add("-k", "--insecure", action="store_true", help="https: take any certificate")
    add("--no-keepalive", action="store_true", help="a new connection for every request")
    statuses = "what counts as good: 200, 200,404 or 2xx (default: below 400)"
    add("--expect-status", metavar="CODES", type=values.statuses, help=statuses)


def _add_balancer(add: Any) -> None:
    control = "where its control API is, if moved there by control_prefix or control_port (default: at the root of URL)"
    add("--control", metavar="URL", type=values.text, help=control)
    add("--algorithm", metavar="NAME", type=values.text, help="switch the balancer to it for the run, then back")
    compare = "the same load under each algorithm, side by side; all: all it has"
    add("--compare", metavar="A,B|all", type=values.names, default=[], help=compare)
    slow = "make backends of the demo so much slower for the run, as backend_2=200ms"
    add("--slow", metavar="ID=TIME,...", type=values.delays, default={}, help=slow)
    clients = "act as N clients in turn, each with its own cookies and X-Forwarded-For"
    add("--clients", metavar="N", type=values.count(values.MAX_CLIENTS), help=clients)
    source = "JSON field that names the backend (default: header X-Served-By, else server_id)"
    add("--backend-field", metavar="NAME", type=values.text, help=source)
    add("--backend-header", metavar="NAME", type=values.header_name, help="header that names the backend")
    expect = "shares (default: ask the balancer)"
    add("--expect", metavar="ID=PERCENT,...", type=values.shares, default={}, help=expect)
    add("--expect-weights", action="store_true", help="expect shares by weight, whatever the algorithm")
    tolerance = "allowed difference of a share (default: 5; a load run judges shares only if asked)"
    add("--tolerance", "--max-share-deviation", metavar="POINTS", type=values.percent, help=tolerance)
    add("--preflight-only", action="store_true", help="only look whether it is a balancer and what is up")
    add("--no-preflight", action="store_true", help="load any HTTP server; nothing is asked of a control API")
    token = "file with the bearer token of the control API"
    add("--token-file", metavar="FILE", dest="token", type=values.token_file, help=token)


def _add_thresholds(add: Any) -> None:
    add("--max-error-rate", metavar="PERCENT", type=values.percent, default=0.0, help="of failures (default: 0)")
    for rank in (50, 95, 99):
        add(f"--max-p{rank}", metavar="TIME", type=values.limit, help=f"{rank} %% of the answers within this, as 200ms")
    add("--min-rps", metavar="R", type=values.rate, help="good answers a second, at least")
    against = "a report of --json: fail if percentiles, rate or failures are worse than there"
    add("--against", metavar="FILE", type=values.old_report, help=against)
    worse = "by how much more than --against (default: 10)"
    add("--max-regression", metavar="PERCENT", type=values.percent, default=10.0, help=worse)
    add("--exit-zero", action="store_true", help="a failed check is reported, but the exit code is 0")


def _add_output(add: Any) -> None:
    forms = ("text", "json", "csv", "quiet")
    forms_help = f"{', '.join(forms)} (csv: a row per request)"
    add("-o", "--output", metavar="FORM", choices=forms, default="text", help=forms_help)
    add("--json", dest="output", action="store_const", const="json", help="the same as --output json")
    add("--output-file", metavar="FILE", type=values.text, default="-", help="instead of standard output")
    buckets = "bounds of the histogram: auto or 1ms,5ms,..."
    add("--buckets", metavar="TIMES", type=values.bounds, default=[], help=buckets)
    add("--no-progress", action="store_true", help="no progress on stderr")
    add("--no-color", action="store_true", help="no colours (as NO_COLOR=1 does)")
    units = ("us", "ms", "s")
    add("--time-unit", metavar="UNIT", choices=units, default="ms", help="of the text: us, ms or s (default: ms)")
    add("-v", "--verbose", action="store_true", help="more times, and the slowest requests with their ids")
    add("--debug", action="store_true", help="send one request and show both sides of it")
