"""`/metrics` for Prometheus: read from the parts when it is asked for, so that requests pay nothing for it.

Counters count since the start of the process, or of its `state_file`. Neither a reset nor the removal of a backend
lowers them. Nothing that a client can make up (paths, names of methods, addresses) is a label. What there is for each
backend has `backendmetrics`.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import cast, get_args

from flask import current_app
from prometheus_client import CollectorRegistry, Counter, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from balancer import __version__
from balancer.control.backendmetrics import BACKEND_REASONS, BUCKETS, BackendMetrics, measured, one_of, reasons_below
from balancer.control.control import Control, Lifecycle
from balancer.control.exposition import render
from balancer.errors import BalancerError
from balancer.observe.refusals import WHYS
from balancer.observe.statistics import Counters, Lifetime

EOF = "# EOF\n"  # the end, in OpenMetrics
QUEUE_BUCKETS = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
LIFECYCLES = get_args(Lifecycle)
REASONS = sorted(reasons_below(BalancerError))

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter, and nobody reads them


def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lb_{name}", text, labels=labels)


def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"lb_{name}", text, labels=labels)


def histogram(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"lb_{name}", text, labels=labels)


def add(family: GaugeMetricFamily | CounterMetricFamily, labels: Sequence[str], value: float) -> Metric:
    family.add_metric(labels, value)
    return family


def add_each(
    family: GaugeMetricFamily | CounterMetricFamily, labels: Sequence[str], values: Mapping[str, float]
) -> Metric:
    """One sample per value of the last label."""
    for value, count in values.items():
        family.add_metric([*labels, value], count)
    return family


class Metrics:
    """What `/metrics` answers with, and the one counter that is not read from elsewhere."""

    def __init__(self, control: Control) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._collector, self._backends = Collector(control), BackendMetrics(control)
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)
        self.admin_requests = Counter(
            "lb_admin_requests", "Requests to the control API.", ["action", "code"], registry=self._registry
        )

    def text(self, accept: str, names: Sequence[str]) -> tuple[bytes, str]:
        """In the format that this header asks for, with its content type; only samples of these `names` if there are
        any."""
        lifetime = self._collector.look()
        encode, content_type = choose_encoder(accept)
        is_openmetrics = content_type.startswith("application/openmetrics-text")
        pieces = render(self._backends.families(lifetime), is_openmetrics, names)
        whole = encode(self._registry.restricted_registry(names) if names else self._registry).decode()
        if is_openmetrics:
            whole = whole.removesuffix(EOF)
            pieces.append(EOF)
        return "".join([whole, *pieces]).encode(), content_type


def current_metrics() -> Metrics:
    """Those of the app whose request is being answered."""
    return cast(Metrics, current_app.extensions["metrics"])


class Collector:
    """Makes the metrics of this moment, but for those of each backend. Each source locks itself, so numbers of two
    sources may be a moment apart."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._started = time.time()
        self.look()

    def look(self) -> Lifetime:
        """What requests came to, for all that is told next: with hundreds of backends it takes a while."""
        self._lifetime = self._control.statistics.lifetime()
        return self._lifetime

    def collect(self) -> Iterator[Metric]:
        yield from self._process()
        yield from self._configuration()
        yield from self._requests(self._lifetime)
        yield from self._routes()
        yield from self._websockets()
        yield from self._limits()
        yield from self._pools()
        yield from self._cluster()
        yield from self._scaling()
        yield from self._sources()

    def _process(self) -> Iterator[Metric]:
        control, versions = self._control, (__version__, platform.python_version())
        yield add(gauge("build_info", "Versions.", "version", "python_version"), versions, 1)
        names = (control.settings.id, control.pool.algorithm)
        yield add(gauge("info", "Name, and algorithm of the default pool.", "instance_id", "algorithm"), names, 1)
        yield add(gauge("start_time_seconds", "When the process started."), [], self._started)
        lifecycle = gauge("lifecycle_state", "1 for the state the process is in.", "state")
        yield add_each(lifecycle, [], one_of(LIFECYCLES, control.lifecycle))
        yield add(
            gauge("panic", "Whether the default pool ignores health, as lb_pool_panic tells of all."),
            [],
            control.pool.is_panicking,
        )
        yield add_each(counter("events", "Events, as GET /events tells them.", "kind"), [], control.events.counts())
        yield add(counter("log_lines", "Log lines written, access log and others."), [], control.log.written)
        yield add(counter("log_lines_dropped", "Log lines lost: nobody reads them."), [], control.log.dropped)

    def _configuration(self) -> Iterator[Metric]:
        configuration, events = self._control.configuration, self._control.events.counts()
        is_good = configuration.last_error is None
        yield add(gauge("config_last_reload_successful", "Whether the last (re)load was good."), [], is_good)
        loaded = gauge("config_last_reload_success_timestamp_seconds", "When the configuration in force was loaded.")
        yield add(loaded, [], configuration.loaded_at)
        good, bad = events["config_reloaded"], events["config_refused"]
        yield add(counter("config_reloads", "Times the configuration was to be reloaded."), [], good + bad)
        yield add(counter("config_reload_failures", "Times it was refused."), [], bad)
        if (tls := self._control.tls()) is not None:
            expiry = gauge("tls_certificate_expiry_timestamp_seconds", "When the certificate that is shown expires.")
            yield add(expiry, [], tls["expires_at"])
            text = "Whether the newest certificate was not refused."
            yield add(gauge("tls_reload_success", text), [], tls["last_error"] is None)

    def _scaling(self) -> Iterator[Metric]:
        wanted = gauge("scaling_wanted", "Backends that scaling wants a pool to have, or would.", "pool")
        started = counter("scaling_started", "Backends that scaling has started.", "pool")
        failed = counter("scaling_failed_starts", "Of these, those that ended or were not healthy in time.", "pool")
        for scaled in self._control.scaling.describe():
            pool = [scaled["pool"]]
            if scaled["wanted"] is not None:
                wanted.add_metric(pool, scaled["wanted"])
            started.add_metric(pool, scaled["started"])
            failed.add_metric(pool, scaled["failed_starts"])
        yield from (wanted, started, failed)

    def _routes(self) -> Iterator[Metric]:
        """Of those that there are now: names that a reload takes away would pile up."""
        names, text = {route.name for route in self._control.settings.routes}, "Finished requests of a route."
        answers = counter("route_requests", text, "route", "code")
        for route, counters in self._control.routes.lifetime().items():
            if route in names:
                codes = {str(status): count for status, count in counters.statuses.items()}
                add_each(answers, [route], {**codes, "499": codes.get("499", 0) + counters.aborted})
        yield answers
        text = "Copies of requests, by what came of each."
        copies = counter("route_copies", text, "route", "outcome")
        for (route, outcome), count in self._control.routes.copies().items():
            copies.add_metric([route, outcome], count)
        yield copies
        share = gauge("route_canary_share", "Share of a route's requests that its canary gets.", "route")
        for route in sorted(names):
            if (canary := self._control.canaries.of(route)) is not None:
                share.add_metric([route], canary.share)
        yield share

    def _requests(self, lifetime: Lifetime) -> Iterator[Metric]:
        totals, whole = lifetime.totals, Counters()
        for counters in lifetime.counters.values():
            whole += counters
        answers = counter("requests", "Finished requests; code 499 if the client left.", "code", "method")
        for (status, method), count in totals.answers.items():
            answers.add_metric([str(status), method], count)
        yield answers
        errors = counter("request_errors", "Requests without a whole answer of a backend.", "reason")
        yield add_each(errors, [], dict.fromkeys(REASONS, 0) | totals.errors)
        refused = counter("auth_failures", "Requests that were not let in, by who decided that.", "auth", "reason")
        known = {(auth.name, why): 0 for auth in self._control.settings.auth for why in WHYS}
        for labels, count in {**known, **self._control.statistics.refusals.counts()}.items():
            refused.add_metric(labels, count)
        yield refused
        yield add(gauge("requests_in_flight", "Requests under way."), [], lifetime.active)
        duration = histogram("request_duration_seconds", "Time from a request's head to the end of its answer.")
        duration.add_metric([], *measured(whole.times, BUCKETS))
        yield duration
        yield add(counter("request_bytes", "Bytes of request bodies."), [], totals.bytes_in)
        yield add(counter("response_bytes", "Bytes of response bodies."), [], totals.bytes_out)
        retries = counter("retries", "Further attempts, by what had failed before.", "reason")
        yield add_each(retries, [], dict.fromkeys(BACKEND_REASONS, 0) | totals.retries)
        waiting = {"backend": self._control.pools.waiting, "thread": self._control.queued()}
        yield add_each(gauge("queue_length", "Requests that wait, by what for.", "queue"), [], waiting)
        queued = histogram("queue_duration_seconds", "Time in the queue for a backend, of requests that had to wait.")
        queued.add_metric([], *measured(totals.waits, QUEUE_BUCKETS))
        yield queued

    def _websockets(self) -> Iterator[Metric]:
        totals = self._control.statistics.websockets.totals()
        yield add(counter("websockets_opened", "WebSockets opened."), [], totals.opened)
        closed = counter("websockets_closed", "WebSockets closed, with which code and by whom.", "code", "by")
        for labels, count in totals.closes.items():
            closed.add_metric(labels, count)
        yield closed
        messages = counter("websocket_messages", "Messages of WebSockets, in from clients.", "direction")
        yield add_each(messages, [], totals.messages)
        yield add_each(counter("websocket_bytes", "Bytes of these messages.", "direction"), [], totals.bytes)

    def _limits(self) -> Iterator[Metric]:
        text = "Requests that a limit let through, refused, or in shadow mode would have refused."
        requests = counter("limit_requests", text, "limit", "outcome")
        in_flight = gauge("limit_requests_in_flight", "Requests under way of all keys.", "limit")
        keys = gauge("limit_keys", "Keys that are known just now.", "limit")
        evicted = counter("limit_keys_evicted", "Keys that gave way to others, for want of room.", "limit")
        for limit in self._control.limiter.describe():
            name = [limit["name"]]
            add_each(requests, name, limit["requests"])
            add(in_flight, name, limit["requests_in_flight"])
            add(keys, name, limit["keys"])
            add(evicted, name, limit["evicted"])
        yield from (requests, in_flight, keys, evicted)

    def _cluster(self) -> Iterator[Metric]:
        cluster = self._control.cluster
        if cluster is None:
            return
        connected = gauge("cluster_connected", "Whether it hears of the other members.")
        yield add(connected, [], cluster.state.is_together)
        yield add(gauge("cluster_members", "Members that it knows of, itself among them."), [], len(cluster.members))
        yield add(gauge("cluster_age_seconds", "Since the Redis server answered last."), [], cluster.age)

    def _pools(self) -> Iterator[Metric]:
        info = gauge("pool_info", "The algorithm in use.", "pool", "algorithm")
        panic = gauge("pool_panic", "Whether health is ignored because too few backends are available.", "pool")
        available = gauge("pool_backends_available", "Backends that take requests as far as they have room.", "pool")
        waiting = gauge("pool_queue_length", "Requests that wait for a backend.", "pool")
        hedges = counter("hedges", "Requests that a second backend got too, by what came of it.", "pool", "result")
        late = gauge("hedge_late_seconds", "After how long without an answer that happens; +Inf for never.", "pool")
        counted = self._control.statistics.hedges()
        for each in self._control.pools.describe():
            name = each["name"]
            add(info, [name, each["algorithm"]], 1)
            add(panic, [name], each["panic"])
            add(available, [name], each["available"])
            add(waiting, [name], each["waiting_requests"])
            seconds = each["hedge"]["late"]
            if each["hedge"]["mode"] != "off":
                add_each(hedges, [name], counted[name])
                add(late, [name], math.inf if seconds is None else seconds)
        yield from (info, panic, available, waiting, hedges, late)

    def _sources(self) -> Iterator[Metric]:
        age = gauge("source_age_seconds", "Since a source of backends last told who is there.", "source")
        backends = gauge("source_backends", "Backends that are there by its word.", "source")
        failures = counter("source_failures", "Times that it could not tell, or told of nobody.", "source")
        for source in self._control.discovery.describe():
            name = [source["name"]]
            if source["age"] is not None:
                add(age, name, source["age"])
            add(backends, name, source["backends"])
            add(failures, name, source["failures"])
        yield from (age, backends, failures)
