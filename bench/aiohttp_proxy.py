"""An asynchronous Python load balancer, as a point of comparison: aiohttp's server in front, aiohttp's client behind.

Round robin, one session with kept connections, bodies streamed both ways. No health checks, retries or statistics: what
is measured is the way of an asyncio proxy without any features.
"""

from __future__ import annotations

import argparse
import itertools

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict

HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}


class Proxy:
    def __init__(self, urls: list[str]) -> None:
        self._turn = itertools.cycle(urls)
        self._session: ClientSession | None = None

    async def open(self, app: web.Application) -> None:
        connector = TCPConnector(limit=0, limit_per_host=0)
        timeout = ClientTimeout(total=None, sock_connect=3, sock_read=30)
        self._session = ClientSession(connector=connector, timeout=timeout, auto_decompress=False)

    async def close(self, app: web.Application) -> None:
        if self._session is not None:
            await self._session.close()

    async def forward(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        headers.append(("X-Forwarded-For", request.remote or ""))
        async with self._session.request(
            request.method,
            f"{next(self._turn)}{request.raw_path}",
            headers=headers,
            data=request.content if request.can_read_body else None,
            allow_redirects=False,
        ) as answer:
            kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP]
            response = web.StreamResponse(status=answer.status, headers=CIMultiDict(kept))
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--backend", action="append", required=True, metavar="URL")
    options = parser.parse_args()
    proxy = Proxy(options.backend)
    app = web.Application(client_max_size=0)
    app.on_startup.append(proxy.open)
    app.on_cleanup.append(proxy.close)
    app.router.add_route("*", "/{path:.*}", proxy.forward)
    loop = uvloop.new_event_loop()  # as in this balancer
    web.run_app(app, host="127.0.0.1", port=options.port, access_log=None, print=None, backlog=4096, loop=loop)


if __name__ == "__main__":
    main()
