"""The official openai client on a real TorchServe: what it sends works, what is wrong raises what it should."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import openai
import pytest
from openai import OpenAI
from service import CHOICES, PROMPTS, SEQ_LEN, SHARED, Service, wait_until

pytest_plugins = ("service",)
pytestmark = SHARED

MODEL = "llama"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
STORY = "Once upon a time there was a girl named Mia. Mia had a red ball."
AT_ONCE = 32
STREAMS = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[OpenAI]:
    with service.openai() as client:
        yield client


def chat(client: OpenAI, stream: bool = False, **options: Any) -> dict[int, str]:
    """The texts of a chat's choices, by their number."""
    given = {"model": MODEL, "messages": FRANCE, "temperature": 0} | options
    if not stream:
        choices = client.chat.completions.create(**given).choices
        assert all(choice.message.role == "assistant" and choice.finish_reason for choice in choices)
        return {choice.index: choice.message.content for choice in choices}
    texts: dict[int, str] = defaultdict(str)
    roles, reasons = [], []
    for chunk in client.chat.completions.create(**given, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role == "assistant" else []
            reasons += [choice.index] if choice.finish_reason else []
    assert sorted(roles) == sorted(reasons) == sorted(texts)  # each begins and ends once
    return dict(texts)


def complete(client: OpenAI, stream: bool = False, **options: Any) -> dict[int, str]:
    """The texts of a completion's choices, by their number."""
    given = {"model": MODEL, "prompt": STORY, "temperature": 0, "max_tokens": 20} | options
    if not stream:
        return {choice.index: choice.text for choice in client.completions.create(**given).choices}
    texts: dict[int, str] = defaultdict(str)
    reasons = []
    for chunk in client.completions.create(**given, stream=True):
        for choice in chunk.choices:
            assert choice.index not in reasons, "there is more behind the end"
            texts[choice.index] += choice.text
            reasons += [choice.index] if choice.finish_reason else []
    assert sorted(reasons) == sorted(texts)
    return dict(texts)


# --- what works ---


def test_the_model_is_listed_and_found(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model
    assert model.max_model_len == SEQ_LEN


@STREAMS
def test_a_chat_is_answered(client: OpenAI, stream: bool) -> None:
    assert chat(client, stream) == {0: ANSWER}
    system = {"role": "system", "content": "Talk like a pirate."}
    assert chat(client, stream, messages=[system, *FRANCE]) == {0: f"Arr! {ANSWER}"}
    parts = [{"role": "user", "content": [{"type": "text", "text": FRANCE[0]["content"]}]}]
    assert chat(client, stream, messages=parts) == {0: ANSWER}


@STREAMS
def test_a_text_is_continued(client: OpenAI, stream: bool) -> None:
    (text,) = complete(client, stream, max_tokens=60).values()
    assert text.startswith(" One day Mia went to the ") and text == complete(client, max_tokens=60)[0]


@STREAMS
def test_several_choices_are_numbered_and_the_same_when_nothing_is_drawn(client: OpenAI, stream: bool) -> None:
    assert chat(client, stream, n=4) == dict.fromkeys(range(4), ANSWER)


@STREAMS
def test_several_prompts_with_several_choices_come_prompt_by_prompt(client: OpenAI, stream: bool) -> None:
    prompts = [STORY, "Once upon a time", "The capital of"]
    alone = [complete(client, prompt=prompt)[0] for prompt in prompts]
    assert len(set(alone)) == 3
    wanted = {2 * place + choice: text for place, text in enumerate(alone) for choice in (0, 1)}
    assert complete(client, stream, prompt=prompts, n=2) == wanted


def test_token_ids_stand_for_the_text_that_they_are_of(service: Service, client: OpenAI) -> None:
    ids = service.post({"prompt": STORY}, "v1/tokenize").json()["tokens"]
    text = complete(client)[0]
    assert complete(client, prompt=ids) == {0: text}
    assert complete(client, prompt=[ids, ids]) == {0: text, 1: text}
    assert complete(client, prompt=ids, echo=True)[0] == STORY + text


@STREAMS
def test_stop_strings_end_an_answer_in_front_of_them(client: OpenAI, stream: bool) -> None:
    assert chat(client, stream, stop="is Paris") == {0: "The capital of France "}
    assert chat(client, stream, stop=["never", "capital of F", "France"]) == {0: "The "}
    choice = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, stop=" is").choices[0]
    assert (choice.message.content, choice.finish_reason) == ("The capital of France", "stop")


def test_a_seed_repeats_an_answer_and_another_seed_gives_another(client: OpenAI) -> None:
    def drawn(seed: int, **options: Any) -> dict[int, str]:
        return complete(client, prompt="Once upon a time", temperature=1.5, max_tokens=30, seed=seed, **options)

    first = drawn(1)
    assert drawn(1) == drawn(1, stream=True) == first
    assert len({drawn(seed)[0] for seed in range(1, 6)}) > 1
    several = drawn(1, n=4)
    assert several[0] == first[0] and len(set(several.values())) > 1 and drawn(1, n=4) == several


def test_log_probabilities_of_a_chat_belong_to_its_tokens(client: OpenAI) -> None:
    given = {"model": MODEL, "messages": FRANCE, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**given).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode().strip() == ANSWER
    for token in tokens:
        likeliest = [other.logprob for other in token.top_logprobs]
        assert len(likeliest) == 3 and all(one >= other for one, other in pairwise(likeliest))
        assert token.top_logprobs[0].token == token.token and token.logprob == likeliest[0] <= 0
    streamed = [
        token
        for chunk in client.chat.completions.create(**given, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in tokens], abs=1e-3)
    plain = client.chat.completions.create(**{**given, "top_logprobs": openai.omit}).choices[0]
    assert all(token.top_logprobs == [] for token in plain.logprobs.content)


def test_an_echoed_text_has_the_log_probabilities_that_it_had_when_it_was_generated(client: OpenAI) -> None:
    given = {"model": MODEL, "prompt": STORY, "temperature": 0, "max_tokens": 12, "logprobs": 2, "echo": True}
    choice = client.completions.create(**given).choices[0]
    echoed = choice.logprobs
    assert choice.text.startswith(STORY) and len(choice.text) > len(STORY)
    assert echoed.token_logprobs[0] is None and all(value <= 0 for value in echoed.token_logprobs[1:])
    for token, offset in zip(echoed.tokens[2:], echoed.text_offset[2:], strict=True):
        assert choice.text[offset:].startswith(token)
    # The whole text as a prompt of which nothing follows: its last tokens are scored, not drawn.
    scored = client.completions.create(**{**given, "prompt": choice.text, "max_tokens": 0}).choices[0]
    assert scored.text == choice.text and scored.finish_reason == "length"
    assert scored.logprobs.tokens == echoed.tokens
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(echoed.token_logprobs[1:], abs=1e-3)
    chunks = list(client.completions.create(**given, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    streamed = [value for chunk in chunks for value in chunk.choices[0].logprobs.token_logprobs]
    assert streamed[1:] == pytest.approx(echoed.token_logprobs[1:], abs=1e-3) and streamed[0] is None


def test_the_last_event_of_a_stream_has_the_usage_if_it_is_asked_for(client: OpenAI) -> None:
    given: dict[str, Any] = {"model": MODEL, "messages": FRANCE, "temperature": 0, "n": 2}
    usage = client.chat.completions.create(**given).usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens > 10
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == usage
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**given, stream=True))
    texts: dict[str, Any] = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 3, "temperature": 0}
    last = list(client.completions.create(**texts, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage == client.completions.create(**texts).usage


def test_the_other_options_have_their_effect(client: OpenAI) -> None:
    def endless(**options: Any) -> str:
        more = {"ignore_eos": True} | options.pop("extra_body", {})
        return complete(client, max_tokens=60, extra_body=more, **options)[0]

    assert chat(client, max_completion_tokens=2) == {0: "The capital"}
    assert chat(client, logit_bias={"2": 100}) == {0: ""}
    greedy = endless()
    assert endless(temperature=1.5, seed=3) != greedy
    assert endless(temperature=1.5, seed=3, extra_body={"top_k": 1}) == greedy
    assert endless(temperature=1.5, seed=3, extra_body={"min_p": 1.0}) == greedy
    assert endless(presence_penalty=2, frequency_penalty=2) != greedy


def test_32_clients_at_once_get_what_each_gets_alone(service: Service, client: OpenAI) -> None:
    countries = ["France", "Italy", "Spain", "Germany", "Norway", "Japan", "Peru", "Kenya"]
    dialogs = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in countries]
    alone = [chat(client, messages=dialog)[0] for dialog in dialogs]
    assert len(set(alone)) == len(alone)
    drawn = complete(client, temperature=1.0, seed=9, max_tokens=24)[0]

    async def one(asynchronous: openai.AsyncOpenAI, number: int) -> str:
        given: dict[str, Any] = {"model": MODEL, "temperature": 0, "messages": dialogs[number % len(dialogs)]}
        if number % 4 == 0:
            text = {"prompt": STORY, "temperature": 1.0, "seed": 9, "max_tokens": 24}
            return (await asynchronous.completions.create(model=MODEL, **text)).choices[0].text
        if number % 2 == 0:
            return (await asynchronous.chat.completions.create(**given)).choices[0].message.content
        pieces = [chunk async for chunk in await asynchronous.chat.completions.create(**given, stream=True)]
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    async def all_of_them() -> list[str]:
        async with service.async_openai() as asynchronous:
            return await asyncio.gather(*(one(asynchronous, number) for number in range(AT_ONCE)))

    wanted = [drawn if number % 4 == 0 else alone[number % len(alone)] for number in range(AT_ONCE)]
    assert asyncio.run(all_of_them()) == wanted


# --- what is refused ---


@STREAMS
@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean 'temperature'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"n": 9}, "n", "from 1 to 8"),
        ({"n": 0}, "n", "from 1 to 8"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens", "beside"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only"),
        ({"messages": []}, "messages", ""),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages", ""),
        ({"messages": [{"role": "user", "content": "word " * SEQ_LEN}]}, "messages", str(SEQ_LEN)),
        ({"seed": 2**70}, None, "digits"),
    ],
)
def test_a_request_that_is_wrong_raises_bad_request_naming_the_option(
    client: OpenAI, stream: bool, options: dict, param: str | None, said: str
) -> None:
    given = {"model": MODEL, "messages": FRANCE} | options
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**given, stream=stream)
    error = raised.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", param)
    assert said in error.message and error.request_id
    assert (error.code == "context_length_exceeded") == (said == str(SEQ_LEN))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": [1, 2, 10**6]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * (PROMPTS * CHOICES + 1)}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": [5] * SEQ_LEN}, "prompt"),
    ],
)
def test_a_completion_that_is_wrong_raises_bad_request_naming_the_option(
    client: OpenAI, options: dict, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**{"model": MODEL, "prompt": "a"} | options)
    assert raised.value.param == param


