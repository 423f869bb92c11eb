"""HTTP requests to what they ask for: one table of routes, with what understands each one's bodies."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from reprlib import repr as short_repr
from typing import Any

from engine.config import RequestError
from handler import kserve, native, openai_requests
from handler.bodies import Fields, parse_object
from handler.generation import Generation, Service, check_model
from handler.prompts import chat_prompt, token_ids
from handler.responses import Reply, json_reply
from tokenizing import TokenizerError

MOST_IDS = 1 << 16  # in a list: the frontend keeps what a client does not read

Answer = Callable[[str, bytes, Service], Generation | Reply]  # of a content type and a body


@dataclass(frozen=True)
class Route:
    """An endpoint: its methods, its path behind the model's own, and what answers or understands its requests.

    The methods are for people: TorchServe does not tell the handler with which one a request came.
    """

    methods: str
    path: str
    answer: Answer
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        pattern = re.escape(self.path).replace(re.escape("{model}"), "(?P<model>[^/:]+)")
        object.__setattr__(self, "pattern", re.compile(pattern))

    def __str__(self) -> str:
        return f"{self.methods} {self.path or '(the model itself)'}"


def understand(path: str, content_type: str, body: bytes, service: Service) -> Generation | Reply:
    """What a request asks for, by the part of its path behind the model's own; RequestError if it is wrong anywhere."""
    path = path.strip("/")
    for route in ROUTES:
        if (match := route.pattern.fullmatch(path)) is not None:
            break
    else:
        known = ", ".join(map(str, ROUTES))
        raise RequestError(
            f"there is no {short_repr(path)} here; behind the model's path there are: {known}", None, 404
        )
    if len(body) > service.max_body_bytes:
        raise RequestError(f"the body has {len(body)} bytes; at most {service.max_body_bytes}", None, 413)
    check_model(match.groupdict().get("model"), service)
    return route.answer(content_type, body, service)


def _of_json(answer: Callable[[dict[str, Any], Service], Generation | Reply]) -> Answer:
    return lambda content_type, body, service: answer(parse_object(body), service)


def _told(value: Callable[[Service], dict[str, Any]]) -> Answer:
    return lambda content_type, body, service: json_reply(value(service))


def _models(service: Service) -> dict[str, Any]:
    return {"object": "list", "data": [_model(service)]}


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "torchserve",
        "max_model_len": service.max_seq_len,
    }


def _tokenize(body: dict[str, Any], service: Service) -> Reply:
    """vLLM's names; `text` is taken for `prompt`, as the word that comes to mind."""
    contents = ("prompt", "text", "messages")
    fields = Fields(body, (*contents, "model", "add_special_tokens"))
    check_model(fields.get("model"), service)
    name = fields.only_one(contents, required=True)
    special = fields.flag("add_special_tokens", True)
    if name == "messages":
        if not special:
            raise fields.error("add_special_tokens", "is false, but the chat format cannot do without them")
        ids = chat_prompt(fields.get(name), name, service.tokenizer).ids
    else:
        try:
            ids = service.tokenizer.encode(fields.text(name), bos=special, eos=False)
        except TokenizerError as error:
            raise fields.error(name, f"cannot be tokenized: {error}") from None
    most = max(MOST_IDS, 4 * service.max_seq_len)
    if len(ids) > most:
        raise fields.error(name, f"has {len(ids)} tokens; at most {most} are listed in one answer: send it in parts")
    return json_reply({"tokens": list(ids), "count": len(ids), "max_model_len": service.max_seq_len})


def _detokenize(body: dict[str, Any], service: Service) -> Reply:
    """As vLLM has it: the text is called `prompt`."""
    fields = Fields(body, ("tokens", "model"))
    check_model(fields.get("model"), service)
    fields.only_one(("tokens",), required=True)
    if fields.get("tokens") == []:
        return json_reply({"prompt": ""})
    ids = token_ids(fields.elements("tokens"), "tokens", service.tokenizer.vocab_size)
    return json_reply({"prompt": service.tokenizer.decode(ids)})


def _ready(service: Service) -> dict[str, Any]:
    return {"name": service.model_name, "ready": True}


ROUTES = (
    Route("POST/PUT", "", native.generate),  # curl -T sends PUT
    Route("POST", "v1/completions", _of_json(openai_requests.complete)),
    Route("POST", "v1/chat/completions", _of_json(openai_requests.chat)),
    Route("GET", "v1/models", _told(_models)),
    Route("GET", "v1/models/{model}", _told(_model)),
    Route("POST", "v1/tokenize", _of_json(_tokenize)),
    Route("POST", "v1/detokenize", _of_json(_detokenize)),
    Route("POST", "v1/models/{model}:predict", _of_json(kserve.predict)),
    Route("POST", "v2/models/{model}/infer", _of_json(kserve.infer)),
    Route("GET", "v2/models/{model}", _told(kserve.metadata)),
    Route("GET", "v2/models/{model}/ready", _told(_ready)),
)
