"""The frontend's messages, read whole: the requests that TorchServe's own reader finds, repeated headers left out."""

from __future__ import annotations

import importlib.util
import socket
import struct
import threading
from collections.abc import Iterator
from types import ModuleType

import pytest
import ts.protocol.otf_message_handler

from handler.transport import Messages


def fresh_copy(module: ModuleType) -> ModuleType:
    """A module as its file has it, whatever was put into the one that all share."""
    spec = importlib.util.spec_from_file_location("copy", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


TORCHSERVES = fresh_copy(ts.protocol.otf_message_handler)
HEADERS = {"Host": "localhost", "content-type": "application/json", "url_path": "v1/completions", "x": "é" * 40}


def field(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


END = struct.pack("!i", -1)


def request(id_: str, headers: dict[str, str] = HEADERS, body: bytes | None = None) -> bytes:
    """One request as the frontend writes it; a body comes the first time only."""
    lines = b"".join(field(name.encode()) + field(value.encode()) for name, value in headers.items())
    inputs = b"" if body is None else field(b"body") + field(b"application/octet-stream") + field(body)
    return field(id_.encode()) + lines + END + inputs + END


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    with ours, theirs:
        yield ours, theirs


def by_torchserve(message: bytes) -> list[dict]:
    """What TorchServe's own code makes of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Thread(target=theirs.sendall, args=(message,)).start()
        return TORCHSERVES._retrieve_inference_msg(ours)


def test_new_requests_are_what_torchserves_own_reader_finds(ends: tuple) -> None:
    bodies = [b"", b'{"prompt": "x"}', bytes(range(256)) * 2000]
    message = b"".join(request(f"id-{i}", body=body) for i, body in enumerate(bodies)) + END
    threading.Thread(target=ends[1].sendall, args=(message,)).start()
    assert Messages().inference(ends[0]) == by_torchserve(message)


def test_a_request_that_is_repeated_has_its_id_and_nothing_else(ends: tuple) -> None:
    messages = Messages()
    rounds = [
        request("a", body=b"text") + request("b", body=b"more") + END,
        request("a") + request("b") + END,
        request("a") + request("b") + END,
        request("b") + request("c", body=b"new") + request("a") + END,
        request("a") + request("c") + END,
        request("a", HEADERS | {"x": "other"}) + END,
    ]
    found = []
    for message in rounds:
        ends[1].sendall(b"I" + message)
        assert messages.retrieve(ends[0], 1) == b"I"
        found.append(messages.inference(ends[0]))
        assert messages._kept == b"", "what was read is not kept, however long nothing else comes"
    assert [[bytes(each["requestId"]).decode() for each in requests] for requests in found] == [
        ["a", "b"],
        ["a", "b"],
        ["a", "b"],
        ["b", "c", "a"],
        ["a", "c"],
        ["a"],
    ]
    assert found[1] == by_torchserve(rounds[1])  # the first time without a body is read in full
    empty = {"headers": [], "parameters": []}
    assert found[3][0] == {"requestId": bytearray(b"b"), **empty} and found[3][2]["headers"] == []
    assert found[3][1] == by_torchserve(rounds[3])[1]
    assert found[4][0]["headers"] == [] and found[4][1] == by_torchserve(rounds[4])[1]
    assert found[5] == by_torchserve(rounds[5])  # other headers under a known id are read


@pytest.mark.parametrize("size", [1, 7, 100])
def test_it_does_not_matter_in_what_pieces_a_message_arrives(ends: tuple, size: int) -> None:
    messages = Messages()
    first = request("a", body=b"text") + request("b") + END
    second = request("a") + request("b") + request("d", body=b"x" * 300) + END

    def trickle() -> None:
        for message in (first, second):
            for start in range(0, len(message), size):
                ends[1].sendall(message[start : start + size])

    threading.Thread(target=trickle).start()
    assert messages.inference(ends[0]) == by_torchserve(first)
    found = messages.inference(ends[0])
    assert [bytes(each["requestId"]) for each in found] == [b"a", b"b", b"d"]
    assert found[2] == by_torchserve(second)[2]


@pytest.mark.parametrize("size", [11, 1 << 20])
def test_a_whole_message_that_is_repeated_is_known_and_one_that_goes_on_is_not(ends: tuple, size: int) -> None:
    messages = Messages()
    both, third = request("a") + request("b"), request("c", body=b"new")
    sent = [request("a", body=b"x") + request("b", body=b"y"), both, both, both, both + third, both + third]
    sent += [both, request("b"), b""]

    def trickle() -> None:
        for message in sent:
            for start in range(0, len(message + END) + 1, size):
                ends[1].sendall((b"I" + message + END)[start : start + size])

    threading.Thread(target=trickle).start()
    found = []
    for _ in sent:
        assert messages.retrieve(ends[0], 1) == b"I"
        found.append(messages.inference(ends[0]))
    ids = [[bytes(each["requestId"]).decode() for each in requests] for requests in found]
    assert ids == [["a", "b"]] * 4 + [["a", "b", "c"]] * 2 + [["a", "b"], ["b"], []]
    repeated = [each for requests in found[2:4] for each in requests]
    assert not any(each["parameters"] for each in repeated)
    assert size < 100 or not any(each["headers"] for each in repeated), "what came in pieces is read anew"
    assert found[4][2] == found[5][2] == by_torchserve(third + END)[0]
    assert messages._kept == b""


def test_a_frontend_that_is_gone_ends_the_worker(ends: tuple) -> None:
    ends[1].sendall(request("a")[:-3])
    ends[1].close()
    with pytest.raises(SystemExit) as ended:
        Messages().inference(ends[0])
    assert ended.value.code == 0
