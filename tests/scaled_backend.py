"""A backend that is quickly started: by the scaling under test, as a process. Answers its id, `--delay` seconds later.

With `--child` it has a child that ignores SIGTERM, with `--daemon` one that is in a session of its own, too; with
`--sick` it never is healthy; with `--fail` it ends at once.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--id")
parser.add_argument("--delay", type=float, default=0.0)
for flag in ("--child", "--daemon", "--sick", "--fail"):
    parser.add_argument(flag, action="store_true")
options = parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        is_check = self.path == "/health"
        if not is_check:
            time.sleep(options.delay)
        body = b"" if is_check else options.id.encode()
        self.send_response(503 if is_check and options.sick else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


if options.fail:
    print("no licence", flush=True)
    sys.exit(3)
if options.child or options.daemon:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)  # stubborn"
    subprocess.Popen([sys.executable, "-c", stubborn, "of", options.id], start_new_session=options.daemon)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(f"{options.id} listens", flush=True)
Server(("127.0.0.1", options.port), Handler).serve_forever()
