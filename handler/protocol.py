"""HTTP requests to what they ask for: one table of routes, with what understands each one's bodies."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from reprlib import repr as short_repr
from urllib.parse import unquote

from engine.config import RequestError
from handler import kserve, native, openai_requests
from handler.bodies import Fields, parse_object
from handler.generation import Generation, Service, check_model
from handler.prompts import chat_prompt, token_ids
from handler.responses import Reply, json_reply
from tokenizing import TokenizerError

__all__ = ["ROUTES", "Generation", "Route", "Service", "understand"]


@dataclass(frozen=True)
class Request:
    """The parts of an HTTP request that matter once its route is known."""

    content_type: str
    body: bytes


@dataclass(frozen=True)
class Route:
    """An endpoint: its methods, its path behind the model's own, and what answers or understands its requests."""

    methods: tuple[str, ...]
    path: str
    answer: Callable[[Request, Service], Generation | Reply]
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        pattern = re.escape(self.path).replace(re.escape("{model}"), "(?P<model>[^/:]+)")
        object.__setattr__(self, "pattern", re.compile(pattern))

    def __str__(self) -> str:
        return f"{'/'.join(self.methods)} {self.path or '(the model itself)'}"


def understand(method: str, path: str, content_type: str, body: bytes, service: Service) -> Generation | Reply:
    """What a request asks for; RequestError if it is wrong in any way.

    `path` is the part behind the model's own. An empty `method` fits every route, for frontends that do not tell it.
    """
    path = unquote(path.partition("?")[0]).strip("/")
    found = [(route, match) for route in ROUTES if (match := route.pattern.fullmatch(path))]
    if not found:
        known = ", ".join(map(str, ROUTES))
        raise RequestError(
            f"there is no {short_repr(path)} here; behind the model's path there are: {known}", None, 404
        )
    route, match = next((pair for pair in found if not method or method.upper() in pair[0].methods), (None, None))
    if route is None:
        known = ", ".join(method for other, _ in found for method in other.methods)
        raise RequestError(f"{short_repr(path)} does not take {short_repr(method)}; it takes {known}", None, 405)
    if len(body) > service.max_body_bytes:
        raise RequestError(f"the body has {len(body)} bytes; at most {service.max_body_bytes}", None, 413)
    check_model(match.groupdict().get("model"), service)
    return route.answer(Request(content_type or "", body), service)


def _generate(request: Request, service: Service) -> Generation:
    return native.generate(request.content_type, request.body, service)


def _complete(request: Request, service: Service) -> Generation:
    return openai_requests.complete(parse_object(request.body), service)


def _chat(request: Request, service: Service) -> Generation:
    return openai_requests.chat(parse_object(request.body), service)


def _list_models(request: Request, service: Service) -> Reply:
    return json_reply({"object": "list", "data": [_model(service)]})


def _show_model(request: Request, service: Service) -> Reply:
    return json_reply(_model(service))


def _model(service: Service) -> dict[str, object]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "torchserve",
        "max_model_len": service.max_seq_len,
    }


def _tokenize(request: Request, service: Service) -> Reply:
    """vLLM's names; `text` is taken for `prompt`, as the word that comes to mind."""
    contents = ("prompt", "text", "messages")
    fields = Fields(parse_object(request.body), (*contents, "model", "add_special_tokens"))
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
    return json_reply({"tokens": list(ids), "count": len(ids), "max_model_len": service.max_seq_len})


def _detokenize(request: Request, service: Service) -> Reply:
    """As vLLM has it: the text is called `prompt`."""
    fields = Fields(parse_object(request.body), ("tokens", "model"))
    check_model(fields.get("model"), service)
    fields.only_one(("tokens",), required=True)
    if fields.get("tokens") == []:
        return json_reply({"prompt": ""})
    ids = token_ids(fields.elements("tokens"), "tokens", service.tokenizer.vocab_size)
    return json_reply({"prompt": service.tokenizer.decode(ids)})


def _predict(request: Request, service: Service) -> Generation:
    return kserve.predict(parse_object(request.body), service)


def _infer(request: Request, service: Service) -> Generation:
    return kserve.infer(parse_object(request.body), service)


def _metadata(request: Request, service: Service) -> Reply:
    return json_reply(kserve.metadata(service))


def _ready(request: Request, service: Service) -> Reply:
    return json_reply({"name": service.model_name, "ready": True})


ROUTES = (
    Route(("POST", "PUT"), "", _generate),  # curl -T sends PUT
    Route(("POST",), "v1/completions", _complete),
    Route(("POST",), "v1/chat/completions", _chat),
    Route(("GET",), "v1/models", _list_models),
    Route(("GET",), "v1/models/{model}", _show_model),
    Route(("POST",), "v1/tokenize", _tokenize),
    Route(("POST",), "v1/detokenize", _detokenize),
    Route(("POST",), "v1/models/{model}:predict", _predict),
    Route(("POST",), "v2/models/{model}/infer", _infer),
    Route(("GET",), "v2/models/{model}", _metadata),
    Route(("GET",), "v2/models/{model}/ready", _ready),
)
