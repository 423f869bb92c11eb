"""A request that needs the engine, and its options; what is served, and the limits that hold for all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

from engine.config import RequestError
from engine.sequence import MAX_LOGIT_BIAS, MAX_SEED, SamplingParams
from handler.bodies import Fields
from handler.prompts import MAX_CHOICES, token_ids
from handler.responses import Renderer
from handler.settings import SAMPLING_KEYS
from tokenizing import Tokenizer

MAX_N = 8
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_STOP_IDS = 64

NUMBERS = (*SAMPLING_KEYS, "seed")
SAMPLING = (*NUMBERS, "ignore_eos", "logit_bias", "stop_token_ids", "stop")
LENGTH = ("max_new_tokens", "max_tokens")  # the sample files' name, and everyone else's
OPTIONS = (*SAMPLING, *LENGTH, "mode")


@dataclass(frozen=True)
class Service:
    """What understanding a request needs to know of the model and its configuration."""

    tokenizer: Tokenizer
    model_name: str
    max_seq_len: int
    vocab_size: int
    created: int
    defaults: Mapping[str, Any]
    max_body_bytes: int = 1 << 20


@dataclass(frozen=True)
class Generation:
    """A request that needs the engine; choice k of prompt p has the number p * n + k."""

    prompts: tuple[tuple[int, ...], ...]
    content: str  # what the body calls them
    n: int
    params: SamplingParams
    stop: tuple[str, ...]
    chat: bool
    stream: bool
    renderer: Renderer

    def params_for(self, choice: int) -> SamplingParams:
        """The options of one choice: with a seed, each choice of a prompt has its own."""
        k = choice % self.n
        if self.params.seed is None or k == 0:
            return self.params
        return dataclasses.replace(self.params, seed=self.params.seed + k)


def sampling_params(
    fields: Fields, service: Service, n: int, max_tokens: int | None, **logprobs: Any
) -> SamplingParams:
    """A request's options over the service's defaults; ranges are the engine's."""
    values = {name: service.defaults.get(name) for name in (*NUMBERS, "ignore_eos")}
    values |= {name: fields.number(name) for name in NUMBERS if name in fields}
    if "ignore_eos" in fields:
        values["ignore_eos"] = fields.flag("ignore_eos")
    if "logit_bias" in fields:
        values["logit_bias"] = _logit_bias(fields, service.vocab_size)
    if fields.get("stop_token_ids") not in (None, []):
        values["stop_ids"] = frozenset(_stop_ids(fields, service.vocab_size))
    values = {name: value for name, value in values.items() if value is not None}
    params = SamplingParams(max_tokens=max_tokens, **values, **logprobs)
    if params.seed is not None and params.seed + n - 1 > MAX_SEED:
        raise fields.error("seed", f"is {params.seed}; with n {n} it can be at most {MAX_SEED - n + 1}")
    return params


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    given = fields.members("logit_bias")
    if len(given) > MAX_LOGIT_BIAS:
        raise fields.error("logit_bias", f"has {len(given)} entries; at most {MAX_LOGIT_BIAS}")
    biases = {}
    for token, bias in given.items():
        # isascii, because int() reads the digits of every script
        id = int(token) if token.isascii() and token.isdigit() and len(token) <= 10 else vocab_size
        if id >= vocab_size:
            raise fields.error(
                "logit_bias", f"has the key {short_repr(token)}; keys are ids from 0 to {vocab_size - 1}"
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise fields.error("logit_bias", f"gives token {id} {short_repr(bias)}; it must be a number")
        biases[id] = bias
    return biases


def _stop_ids(fields: Fields, vocab_size: int) -> list[int]:
    ids = fields.elements("stop_token_ids")
    if len(ids) > MAX_STOP_IDS:
        raise fields.error("stop_token_ids", f"has {len(ids)} entries; at most {MAX_STOP_IDS}")
    return list(token_ids(ids, "stop_token_ids", vocab_size))


def stop_strings(fields: Fields) -> tuple[str, ...]:
    """`stop`: a string or a short list of them."""
    value = fields.get("stop")
    if value is None:
        return ()
    stop = [value] if isinstance(value, str) else value
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise fields.error("stop", f"is {short_repr(value)}; it must be a string or a list of strings")
    if len(stop) > MAX_STOP_STRINGS:
        raise fields.error("stop", f"has {len(stop)} strings; at most {MAX_STOP_STRINGS}")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise fields.error("stop", f"has a string of {len(text)} characters; each has 1 to {MAX_STOP_LENGTH}")
    return tuple(stop)


def max_tokens(fields: Fields, names: Sequence[str], default: int | None, least: int = 1) -> int | None:
    """How many tokens may be generated, by whichever name the client gave it."""
    name = fields.only_one(names, required=False)
    return default if name is None else fields.whole(name, least)


def choices(fields: Fields, prompts: int) -> int:
    """`n`, within what one request may ask for."""
    n = fields.whole("n", 1, MAX_N, default=1)
    if prompts * n > MAX_CHOICES:
        what = f"{prompts} prompts with n {n} make {prompts * n} answers"
        raise RequestError(f"{what}; one request may ask for at most {MAX_CHOICES}", "n" if n > 1 else "prompt")
    return n


def check_model(model: object, service: Service) -> None:
    """Refuse a request for a model that is not the served one."""
    if model is None or model == service.model_name:
        return
    if not isinstance(model, str):
        raise RequestError(f"model is {short_repr(model)}; it must be a string", "model")
    raise RequestError(
        f"the model {short_repr(model)} does not exist here; this server has {service.model_name!r}",
        "model",
        404,
        "model_not_found",
    )
