"""Llama 3's tokenizer.model: one line per token, its bytes in base64 and its rank, which is also its id.

The file does not name the 256 control tokens that follow; which they are is part of the format.
"""

from __future__ import annotations

import base64
import binascii
import re

from formats.source import FormatError
from formats.vocabulary import MAX_TOKENS, TokenType, Vocabulary, check_tokens
from formats.vocabulary_chat import LLAMA_3_TEMPLATE
from formats.vocabulary_merges import (
    BYTE_BY_CHARACTER,
    CHARACTER_BY_BYTE,
    disagreement,
    merges_of,
    ranked,
)
from llama3_tokenizer import (
    BEGIN_OF_TEXT,
    CONTROL_TOKENS,
    END_HEADER,
    END_OF_TEXT,
    END_OF_TURN,
    START_HEADER,
    control_tokens,
)

_LINE = re.compile(rb"([A-Za-z0-9+/]{1,16384}={0,2}) ([0-9]{1,9})\r?\n?")
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")
_TARGET = "a tiktoken file"
# What the chat format is made of. Of the others some were reserved once and got a purpose, or another number.
_FIXED = frozenset({BEGIN_OF_TEXT, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN})


def recognizes(content: bytes) -> bool:
    """Whether this is a tiktoken file, judged by its first line."""
    return _LINE.match(content) is not None


def parse(content: bytes, origin: str) -> Vocabulary:
    """A Vocabulary from the content of a tiktoken file."""
    by_rank: dict[int, str] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if line:
            token, rank = _token_and_rank(line, f"{origin}: line {number}")
            if by_rank.setdefault(rank, token) is not token or len(by_rank) > MAX_TOKENS:
                raise FormatError(f"{origin}: line {number} has the rank of another line, or is one too many")
    first = len(by_rank)
    if max(by_rank, default=-1) != first - 1:
        raise FormatError(f"{origin}: the ranks of its {first} tokens are not 0 to {first - 1}")
    tokens, control = [by_rank[rank] for rank in range(first)], control_tokens()
    check_tokens(tokens, origin)
    return Vocabulary(
        kind="bpe",
        tokens=(*tokens, *control),
        types=(TokenType.NORMAL,) * first + (TokenType.CONTROL,) * len(control),
        merges=tuple(map(" ".join, merges_of(ranked(tokens)))),
        bos_id=first,
        eos_id=first + 1,
        chat_template=LLAMA_3_TEMPLATE,
        origin=origin,
        originals={"tokenizer.model": content},
    )


def _token_and_rank(line: bytes, where: str) -> tuple[str, int]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise FormatError(f"{where} is {line[:80]!r}; a token in base64 and its rank are needed")
    try:
        return "".join(CHARACTER_BY_BYTE[byte] for byte in base64.b64decode(match[1], validate=True)), int(match[2])
    except binascii.Error as error:
        raise FormatError(f"{where} is no valid base64: {error}") from None


def serialize(vocabulary: Vocabulary) -> bytes:
    """The content of a tiktoken file; a vocabulary that it cannot express is an error that says why."""
    vocabulary.require_portable(_TARGET)
    first = len(vocabulary.ids_of(TokenType.NORMAL))
    _check_control(vocabulary, first)
    tokens = vocabulary.tokens[:first]
    lines = []
    for rank, token in enumerate(tokens):
        content = bytes(BYTE_BY_CHARACTER[character] for character in token)
        lines.append(b"%s %d\n" % (base64.b64encode(content), rank))
    original = vocabulary.originals.get("tokenizer.model", b"")
    if original.splitlines(keepends=True) == lines:
        return original
    reason = disagreement(ranked(tokens), [tuple(merge.split(" ")) for merge in vocabulary.merges])
    if reason:
        raise vocabulary.error(f"cannot be written as {_TARGET}: its merges are not in the order of its ids: {reason}")
    return b"".join(lines)


def _check_control(vocabulary: Vocabulary, first: int) -> None:
    """Refuse control tokens other than Meta's, whose names the file could not carry."""
    names, types = vocabulary.tokens[first:], vocabulary.types[first:]
    problem = None
    if TokenType.NORMAL in types:
        problem = "its control tokens do not come after all others"
    elif len(names) != CONTROL_TOKENS:
        problem = f"it has {len(names)} control and added tokens; the file means Llama 3's {CONTROL_TOKENS}"
    for place, (name, type, usual) in enumerate(zip(names, types, control_tokens(), strict=False)):
        if not problem and name != usual and (usual in _FIXED or not _RESERVED.fullmatch(name)):
            problem = f"token {first + place} is {name[:80]!r}, where the file means {usual!r}"
        if not problem and type is not TokenType.CONTROL:
            problem = f"token {first + place}, {name[:80]!r}, is no control token"
    if not problem and vocabulary.bos_id != first:
        problem = f"its texts do not begin with {BEGIN_OF_TEXT}"
    if problem:
        raise vocabulary.error(f"cannot be written as {_TARGET}: {problem}")
