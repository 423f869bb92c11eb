"""300 malformed bodies among 16 good streams: each is refused with a 4xx, none hangs, and no stream notices."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import requests
from service import LENGTH, SEQ_LEN, SHARED, Service, reference, text_of, wait_until

from demo import world
from engine.sequence import SamplingParams
from generate import Request

pytest_plugins = ("service",)
pytestmark = SHARED

MALFORMED = 300
GOOD = 16
SEED = 20260731
HANG_S = 10.0  # what is refused takes milliseconds

NATIVE, COMPLETIONS, CHAT = "", "v1/completions", "v1/chat/completions"
TOKENIZE, DETOKENIZE = "v1/tokenize", "v1/detokenize"
PREDICT, INFER = "v1/models/llama:predict", "v2/models/llama/infer"
MESSAGES = [{"role": "user", "content": "Hello!"}]
# A good body for every endpoint, of which something is then spoilt.
GOOD_BODIES: dict[str, dict[str, Any]] = {
    NATIVE: {"prompt": "Once upon a time"},
    COMPLETIONS: {"model": "llama", "prompt": "Once upon a time"},
    CHAT: {"model": "llama", "messages": MESSAGES},
    TOKENIZE: {"prompt": "Once upon a time"},
    DETOKENIZE: {"tokens": [1, 5, 6]},
    PREDICT: {"instances": ["Once upon a time"]},
    INFER: {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["Once upon a time"]}]},
}
GENERATING = (NATIVE, COMPLETIONS, CHAT)
JSON = "application/json"


@dataclass(frozen=True)
class Malformed:
    """A request that cannot be understood, and why."""

    why: str
    path: str
    body: bytes
    content_type: str | None = JSON


def encoded(value: Any) -> bytes:
    """As JSON, with the constants that JSON does not have."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


# Values that fit none of the named options.
WRONG_TYPES: tuple[Any, ...] = ({}, [], [[]], {"a": 1}, "x", "1", "", [None], [1.5], ["a", 1])
NUMERIC = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed", "n")
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "temperature": (-1, -1e-9, 1e300, -(10**19)),
    "top_p": (-0.1, 1.1, 7, 1e18),
    "top_k": (-2, 1.5, -(10**18)),
    "min_p": (-0.5, 1.01, 2),
    "repetition_penalty": (0, -1, 1e300),
    "presence_penalty": (-5, 1e9),
    "frequency_penalty": (-5, 1e9),
    "seed": (10**19, 1.5, -(10**19)),
    "n": (0, -1, 9, 2.0, 10**18),
    "max_tokens": (0, -1, 1.5, -(10**18)),
    "stop": ("", [""], ["a"] * 5, "x" * 257),
    "logit_bias": ({"-1": 0}, {"x": 0}, {"99999": 0}, {"5": "a"}, {"٣": 1}, {str(i): 0 for i in range(301)}),
    "stop_token_ids": ([-1], [10**9], [1.5], list(range(65)), ["a"]),
}


def wrong_type(rng: random.Random) -> Malformed:
    path = rng.choice(GENERATING)
    name = rng.choice((*NUMERIC, "stream", "logprobs", "max_tokens"))
    value = rng.choice(WRONG_TYPES if name != "logprobs" or path != CHAT else (1, "true", [], {}))
    return Malformed(f"type of {name}", path, encoded(GOOD_BODIES[path] | {name: value}))


def out_of_range(rng: random.Random) -> Malformed:
    path, name = rng.choice(GENERATING), rng.choice(list(OUT_OF_RANGE))
    return Malformed(f"range of {name}", path, encoded(GOOD_BODIES[path] | {name: rng.choice(OUT_OF_RANGE[name])}))


def not_finite(rng: random.Random) -> Malformed:
    path, name = rng.choice(GENERATING), rng.choice(NUMERIC)
    number = rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "-1e400", "9" * 400, "1" + "0" * 5000))
    body = encoded(GOOD_BODIES[path])[:-1] + f', "{name}": {number}}}'.encode()
    return Malformed(f"{name} {number[:9]}", path, body)


