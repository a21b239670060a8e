"""A backend for the checks of behaviour: slow answers by the thousand, and bodies of any size, never held whole.

GET /delay/<seconds>           answers after that time
GET /download/<bytes>          a body of that many bytes, with Content-Length
GET /download/<bytes>/chunked  the same, chunked
PUT /upload                    reads the body, answers its length and checksum
GET /peak                      the most /delay requests that were open at one time
anything else                  the body that the benchmark's fast backend gives
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import zlib
from collections.abc import AsyncIterator, Iterator

from contenders import BODY
from processes import raise_file_limit

# Odd length and random content: a lost, repeated or swapped piece changes the checksum of the whole.
BLOCK = random.Random(1).randbytes(65521)
READ_SIZE = 1 << 16


def blocks(size: int) -> Iterator[bytes]:
    whole, rest = divmod(size, len(BLOCK))
    for _ in range(whole):
        yield BLOCK
    if rest:
        yield BLOCK[:rest]


class SlowBackend:
    def __init__(self) -> None:
        self._delayed = 0
        self._peak = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await read_head(reader):
                await self._answer(*head, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side went away; there is nobody to tell
        finally:
            writer.close()

    async def _answer(
        self, path: str, headers: dict[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        length, checksum = 0, 0
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        async for piece in read_body(reader, headers):
            length, checksum = length + len(piece), zlib.crc32(piece, checksum)
        match path.strip("/").split("/"):
            case ["delay", seconds]:
                await self._delay(float(seconds))
                write_small(writer, BODY)
            case ["download", size]:
                await write_download(writer, int(size), chunked=False)
            case ["download", size, "chunked"]:
                await write_download(writer, int(size), chunked=True)
            case ["upload"]:
                write_small(writer, json.dumps({"length": length, "checksum": checksum}).encode())
            case ["peak"]:
                write_small(writer, json.dumps(self._peak).encode())
            case _:
                write_small(writer, BODY)
        await writer.drain()

    async def _delay(self, seconds: float) -> None:
        self._delayed += 1
        self._peak = max(self._peak, self._delayed)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._delayed -= 1


async def read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]] | None:
    """The path and the headers of the next request; None when the client has no more."""
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    fields = (line.partition(":") for line in lines[1:] if line)
    return lines[0].split(" ")[1], {name.lower(): value.strip() for name, _, value in fields}


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        async for piece in read_exactly(reader, int(headers.get("content-length", "0"))):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        async for piece in read_exactly(reader, size):
            yield piece
        await reader.readline()
    while (await reader.readline()).strip():
        pass  # trailers


async def read_exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, READ_SIZE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


def write_small(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def write_download(writer: asyncio.StreamWriter, size: int, chunked: bool) -> None:
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n" + framing + b"\r\n\r\n")
    for block in blocks(size):
        writer.write(b"%x\r\n" % len(block) + block + b"\r\n" if chunked else block)
        await writer.drain()
    if chunked:
        writer.write(b"0\r\n\r\n")


async def serve_ports(ports: list[int]) -> None:
    backend = SlowBackend()
    servers = [await asyncio.start_server(backend.serve, "127.0.0.1", port, backlog=4096) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    parser = argparse.ArgumentParser(description="Backend of the benchmark's checks of behaviour.")
    parser.add_argument("ports", type=int, nargs="+")
    raise_file_limit()
    asyncio.run(serve_ports(parser.parse_args().ports))


if __name__ == "__main__":
    main()
