"""What files of prompts and dialogs ask. No torch: a client of a server reads them too."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.config import ConfigError


def read_dialogs(path: str) -> list[dict[str, Any]]:
    """What a JSON file asks: an object with `dialog` and maybe options, a list of messages, or a list of such lists."""
    value = _json(_read(path), path)
    body = value if isinstance(value, dict) else {"dialog": value}
    dialogs = body.get("dialog")
    if not isinstance(dialogs, list) or not dialogs:
        raise ConfigError(f'{path}: needs a list of messages {{"role": ..., "content": ...}}, or a list of such lists')
    several = all(isinstance(item, list) for item in dialogs)
    return [body | {"dialog": dialog} for dialog in (dialogs if several else [dialogs])]


def read_prompts(path: str) -> list[tuple[str, dict[str, Any]]]:
    """What a file asks, and where it stands there: JSON objects, if it begins with one, else a prompt a line."""
    text = _read(path)
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{path}: holds no prompt; it needs one per line, or JSON objects, one per line")
    if not text.lstrip().startswith("{"):
        return [(where, {"prompt": line}) for where, line in lines]
    with suppress(ValueError, RecursionError):
        return [(path, json.loads(text))]
    bodies = [(where, _json(line, where)) for where, line in lines]
    for where, body in bodies:
        if not isinstance(body, dict):
            raise ConfigError(f'{where}: needs an object such as {{"prompt": "..."}}, not {type(body).__name__}')
    return bodies


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None


def _read(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
