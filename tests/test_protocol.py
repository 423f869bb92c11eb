"""What clients send: every shape that is understood, every limit, and 2,000 broken bodies."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizer_fixture import train_tokenizer

from engine.config import RequestError
from engine.sequence import MAX_SEED
from handler import protocol
from handler.bodies import MAX_JSON_DEPTH, parse_json
from handler.generation import Generation, Service
from handler.prompts import MAX_CHOICES
from handler.protocol import ROUTES, understand
from handler.responses import Reply, error_reply
from llama2_tokenizer import Tokenizer

PROJECT = Path(__file__).resolve().parent.parent
NATIVE, COMPLETIONS, CHAT = "", "v1/completions", "v1/chat/completions"
USER = {"role": "user", "content": "Hello there"}
ASSISTANT = {"role": "assistant", "content": "I am fine"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    tokenizer = Tokenizer(train_tokenizer(tmp_path_factory.mktemp("protocol") / "tokenizer.model"))
    defaults = {
        "max_new_tokens": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": None,
        "seed": None,
        "mode": "text_completion",
    }
    return Service(tokenizer, "llama", 512, tokenizer.vocab_size, 1_700_000_000, defaults)


def ask(service: Service, path: str, body: object, content_type: str = "") -> Any:
    """What becomes of a body, given as bytes, as text, or as what its JSON says."""
    if not isinstance(body, bytes):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    return understand(path, content_type, body, service)


def refused(service: Service, path: str, body: object, content_type: str = "") -> RequestError:
    with pytest.raises(RequestError) as caught:
        ask(service, path, body, content_type)
    assert 400 <= caught.value.status < 500
    json.loads(error_reply(caught.value).body)
    return caught.value


def said(reply: Reply) -> Any:
    assert isinstance(reply, Reply) and reply.status == 200 and reply.content_type == "application/json"
    return json.loads(reply.body)


def encoded(service: Service, *texts: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(service.tokenizer.encode(text, bos=True, eos=False)) for text in texts)


def as_chat(service: Service, *dialogs: list[dict[str, str]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(service.tokenizer.encode_dialog(dialog)) for dialog in dialogs)


# The model's own endpoint


def test_the_two_sample_files_are_understood_as_curl_sends_them(service: Service) -> None:
    text = (PROJECT / "sample_text.txt").read_bytes()
    completion = understand("", "", text, service)
    assert completion.prompts == encoded(service, json.loads(text)["prompt"])
    assert (completion.params.max_tokens, completion.chat, completion.stream) == (60, False, True)
    text = (PROJECT / "dialogs.txt").read_bytes()
    chat = understand("", "", text, service)
    assert chat.prompts == as_chat(service, json.loads(text)["dialog"])
    assert (chat.chat, chat.stream, chat.renderer.content_type.split(";")[0]) == (True, True, "application/x-ndjson")


def test_a_bare_list_of_messages_is_a_dialog_and_a_list_of_those_is_several(service: Service) -> None:
    other = [USER, ASSISTANT, {"role": "user", "content": "STOP"}]
    assert ask(service, NATIVE, [USER]).prompts == as_chat(service, [USER])
    for body in ([[USER], other], {"dialog": [[USER], other]}):
        many = ask(service, NATIVE, body)
        assert many.prompts == as_chat(service, [USER], other) and many.chat


@pytest.mark.parametrize("content_type", ["", "text/plain; charset=utf-8", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize(
    "text", ["Hello there", "[INST] what is it? [/INST]", "[1, 2] is a list", "[1]", "naïve 😀", '"']
)
def test_what_is_no_json_is_a_text_in_the_mode_of_the_configuration(
    service: Service, text: str, content_type: str
) -> None:
    plain = ask(service, NATIVE, text, content_type)
    assert plain.prompts == encoded(service, text) and not plain.chat
    chatty = dataclasses.replace(service, defaults=service.defaults | {"mode": "chat"})
    plain = ask(chatty, NATIVE, text, content_type)
    assert plain.prompts == as_chat(service, [{"role": "user", "content": text}]) and plain.chat


def test_json_in_a_form_is_json(service: Service) -> None:
    form = "application/x-www-form-urlencoded"
    assert ask(service, NATIVE, {"prompt": "Hello"}, form).prompts == encoded(service, "Hello")
    assert ask(service, NATIVE, [USER], form).chat
    assert ask(service, NATIVE, b'\xef\xbb\xbf {"prompt": "Hello"}').prompts == encoded(service, "Hello")


def test_broken_json_is_refused_where_json_was_meant(service: Service) -> None:
    assert "not valid JSON" in refused(service, NATIVE, '{"prompt": "Hello"').message
    assert '{"prompt"' in refused(service, NATIVE, "{placeholder}", "text/plain").message
    for body in ("[1, 2", "Hello", "[INST]", "12", '"text"', "null", "[1]"):
        refused(service, NATIVE, body, "application/json; charset=utf-8")
    for body in (b"", b" \n\t", b"\xef\xbb\xbf"):
        assert "empty" in refused(service, NATIVE, body).message


def test_prompts_may_be_texts_or_token_ids_one_or_many(service: Service) -> None:
    for path in (NATIVE, COMPLETIONS):
        assert ask(service, path, {"prompt": "a"}).prompts == encoded(service, "a")
        assert ask(service, path, {"prompt": ["a", "b"]}).prompts == encoded(service, "a", "b")
        assert ask(service, path, {"prompt": [1, 5, 9]}).prompts == ((1, 5, 9),)
        assert ask(service, path, {"prompt": [[1, 5], [9]]}).prompts == ((1, 5), (9,))
        assert ask(service, path, {"prompt": ""}).prompts == ((service.tokenizer.bos_id,),)
        for wrong in ([], [[]], [1, "a"], ["a", [1]], [True], [1.0], [[1], [True]], 5, {}, True, [None]):
            assert refused(service, path, {"prompt": wrong}).param == "prompt"
        for wrong in ([-1], [service.vocab_size], [[1], [10**9]]):
            error = refused(service, path, {"prompt": wrong})
            assert error.param == "prompt" and str(service.vocab_size - 1) in error.message


def test_text_never_becomes_control_tokens(service: Service) -> None:
    (ids,) = ask(service, NATIVE, {"prompt": "<s></s>"}).prompts
    assert service.tokenizer.bos_id not in ids[1:] and service.tokenizer.eos_id not in ids


def test_options_override_the_defaults_and_null_is_absent(service: Service) -> None:
    plain = ask(service, NATIVE, {"prompt": "a", "temperature": None, "max_new_tokens": None, "stop": None}).params
    assert (plain.temperature, plain.top_p, plain.max_tokens, plain.seed) == (0.5, 0.9, 64, None)
    body = {
        "prompt": "a",
        "max_new_tokens": 7,
        "temperature": 0,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -2,
        "frequency_penalty": 2.0,
        "seed": 11,
        "ignore_eos": True,
        "logit_bias": {"5": -100, "6": 1.5},
        "stop_token_ids": [7, 8],
        "logprobs": 4,
        "prompt_logprobs": 0,
        "stop": ["x", "yz"],
        "stream": False,
        "n": 3,
    }
    request = ask(service, NATIVE, body)
    params = dataclasses.asdict(request.params)
    assert params.pop("max_tokens") == 7
    assert params.pop("stop_ids") == {7, 8}
    assert params.pop("logit_bias") == {5: -100, 6: 1.5}
    assert params == {name: body[name] for name in params}
    assert (request.stop, request.n, request.stream) == (("x", "yz"), 3, False)


def test_the_mode_says_how_a_prompt_is_meant(service: Service) -> None:
    chat = ask(service, NATIVE, {"prompt": ["Hello", "STOP"], "mode": "chat"})
    dialogs = [[{"role": "user", "content": text}] for text in ("Hello", "STOP")]
    assert chat.prompts == as_chat(service, *dialogs) and chat.chat
    chatty = dataclasses.replace(service, defaults=service.defaults | {"mode": "chat"})
    assert not ask(chatty, NATIVE, {"prompt": "Hello"}).chat  # the default is for bodies that name neither
    assert refused(service, NATIVE, {"dialog": [USER], "mode": "text_completion"}).param == "mode"
    assert "'chat'" in refused(service, NATIVE, {"prompt": "a", "mode": "chats"}).message
    assert refused(service, NATIVE, {"prompt": [1, 2], "mode": "chat"}).param == "prompt"
    assert refused(service, NATIVE, {"prompt": "a", "dialog": [USER]}).param == "dialog"
    assert refused(service, NATIVE, {"max_new_tokens": 5}).param == "prompt"


def test_each_choice_of_a_prompt_has_its_own_seed(service: Service) -> None:
    request = ask(service, COMPLETIONS, {"prompt": ["a", "b"], "n": 3, "seed": 10})
    assert [request.params_for(choice).seed for choice in range(6)] == [10, 11, 12, 10, 11, 12]
    request = ask(service, COMPLETIONS, {"prompt": "a", "n": 3})
    assert [request.params_for(choice).seed for choice in range(3)] == [None] * 3
    edge = {"prompt": "a", "n": 2, "seed": MAX_SEED - 1}
    assert ask(service, COMPLETIONS, edge).params_for(1).seed == MAX_SEED
    assert refused(service, COMPLETIONS, edge | {"seed": MAX_SEED}).param == "seed"


# OpenAI


def test_openai_bodies_are_understood(service: Service) -> None:
    request = ask(service, COMPLETIONS, {"model": "llama", "prompt": "a", "user": "me", "response_format": None})
    assert (request.params.max_tokens, request.stream, request.chat, request.params.logprobs) == (
        16,
        False,
        False,
        None,
    )
    request = ask(service, CHAT, {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}})
    assert (request.params.max_tokens, request.stream, request.chat) == (None, True, True)
    assert request.renderer.content_type.startswith("text/event-stream")
    assert request.prompts == as_chat(service, [USER])
    for name in ("max_tokens", "max_completion_tokens"):
        assert ask(service, CHAT, {"messages": [USER], name: 5}).params.max_tokens == 5
    request = ask(service, CHAT, {"messages": [USER], "response_format": {"type": "text"}, "logprobs": True})
    assert request.params.logprobs == 0
    assert ask(service, CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 20}).params.logprobs == 20
    assert ask(service, CHAT, {"messages": [USER], "logprobs": False}).params.logprobs is None
    assert ask(service, CHAT, {"messages": [USER], "stop": "x"}).stop == ("x",)


def test_echo_with_logprobs_scores_the_prompt_without_generating(service: Service) -> None:
    params = ask(service, COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 5, "max_tokens": 0}).params
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (0, 5, 5)
    assert ask(service, COMPLETIONS, {"prompt": "a", "echo": True}).params.prompt_logprobs is None
    assert ask(service, NATIVE, {"prompt": "a", "max_new_tokens": 0, "prompt_logprobs": 1}).params.max_tokens == 0
    assert refused(service, COMPLETIONS, {"prompt": "a", "max_tokens": 0}).param == "max_tokens"
    assert refused(service, CHAT, {"messages": [USER], "max_completion_tokens": 0}).param == "max_completion_tokens"
    assert refused(service, NATIVE, {"prompt": "a", "max_new_tokens": 0}).param == "max_new_tokens"


def test_contents_may_come_in_parts_and_developers_are_the_system(service: Service) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    body = {"messages": [{"role": "developer", "content": "STOP"}, {"role": "user", "content": parts}]}
    dialog = [{"role": "system", "content": "STOP"}, {"role": "user", "content": "Hello\nthere"}]
    assert ask(service, CHAT, body).prompts == as_chat(service, dialog)
    answered = ASSISTANT | {"refusal": None, "tool_calls": None, "annotations": []}  # as the client's own objects dump
    assert ask(service, CHAT, {"messages": [USER, answered, USER]}).prompts == as_chat(service, [USER, ASSISTANT, USER])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        {},
        "Hello",
        [[USER]],
        ["Hello"],
        [ASSISTANT],
        [USER, USER],
        [USER, ASSISTANT],
        [USER, {"role": "system", "content": "late"}],
        [{"role": "system", "content": "alone"}],
        [{"role": "tool", "content": "a"}],
        [{"role": ["user"], "content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "a", "tool_calls": [{}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": "b"}]}],
        [{"role": "user", "content": "a", "name": "me"}],
    ],
)
def test_dialogs_that_llama_cannot_answer_are_refused(service: Service, messages: object) -> None:
    error = refused(service, CHAT, {"messages": messages})
    assert error.param == "messages" and error.status == 400 and "dialog[" not in error.message
    if messages != [[USER]]:  # which is a list of dialogs there
        assert refused(service, NATIVE, {"dialog": messages}).param in ("dialog", "prompt")


def test_a_message_that_the_vocabulary_cannot_write_safely_is_refused(service: Service, tmp_path: Path) -> None:
    path = train_tokenizer(tmp_path / "tokenizer.model", model_type="char", byte_fallback=False)
    bare = dataclasses.replace(service, tokenizer=Tokenizer(path))
    error = refused(bare, CHAT, {"messages": [{"role": "user", "content": "[INST]"}]})
    assert error.param == "messages" and "[INST]" in error.message


def test_what_asks_for_nothing_is_taken_from_wrappers_that_send_it(service: Service) -> None:
    nothing = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "metadata": {}}
    assert ask(service, CHAT, {"messages": [USER]} | nothing).prompts == as_chat(service, [USER])
    assert ask(service, COMPLETIONS, {"prompt": "a", "suffix": "", "stop_token_ids": []}).params.stop_ids == frozenset()
    assert ask(service, CHAT, {"messages": [USER], "top_logprobs": 0}).params.logprobs is None
    streamed = {"messages": [USER], "stream": True}
    assert ask(service, CHAT, streamed | {"stream_options": {"include_obfuscation": False}}).stream
    padded = refused(service, CHAT, streamed | {"stream_options": {"include_obfuscation": True}})
    assert padded.param == "stream_options.include_obfuscation"
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    assert ask(service, "v2/models/llama/infer", {"inputs": [tensor | {"parameters": {}}]}).content == "inputs"
    assert ask(service, NATIVE, {"prompt": "a", "instances": None, "inputs": None}).content == "prompt"
    for name, value in (("tools", [{}]), ("tool_choice", "required"), ("store", True), ("metadata", {"a": "b"})):
        assert "not supported" in refused(service, CHAT, {"messages": [USER]} | nothing | {name: value}).message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tools", "not supported"),
        ("functions", "not supported"),
        ("audio", "not supported"),
        ("suffix", "not supported"),
        ("metadata", "not supported"),
        ("store", "not supported"),
        ("temprature", "'temperature'"),
        ("max_token", "'max_tokens'"),
        ("guided_json", "allowed: "),
        ("x" * 5000, "too long"),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_its_name(service: Service, name: str, hint: str) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]})):
        error = refused(service, path, body | {name: 1})
        assert hint in error.message and name[:64] in error.message and name.startswith(error.param[:64])
        ask(service, path, body | {name: None}) if hint == "not supported" else None
    for path, body in ((NATIVE, {"prompt": "a"}), ("v1/tokenize", {"prompt": "a"})):
        assert name[:64] in refused(service, path, body | {name: 1}).message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[(name, value) for name in ("temperature", "top_p", "min_p") for value in (-1, 1000, True, "1", [], {})],
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, "0", False)],
        *[("repetition_penalty", value) for value in (0, -1, 11, "1")],
        *[("top_k", value) for value in (-1, 1.5, True, "3")],
        *[("seed", value) for value in (1.5, "1", True, 2**63, -(2**63))],
        *[("n", value) for value in (0, 9, -1, 1.0, True, "2")],
        *[("max_tokens", value) for value in (-1, 1.5, True, "5")],
        *[("stop", value) for value in (5, [1], [""], "", ["a"] * 5, "x" * 257, {}, [["a"]])],
        *[("stop_token_ids", value) for value in (5, ["1"], [-1], [10**6], [True], [1] * 65)],
        *[("logit_bias", value) for value in ([], 5, {"a": 1}, {"-1": 1}, {"1": "x"}, {"1": 101}, {"1": True})],
        *[("logit_bias", value) for value in ({"1000000": 1}, {"٣": 1}, {"1.0": 1}, {"1" * 30: 1}, {"1": None})],
        *[("logit_bias", {str(id): 1 for id in range(301)})],
        *[(name, value) for name in ("stream", "ignore_eos") for value in (1, 0, "true", [])],
    ],
)
def test_values_of_the_wrong_type_or_range_are_refused_everywhere(service: Service, option: str, value: object) -> None:
    for path, body in ((NATIVE, {"prompt": "a"}), (COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]})):
        error = refused(service, path, body | {option: value})
        assert error.param == option and error.status == 400


@pytest.mark.parametrize(
    ("path", "option", "value"),
    [
        *[(COMPLETIONS, "logprobs", value) for value in (-1, 21, True, 1.0, "1")],
        *[(CHAT, "logprobs", value) for value in (0, 1, 5, "true")],
        *[(CHAT, "top_logprobs", value) for value in (5, -1, 21)],  # 5 without logprobs
        *[(COMPLETIONS, "echo", value) for value in (1, "true")],
        *[(COMPLETIONS, "best_of", value) for value in (2, 0, True)],
        *[(COMPLETIONS, "user", value) for value in (5, [])],
        *[(COMPLETIONS, "stream_options", value) for value in ({"include_usage": True}, 5)],  # without stream
        *[
            (CHAT, "response_format", value)
            for value in ({"type": "json_object"}, "text", {}, {"type": "text", "a": 1})
        ],
        *[(CHAT, "prompt", "a"), (COMPLETIONS, "messages", [USER]), (CHAT, "echo", True), (CHAT, "best_of", 1)],
    ],
)
def test_what_only_one_of_openais_apis_has_is_checked_there(
    service: Service, path: str, option: str, value: object
) -> None:
    body = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
    assert refused(service, path, body | {option: value}).param == option


def test_stream_options_are_checked_inside(service: Service) -> None:
    body = {"prompt": "a", "stream": True}
    assert ask(service, COMPLETIONS, body | {"stream_options": {}}).stream
    for options in ({"include_usage": 1}, {"include_use": True}):
        error = refused(service, COMPLETIONS, body | {"stream_options": options})
        assert error.param.startswith("stream_options.")


def test_two_names_for_one_thing_exclude_each_other(service: Service) -> None:
    body = {"messages": [USER], "max_tokens": 5, "max_completion_tokens": 5}
    assert "max_tokens" in refused(service, CHAT, body).message
    assert refused(service, NATIVE, {"prompt": "a", "max_tokens": 5, "max_new_tokens": 5}).status == 400


def test_only_the_served_model_is_there(service: Service) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]}), ("v1/tokenize", {"prompt": "a"})):
        error = refused(service, path, body | {"model": "gpt-4"})
        assert error.status == 404 and "'llama'" in error.message and "'gpt-4'" in error.message
        assert json.loads(error_reply(error).body)["error"]["code"] == "model_not_found"
        assert refused(service, path, body | {"model": 5}).status == 400
        assert ask(service, path, body | {"model": None})


def test_how_many_answers_one_request_may_ask_for_is_limited(service: Service) -> None:
    assert len(ask(service, COMPLETIONS, {"prompt": ["a"] * MAX_CHOICES}).prompts) == MAX_CHOICES
    for body in ({"prompt": ["a"] * (MAX_CHOICES + 1)}, {"prompt": ["a"] * MAX_CHOICES, "n": 2}):
        assert str(MAX_CHOICES) in refused(service, COMPLETIONS, body).message
    assert str(MAX_CHOICES) in refused(service, NATIVE, {"dialog": [[USER]] * (MAX_CHOICES + 1)}).message
    assert str(MAX_CHOICES) in refused(service, NATIVE, {"instances": ["a"] * (MAX_CHOICES + 1)}).message


# Models, tokens


def test_models_are_listed_and_shown(service: Service) -> None:
    listed = said(ask(service, "v1/models", b""))
    shown = said(ask(service, "/v1/models/llama/", b""))
    assert listed == {"object": "list", "data": [shown]}
    assert shown["id"] == "llama" and shown["created"] == 1_700_000_000 and shown["object"] == "model"
    for name in ("gpt", "llama?x", "ll%61ma"):  # TorchServe has decoded the path and cut off the query
        assert refused(service, f"v1/models/{name}", b"").status == 404


def test_a_mode_of_null_leaves_the_one_of_all_instances(service: Service) -> None:
    body = {"instances": [{"prompt": "Hello", "mode": None}], "parameters": {"mode": "chat"}}
    found = ask(service, "v1/models/llama:predict", body)
    assert found.chat and found.prompts == as_chat(service, [{"role": "user", "content": "Hello"}])


def test_tokens_can_be_counted_and_read(service: Service) -> None:
    (ids,) = encoded(service, "Hello naïve 😀")
    for name in ("prompt", "text"):
        answer = said(ask(service, "v1/tokenize", {name: "Hello naïve 😀"}))
        assert answer == {"tokens": list(ids), "count": len(ids), "max_model_len": 512}
    bare = said(ask(service, "v1/tokenize", {"prompt": "Hello naïve 😀", "add_special_tokens": False}))
    assert bare["tokens"] == list(ids[1:])
    assert said(ask(service, "v1/detokenize", {"tokens": list(ids)})) == {"prompt": "Hello naïve 😀"}
    assert said(ask(service, "v1/detokenize", {"tokens": []})) == {"prompt": ""}
    chat = said(ask(service, "v1/tokenize", {"messages": [USER]}))
    assert chat["tokens"] == list(as_chat(service, [USER])[0])
    for body in (
        {},
        {"prompt": 5},
        {"prompt": "a", "messages": [USER]},
        {"messages": [USER], "add_special_tokens": False},
    ):
        refused(service, "v1/tokenize", body)
    for tokens in (None, 5, ["a"], [-1], [service.vocab_size], [True], [1.5]):
        assert refused(service, "v1/detokenize", {"tokens": tokens}).param == "tokens"


def test_a_list_of_tokens_has_an_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MOST_IDS", 1000)
    most = max(1000, 4 * service.max_seq_len)
    text = "\u4e00" * most  # three bytes, and a token for each, behind the one for the beginning of a word
    error = refused(service, "v1/tokenize", {"prompt": text, "add_special_tokens": False})
    assert (error.status, error.param) == (400, "prompt")
    expected = f"prompt has {3 * most + 1} tokens; at most {most} are listed in one answer: send it in parts"
    assert error.message == expected
    assert said(ask(service, "v1/tokenize", {"prompt": text[: most // 4]}))["count"] <= most


# KServe


@pytest.mark.parametrize("path", ["", "v1/models/llama:predict"])
def test_kserve_version_1_takes_texts_and_dialogs(service: Service, path: str) -> None:
    body = {"instances": ["a", {"prompt": "b"}], "parameters": {"max_new_tokens": 5, "stop": ["x"]}}
    request = ask(service, path, body)
    assert request.prompts == encoded(service, "a", "b")
    assert (request.params.max_tokens, request.stop, request.stream, request.n) == (5, ("x",), False, 1)
    assert ask(service, path, {"instances": [{"dialog": [USER]}]}).prompts == as_chat(service, [USER])
    chat = ask(service, path, {"instances": ["a"], "parameters": {"mode": "chat"}})
    assert chat.chat and chat.prompts == as_chat(service, [{"role": "user", "content": "a"}])
    for wrong in (
        {"instances": []},
        {"instances": None, "parameters": {}},
        {"instances": "a"},
        {"instances": [5]},
        {"instances": [{}]},
        {"instances": [{"prompt": ["a", "b"]}]},
        {"instances": ["a", {"dialog": [USER]}]},
        {"instances": [{"prompt": "a", "max_new_tokens": 5}]},
        {"instances": ["a"], "stream": True},
        {"instances": ["a"], "parameters": {"stream": True}},
        {"instances": ["a"], "parameters": []},
    ):
        assert refused(service, path, wrong).status == 400


@pytest.mark.parametrize("path", ["", "v2/models/llama/infer"])
def test_kserve_version_2_takes_one_tensor_of_texts(service: Service, path: str) -> None:
    tensor = {"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
    request = ask(service, path, {"id": "7", "inputs": [tensor], "parameters": {"temperature": 0}})
    assert request.prompts == encoded(service, "a", "b") and request.params.temperature == 0
    nested = tensor | {"shape": [2, 1], "data": [["a"], ["b"]]}
    assert ask(service, path, {"inputs": [nested]}).prompts == encoded(service, "a", "b")
    assert ask(service, path, {"inputs": [tensor], "parameters": {"mode": "chat"}}).chat
    for change in (
        {"shape": [3]},
        {"shape": None},
        {"shape": [True, 2]},
        {"shape": [0]},
        {"shape": [-1, -2]},
        {"datatype": "FP32"},
        {"datatype": None},
        {"data": [1, 2]},
        {"data": None},
        {"data": "ab"},
        {"parameters": {"binary_data_size": 5}},
        {"extra": 1},
        {"name": 5},
    ):
        assert refused(service, path, {"inputs": [tensor | change]}).status == 400
    for wrong in (
        {"inputs": [tensor, tensor]},
        {"inputs": []},
        {"inputs": [5]},
        {"inputs": [tensor], "outputs": [{"name": "logits"}]},
        {"inputs": [tensor], "outputs": [5]},
        {"inputs": [tensor], "outputs": [{}]},
        {"inputs": [tensor], "id": 5},
        {"inputs": [tensor], "id": "x" * 1000},
        {"inputs": [tensor], "parameters": {"n": 2}},
    ):
        assert refused(service, path, wrong).status == 400


def test_kserve_tells_what_the_model_takes(service: Service) -> None:
    assert said(ask(service, "v2/models/llama/ready", b"")) == {"name": "llama", "ready": True}
    metadata = said(ask(service, "v2/models/llama", b""))
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["text", "finish_reason"]
    for path in ("v2/models/gpt/infer", "v1/models/gpt:predict"):
        assert refused(service, path, {"instances": ["a"]}).status == 404


# Routes and limits


def test_an_unknown_path_is_told_the_known_ones(service: Service) -> None:
    for path in (
        "v1/embeddings",
        "v1",
        "v1/completions/x",
        "v1/models/a/b",
        "x" * 5000,
        "%00",
        "v1/models/llama:explain",
    ):
        error = refused(service, path, {"prompt": "a"})
        assert error.status == 404
        assert all(str(route) in error.message for route in ROUTES)
    assert ask(service, "/v1/completions/", {"prompt": "a"})


def test_every_route_is_reached(service: Service) -> None:
    for route in ROUTES:
        try:
            understand(route.path.replace("{model}", "llama"), "", b"{}", service)
        except RequestError as error:
            assert error.status == 400  # its body is wrong, its place is not


def test_a_body_has_a_largest_size(service: Service) -> None:
    small = dataclasses.replace(service, max_body_bytes=30)
    body = b'{"prompt": "12345678901234567"}'
    assert len(body) == 31
    error = refused(small, NATIVE, body)
    assert error.status == 413 and "31" in error.message and "30" in error.message
    assert ask(small, NATIVE, body.replace(b"1234", b"123", 1))


def test_json_has_a_deepest_nesting(service: Service) -> None:
    def nested(depth: int) -> str:
        return '{"prompt": ' + "[" * (depth - 1) + '"]]"' + "]" * (depth - 1) + "}"

    assert MAX_JSON_DEPTH == 32
    error = refused(service, NATIVE, nested(MAX_JSON_DEPTH + 1))
    assert str(MAX_JSON_DEPTH) in error.message and str(MAX_JSON_DEPTH + 1) in error.message
    assert "nested" not in refused(service, NATIVE, nested(MAX_JSON_DEPTH)).message
    for opening in ("[", '{"a":', '[{"a":', "{["):
        for path in (NATIVE, COMPLETIONS):
            assert refused(service, path, opening * 100_000).status == 400
    assert ask(service, NATIVE, {"prompt": "[" * 100 + '"{' * 100}).prompts  # a string is as deep as it likes
    assert ask(service, NATIVE, '{"prompt": "\\\\", "stop": "\\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}').prompts


@pytest.mark.parametrize("text", ["[[],[]]", '"[[[["', '"\\"[["', '{"a": "]]", "b": [1, {"c": []}]}', "[[1], [[2]]]"])
def test_the_depth_that_is_counted_is_the_depth_of_the_value(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def depth(value: object) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    true = depth(json.loads(text))
    monkeypatch.setattr("handler.bodies.MAX_JSON_DEPTH", true)
    parse_json(text)
    monkeypatch.setattr("handler.bodies.MAX_JSON_DEPTH", true - 1)
    with pytest.raises(RequestError):
        parse_json(text)


def test_reading_takes_a_time_that_grows_with_the_body_only() -> None:
    started = time.process_time()
    for text in (
        '"' + '\\"' * 500_000,
        '"' * 1_000_001,
        "\\" * 1_000_000,
        "[" * 1_000_000,
        '"\\' * 333_333,
        "[]" * 500_000,
    ):
        with pytest.raises(RequestError):
            parse_json(text)
    assert time.process_time() - started < 20


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "-" + "9" * 21])
def test_numbers_are_finite_and_of_a_sane_length(service: Service, number: str) -> None:
    with pytest.raises(RequestError, match="finite|digits"):
        parse_json(f"[{number}]")
    for path in (NATIVE, COMPLETIONS):
        assert refused(service, path, f'{{"prompt": "a", "temperature": {number}}}').status == 400
        assert refused(service, path, f'{{"prompt": [{number}]}}', "application/json").status == 400


def test_text_is_utf_8_without_half_characters(service: Service) -> None:
    for path in (NATIVE, COMPLETIONS):
        assert "UTF-8" in refused(service, path, b'{"prompt": "\xff"}').message
        assert refused(service, path, b'{"prompt": "\xed\xa0\x80"}').status == 400
        for field in ("prompt", "stop", "model", "\\ud800"):
            assert "surrogate" in refused(service, path, '{"' + field + '": "\\uD800"}').message
        assert ask(service, path, '{"prompt": "\\ud83d\\ude00"}').prompts == encoded(service, "😀")
        assert ask(service, path, '{"prompt": "\\\\ud800 \\u0000"}').prompts == encoded(service, "\\ud800 \0")


def test_errors_stay_short_whatever_was_sent(service: Service) -> None:
    long = "x" * 100_000
    for body in (
        {"prompt": "a", "temperature": long},
        {"prompt": "a", long: 1},
        {"prompt": "a", "model": long},
        {"prompt": {"a": long}},
        {"prompt": "a", "mode": long},
        {"prompt": "a", "logit_bias": {long: 1}},
        {"prompt": "a", "logit_bias": {"1": long}},
        {"dialog": [{"role": long, "content": "a"}]},
        {"dialog": [USER | {long: 1}]},
        {"dialog": [{"role": "user", "content": [{"type": long}]}]},
        {"inputs": [{"datatype": long}]},
    ):
        error = refused(service, NATIVE, body)
        assert len(error.message) < 1000 and len(error.param or "") < 100
    assert len(refused(service, long, {}).message) < 1000


# Broken bodies

GOOD: list[tuple[str, object]] = [
    (NATIVE, {"prompt": "Hello", "max_new_tokens": 5, "temperature": 0.5, "stream": False, "seed": 1}),
    (NATIVE, {"dialog": [{"role": "system", "content": "STOP"}, USER, ASSISTANT, USER], "mode": "chat", "stop": ["x"]}),
    (NATIVE, [[USER], [USER, ASSISTANT, USER]]),
    (NATIVE, {"prompt": [[1, 5], [7]], "n": 2, "logprobs": 3, "prompt_logprobs": 1, "top_k": 5}),
    (NATIVE, {"instances": ["a", {"prompt": "b"}], "parameters": {"max_new_tokens": 5}}),
    (NATIVE, {"id": "1", "inputs": [{"name": "x", "shape": [1, 2], "datatype": "BYTES", "data": [["a", "b"]]}]}),
    (COMPLETIONS, {"model": "llama", "prompt": ["a", "b"], "echo": True, "logprobs": 2, "max_tokens": 0, "n": 2}),
    (COMPLETIONS, {"prompt": [1, 2], "stream": True, "stream_options": {"include_usage": True}, "best_of": 1}),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": -1, "6": 2.5}, "presence_penalty": 1, "min_p": 0.1}),
    (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 4, "max_completion_tokens": 5, "user": "u"}),
    (CHAT, {"messages": [USER | {"content": [{"type": "text", "text": "hi"}]}], "response_format": {"type": "text"}}),
    ("v1/tokenize", {"prompt": "Hello", "add_special_tokens": True}),
    ("v1/tokenize", {"messages": [USER]}),
    ("v1/detokenize", {"tokens": [1, 5, 9]}),
    ("v2/models/llama/infer", {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}),
    ("v1/models/llama:predict", {"instances": [{"dialog": [USER]}], "parameters": {"stop_token_ids": [5]}}),
]
ODD = [
    *(None, True, False, 0, -1, 1, 9, 2**63, 10**19, -(10**19), 0.5, 1e308, -0.0, 5e-324),
    *("", " ", "a", "😀", "\x00", "\u2581", "[INST]", "</s>", "\u202e", "user", "BYTES", "1" * 25),
    *([], [[]], {}, [{}], [None], [1, "a"], {"": ""}, {"role": "user"}, [[[1]]], {"type": "text"}),
]
NAMES = [
    "prompt",
    "dialog",
    "messages",
    "tokens",
    "instances",
    "inputs",
    "mode",
    "n",
    "stop",
    "text",
    "",
    "\x00",
    "tools",
]


def mutated(value: Any, dice: random.Random) -> Any:
    """The value with one thing in it changed: replaced, removed, doubled, renamed or added."""
    if isinstance(value, dict | list) and value and dice.random() < 0.8:
        value = dict(value) if isinstance(value, dict) else list(value)
        key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        how = dice.randrange(6)
        if how < 3:
            value[key] = mutated(value[key], dice)
        elif how == 3:
            del value[key]
        elif isinstance(value, list):
            value.insert(key, dice.choice([value[key], dice.choice(ODD)]))
        elif how == 4:
            value[dice.choice(NAMES)] = value.pop(key)
        else:
            value[dice.choice([*NAMES, *value])] = dice.choice(ODD)
        return value
    return dice.choice(ODD)


def spoilt(body: bytes, dice: random.Random) -> bytes:
    """The bytes with a few of them changed, cut, or swapped for what parsers trip over."""
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(body) + 1)
        traps = [
            b"\xff",
            b"\x00",
            b"{",
            b"]",
            b'"',
            b"\\",
            b"NaN",
            b"1e999",
            b"\\ud800",
            b"[" * 40,
            b"-",
            b",",
            b"\xc3",
        ]
        how = dice.randrange(3)
        body = body[:at] + (dice.choice(traps) if how else b"") + body[at + (how == 1) :]
        if how == 0:
            body = body[: dice.randrange(len(body) + 1)] if dice.random() < 0.5 else body
    return body


def test_two_thousand_broken_bodies_are_understood_or_refused(service: Service) -> None:
    dice = random.Random(20240229)
    outcomes = {"understood": 0, "refused": 0}
    for case in range(2000):
        path, body = dice.choice(GOOD)
        for _ in range(dice.randrange(1, 4)):
            body = mutated(body, dice)
        data = json.dumps(body, ensure_ascii=dice.random() < 0.5).encode()
        if dice.random() < 0.4:
            data = spoilt(data, dice)
        content_type = dice.choice(["", "application/json", "text/plain", "application/x-www-form-urlencoded"])
        try:
            result = understand(path, content_type, data, service)
        except RequestError as error:
            assert 400 <= error.status < 500, (case, data)
            json.loads(error_reply(error).body)
            outcomes["refused"] += 1
            continue
        assert isinstance(result, Generation | Reply), (case, data)
        if isinstance(result, Generation):
            assert result.prompts and all(result.prompts)
            for choice in range(len(result.prompts) * result.n):
                result.params_for(choice)
        outcomes["understood"] += 1
    assert min(outcomes.values()) > 200, outcomes  # both ways are walked


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_the_bodies_that_are_broken_above_are_good(service: Service, path: str, body: object) -> None:
    assert ask(service, path, body, "application/json")
