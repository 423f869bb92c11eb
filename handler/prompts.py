"""What clients send as prompts and dialogs, to token ids."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

from engine.config import RequestError, nearest
from handler.bodies import NOTHING, Fields, is_whole, kind_of
from handler.settings import MODES
from tokenizing import DialogError, Tokenizer, TokenizerError

MAX_CHOICES = 64  # answers that one request may ask for: its prompts times n
CONTENT = ("prompt", "dialog")


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that they stand for where the client sent text."""

    ids: tuple[int, ...]
    text: str | None = None


def prompts_of(fields: Fields, tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[Prompt, ...], bool]:
    """The prompts of a body's `prompt` or `dialog`, in its `mode`, and whether they are chats."""
    name = fields.only_one(CONTENT, required=True)
    mode = mode_of(fields)
    value = fields.get(name)
    if name == "prompt" and mode == "chat":
        return user_prompts(value, name, tokenizer), True
    if name == "prompt":
        return read_prompts(value, name, tokenizer, vocab_size), False
    if mode == MODES[0]:
        raise fields.error("mode", f"is {mode!r}, but a dialog is a chat; leave it out or say 'chat'")
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        _bounded(value, name)
        return tuple(chat_prompt(item, f"dialog[{index}]", tokenizer) for index, item in enumerate(value)), True
    return (chat_prompt(value, name, tokenizer),), True


def mode_of(fields: Fields) -> str | None:
    """`mode`, if given."""
    mode = fields.text("mode")
    if mode is not None and mode not in MODES:
        raise fields.error("mode", f"is {short_repr(mode)}; {nearest(mode[:64], list(MODES))}")
    return mode


def read_prompts(value: object, name: str, tokenizer: Tokenizer, vocab_size: int) -> tuple[Prompt, ...]:
    """A text, token ids, or a list of either, as prompts."""
    if isinstance(value, str):
        return (text_prompt(value, name, tokenizer),)
    if isinstance(value, list) and value:
        if all(map(is_whole, value)):
            return (Prompt(token_ids(value, name, vocab_size)),)
        _bounded(value, name)
        if all(isinstance(item, str) for item in value):
            return tuple(text_prompt(item, name, tokenizer) for item in value)
        if all(isinstance(item, list) and item for item in value):
            return tuple(Prompt(token_ids(item, name, vocab_size)) for item in value)
    raise RequestError(
        f"{name} is {short_repr(value)}; it must be a string, a list of token ids, or a list of either",
        name,
    )


def text_prompt(text: str, name: str, tokenizer: Tokenizer) -> Prompt:
    """A text to complete."""
    try:
        return Prompt(tuple(tokenizer.encode(text, bos=True, eos=False)), text)
    except TokenizerError as error:
        raise RequestError(str(error), name) from None


def token_ids(values: list[Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """Ids that the model has."""
    for value in values:
        if not is_whole(value) or not 0 <= value < vocab_size:
            raise RequestError(
                f"{name} holds {short_repr(value)}; token ids are whole numbers from 0 to {vocab_size - 1}", name
            )
    return tuple(values)


def chat_prompt(messages: object, name: str, tokenizer: Tokenizer) -> Prompt:
    """A dialog to answer; `name` is where it stands in the body, as messages[0] or dialog[1][0] do."""
    try:
        if not isinstance(messages, list):
            raise RequestError(f"{name} is a {kind_of(messages)}; it must be a list of messages", _option(name))
        dialog = [_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]
        return Prompt(tuple(tokenizer.encode_dialog(dialog)))
    except (DialogError, TokenizerError) as error:
        message = str(error)
        if message.startswith("dialog["):
            message = name + message.removeprefix("dialog")
        raise RequestError(message, _option(name)) from None


def user_prompts(value: object, name: str, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """A text, or each of a list of texts, as a dialog of one message."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name} is {short_repr(value)}; in mode 'chat' it must be a string or a list of them", name)
    _bounded(texts, name)
    return tuple(chat_prompt([{"role": "user", "content": text}], name, tokenizer) for text in texts)


def _bounded(prompts: list[Any], name: str) -> None:
    # Before they are tokenized, which takes time.
    if len(prompts) > MAX_CHOICES:
        raise RequestError(f"{name} is a list of {len(prompts)} prompts; at most {MAX_CHOICES}", name)


def _message(message: object, where: str) -> dict[str, Any]:
    """A message with its content as one string, its role as chat formats know it, and nothing that would be ignored."""
    param = _option(where)
    if not isinstance(message, dict):
        raise RequestError(f"{where} is a {kind_of(message)}; a message is an object with role and content", param)
    _nothing_but(message, ("role", "content"), where, "a message")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, where, param) for part in content)
    elif not isinstance(content, str):
        raise RequestError(f"{where}: content is a {kind_of(content)}; it must be a string or a list of parts", param)
    role = message.get("role")
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: object, where: str, param: str) -> str:
    if not isinstance(part, dict):
        raise RequestError(f"{where}: a content part is an object, not a {kind_of(part)}", param)
    if part.get("type") != "text":
        kind = short_repr(part.get("type"))
        raise RequestError(f"{where}: content parts of type {kind} are not supported; only 'text'", param)
    _nothing_but(part, ("type", "text"), where, "a content part")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}: a content part of type 'text' needs a string 'text'", param)
    return part["text"]


def _nothing_but(given: dict[str, Any], names: tuple[str, str], where: str, what: str) -> None:
    for key, value in given.items():
        if key not in names and value is not None and value not in NOTHING:
            problem = f"{short_repr(key)} is not supported; {what} has {' and '.join(names)}"
            raise RequestError(f"{where}: {problem}", _option(where))


def _option(place: str) -> str:
    return place.partition("[")[0]
