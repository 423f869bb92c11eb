"""What clients get: OpenAI's shapes by OpenAI's own types and client, streams that add up to the whole, errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from tokenizer_fixture import train_tokenizer

from engine.config import RequestError
from engine.sequence import FinishReason, TokenLogprobs
from handler.generation import Generation, Service
from handler.openai_format import EchoedPrompt, _TokenList, token_text
from handler.protocol import understand
from handler.responses import Choice, Piece, Reply, Usage, error_reply, to_json
from llama2_tokenizer import Tokenizer
from tokenizing import StreamDecoder

COMPLETIONS, CHAT = "v1/completions", "v1/chat/completions"
USER = {"role": "user", "content": "Hello there"}
TEXT = "I am fine 😀 naïve, thank you."
INFINITE = float("-inf")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    tokenizer = Tokenizer(train_tokenizer(tmp_path_factory.mktemp("responses") / "tokenizer.model"))
    return Service(tokenizer, "llama", 512, tokenizer.vocab_size, 1_700_000_000, {"max_new_tokens": 64})


def ask(service: Service, path: str, body: dict[str, Any]) -> Generation:
    request = understand(path, "application/json", json.dumps(body).encode(), service)
    assert isinstance(request, Generation)
    return request


def logprobs_of(ids: tuple[int, ...], top: int) -> tuple[TokenLogprobs, ...]:
    """Made up: the likeliest are ids near the token, which itself is there only when `top` is large."""
    return tuple(
        TokenLogprobs(id, -1.5 - id / 8, tuple(((id + k) % 256 + 3, -0.5 - k / 4) for k in range(1, top + 1)))
        for id in ids
    )


class Answers:
    """Answers to a request, as the engine would give them token by token: each choice says TEXT and stops."""

    def __init__(self, service: Service, request: Generation, text: str = TEXT, reason: str = "stop") -> None:
        self.tokenizer, self.request, self.reason = service.tokenizer, request, reason
        ids = tuple(self.tokenizer.encode(text, bos=False, eos=reason == "stop"))
        self.ids = () if request.params.max_tokens == 0 else ids
        self.count = len(request.prompts) * request.n
        self.usage = Usage(sum(map(len, request.prompts)), len(self.ids) * self.count)

    def prompt_logprobs(self, choice: int) -> tuple[TokenLogprobs, ...] | None:
        top = self.request.params.prompt_logprobs
        return None if top is None else logprobs_of(self.request.prompts[choice // self.request.n][1:], top)

    def pieces(self, choice: int) -> Iterator[Piece]:
        decoder = StreamDecoder(self.tokenizer, self.request.stop, strip_leading_space=self.request.chat)
        top = self.request.params.logprobs
        for position, id in enumerate(self.ids):
            text = "" if id == self.tokenizer.eos_id else decoder.push(id)
            last = decoder.stopped or position == len(self.ids) - 1
            text += decoder.finish() if last else ""
            reason = ("stop" if decoder.stopped else self.reason) if last else None
            yield Piece(choice, text, (id,), () if top is None else logprobs_of((id,), top), reason)
            if last:
                return
        yield Piece(choice, "", (), (), FinishReason.LENGTH)

    def choices(self) -> list[Choice]:
        done = []
        for choice in range(self.count):
            pieces = list(self.pieces(choice))
            logprobs = tuple(logprob for piece in pieces for logprob in piece.logprobs)
            done.append(
                Choice(
                    "".join(piece.text for piece in pieces),
                    tuple(id for piece in pieces for id in piece.ids),
                    None if self.request.params.logprobs is None else logprobs,
                    self.prompt_logprobs(choice),
                    pieces[-1].finish_reason,
                )
            )
        return done

    def whole(self) -> bytes:
        return self.request.renderer.whole(self.choices(), self.usage)

    def stream(self) -> bytes:
        """All choices, one token of each in turn."""
        renderer = self.request.renderer
        out, running = b"", [self.pieces(choice) for choice in range(self.count)]
        for choice in range(self.count):
            out += renderer.begin(choice, self.prompt_logprobs(choice))
        while running:
            for pieces in list(running):
                piece = next(pieces)
                out += renderer.piece(piece)
                if piece.finish_reason is not None:
                    running.remove(pieces)
        return out + renderer.end(self.usage)


def served(service: Service, path: str, body: dict[str, Any], **answer: Any) -> bytes:
    answers = Answers(service, ask(service, path, body), **answer)
    return answers.stream() if answers.request.stream else answers.whole()


def events(stream: bytes) -> list[dict[str, Any]]:
    """The values of a stream of server-sent events, which must end with the end mark."""
    *parts, done, rest = stream.decode().split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def lines(stream: bytes) -> list[dict[str, Any]]:
    assert stream.endswith(b"\n")
    return [json.loads(line) for line in stream.decode().splitlines()]


def nothing_extra(model: object) -> None:
    """Every member is one that OpenAI has."""
    if isinstance(model, BaseModel):
        assert not model.model_extra, model
        for name in type(model).model_fields:
            nothing_extra(getattr(model, name))
    elif isinstance(model, list):
        for item in model:
            nothing_extra(item)


def valid(kind: type[BaseModel], value: dict[str, Any]) -> Any:
    model = kind.model_validate_json(json.dumps(value), strict=True)
    nothing_extra(model)
    return model


# Completions


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("n", [1, 2])
def test_a_completion_is_what_openai_calls_one(service: Service, n: int, logprobs: int | None) -> None:
    body = {"prompt": ["Hello", "STOP"], "n": n, "logprobs": logprobs}
    completion = valid(Completion, json.loads(served(service, COMPLETIONS, body)))
    assert completion.id.startswith("cmpl-") and completion.model == "llama" and completion.created > 1_700_000_000
    assert [choice.index for choice in completion.choices] == list(range(2 * n))
    assert {(choice.text, choice.finish_reason) for choice in completion.choices} == {(" " + TEXT, "stop")}
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    for choice in completion.choices:
        if logprobs is None:
            assert choice.logprobs is None
            continue
        found = choice.logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
        for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
            assert token in top and (logprobs or top[token] == logprob)
            assert 1 <= len(top) <= logprobs + 1


def test_tokens_stand_where_their_offsets_say(service: Service) -> None:
    body = {"prompt": "Hello there 😀 é", "logprobs": 1, "echo": True}
    for text in (TEXT, "😀é", "STOP"):
        (choice,) = json.loads(served(service, COMPLETIONS, body, text=text))["choices"]
        assert choice["text"] == "Hello there 😀 é " + text
        found = choice["logprobs"]
        assert found["text_offset"] == sorted(found["text_offset"]) and found["text_offset"][-1] == len(choice["text"])
        whole_tokens = 0
        for position, (token, offset) in enumerate(zip(found["tokens"], found["text_offset"], strict=True)):
            if not token.startswith("bytes:") and token not in ("<s>", "</s>"):
                # The first token has the space that the tokenizer puts before a text.
                expected = token.removeprefix(" ") if position == 1 else token
                assert choice["text"][offset : offset + len(expected)] == expected
                whole_tokens += 1
        assert whole_tokens > 5
        assert found["tokens"][0] == "<s>" and found["tokens"][-1] == "</s>"
        assert [token for token in found["tokens"] if token.startswith("bytes:")][:2] == ["bytes:\\xf0", "bytes:\\x9f"]


def test_offsets_count_what_a_character_without_an_end_became(service: Service) -> None:
    tokens = _TokenList(service.tokenizer)
    tokens.add(TokenLogprobs(3 + byte, -1.0, ()) for byte in b"a\xf0\x9fb\xc3\xa9c")  # 3 is <0x00>
    # a, half of a character, b, a whole one, c
    assert tokens.take(final=False)["text_offset"] == [0, 1, 1, 2, 3, 3, 4]
    # What a prompt's last tokens began counts with the prompt: the answer's text begins anew.
    tokens = _TokenList(service.tokenizer)
    tokens.add_prompt(EchoedPrompt("a\ufffd", tuple(3 + byte for byte in b"a\xf0\x9f")), ())
    tokens.add([TokenLogprobs(3 + byte, -1.0, ()) for byte in b"bc"])
    assert tokens.take(final=False)["text_offset"] == [0, 1, 1, 2, 3]


def test_of_two_tokens_that_read_the_same_the_likelier_one_stays(service: Service) -> None:
    tokens = _TokenList(service.tokenizer)
    byte, piece = 3 + ord("a"), service.tokenizer.encode("ba", bos=False, eos=False)[-1]
    assert byte != piece and token_text(service.tokenizer, byte) == token_text(service.tokenizer, piece) == "a"
    tokens.add([TokenLogprobs(byte, -3.0, ((piece, -0.5), (byte, -3.0)))])
    tokens.add([TokenLogprobs(byte, -3.0, ((piece, -0.5),))])
    found = tokens.take(final=False)
    assert found["token_logprobs"] == [-3.0, -3.0] and found["top_logprobs"] == [{"a": -0.5}] * 2


def test_echo_gives_the_prompt_and_its_logprobs(service: Service) -> None:
    body = {"prompt": ["Hello", "STOP"], "echo": True, "logprobs": 2, "max_tokens": 0, "n": 2}
    for stream in (False, True):
        raw = served(service, COMPLETIONS, body | {"stream": stream})
        found = merged_completions(events(raw)) if stream else json.loads(raw)["choices"]
        assert [choice["text"] for choice in found] == ["Hello", "Hello", "STOP", "STOP"]
        for choice, text in zip(found, ("Hello", "Hello", "STOP", "STOP"), strict=True):
            ids = service.tokenizer.encode(text, bos=True, eos=False)
            assert choice["logprobs"]["tokens"] == [token_text(service.tokenizer, id) for id in ids]
            assert choice["logprobs"]["token_logprobs"] == [None, *[-1.5 - id / 8 for id in ids[1:]]]
            assert choice["logprobs"]["top_logprobs"][0] is None
            assert choice["logprobs"]["text_offset"][:2] == [0, 0]
            assert choice["finish_reason"] == "length"
    plain = json.loads(served(service, COMPLETIONS, {"prompt": "Hello", "echo": True}))["choices"][0]
    assert plain["text"] == "Hello " + TEXT and plain["logprobs"] is None
    ids = service.tokenizer.encode("Hello", bos=True, eos=False)
    plain = json.loads(served(service, COMPLETIONS, {"prompt": ids, "echo": True}))["choices"][0]
    assert plain["text"] == "Hello " + TEXT


def merged_completions(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that the chunks of a completion add up to."""
    merged: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            known = merged.setdefault(choice["index"], {"index": choice["index"], "text": "", "logprobs": None})
            assert known.get("finish_reason") is None, "nothing follows the end"
            known["text"] += choice["text"]
            known["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"] is not None:
                lists = known["logprobs"] or {name: [] for name in choice["logprobs"]}
                known["logprobs"] = {name: lists[name] + values for name, values in choice["logprobs"].items()}
    return [merged[index] for index in sorted(merged)]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 3])
