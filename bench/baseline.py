"""The classic Python load balancer as a point of comparison: Flask's own server, and one `requests` call per request.

It is written the way such programs are usually written: nothing is added to make it
slow, and its access log is off as it is for every other contender.
"""

from __future__ import annotations

import itertools
import logging
import threading

import requests
from flask import Flask, Response, request
from script import Parser, at_least

# Flask and the server write their own framing; `requests` has already undone the backend's.
NOT_FORWARDED = {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding"}
parser = Parser(__doc__)
parser.add_argument("port", type=at_least(1, 65535))
parser.add_argument("urls", metavar="url", nargs="+")
options = parser.parse_args()
app = Flask(__name__, static_folder=None)
turn = itertools.cycle(options.urls)
lock = threading.Lock()  # guards turn


@app.before_request  # of whatever method and path
def forward() -> Response:
    with lock:
        url = next(turn)
    answer = requests.request(
        request.method,
        url + request.path,
        params=request.args.to_dict(flat=False),
        headers={name: value for name, value in request.headers if name.lower() not in NOT_FORWARDED},
        data=request.get_data(),
        allow_redirects=False,
        timeout=30,
    )
    headers = [(name, value) for name, value in answer.headers.items() if name.lower() not in NOT_FORWARDED]
    return Response(answer.content, answer.status_code, headers)


logging.getLogger("werkzeug").setLevel(logging.ERROR)
app.run(host="127.0.0.1", port=options.port, threaded=True)
