"""The routes, made from the settings; and whether they do what is expected of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

from balancer.balancing.pool import DEFAULT_POOL
from balancer.config.routes import ExpectSettings, RouteSettings
from balancer.config.settings import Settings
from balancer.errors import AmbiguousPath, NoRoute, SettingsError
from balancer.filters.directanswers import Ambiguous, FixedAnswer, Redirect, Unrouted
from balancer.filters.headers import RequestHeaders
from balancer.filters.mirror import Copies, Mirror, MirrorOptions
from balancer.filters.rewrite import Rewrite, RewriteAnswers
from balancer.forwarding.filter import Filter
from balancer.forwarding.route import Route, RouteOptions, Routes, TableOfRoutes
from balancer.forwarding.routetable import Candidate, Match, RouteTable
from balancer.forwarding.split import Split
from balancer.observe.canary import Canaries, CanaryOptions, Side
from balancer.observe.record import Record
from balancer.observe.routecounts import RouteCounts
from balancer.protocol.headerrules import NO_RULES, HeaderRules
from balancer.protocol.request import Request
from balancer.protocol.requestheads import HeadChange, RequestHeads, changed_heads
from balancer.protocol.requestkey import request_key
from balancer.protocol.responseheads import ResponseHeads
from balancer.upstream.transport import Timeouts

T = TypeVar("T")

Guards = Callable[[RouteSettings], Sequence[Filter]]  # who may, and how much


@dataclass(frozen=True, slots=True)
class Way:
    """What all requests to one pool have in common: its `settings`, and for which nothing of a route's own is known."""

    settings: Settings
    route: Route
    filters: Sequence[Filter]


class RouteWiring:
    """Makes routes of `ways`, one for each pool by its name. `rare` are filters for requests of which there are few,
    `guards` makes those of one route."""

    def __init__(
        self,
        config: Settings,
        ways: Mapping[str, Way],
        rare: Sequence[Filter],
        guards: Guards,
        canaries: Canaries,
        copies: Copies,
    ) -> None:
        self._config = config
        self._ways = ways
        self._rare = rare
        self._guards = guards
        self._canaries = canaries
        self._copies = copies
        self._request_heads = changed_heads()
        self._response_heads: dict[HeaderRules, ResponseHeads] = {}

    def routes(self, counts: RouteCounts) -> Routes:
        config, default = self._config, self._ways[DEFAULT_POOL]
        counts.keep({route.name for route in config.routes})
        self._canaries.use({route.name: _canary(route) for route in config.routes if route.split_steps})
        if not config.routes and not config.pools:
            return self._pair(default.route, default.filters)
        unrouted = Unrouted(default.route.pool)
        missing = self._pair(
            default.route, default.filters if config.has_default_pool else [unrouted, *default.filters]
        )
        if not config.routes:
            return missing
        ambiguous = self._pair(default.route, [Ambiguous(), *default.filters])
        table = make_table(config, lambda route: self._made(route, counts), missing=missing, ambiguous=ambiguous)
        return TableOfRoutes(missing.usual, missing.rare, table)

    def _pair(self, route: Route, filters: Sequence[Filter]) -> Routes:
        return Routes(usual=route.with_filters(filters), rare=route.with_filters([*self._rare, *filters]))

    def _made(self, route: RouteSettings, counts: RouteCounts) -> Routes:
        guards = self._guards(route)  # one for all its pools: a limit is the route's
        if not route.split:
            return self._leading_to(route.pool or DEFAULT_POOL, route, counts, guards)
        canary, whole = self._canaries.of(route.name), sum(route.split.values())
        parts = [part / whole for part in route.split.values()]
        watched = [None] * len(parts) if canary is None else [canary.stable, canary.canary]
        sides = [
            self._leading_to(pool, route, counts, guards, side) for pool, side in zip(route.split, watched, strict=True)
        ]
        shares = (lambda: parts) if canary is None else canary.shares
        key = request_key(route.split_key, self._config.networks)
        return Split(sides[0].usual, sides[0].rare, sides, shares, key)

    def _leading_to(
        self,
        pool: str,
        route: RouteSettings,
        counts: RouteCounts,
        guards: Sequence[Filter],
        side: Side | None = None,
    ) -> Routes:
        way = self._ways[pool]
        settings = way.settings.model_copy(update=route.own)
        timeouts = settings.options(Timeouts)
        made = replace(
            way.route,
            options=settings.options(RouteOptions),
            adapter=way.route.adapter if not route.own else way.route.adapter.with_timeouts(timeouts),
            response_heads=self._heads(way.route.response_heads, route.response_headers),
            done=(_label(route, pool, counts, side), *way.route.done),  # before it is logged
        )
        return self._pair(
            made.with_filters(self._changes(route, settings)),
            [*guards, *_ending(route), *way.filters, *self._mirrors(route)],
        )

    def _mirrors(self, route: RouteSettings) -> list[Filter]:
        if route.mirror is None:
            return []
        options = MirrorOptions(**route.mirror.model_dump(exclude={"pool"}))
        way = self._ways[route.mirror.pool].route
        return [Mirror(route.name, options, way.pool, way.adapter, self._copies)]

    def _heads(self, general: ResponseHeads, own: HeaderRules) -> ResponseHeads:
        """Shared by those with the same rules: they keep much."""
        if not own:
            return general
        rules = general.rules.then(own)
        return self._response_heads.setdefault(rules, ResponseHeads(rules))

    def _changes(self, route: RouteSettings, settings: Settings) -> list[Filter]:
        """Of requests and of answers, before other filters see them. `settings` are its pool's."""
        found: list[Filter] = []
        is_same = settings.host_field == self._config.host_field
        change = HeadChange(None if is_same else settings.host_field, route.request_headers)
        if change != (None, NO_RULES):
            found.append(RequestHeaders(change, self._request_heads))
        if route.rewriting is not None:
            found.append(Rewrite(route.rewriting, takes_ambiguous=route.ambiguous_paths == "forward"))
            if route.rewrite_answers:
                found.append(RewriteAnswers(route.rewriting, settings.host_field))
        return found


