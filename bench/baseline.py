"""The classic Python load balancer, as the benchmark's point of comparison.

Flask's own development server (one thread per connection) and one plain `requests` call per request, round robin over
the backends. It is written the way such programs are usually written: nothing is added to make it slow, and its
access log is off as it is for every other contender.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import threading

import requests
from flask import Flask, Response, request

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
# Flask and the server write their own framing; `requests` has already undone the backend's.
NOT_FORWARDED = {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding"}


class RoundRobin:
    """Hands out the backends in turn and counts what each was given."""

    def __init__(self, urls: list[str]) -> None:
        self._turn = itertools.cycle(urls)
        self._lock = threading.Lock()  # guards _turn and counts
        self.counts = dict.fromkeys(urls, 0)

    def next(self) -> str:
        with self._lock:
            url = next(self._turn)
            self.counts[url] += 1
            return url


def create_app(urls: list[str]) -> Flask:
    app = Flask(__name__, static_folder=None)
    backends = RoundRobin(urls)

    @app.route("/", defaults={"path": ""}, methods=METHODS)
    @app.route("/<path:path>", methods=METHODS)
    def forward(path: str) -> Response:
        answer = requests.request(
            request.method,
            f"{backends.next()}/{path}",
            params=request.args.to_dict(flat=False),
            headers={name: value for name, value in request.headers if name.lower() not in NOT_FORWARDED},
            data=request.get_data(),
            allow_redirects=False,
            timeout=30,
        )
        headers = [(name, value) for name, value in answer.headers.items() if name.lower() not in NOT_FORWARDED]
        return Response(answer.content, answer.status_code, headers)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--backend", action="append", required=True, metavar="URL")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    create_app(options.backend).run(host="127.0.0.1", port=options.port, threaded=True)


if __name__ == "__main__":
    main()