@pytest.mark.parametrize("stop", [None, "ïve", "fine"])
def test_a_streamed_completion_adds_up_to_the_whole(
    service: Service, echo: bool, logprobs: int | None, stop: str | None
) -> None:
    body = {"prompt": ["Hello", "STOP"], "n": 2, "echo": echo, "logprobs": logprobs, "stop": stop}
    whole = json.loads(served(service, COMPLETIONS, body))
    chunks = events(served(service, COMPLETIONS, body | {"stream": True}))
    assert merged_completions(chunks) == whole["choices"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for choice in whole["choices"]:
        assert choice["text"].endswith((stop and TEXT.partition(stop)[0]) or TEXT)
        assert logprobs is None or max(choice["logprobs"]["text_offset"]) <= len(choice["text"])
    if not echo:
        for chunk in chunks:
            nothing_extra(Completion.model_validate(chunk | {"choices": []}, strict=True))


def test_usage_comes_in_a_last_chunk_without_choices_when_asked_for(service: Service) -> None:
    for path, prompt in ((COMPLETIONS, {"prompt": "Hello"}), (CHAT, {"messages": [USER]})):
        body = prompt | {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = events(served(service, path, body))
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
        whole = json.loads(served(service, path, prompt))
        assert last["choices"] == [] and last["usage"] == whole["usage"]


def test_tokens_that_were_in_the_cache_stand_where_each_api_has_them(service: Service) -> None:
    counts, usage = {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}, Usage(20, 3, 16)
    details = counts | {"prompt_tokens_details": {"cached_tokens": 16}}
    for path, prompt in ((COMPLETIONS, {"prompt": "Hello"}), (CHAT, {"messages": [USER]})):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        assert json.loads(ask(service, path, prompt).renderer.whole([], usage))["usage"] == details
        assert details in [event["usage"] for event in events(ask(service, path, prompt | options).renderer.end(usage))]
    native = ask(service, "", {"prompt": "Hello"}).renderer.end(usage)
    assert lines(native)[0]["usage"] == counts | {"cached_tokens": 16}


# Chat


@pytest.mark.parametrize("top", [None, 0, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_a_chat_completion_is_what_openai_calls_one(service: Service, n: int, top: int | None) -> None:
    body = {"messages": [USER], "n": n, "logprobs": top is not None, "top_logprobs": top}
    completion = valid(ChatCompletion, json.loads(served(service, CHAT, body)))
    assert completion.id.startswith("chatcmpl-")
    assert [choice.index for choice in completion.choices] == list(range(n))
    for choice in completion.choices:
        assert choice.message.content == TEXT and choice.message.role == "assistant" and choice.finish_reason == "stop"
        if top is None:
            assert choice.logprobs is None
            continue
        data = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert data.decode() == " " + TEXT
        assert all(len(token.top_logprobs) == top for token in choice.logprobs.content)
        assert choice.logprobs.content[-1].token == "</s>" and choice.logprobs.content[-1].bytes is None


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("stop", [None, ["thank"], ["I"]])
def test_a_streamed_chat_adds_up_to_the_whole(service: Service, top: int | None, stop: list[str] | None) -> None:
    body = {"messages": [USER], "n": 2, "logprobs": top is not None, "top_logprobs": top, "stop": stop}
    whole = json.loads(served(service, CHAT, body))["choices"]
    chunks = [valid(ChatCompletionChunk, chunk) for chunk in events(served(service, CHAT, body | {"stream": True}))]
    for index, choice in enumerate(whole):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert (parts[0].delta.role, parts[0].delta.content) == ("assistant", "")
        assert all(part.delta.role is None for part in parts[1:])
        assert "".join(part.delta.content or "" for part in parts) == choice["message"]["content"]
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        if top is not None:
            tokens = [token.model_dump() for part in parts if part.logprobs for token in part.logprobs.content]
            assert tokens == choice["logprobs"]["content"]
    assert whole[0]["message"]["content"] == (TEXT.partition(stop[0])[0] if stop else TEXT)


def test_a_step_without_news_sends_nothing(service: Service) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]})):
        renderer = ask(service, path, body | {"stream": True}).renderer
        assert renderer.piece(Piece(0, "", (5,), logprobs_of((5,), 1), None)) == b""
    native = ask(service, "", {"prompt": "a"}).renderer
    assert native.begin(0, None) == b"" and native.piece(Piece(0, "", (), (), None)) == b""