def test_stream_options_without_a_stream_raise_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="needs stream to be true"):
        client.chat.completions.create(model=MODEL, messages=FRANCE, stream_options={"include_usage": True})


def test_a_model_that_is_not_there_raises_not_found(service: Service, client: OpenAI) -> None:
    for ask in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.chat.completions.create(model="gpt-4", messages=FRANCE),
        lambda: client.completions.create(model="gpt-4", prompt="x", stream=True),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            ask()
        assert raised.value.code == "model_not_found" and "'llama'" in raised.value.message
    other = service.openai(base_url=f"{service.record.url}/predictions/other/1.0/v1")
    with pytest.raises(openai.NotFoundError):  # this one TorchServe answers
        other.models.list()


def test_a_route_that_is_not_there_raises_not_found_with_those_that_are(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="v1/chat/completions"):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.NotFoundError, match="v1/responses"):
        client.responses.create(model=MODEL, input="x")


def test_a_body_that_is_too_large_raises_with_status_413(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="at most 1048576") as raised:
        client.completions.create(model=MODEL, prompt="x" * (1 << 20))
    assert (raised.value.status_code, raised.value.code) == (413, "body_too_large")
    with pytest.raises(openai.APIStatusError) as raised:  # so large that TorchServe itself drops it, unexplained
        client.completions.create(model=MODEL, prompt="x" * (3 << 20))
    assert raised.value.status_code == 413


