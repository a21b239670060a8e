"""From the first process started to the last one ended."""

import os
import signal
import time
from collections.abc import Sequence

from demo.access import offer_access, withdraw_access
from demo.console import Failure, printable_command, say
from demo.installation import ensure_venv
from demo.places import RUN, SCRIPT, last_line
from demo.ports import port_is_free
from demo.runfiles import one_at_a_time, read_pid, remove_pid, write_pid
from demo.services import Service
from demo.signals import STOP, pause
from demo.urls import control_urls, print_urls

READY_SECONDS = 30.0  # most of it for the first start on a slow machine; a warm one takes about a second
STOP_SECONDS = 10.0  # then the process is killed


def run_services(services: list[Service], detach: bool) -> int:
    """Start, wait until ready, then watch until the end or a signal; only what is detached and ready outlives this."""
    check_ports(services)  # before an installation that may take minutes
    own_pid_file = RUN / f"start_all-{services[-1].port}.pid"
    try:
        with one_at_a_time():
            ensure_venv()
            check_ports(services)
            if read_pid(own_pid_file):  # of the one whose ended backends this one starts again
                own_pid_file = RUN / f"start_all-{os.getpid()}.pid"
            write_pid(own_pid_file, os.getpid(), "start_all.py")
            start_services(services, detach)
            for service in services:
                if service.name == "balancer":
                    offer_access(service.pid_file.stem, control_urls(service), service.environment["LB_PAGE_TOKEN"])
        print_urls(services, detach)
        if detach:
            services = []
            return 0
        return watch(services)
    finally:
        stop_services(services)
        remove_pid(own_pid_file, os.getpid())
        withdraw_access()
        name_survivors(services)


def without_running(services: list[Service]) -> list[Service]:
    """Those that a running demo has lost; all if none of them runs, or all do, which `check_ports` refuses."""
    return [service for service in services if not read_pid(service.pid_file)] or services


def check_ports(services: Sequence[Service]) -> None:
    for service in services:
        if port_is_free(service.port):
            continue
        if read_pid(service.pid_file):
            raise Failure(f"port {service.port} is in use by a demo that runs already; stop it: {SCRIPT} stop", 2)
        example = f"{service.port_setting}={example_ports(service)}"
        raise Failure(f"port {service.port} is in use by another program; end that, or choose another: {example}", 2)


def example_ports(service: Service) -> str:
    return str(service.port + 1) if service.port_setting == "LB_PORT" else '"5101 5102 5103"'


def start_services(services: Sequence[Service], detached: bool) -> None:
    started = time.monotonic()
    for service in services:
        STOP.check()
        service.start(detached)
    waiting = list(services)
    while waiting:
        STOP.check()
        waiting = [service for service in waiting if not service.is_ready()]
        if waiting and time.monotonic() > started + READY_SECONDS:
            slow = waiting[0]
            raise Failure(f"{slow.name} was not ready within {READY_SECONDS:g} s: {last_line(slow.log)} ({slow.log})")
        if waiting:
            pause()
    say(f"Ready in {time.monotonic() - started:.1f} s.")


def watch(services: Sequence[Service]) -> int:
    """Until the balancer ends, or every process, or a signal comes."""
    living = list(services)
    while living:
        STOP.check()
        for service in [service for service in living if service.exit_code is not None]:
            living.remove(service)
            remove_pid(service.pid_file, service.process.pid if service.process else None)
            if service.name == "balancer":
                return report_balancer_end(service)
            say(f"{service.name} ended ({how_it_ended(service)}). Start it again with:")
            say(f"  {printable_command(service.command)}")
        pause()
    raise Failure("every backend has ended")


def report_balancer_end(balancer: Service) -> int:
    """Asked to end from outside it ends with 0, and so do we; else it died."""
    if balancer.exit_code == 0:
        say("The balancer ended.")
        return 0
    how = how_it_ended(balancer)
    raise Failure(f"the balancer ended by itself ({how}): {last_line(balancer.log)} ({balancer.log})")


def how_it_ended(service: Service) -> str:
    code = service.exit_code
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"


def stop_services(services: Sequence[Service]) -> None:
    """The balancer first, so that it can finish what it has in hand while the backends still answer."""
    if STOP.count and any(service.process for service in services):
        say("Stopping ...")
    for group in (
        [service for service in services if service.name == "balancer"],
        [service for service in services if service.name != "balancer"],
    ):
        for service in group:
            service.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for service in group:
            service.wait(deadline)


def name_survivors(services: Sequence[Service]) -> None:
    """What another start_all has started in the place of one of ours goes on: that one may not even be detached."""
    names = [service.name for service in services if service.process and read_pid(service.pid_file)]
    if names:
        say(f"Another start_all has started {', '.join(names)} again; to stop that as well: {SCRIPT} stop")