def too_deep(rng: random.Random) -> Malformed:
    path, depth = rng.choice(list(GOOD_BODIES)), rng.choice((33, 100, 5000, 200_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    inner = opening * depth + "1" + closing * depth * rng.randint(0, 1)
    return Malformed(f"depth {depth}", path, f'{{"prompt": {inner}}}'.encode())


def too_large(rng: random.Random) -> Malformed:
    path, size = rng.choice(list(GOOD_BODIES)), rng.choice(((1 << 20) + 1, 1_500_000))
    return Malformed(f"size {size}", path, b'{"prompt": "' + b"x" * (size - 14) + b'"}')


def too_long(rng: random.Random) -> Malformed:
    path, body = rng.choice(
        (
            (NATIVE, {"prompt": [7] * SEQ_LEN}),
            (NATIVE, {"prompt": "word " * rng.randint(SEQ_LEN, 50_000)}),
            (COMPLETIONS, {"prompt": ["good", [5] * (SEQ_LEN + 1)]}),
            (COMPLETIONS, {"prompt": ["a"] * 65}),
            (CHAT, {"messages": [{"role": "user", "content": "word " * SEQ_LEN}]}),
            (CHAT, {"messages": MESSAGES * 2000}),
            (PREDICT, {"instances": ["a"] * 65}),
        )
    )
    return Malformed("too long", path, encoded(body))


def broken_json(rng: random.Random) -> Malformed:
    path = rng.choice(list(GOOD_BODIES))
    good = encoded(GOOD_BODIES[path])
    ways = (
        good[: rng.randrange(1, len(good))],
        good + rng.choice((b"}", b",", b"x", good)),
        good.replace(b'"', b"'"),
        good.replace(b":", b"=", 1),
        good[:-1] + b",}",
        b"[" + good,
        b"{" + good,
        good.replace(b'"', b'"\x01', 1),
        good[:-1] + rng.choice((b', "n": 01}', b', "n": +1}', b', "n": 0x1}', b', "n": tru}', b', "n": .5}')),
    )
    return Malformed("broken JSON", path, rng.choice(ways))


def wrong_encoding(rng: random.Random) -> Malformed:
    path = rng.choice(list(GOOD_BODIES))
    text = json.dumps(GOOD_BODIES[path] | {"user": "é"}, ensure_ascii=False)
    body, charset = rng.choice(
        (
            (text.encode("utf-16"), "utf-16"),
            (text.encode("utf-16-be"), "utf-16be"),
            (text.encode("utf-32"), "utf-32"),
            (text.encode("latin-1"), "latin-1"),
            (text.replace("é", "\udc80").encode("utf-8", "surrogatepass"), "utf-8"),
            (text.replace("é", "\\ud800").encode(), "utf-8"),
            (b"\xc0\xaf" + text.encode(), "utf-8"),
            (text.encode().replace(b"\xc3\xa9", b"\xf4\x90\x80\x80"), "utf-8"),
        )
    )
    return Malformed(f"encoding {charset}", path, body, f"{JSON}; charset={charset}")


def wrong_dialog(rng: random.Random) -> Malformed:
    messages = rng.choice(
        (
            [{"role": "robot", "content": "x"}],
            [{"role": "USER", "content": "x"}],
            [{"role": ["user"], "content": "x"}],
            [{"role": "user"}],
            [{"content": "x"}],
            [{"role": "user", "content": None}],
            [{"role": "user", "content": 5}],
            [{"role": "user", "content": {"text": "x"}}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            [{"role": "user", "content": [{"type": "text", "text": 7}]}],
            [{"role": "user", "content": "x", "tool_calls": [{}]}],
            [{"role": "tool", "content": "x"}],
            [{"role": "assistant", "content": "x"}],
            [{"role": "system", "content": "x"}],
            [*MESSAGES, *MESSAGES],
            [*MESSAGES, {"role": "assistant", "content": "x"}],
            [*MESSAGES, {"role": "system", "content": "x"}, *MESSAGES],
            [],
            {},
            "Hello!",
            ["Hello!"],
            [None],
            [MESSAGES],
            7,
            None,
        )
    )
    # Several dialogs, as a list of lists, are fine there.
    native = messages != [MESSAGES] and rng.random() < 0.5
    return Malformed("dialog", NATIVE if native else CHAT, encoded({"dialog" if native else "messages": messages}))


def wrong_prompt(rng: random.Random) -> Malformed:
    prompt = rng.choice(
        ([], [[]], [1, "a"], [-1], [10**6], [1.0], [True], [None], {}, 5, True, None, [["a"]], [[1], "a"], [[[1]]])
    )
    return Malformed("prompt", rng.choice((NATIVE, COMPLETIONS, TOKENIZE)), encoded({"prompt": prompt}))


def wrong_option(rng: random.Random) -> Malformed:
    path = rng.choice(list(GOOD_BODIES))
    name = rng.choice(("temprature", "max_token", "__class__", "Prompt", "é", "", "x" * 5000, "a\nb", "{}", "%s"))
    return Malformed("unknown option", path, encoded(GOOD_BODIES[path] | {name: rng.choice((1, "a", [1], True))}))


def wrong_kserve(rng: random.Random) -> Malformed:
    tensor = GOOD_BODIES[INFER]["inputs"][0]
    path, body = rng.choice(
        (
            (PREDICT, {"instances": rng.choice(([], {}, "a", 5, None, [5], [None], [{}], [["a"]]))}),
            (PREDICT, {"instances": [{"prompt": "a", "n": 2}]}),
            (PREDICT, {"instances": ["a", {"dialog": MESSAGES}], "parameters": {"mode": "text_completion"}}),
            (PREDICT, {"instances": ["a"], "parameters": rng.choice(([], 5, {"x": 1}, {"temperature": "hot"}))}),
            (INFER, {"inputs": rng.choice(([], {}, "a", [5], [tensor, tensor], [{}]))}),
            (INFER, {"inputs": [tensor | {"shape": rng.choice(([2], [0], [-1], ["1"], [10**19] * 30, 1))}]}),
            (INFER, {"inputs": [tensor | {"datatype": rng.choice(("FP32", "bytes", 5, None))}]}),
            (INFER, {"inputs": [tensor | {"data": rng.choice(([], [5], "a", None, [[]], {}))}]}),
            (INFER, {"inputs": [tensor], "outputs": rng.choice((["text"], [{"name": "x"}], [{}], 5))}),
            (INFER, {"inputs": [tensor], "id": rng.choice((5, [], "x" * 300))}),
        )
    )
    return Malformed("KServe", path, encoded(body))


def not_an_object(rng: random.Random) -> Malformed:
    path = rng.choice([path for path in GOOD_BODIES if path])
    body = rng.choice(
        (b"", b" ", b"null", b"true", b"5", b'"text"', b"[]", b"[[]]", b"Hello!", b"\xef\xbb\xbf", b"<a/>")
    )
    return Malformed("no object", path, body, rng.choice((JSON, "text/plain", "application/xml", "image/png", None)))


def raw_bytes(rng: random.Random) -> Malformed:
    # 0xff stands nowhere in UTF-8, so this can never be a text.
    body = b"\xff" + rng.randbytes(rng.randrange(2000))
    types = (JSON, "text/plain", "application/octet-stream", "application/json; charset=nope", ";;;", "a" * 2000, None)
    return Malformed("raw bytes", rng.choice(list(GOOD_BODIES)), body, rng.choice(types))


def wrong_form(rng: random.Random) -> Malformed:
    # Not among them: a form with a broken percent escape ("a=%zz") or without a name ("&&="). TorchServe's own
    # decoder fails on those, and it answers 500 before any code of ours is called.
    urlencoded, multipart = "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"
    part = 'Content-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
    body, content_type = rng.choice(
        (
            (encoded(GOOD_BODIES[CHAT]), urlencoded),
            (b"prompt=Hello&temperature=hot", urlencoded),
            (b"prompt=Hello&foo=1", urlencoded),
            (b"prompt=Hello&stream=perhaps", urlencoded),
            (b"foo=1&bar=2", urlencoded),
            (b"data={", urlencoded),
            (encoded(GOOD_BODIES[CHAT]), multipart),
            (b"--x\r\n" + part.format("prompt", "Hello").encode(), multipart),  # without its end
            (b"--x\r\n" + part.format("foo", "Hello").encode() + b"--x--\r\n", multipart),
            (b"", multipart),
        )
    )
    return Malformed("form", rng.choice((NATIVE, CHAT)), body, content_type)


def wrong_route(rng: random.Random) -> Malformed:
    routes = (
        "v1/chat",
        "v1/completions/x",
        "v1/models/gpt:predict",
        "v2/models/gpt/infer",
        "v9",
        "%00",
        "v1/%ff",
        "x" * 900,
    )
    return Malformed("route", rng.choice(routes), encoded(GOOD_BODIES[CHAT]))


KINDS: tuple[Callable[[random.Random], Malformed], ...] = (
    wrong_type,
    out_of_range,
    not_finite,
    too_deep,
    too_large,
    too_long,
    broken_json,
    wrong_encoding,
    wrong_dialog,
    wrong_prompt,
    wrong_option,
    wrong_kserve,
    not_an_object,
    raw_bytes,
    wrong_form,
    wrong_route,
)


def malformed(count: int, seed: int) -> list[Malformed]:
    """As many of each kind, in any order; the same for the same seed."""
    rng = random.Random(seed)
    bodies = [KINDS[number % len(KINDS)](rng) for number in range(count)]
    rng.shuffle(bodies)
    return bodies


def fire(service: Service, request: Malformed) -> requests.Response | Exception:
    """What comes of it; a hang ends as an exception."""
    headers = {} if request.content_type is None else {"Content-Type": request.content_type}
    try:
        return service.post(request.body, request.path, headers=headers, timeout=HANG_S)
    except requests.RequestException as error:
        return error


def refused(answer: requests.Response | Exception) -> bool:
    """Whether it is a 4xx that says why."""
    if isinstance(answer, Exception) or not 400 <= answer.status_code < 500:
        return False
    error = answer.json().get("error")
    # TorchServe has its own form for what it refuses by itself, such as a version of the model that is not there.
    return bool(error["message"] if error else answer.json()["message"])


@pytest.fixture(scope="module")
def stories(service: Service) -> dict[str, str]:
    """Prompts for 16 streams, with what the engine makes of them without any server."""
    prompts = [question.prompt for question in world.questions("story", GOOD)]
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH)
    completions = reference(service.record.checkpoint, [Request(prompt=prompt, params=params) for prompt in prompts])
    return {prompt: completion.text for prompt, completion in zip(prompts, completions, strict=True)}


class Streams:
    """Good streams, each of which begins again whenever it ends, until they are told to stop."""

    def __init__(self, service: Service, prompts: list[str]) -> None:
        self.texts: dict[str, list[str]] = {prompt: [] for prompt in prompts}
        self.failed: list[BaseException] = []
        self._service, self._stop = service, threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(prompt,)) for prompt in prompts]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _stream(self, prompt: str) -> None:
        try:
            while not self._stop.is_set():
                body = {"prompt": prompt, "temperature": 0, "max_new_tokens": LENGTH}
                self.texts[prompt].append(text_of(self._service.post(body)))
        except BaseException as error:
            self.failed.append(error)