@pytest.fixture
def full(service: Service, client: OpenAI) -> Iterator[openai.Stream]:
    """A stream whose answers hold every slot and the whole queue."""
    body = service.fill(max_tokens=SEQ_LEN)
    options = {name: body[name] for name in ("prompt", "n", "max_tokens", "temperature")}
    with client.completions.create(model=MODEL, **options, extra_body={"ignore_eos": True}, stream=True) as stream:
        next(iter(stream))
        yield stream
    wait_until(service.has_room, 20, "the queue is empty again")


@STREAMS
def test_a_full_queue_raises_rate_limit_with_when_to_try_again(
    client: OpenAI, full: openai.Stream, stream: bool
) -> None:
    with pytest.raises(openai.RateLimitError, match=f"at most {PROMPTS * CHOICES}") as raised:
        client.chat.completions.create(model=MODEL, messages=FRANCE, stream=stream)
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert raised.value.code == "rate_limit_exceeded"


def test_a_client_that_tries_again_gets_its_answer_when_there_is_room(service: Service, full: openai.Stream) -> None:
    leave = threading.Timer(0.3, full.close)
    leave.start()
    try:
        with service.openai(max_retries=4) as patient:
            assert chat(patient) == {0: ANSWER}
    finally:
        leave.join()


def test_a_server_that_asks_for_a_key_answers_only_those_who_have_it(service_of_two: Service) -> None:
    with service_of_two.openai() as known:
        assert chat(known) == chat(known, stream=True) == {0: ANSWER}
    with service_of_two.openai(api_key="unused") as stranger:
        # TorchServe says 400 where others say 401, so this is the exception that there is.
        with pytest.raises(openai.BadRequestError, match="Token Authorization failed"):
            stranger.models.list()
        with pytest.raises(openai.BadRequestError, match="Token Authorization failed"):
            chat(stranger, stream=True)