def _ending(route: RouteSettings) -> list[Filter]:
    """What answers in place of a backend."""
    if route.redirect is not None:
        return [Redirect(route.redirect, route.redirect_status)]
    return [] if route.status is None else [FixedAnswer(route.status, route.body)]


def _canary(route: RouteSettings) -> CanaryOptions:
    return CanaryOptions(route.pools, tuple(step / 100 for step in route.split_steps), route.split_hold)


def _label(
    route: RouteSettings, pool: str, counts: RouteCounts, side: Side | None
) -> Callable[[Request, Record], None]:
    name, told = route.name, pool if route.pools else None

    def label(request: Request, record: Record) -> None:
        record.route, record.pool = name, told
        counts.add(name, record)
        if side is not None:
            side.add(record)

    return label


def make_table(config: Settings, made: Callable[[RouteSettings], T], *, missing: T, ambiguous: T) -> RouteTable[T]:
    return RouteTable(
        (
            Candidate(
                _match(route),
                made(route),
                is_guarded=route.is_guarded,
                takes_ambiguous=route.ambiguous_paths == "forward",
            )
            for route in config.routes
        ),
        missing=missing,
        ambiguous=ambiguous,
    )


def _match(route: RouteSettings) -> Match:
    return Match(
        (route.host or "").encode(),
        route.match_path,
        route.is_exact,
        frozenset(route.methods),
        route.match_headers,
        route.match_query,
    )


# What is expected.


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a request, as far as the settings decide it."""

    route: str | None = None
    pools: tuple[str, ...] = ()  # that may get it
    status: int | None = None  # if no backend is asked

    def __str__(self) -> str:
        told = [f"route {self.route}" if self.route else "no route"]
        told += [f"pool {' or '.join(self.pools)}"] if self.pools else []
        told += [f"status {self.status}"] if self.status else []
        return ", ".join(told)


def check_expectations(config: Settings, heads: RequestHeads, is_control: Callable[[str], bool]) -> None:
    """Raises SettingsError for the first one that is not met."""
    if not config.expect:
        return
    missing = Outcome(pools=(DEFAULT_POOL,)) if config.has_default_pool else Outcome(status=NoRoute.status)
    table = make_table(config, _outcome, missing=missing, ambiguous=Outcome(status=AmbiguousPath.status))
    for each in config.expect:
        request = _request(each, heads)
        if is_control(request.path):
            raise SettingsError(f"expect {each}: this path is the control API's, which no route can change")
        found = table.find(request)
        if request.refusal is not None:
            found = Outcome(status=request.refusal.status)
        wanted = {name: getattr(each, name) for name in ("route", "pool", "status")}
        got: dict[str, Sequence[object]] = {"route": [found.route or ""], "pool": found.pools or [""]}
        got["status"] = [found.status or ""]
        wrong = [name for name, value in wanted.items() if value not in (None, *got[name])]
        if wrong:
            told = " and ".join(f"{name} {wanted[name]}" if wanted[name] else f"no {name}" for name in wrong)
            raise SettingsError(f"expect {each}: expected {told}, got {found}")


def _outcome(route: RouteSettings) -> Outcome:
    return Outcome(route.name, route.pools, route.status if route.redirect is None else route.redirect_status)


def _request(expected: ExpectSettings, heads: RequestHeads) -> Request:
    method, url = expected.request.split(" ")
    parts = urlsplit(url)
    target = url.partition("://")[2].removeprefix(parts.netloc) or "/"
    path = unquote_to_bytes(target.partition("?")[0]).decode("latin-1")
    lines = [(b"host", parts.netloc.encode())]
    lines += [(name.lower().encode(), value.encode("latin-1")) for name, value in expected.headers.items()]
    return Request(heads, method, path, target.encode(), "1.1", parts.scheme, "127.0.0.1", lines)