def test_300_malformed_bodies_among_16_good_streams_are_refused_and_disturb_nobody(
    service: Service, stories: dict[str, str]
) -> None:
    bodies = malformed(MALFORMED, SEED)
    assert len(bodies) == MALFORMED and bodies == malformed(MALFORMED, SEED)
    with Streams(service, list(stories)) as streams:
        # All of them are on their way before the first malformed one is.
        wait_until(lambda: service.metrics().get("llama_requests_running", 0) >= GOOD / 2, 10, "the streams run")
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda body: fire(service, body), bodies))
    wrong = [
        (body.why, body.path, body.body[:80], body.content_type, getattr(answer, "status_code", answer))
        for body, answer in zip(bodies, answers, strict=True)
        if not refused(answer)
    ]
    assert not wrong
    assert not streams.failed
    assert all(set(texts) == {stories[prompt]} for prompt, texts in streams.texts.items())
    assert service.has_room() and len(service.processes()) >= 3


def test_the_good_bodies_are_good(service: Service) -> None:
    # Else what was spoilt would not be why they are refused.
    for path, body in GOOD_BODIES.items():
        assert service.post(body, path).status_code == 200, path


RAW = {
    "no HTTP at all": b"\x00\xff\x13\x37\r\n\r\n",
    "the beginning of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60) + b"\r\n\r\n",
    "a length that is no number": b"POST /predictions/llama HTTP/1.1\r\nHost: a\r\nContent-Length: abc\r\n\r\n",
    "a chunk that is none": b"POST /predictions/llama HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "a version that is none": b"POST /predictions/llama HTTP/9.9\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "an endless line": b"POST /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "a header that is too large": b"GET /ping HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 9000 + b"\r\n\r\n",
}


@pytest.fixture
def connection(service: Service) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port), timeout=HANG_S) as connection:
        yield connection


@pytest.mark.parametrize("sent", RAW.values(), ids=RAW)
def test_what_is_no_http_is_refused(service: Service, connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)
    assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_never_finishes_its_body_holds_nobody_up(service: Service, connection: socket.socket) -> None:
    connection.sendall(b"POST /predictions/llama HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
    assert service.has_room()
