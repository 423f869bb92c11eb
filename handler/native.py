"""The model's own endpoint: JSON with `prompt` or `dialog`, bare dialogs, and plain text."""

from __future__ import annotations

from typing import Any

from engine.config import RequestError
from engine.sequence import MAX_TOP_LOGPROBS
from handler import kserve
from handler.bodies import DepthError, Fields, kind_of, parse_json, text_of
from handler.generation import LENGTH, OPTIONS, Generation, Service, choices, max_tokens, sampling_params, stop_strings
from handler.prompts import CONTENT, prompts_of
from handler.responses import NativeRenderer
from handler.settings import MODES

NAMES = (*CONTENT, *OPTIONS, "n", "stream", "logprobs", "prompt_logprobs")


def generate(content_type: str, body: bytes, service: Service) -> Generation:
    """The request that a body makes, whether it is JSON or text; KServe's bodies are known by their shape."""
    value = _value(content_type, text_of(body))
    if isinstance(value, str):
        value = {"prompt": value, "mode": service.defaults.get("mode", MODES[0])}
    elif isinstance(value, list):
        value = {"dialog": value}
    elif value.get("instances") is not None:
        return kserve.predict(value, service)
    elif isinstance(value.get("inputs"), list):
        return kserve.infer(value, service)
    fields = Fields(value, NAMES)
    prompts, chat = prompts_of(fields, service.tokenizer, service.vocab_size)
    n = choices(fields, len(prompts))
    stream = fields.flag("stream", True)
    top = fields.whole("logprobs", 0, MAX_TOP_LOGPROBS)
    prompt_top = fields.whole("prompt_logprobs", 0, MAX_TOP_LOGPROBS)
    # Nothing to generate makes sense only for who wants to know how likely the prompt is.
    length = max_tokens(fields, LENGTH, service.defaults.get("max_new_tokens"), least=1 if prompt_top is None else 0)
    return Generation(
        prompts=tuple(prompt.ids for prompt in prompts),
        content="prompt" if "prompt" in fields else "dialog",
        n=n,
        params=sampling_params(fields, service, n, length, logprobs=top, prompt_logprobs=prompt_top),
        stop=stop_strings(fields),
        chat=chat,
        stream=stream,
        renderer=NativeRenderer(len(prompts) * n, stream=stream, logprobs=top is not None),
    )


def _value(content_type: str, text: str) -> dict[str, Any] | list[Any] | str:
    """A JSON object or list, or the text itself.

    Content types say little: curl sends none with -T, and a form's with -d. So what opens with a brace is JSON
    whatever they say, and what opens with a bracket is if it can be.
    """
    opening = text.lstrip()[:1]
    kind = content_type.partition(";")[0].strip().lower()
    declared = kind == "application/json" or kind.endswith("+json")
    if not opening:
        raise RequestError('the body is empty; give a text, or JSON such as {"prompt": "Once upon a time"}')
    if not declared and opening not in "{[":
        return text
    try:
        value = parse_json(text)
    except DepthError:
        raise
    except RequestError as error:
        if not declared and opening == "[":
            return text  # "[INST] ..." is a fine prompt
        hint = "" if declared else '; a text that begins with a brace goes into {"prompt": ...}'
        raise RequestError(error.message + hint, error.param, error.status) from None
    if isinstance(value, list) and not declared and not all(isinstance(item, dict | list) for item in value):
        return text
    if not isinstance(value, dict | list):
        raise RequestError(f"the body is a JSON {kind_of(value)}; an object or a list of messages is needed")
    return value
