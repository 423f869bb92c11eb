"""From a client's bytes to JSON within limits, and from JSON to fields of the right type."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from itertools import accumulate
from reprlib import repr as short_repr
from typing import Any

from engine.config import RequestError, nearest

MAX_JSON_DEPTH = 32
MAX_INTEGER_DIGITS = 20  # the largest seed has 19; far larger ones do not even fit a float
MAX_NAME = 64  # characters of an unknown name that an error repeats

# Possessive, so that no text makes it go back; an unterminated string reaches to the end.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(r"[][{}]")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
NOTHING = ("", [], {})  # what asks for nothing where something is not supported
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class DepthError(RequestError):
    """JSON that is nested too deeply to be read at all."""


def text_of(body: bytes) -> str:
    """The text of a body, without a byte order mark."""
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text; numbers are finite, strings are text, nesting and digits are limited."""
    depth = max(accumulate(map(_STEP.__getitem__, _BRACKET.findall(_STRING.sub("", text)))), default=0)
    if depth > MAX_JSON_DEPTH:
        raise DepthError(f"the JSON is nested {depth} levels deep; at most {MAX_JSON_DEPTH}")
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    if _SURROGATE.search(text):  # an escaped pair is fine, half of one is not
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestError("the JSON holds a lone surrogate (\\ud800 to \\udfff), which is no text") from None
    return value


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds, whatever its content type says."""
    text = text_of(body)
    if not text.strip():
        raise RequestError("the body is empty; a JSON object is needed")
    value = parse_json(text)
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {kind_of(value)}; a JSON object is needed")
    return value


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int | float, "number"), (str, "string"), (list, "list"), (dict, "object"))
    return next(name for kind, name in kinds if isinstance(value, kind))


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise RequestError(f"the JSON holds a whole number of {len(digits)} digits; at most {MAX_INTEGER_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise RequestError(f"the JSON holds {short_repr(digits)}, which is not a finite number")
    return number


def _no_constant(name: str) -> None:
    raise RequestError(f"the JSON holds {name}; numbers must be finite")


def is_whole(value: object) -> bool:
    """Whether a JSON value is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


class Fields:
    """The members of a JSON object, read by type; a name that is not allowed is refused.

    null counts as absent, and so does, of what is not supported, all that is empty: it asks for nothing.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        allowed: Collection[str],
        unsupported: Collection[str] = (),
        where: str = "",
    ) -> None:
        self._values = {
            name: value
            for name, value in values.items()
            if value is not None and not (name in unsupported and value in NOTHING)
        }
        self._where = where
        for name in self._values:
            if name in allowed:
                continue
            if name in unsupported:
                raise self.error(name, "is not supported by this server; leave it out")
            shown = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
            hint = nearest(name, list(allowed)) if len(name) <= MAX_NAME else "its name is too long"
            raise RequestError(f"unknown option {where + shown!r}; {hint}", where + shown)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def error(self, name: str, problem: str) -> RequestError:
        """An error about one field."""
        return RequestError(f"{self._where}{name} {problem}", self._where + name)

    def given(self, names: Collection[str]) -> list[str]:
        """Which of some names are there."""
        return [name for name in names if name in self._values]

    def only_one(self, names: Collection[str], *, required: bool) -> str | None:
        """The one of some names that is there; two exclude each other."""
        given = self.given(names)
        if len(given) > 1:
            raise self.error(given[1], f"cannot stand beside {given[0]}; give one of them")
        if required and not given:
            raise self.error(next(iter(names)), "is missing" + (f" (or {', '.join(names[1:])})" if names[1:] else ""))
        return given[0] if given else None

    def get(self, name: str) -> Any:
        """A field of any type, None if absent."""
        return self._values.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def number(self, name: str) -> int | float | None:
        """A number, of which the range is checked where it is used."""
        value = self._values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self._wrong(name, "a number")
        return value

    def whole(self, name: str, least: int, most: int | None = None, default: int | None = None) -> int | None:
        """A whole number between limits."""
        value = self._values.get(name, default)
        if value is None:
            return None
        if not is_whole(value) or value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise self._wrong(name, f"a whole number, {limits}")
        return value

    def text(self, name: str) -> str | None:
        """A string."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def members(self, name: str) -> dict[str, Any] | None:
        """An object."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return value

    def elements(self, name: str) -> list[Any] | None:
        """A list that is not empty."""
        value = self._values.get(name)
        if value is not None and (not isinstance(value, list) or not value):
            raise self._wrong(name, "a list that is not empty")
        return value

    def _wrong(self, name: str, needed: str) -> RequestError:
        return self.error(name, f"is {short_repr(self._values.get(name))}; it must be {needed}")
