"""The bodies of OpenAI's completions and chat completions, to requests."""

from __future__ import annotations

from collections.abc import Collection
from reprlib import repr as short_repr
from typing import Any

from engine.sequence import MAX_TOP_LOGPROBS
from handler.bodies import Fields
from handler.generation import (
    SAMPLING,
    Generation,
    Service,
    check_model,
    choices,
    max_tokens,
    sampling_params,
    stop_strings,
)
from handler.openai_format import ChatRenderer, CompletionRenderer, EchoedPrompt, Format
from handler.prompts import Prompt, chat_prompt, read_prompts

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
LENGTH = ("max_tokens", "max_completion_tokens")
# `user` is for the accounts of whoever serves; it has no effect on an answer anywhere.
COMMON = (*SAMPLING, *LENGTH, "model", "n", "stream", "stream_options", "logprobs", "user", "response_format")
COMPLETION = (*COMMON, "prompt", "echo", "best_of")
CHAT = (*COMMON, "messages", "top_logprobs")
# OpenAI has these, and nobody shall think that they had an effect here.
UNSUPPORTED = (
    "audio",
    "function_call",
    "functions",
    "metadata",
    "modalities",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "suffix",
    "tool_choice",
    "tools",
    "verbosity",
    "web_search_options",
)
# What wrappers of OpenAI's client send although it asks for nothing.
NEUTRAL: dict[str, list[Any]] = {
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "parallel_tool_calls": [False, True],
    "service_tier": ["auto", "default"],
    "store": [False],
    "tool_choice": ["none", "auto"],
}


def complete(body: dict[str, Any], service: Service) -> Generation:
    """`/v1/completions`: prompts as text or token ids, one or many; `echo` gives them back."""
    fields = _fields(body, COMPLETION)
    check_model(fields.get("model"), service)
    fields.only_one(("prompt",), required=True)
    prompts = read_prompts(fields.get("prompt"), "prompt", service.tokenizer, service.vocab_size)
    n = choices(fields, len(prompts))
    if fields.whole("best_of", 1, default=n) != n:
        raise fields.error("best_of", f"is {fields.get('best_of')}; only n ({n}) is supported")
    echo = fields.flag("echo")
    top = fields.whole("logprobs", 0, MAX_TOP_LOGPROBS)
    length = max_tokens(fields, LENGTH, DEFAULT_COMPLETION_TOKENS, least=0 if echo else 1)
    format = _format(fields, service, logprobs=top is not None)
    echoed = [_echoed(prompt, service) for prompt in prompts] if echo else None
    return Generation(
        prompts=tuple(prompt.ids for prompt in prompts),
        content="prompt",
        n=n,
        params=sampling_params(fields, service, n, length, logprobs=top, prompt_logprobs=top if echo else None),
        stop=stop_strings(fields),
        chat=False,
        stream=format.stream,
        renderer=CompletionRenderer(format, n, echoed),
    )


def chat(body: dict[str, Any], service: Service) -> Generation:
    """`/v1/chat/completions`: one dialog, in the form that Llama 2 was trained with."""
    fields = _fields(body, CHAT)
    check_model(fields.get("model"), service)
    fields.only_one(("messages",), required=True)
    prompt = chat_prompt(fields.get("messages"), "messages", service.tokenizer)
    n = choices(fields, 1)
    logprobs = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not logprobs:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    length = max_tokens(fields, LENGTH, None)  # OpenAI's default: all that fits
    format = _format(fields, service, logprobs=logprobs)
    return Generation(
        prompts=(prompt.ids,),
        content="messages",
        n=n,
        params=sampling_params(fields, service, n, length, logprobs=(top or 0) if logprobs else None),
        stop=stop_strings(fields),
        chat=True,
        stream=format.stream,
        renderer=ChatRenderer(format),
    )


def _fields(body: dict[str, Any], allowed: Collection[str]) -> Fields:
    asking = {name: value for name, value in body.items() if value not in NEUTRAL.get(name, ())}
    return Fields(asking, allowed, UNSUPPORTED)


def _format(fields: Fields, service: Service, *, logprobs: bool) -> Format:
    fields.text("user")
    response_format = fields.members("response_format")
    if response_format is not None and response_format != {"type": "text"}:
        raise fields.error("response_format", f"is {short_repr(response_format)}; only {{'type': 'text'}} is supported")
    stream = fields.flag("stream")
    options = fields.members("stream_options")
    if options is not None and not stream:
        raise fields.error("stream_options", "needs stream to be true")
    options = Fields(options or {}, ("include_usage", "include_obfuscation"), where="stream_options.")
    if options.flag("include_obfuscation"):
        raise options.error("include_obfuscation", "is true; chunks are not padded here")
    include_usage = options.flag("include_usage")
    return Format(service.tokenizer, service.model_name, stream, logprobs, include_usage)


def _echoed(prompt: Prompt, service: Service) -> EchoedPrompt:
    text = prompt.text
    if text is None:
        # A model's vocabulary may be padded beyond its tokenizer's.
        text = service.tokenizer.decode(id for id in prompt.ids if id < service.tokenizer.vocab_size)
    return EchoedPrompt(text, prompt.ids)
