"""What is printed when all is ready: where everything is, and what is not as it should be."""

import http.client
import json
import os
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from demo.access import given_token
from demo.console import printable_command, say
from demo.places import HERE, SCRIPT, VENV_PYTHON
from demo.services import Service, control_prefix


def print_urls(services: Sequence[Service], detached: bool) -> None:
    for service in services:
        say(f"  {service.name + ':':<11} http://127.0.0.1:{service.port}  log: {service.log.relative_to(HERE)}")
    for service in services:
        if service.name == "balancer":
            host = host_names(service)[-1]
            print_balancer_urls(f"http://{host}:{service.port}", control_urls(service)[-1], service.environment)
            warn_of_unhealthy(service)
            repeat_warnings(service)
    say(f"Stop with: {SCRIPT} stop" if detached else "Stop with Ctrl-C.")


def host_names(balancer: Service) -> list[str]:
    """The names it has in a URL; the last is the one that people like to read."""
    host = f"[{balancer.host}]" if ":" in balancer.host else balancer.host
    return [host, "localhost"] if host == "127.0.0.1" else [host]


def control_urls(balancer: Service) -> list[str]:
    return [f"http://{host}:{balancer.ready_port}{control_prefix()}" for host in host_names(balancer)]


def print_balancer_urls(base: str, control: str, environment: Mapping[str, str]) -> None:
    page = (HERE / "dashboard.html").as_uri() + ("" if control == "http://localhost:9000" else f"?lb={control}")
    token = environment["LB_PAGE_TOKEN"]
    say()
    if token == given_token(os.environ):  # known to whoever set it, and not for every log
        say(f"  Dashboard:  {control}/dashboard  (its token is your LB_PAGE_TOKEN)")
    else:  # behind a # it stays in the browser, which sends it to nobody
        say(f"  Dashboard:  {control}/dashboard#token={quote(token, safe='')}")
    say(f"              {page}")
    say(f"  API:        curl {base}/api/process")
    say(f"  Status:     {control}/status")
    say(f"  Check:      {check_command(base, control)}")
    say()


def check_command(base: str, control: str) -> str:
    """test_client.py for this balancer, to be typed in this folder."""
    arguments = [] if control == base else ["--control", control]
    arguments += [] if base == "http://localhost:9000" else [base]
    return printable_command([str(VENV_PYTHON.relative_to(HERE)), "test_client.py", *arguments])


def warn_of_unhealthy(balancer: Service) -> None:
    """Ready means that every backend has been checked, not that the checks were good."""
    connection = http.client.HTTPConnection(balancer.host, balancer.ready_port, timeout=1)
    try:
        authorization = {"Authorization": f"Bearer {balancer.environment['LB_PAGE_TOKEN']}"}
        connection.request("GET", control_prefix() + "/backends", headers=authorization)
        for backend in json.loads(connection.getresponse().read())["backends"]:
            if not backend["healthy"]:
                say(f"  Warning: {backend['id']} gets no requests: {backend['health']['reason']}")
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        pass  # it has just said that it is ready; what it says now is for the person to see
    finally:
        connection.close()


def repeat_warnings(balancer: Service) -> None:
    """What it says of variables that it does not know: nobody would look for a slip of the pen in a log."""
    for line in balancer.log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(f"{balancer.script}: warning: "):
            say("  Warning: " + line.partition(": warning: ")[2])
