"""An asyncio proxy as a point of comparison: aiohttp's server in front, its client behind, on uvloop as this balancer.

Arguments: port, URLs of backends. In turn, connections kept, bodies streamed both ways. No health checks, retries or
statistics: what is measured is the way of an asyncio proxy without any features.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict

HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
SESSION = web.AppKey("session", ClientSession)
port, *urls = sys.argv[1:]
turn = itertools.cycle(urls)


async def session(app: web.Application) -> AsyncIterator[None]:
    connector = TCPConnector(limit=0, limit_per_host=0)
    timeout = ClientTimeout(total=None, sock_connect=3, sock_read=30)
    async with ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as app[SESSION]:
        yield


async def forward(request: web.Request) -> web.StreamResponse:
    headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
    headers.append(("X-Forwarded-For", request.remote or ""))
    async with request.app[SESSION].request(
        request.method,
        f"{next(turn)}{request.raw_path}",
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


app = web.Application(client_max_size=0)
app.cleanup_ctx.append(session)
app.router.add_route("*", "/{path:.*}", forward)
loop = uvloop.new_event_loop()
web.run_app(app, host="127.0.0.1", port=int(port), access_log=None, print=None, backlog=4096, loop=loop)
