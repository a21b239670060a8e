"""What a round trip over a WebSocket costs this balancer, nginx and Caddy: CPU, as of /proc, in one run.

For each size of message and each contender: connections send a message, wait until it is back, and go on.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from threading import Thread

from contenders import BODY, CONTENDERS, Place, nginx, started
from processes import Service, free_ports, medians
from script import Parser, at_least
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Request, Response, ServerConnection, serve

SIZES = {"32 B": 32, "64 KiB": 65536}
CONNECTIONS = 16


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


def answer(connection: ServerConnection, request: Request) -> Response | None:
    """To whoever asks whether it is up."""
    return None if request.path == "/ws" else connection.respond(200, BODY.decode())


async def backend(port: int) -> None:
    async with serve(echo, "127.0.0.1", port, process_request=answer, compression=None) as server:
        await server.serve_forever()


async def cost(service: Service, port: int, size: int, seconds: float) -> float:
    """Microseconds of CPU that a round trip takes."""
    message, trips = b"x" * size, 0

    async def send(connection: ClientConnection) -> None:
        nonlocal trips
        while not trips or time.monotonic() < end:
            await connection.send(message)
            await connection.recv()
            trips += 1

    async with AsyncExitStack() as stack:
        opened = [connect(f"ws://127.0.0.1:{port}/ws", compression=None) for _ in range(CONNECTIONS)]
        connections = [await stack.enter_async_context(each) for each in opened]
        end, cpu = time.monotonic() + seconds, service.cpu_seconds()
        await asyncio.gather(*map(send, connections))
        return (service.cpu_seconds() - cpu) / trips * 1e6


def nginx_command(place: Place) -> list[str]:
    return nginx(place, "nginx-websocket.conf", backend=place.backends[0])


def main(rounds: int, seconds: float) -> None:
    nginx_too = replace(CONTENDERS["nginx"], command=nginx_command)
    contenders = {each.name: each for each in (CONTENDERS["balancer"], nginx_too, CONTENDERS["caddy"])}
    (port,) = free_ports(1)
    Thread(target=asyncio.run, args=(backend(port),), daemon=True).start()

    def measure(name: str) -> dict[str, float]:
        found = {}
        with started(contenders[name], [port]) as (service, place):
            for about, size in SIZES.items():
                asyncio.run(cost(service, place.port, size, seconds / 4))
                found[about] = asyncio.run(cost(service, place.port, size, seconds))
        return found

    found = medians(rounds, list(contenders), measure)
    print(f"{'us of CPU a round trip':30}" + "".join(f"{about:>12}" for about in SIZES) + f"{'of Caddy':>18}")
    for name, own in found.items():
        ratios = [own[about] / found["caddy"][about] for about in SIZES]
        print(f"{name:30}" + "".join(f"{us:12.0f}" for us in own.values()) + "{:10.2f}{:8.2f}".format(*ratios))


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="default 3")
    parser.add_argument("--seconds", type=at_least(0.1), default=3.0, help="default 3")
    parser.start(main, "nginx", "caddy")
