"""A POST over a connection of its own, and its answer piece by piece as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

# What an answer that breaks off, or is none, raises.
BROKEN = (OSError, ValueError, asyncio.IncompleteReadError)


@contextlib.asynccontextmanager
async def posted(port: int, path: str, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """What the answer is read from; who leaves before its end breaks the connection off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        payload = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + payload)
        yield reader
    except BaseException:
        writer.transport.abort()
        raise
    else:
        writer.close()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """The status, and the headers by their names in lower case."""
    line = await reader.readline()
    if not line:
        raise ConnectionError("the connection was closed without an answer")
    _, status, *_ = line.split()
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return int(status), headers


async def read_pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body's chunks, or all of it where it has none."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        length = headers.get("content-length")
        yield await (reader.read() if length is None else reader.readexactly(int(length)))
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
