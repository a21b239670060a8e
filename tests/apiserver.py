"""A server of a JSON API, with answers that a test sets: on a Unix socket, or over TLS."""

from __future__ import annotations

import json
import queue
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, ThreadingTCPServer, UnixStreamServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

Query = dict[str, str]


class News:
    """Answered to a watch: what is `put` goes out as lines, until `end`."""

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def put(self, *given: Any) -> None:
        self.lines.put(
            b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in given)
        )

    def end(self) -> None:
        self.lines.put(None)


Answer = Callable[[str, Query], Any]  # JSON, bytes, News, or a status


class ApiServer:
    """`answer` gets path and query; `asked` has them, `tokens` what came as Authorization."""

    def __init__(self, answer: Answer, path: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.asked: list[tuple[str, Query]] = []
        self.tokens: list[str | None] = []
        self.news: list[News] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:  # noqa: N802
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                server.asked.append((unquote(parts.path), query))
                server.tokens.append(self.headers["Authorization"])
                with suppress(OSError):
                    self.reply(server.answer(unquote(parts.path), query))
                self.close_connection = True

            def reply(self, answer: Any) -> None:
                status = answer if isinstance(answer, int) else 200
                self.send_response(status)
                if not isinstance(answer, News):
                    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    return
                server.news.append(answer)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while (line := answer.lines.get()) is not None:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *args: Any) -> None:
                pass

            def address_string(self) -> str:
                return "client"

        class Unix(ThreadingMixIn, UnixStreamServer):
            daemon_threads = True

        class Tcp(ThreadingTCPServer):
            daemon_threads = True

        self._server = Tcp(("127.0.0.1", 0), Handler) if path is None else Unix(str(path), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = 0 if path is not None else int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="api-server")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for news in self.news:
            news.end()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
