"""The control API put together: what holds for every route.

`access` decides who may read and write. The routes are in `monitoring`, `administration` and `dashboard`; a new path
also goes into `openapi.PATHS`, else it is forwarded.
"""

from __future__ import annotations

import gzip
import re

from flask import Blueprint, Flask, Response, g, request
from flask_cors import CORS

from balancer.balancing.changes import ACTOR
from balancer.control import administration, cluster, dashboard, limits, monitoring, openapi, problems
from balancer.control.access import LOCAL, Access, AccessOptions, first_segment, is_authorized
from balancer.control.control import Control, current_control
from balancer.control.metrics import Metrics, current_metrics
from balancer.control.paths import MAX_BODY
from balancer.control.problems import ApiError
from balancer.observe.events import REFUSED
from balancer.protocol.messages import check_host, check_target
from balancer.protocol.request import header_lines, raw_target

READS = frozenset({"GET", "HEAD"})
# Open to all: probes tell nothing but that it is alive, and the page has to be there to ask for a token.
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/dashboard"})
PATH_KEPT = 200  # characters of a refused path
WORTH_PACKING = 1000  # bytes

# The routes are nested in it, so that its hooks below hold for all of them and for nothing else.
blueprint = Blueprint("control", __name__)
for part in (monitoring, administration, limits, cluster, dashboard, openapi):
    blueprint.register_blueprint(part.blueprint)


def make(control: Control) -> Flask:
    """The app that has it."""
    app = Flask("balancer", static_folder=None)
    control.access = Access(control.settings.options(AccessOptions))
    app.config["CONTROL_PREFIX"] = control.settings.control_prefix
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY + 1  # one more, because Werkzeug cuts a chunked body without a word
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # or `//x` is sent on to whatever host the client names
    app.extensions["control"], app.extensions["metrics"] = control, Metrics(control)
    app.register_blueprint(blueprint, url_prefix=control.settings.control_prefix or None)
    problems.install(app)
    # For every answer, also where no route is: an unknown path, or a method that a path has not.
    app.before_request(_admit)
    app.teardown_request(_forget_actor)
    app.after_request(_protect)  # after what flask-cors does, for the last one comes first
    origins = [*control.access.options.cors_origins, *(["null"] if control.access.has_tokens else [])]
    CORS(
        app,
        origins=[re.compile(re.escape(origin) + r"\Z") for origin in origins],  # as text: `[` would make it a pattern
        allow_headers=["Content-Type", "Authorization", "If-Match"],
        methods=["GET", "POST", "PATCH", "DELETE"],
        max_age=600,
        vary_header=False,
    )
    return app


def _admit() -> None:
    """The Host rules of the data path, and then who may do what. A preflight changes and tells nothing."""
    lines = header_lines(request.environ)
    check_target(request.method, raw_target(request.environ))
    hosts = [value for name, value in lines if name == b"host"]
    check_host(hosts, request.environ["SERVER_PROTOCOL"].removeprefix("HTTP/"))
    control = current_control()
    is_read, path = request.method in READS, request.path.removeprefix(control.settings.control_prefix)
    if request.method == "OPTIONS" or (is_read and path in OPEN_PATHS):
        return
    try:
        control.access.check(is_write=not is_read)
        if not is_read:
            ACTOR.set(g.holder or LOCAL)
    except ApiError as error:
        if not is_read:
            whole, public = (
                f"{request.method} {repr(told[:PATH_KEPT])[1:-1]}: {error}"  # as text in one line
                for told in (request.path, first_segment(request.path))
            )
            control.events.add(REFUSED, None, whole, "warning", g.get("holder"), public=public)
        raise


def _forget_actor(error: BaseException | None) -> None:
    """The thread is for other requests too."""
    ACTOR.set(None)


def _protect(response: Response) -> Response:
    """No page of another site may make anything of an answer, and no cache keep it."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    response.vary.add("Origin")
    if request.headers.get("Origin") == "null" and request.method != "OPTIONS" and not is_authorized():
        response.headers.pop("Access-Control-Allow-Origin", None)
    return response


@blueprint.after_request
def _pack(response: Response) -> Response:
    """With gzip for who takes it (RFC 9110 section 12.5.3): once a second a page asks for what is mostly the same."""
    response.vary.add("Accept-Encoding")
    wanted = request.accept_encodings.quality("gzip") > 0 and "Content-Encoding" not in response.headers
    if wanted and (response.content_length or 0) >= WORTH_PACKING:
        response.set_data(gzip.compress(response.get_data(), compresslevel=1))
        response.headers["Content-Encoding"] = "gzip"
    return response


@blueprint.after_request
def _count(response: Response) -> Response:
    action = (request.endpoint or "").rpartition(".")[2]
    current_metrics().admin_requests.labels(action, response.status_code).inc()
    return response
