"""KServe's two protocols: bodies to requests; their answers are never streamed."""

from __future__ import annotations

import math
from reprlib import repr as short_repr
from typing import Any

from engine.config import RequestError, nearest
from handler.bodies import Fields, is_whole
from handler.generation import LENGTH, OPTIONS, Generation, Service, max_tokens, sampling_params, stop_strings
from handler.prompts import CONTENT, MAX_CHOICES, Prompt, mode_of, prompts_of
from handler.responses import KServeV1Renderer, KServeV2Renderer, Renderer
from handler.settings import MODES

MAX_ID = 256


def predict(body: dict[str, Any], service: Service) -> Generation:
    """Version 1: `instances` are texts or objects with `prompt` or `dialog`; `parameters` hold for all of them."""
    fields = Fields(body, ("instances", "parameters"))
    instances = fields.elements("instances")
    if instances is None:
        raise fields.error("instances", "is missing")
    parameters = _parameters(fields)
    mode = mode_of(parameters)
    default = mode or service.defaults.get("mode", MODES[0])
    contents = []
    for index, instance in enumerate(instances):
        if isinstance(instance, str):
            contents.append({"prompt": instance, "mode": default})
        elif not isinstance(instance, dict):
            raise fields.error("instances", f"holds {short_repr(instance)}; each is a text, or has prompt or dialog")
        elif given := [name for name in OPTIONS if instance.get(name) is not None]:
            problem = f"[{index}] holds {given[0]}; options stand in 'parameters', for all instances"
            raise RequestError(f"instances{problem}", "instances")
        else:
            contents.append(instance | {"mode": mode})
    return _generation(contents, "instances", parameters, service, KServeV1Renderer())


def infer(body: dict[str, Any], service: Service) -> Generation:
    """Version 2 (Open Inference): one BYTES tensor of texts in `inputs`; options stand in `parameters`."""
    fields = Fields(body, ("id", "inputs", "outputs", "parameters"))
    inputs = fields.elements("inputs")
    if inputs is None:
        raise fields.error("inputs", "is missing")
    if len(inputs) != 1:
        raise fields.error("inputs", f"has {len(inputs)} tensors; give one, with all texts")
    texts = _texts(inputs[0])
    parameters = _parameters(fields)
    mode = mode_of(parameters) or service.defaults.get("mode", MODES[0])
    id = fields.text("id")
    if id is not None and len(id) > MAX_ID:
        raise fields.error("id", f"has {len(id)} characters; at most {MAX_ID}")
    renderer = KServeV2Renderer(service.model_name, id, _outputs(fields))
    contents = [{"prompt": text, "mode": mode} for text in texts]
    return _generation(contents, "inputs", parameters, service, renderer)


def _parameters(fields: Fields) -> Fields:
    return Fields(fields.members("parameters") or {}, OPTIONS, where="parameters.")


def _generation(
    contents: list[dict[str, Any]], name: str, parameters: Fields, service: Service, renderer: Renderer
) -> Generation:
    if len(contents) > MAX_CHOICES:
        raise RequestError(f"{name} holds {len(contents)} prompts; at most {MAX_CHOICES}", name)
    prompts: list[Prompt] = []
    chats = set()
    for index, content in enumerate(contents):
        where = f"{name}[{index}]."
        found, chat = prompts_of(
            Fields(content, (*CONTENT, "mode"), where=where), service.tokenizer, service.vocab_size
        )
        if len(found) != 1:
            raise RequestError(f"{where[:-1]} holds {len(found)} prompts; one each", name)
        prompts += found
        chats.add(chat)
    if len(chats) > 1:
        raise RequestError(f"{name} mixes prompts and dialogs; send them as two requests", name)
    length = max_tokens(parameters, LENGTH, service.defaults.get("max_new_tokens"))
    return Generation(
        prompts=tuple(prompt.ids for prompt in prompts),
        content=name,
        n=1,
        params=sampling_params(parameters, service, 1, length),
        stop=stop_strings(parameters),
        chat=chats.pop(),
        stream=False,
        renderer=renderer,
    )


def _texts(tensor: object) -> list[str]:
    """The elements of a tensor of strings, as flat as they may be nested."""
    if not isinstance(tensor, dict):
        raise RequestError(f"inputs[0] is {short_repr(tensor)}; it must be an object", "inputs")
    fields = Fields(tensor, ("name", "shape", "datatype", "data"), ("parameters",), "inputs[0].")
    fields.text("name")
    if fields.get("datatype") != "BYTES":
        raise fields.error("datatype", f"is {short_repr(fields.get('datatype'))}; texts have 'BYTES'")
    texts = _flat(fields.elements("data") or [])
    if not texts or not all(isinstance(text, str) for text in texts):
        raise fields.error("data", "must be a list of strings")
    shape = fields.elements("shape") or []
    # Each size first, for the product of many large ones takes long.
    if not all(is_whole(size) and 0 < size <= len(texts) for size in shape) or math.prod(shape) != len(texts):
        raise fields.error("shape", f"is {short_repr(shape)}, but data has {len(texts)} elements")
    return texts


def _flat(values: list[Any]) -> list[Any]:
    flat = []
    for value in values:
        flat += _flat(value) if isinstance(value, list) else [value]
    return flat


def _outputs(fields: Fields) -> tuple[str, ...]:
    allowed = KServeV2Renderer.OUTPUTS
    names = []
    for index, output in enumerate(fields.elements("outputs") or []):
        if not isinstance(output, dict):
            raise fields.error("outputs", f"holds {short_repr(output)}; each is an object with a name")
        name = Fields(output, ("name",), ("parameters",), f"outputs[{index}].").text("name")
        if name not in allowed:
            raise fields.error("outputs", f"asks for {short_repr(name)}; {nearest(str(name)[:64], list(allowed))}")
        names.append(name)
    return tuple(names) or allowed[:1]


def metadata(service: Service) -> dict[str, Any]:
    """What version 2 tells of a model."""

    def tensor(name: str) -> dict[str, Any]:
        return {"name": name, "datatype": "BYTES", "shape": [-1]}

    outputs = [tensor(name) for name in KServeV2Renderer.OUTPUTS]
    return {"name": service.model_name, "platform": "pytorch", "inputs": [tensor("prompt")], "outputs": outputs}
