"""The tools' HTTP client, against servers that break off."""

import asyncio

import pytest

from tools.bench_load import Ask, Target
from tools.bench_load import ask as bench_ask
from tools.stress import post

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _against(said: bytes, client):
    """What a client makes of a server that says this and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        return await client(server.sockets[0].getsockname()[1])


@pytest.mark.parametrize(
    ("said", "outcome", "text"),
    [
        (HEAD + b"4\r\nhalf\r\n0\r\n\r\n", "200", b"half"),
        (HEAD + b"4\r\nhalf\r\n", "200 broken", b"half"),
        (HEAD + b"4\r\nhalf\r\n10\r\nanother", "200 broken", b"half"),
        (HEAD + b"4\r\nhalf\r\n1", "200 broken", b"half"),
        (b"HTTP/1.1 429 Full\r\nContent-Length: 4\r\n\r\nfull", "429", b"full"),
        (b"HTTP/1.1 429 Full\r\nContent-Length: 9\r\n\r\nfull", "429 broken", b""),
        (b"HTTP/1.1", "0 broken", b""),
        (b"", "0 broken", b""),
    ],
)
def test_an_answer_that_breaks_off_is_one_that_is_not_complete(said, outcome, text):
    answer = asyncio.run(_against(said, lambda port: post(port, {"prompt": "Hello"})))
    assert (answer.outcome, bytes(answer.text)) == (outcome, text)


@pytest.mark.parametrize("said", [HEAD + b"10\r\nhalf", HEAD + b"x\r\n", b"", b"HTTP/1.1 500 No\r\n\r\nsorry"])
def test_a_benchmark_says_what_went_wrong(said):
    seen = asyncio.run(_against(said, lambda port: bench_ask(Target("here", port, "/", 1), Ask([1], 1))))
    assert seen.error and seen.ended