# The model's own endpoint


def test_a_native_stream_is_lines_of_json_with_the_end_in_the_last(service: Service) -> None:
    *parts, last = lines(served(service, "", {"prompt": "Hello"}))
    assert all(part.keys() == {"text", "ids"} for part in parts)
    assert last.keys() == {"text", "ids", "finish_reason", "usage"} and last["finish_reason"] == "stop"
    whole = json.loads(served(service, "", {"prompt": "Hello", "stream": False}))
    assert whole.keys() == last.keys()
    assert "".join(part["text"] for part in [*parts, last]) == whole["text"] == " " + TEXT
    assert [id for part in [*parts, last] for id in part["ids"]] == whole["ids"]
    assert last["usage"] == whole["usage"]


def test_several_native_choices_are_told_apart_by_their_number(service: Service) -> None:
    body = {"dialog": [[USER], [USER]], "n": 2, "logprobs": 2, "prompt_logprobs": 1}
    whole = json.loads(served(service, "", body | {"stream": False}))
    found = lines(served(service, "", body))
    assert [choice["choice"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [("usage" in line) for line in found] == [False] * (len(found) - 1) + [True]
    assert found[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [line for line in found if line["choice"] == choice["choice"]]
        assert "".join(part["text"] for part in parts) == choice["text"] == TEXT
        for name in ("ids", "logprobs"):
            assert [item for part in parts for item in part.get(name, [])] == choice[name]
        assert [part["prompt_logprobs"] for part in parts if "prompt_logprobs" in part] == [choice["prompt_logprobs"]]
        assert choice["prompt_logprobs"][0] is None and len(choice["logprobs"][0]["top"]) == 2
        assert [part.get("finish_reason") for part in parts] == [None] * (len(parts) - 1) + ["stop"]


def test_a_native_stream_that_fails_loses_nothing(service: Service) -> None:
    renderer = ask(service, "", {"prompt": "Hello"}).renderer
    assert renderer.piece(Piece(0, "end", (5,), (), "stop")) == b""
    last, error = lines(renderer.error(RequestError("the engine stopped", status=500)))
    assert (last["text"], last["ids"]) == ("end", [5])
    assert error["error"]["type"] == "server_error"
    assert lines(renderer.end(Usage(1, 2)))[0]["usage"]["total_tokens"] == 3


@pytest.mark.parametrize("stream", [True, False])
def test_an_openai_answer_that_fails_late_ends_as_it_would_have_come(service: Service, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    renderer = ask(service, "v1/chat/completions", body).renderer
    error = RequestError("no complete answer", status=504)
    text = renderer.error(error).decode()
    if stream:
        assert text.startswith("data: ") and text.endswith("\n\ndata: [DONE]\n\n")
        text = text.removeprefix("data: ").removesuffix("\n\ndata: [DONE]\n\n")
    assert json.loads(text) == json.loads(error_reply(error).body)


# KServe


def test_kserve_gets_predictions_and_tensors(service: Service) -> None:
    assert json.loads(served(service, "", {"instances": ["a", "b"]})) == {"predictions": [" " + TEXT] * 2}
    tensor = {"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
    answer = json.loads(served(service, "v2/models/llama/infer", {"id": "7", "inputs": [tensor]}))
    assert (answer["id"], answer["model_name"]) == ("7", "llama")
    texts = {"name": "text", "shape": [2], "datatype": "BYTES", "data": [" " + TEXT] * 2}
    assert answer["outputs"] == [texts]
    outputs = [{"name": "finish_reason"}, {"name": "text"}]
    answer = json.loads(served(service, "", {"inputs": [tensor], "outputs": outputs}))
    assert "id" not in answer and answer["outputs"][1] == texts and answer["outputs"][0]["data"] == ["stop", "stop"]
    assert answer["parameters"]["completion_tokens"] > 0


# JSON


def test_json_is_one_line_of_utf_8_however_clients_cut_lines() -> None:
    text = "a\u2028b\u2029c\x85d\ne\rf\x0bg\x1c 😀 \u202e"
    line = to_json({"text": text})
    assert len(line.decode().splitlines()) == 1 and json.loads(line) == {"text": text}
    assert "😀".encode() in line and b"\\u2028" in line


@pytest.mark.parametrize("value", [INFINITE, float("inf"), float("nan"), -1e300])
def test_no_logprob_is_more_than_json_can_hold(service: Service, value: float) -> None:
    logprobs = (TokenLogprobs(5, value, ((5, value), (6, -1.0))),)
    choice = Choice("a", (5,), logprobs, logprobs, "stop")
    for path, body in (
        ("", {"prompt": "a", "logprobs": 2, "prompt_logprobs": 2}),
        (COMPLETIONS, {"prompt": [1, 5], "logprobs": 2, "echo": True}),
        (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 2}),
    ):
        renderer = ask(service, path, body).renderer
        written = [renderer.whole([choice], Usage(1, 1)), renderer.begin(0, logprobs)]
        written.append(renderer.piece(Piece(0, "a", (5,), logprobs, None)))
        for data in written:
            assert not any(word in data for word in (b"NaN", b"Infinity", b"e+300"))
        assert b"-9999.0" in written[0] and b"-9999.0" in written[2]


def test_a_vocabulary_wider_than_the_tokenizers_does_no_harm(service: Service) -> None:
    id = service.tokenizer.vocab_size + 3
    wide = Service(service.tokenizer, "llama", 512, id + 1, 1, {})
    logprobs = (TokenLogprobs(id, -1.0, ((id, -1.0),)),)
    for path, body in (
        (COMPLETIONS, {"prompt": [1, id], "logprobs": 1, "echo": True}),
        (CHAT, {"messages": [USER], "logprobs": True}),
    ):
        renderer = ask(wide, path, body).renderer
        assert json.loads(renderer.whole([Choice("", (id,), logprobs, logprobs, "length")], Usage(2, 1)))


# Errors, and the official client


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request_error", None),
        (404, "invalid_request_error", "not_found"),
        (413, "invalid_request_error", "body_too_large"),
        (422, "invalid_request_error", None),
        (429, "rate_limit_error", "rate_limit_exceeded"),
        (500, "server_error", None),
        (503, "server_error", "service_unavailable"),
        (504, "server_error", "timeout"),
    ],
)
def test_errors_are_openais(status: int, kind: str, code: str | None) -> None:
    reply = error_reply(RequestError("no", "n", status))
    assert reply.status == status and reply.content_type == "application/json"
    assert json.loads(reply.body) == {"error": {"message": "no", "type": kind, "param": "n", "code": code}}
    assert reply.headers == ({"Retry-After": "1"} if status in (429, 503) else {})


def client(answer: Callable[[httpx2.Request], httpx2.Response]) -> openai.OpenAI:
    transport = httpx2.MockTransport(answer)
    return openai.OpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=httpx2.Client(transport=transport)
    )


def front(service: Service) -> Callable[[httpx2.Request], httpx2.Response]:
    """What the server does with a request, without server and engine."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        kind = request.headers.get("content-type", "")
        try:
            result = understand(request.url.path, kind, request.content, service)
        except RequestError as error:
            result = error_reply(error)
        if isinstance(result, Generation):
            answers = Answers(service, result)
            body = answers.stream() if result.stream else answers.whole()
            result = Reply(200, body, result.renderer.content_type)
        return httpx2.Response(
            result.status, content=result.body, headers={"content-type": result.content_type, **result.headers}
        )

    return answer


def test_the_official_client_understands_every_answer(service: Service) -> None:
    llama = client(front(service))
    assert [model.id for model in llama.models.list()] == ["llama"]
    assert isinstance(llama.models.retrieve("llama"), Model)
    assert llama.completions.create(model="llama", prompt="a", echo=True).choices[0].text == "a " + TEXT
    chunks = list(llama.completions.create(model="llama", prompt="a", stream=True, logprobs=2))
    assert "".join(chunk.choices[0].text for chunk in chunks) == " " + TEXT
    chat = llama.chat.completions.create(model="llama", messages=[USER], n=2, logprobs=True, top_logprobs=3, seed=1)
    assert [choice.message.content for choice in chat.choices] == [TEXT, TEXT]
    again = [USER, chat.choices[0].message.model_dump(), USER]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = llama.chat.completions.create(model="llama", messages=again, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert last.usage.completion_tokens == chat.usage.completion_tokens // 2


def test_the_official_client_raises_the_right_exceptions(service: Service) -> None:
    llama = client(front(service))
    with pytest.raises(openai.BadRequestError) as caught:
        llama.completions.create(model="llama", prompt="a", suffix="b")
    assert caught.value.param == "suffix" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        llama.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        llama.embeddings.create(model="llama", input="a")
    for status, kind in (
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
    ):
        reply = error_reply(RequestError("no", None, status))
        with pytest.raises(kind):
            client(lambda _, reply=reply: httpx2.Response(reply.status, content=reply.body)).models.list()


def test_a_stream_that_fails_raises_in_the_official_client(service: Service) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]})):
        renderer = ask(service, path, body | {"stream": True}).renderer
        stream = renderer.begin(0, None) + renderer.piece(Piece(0, "a", (5,), (), None))
        stream += renderer.error(RequestError("the engine stopped", None, 500))
        assert events(stream)[-1]["error"]["message"] == "the engine stopped"
        llama = client(
            lambda _, stream=stream: httpx2.Response(200, content=stream, headers={"content-type": "text/event-stream"})
        )
        with pytest.raises(openai.APIError, match="the engine stopped"):
            list(llama.completions.create(model="llama", prompt="a", stream=True))


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_chunk_is_whole_json_whatever_the_model_is_called(service: Service, path: str, options: dict) -> None:
    name = 'a[]"b\u2028'
    asked = {"messages": [USER]} if path == CHAT else {"prompt": "Hello"}
    request = ask(dataclasses.replace(service, model_name=name), path, {"stream": True, **asked, **options})
    chunk = request.renderer.piece(Piece(0, "text", (5,), (), None))
    assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and len(chunk.decode().splitlines()) == 2
    value = json.loads(chunk[6:])
    assert value["model"] == name and len(value["choices"]) == 1 and ("usage" in value) == bool(options)
