"""The tokenizer inside a GGUF file: the `tokenizer.*` keys, as llama.cpp reads and its converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formats.source import FormatError
from formats.vocabulary import FILLER, STOP_NAMES, TokenType, Vocabulary, checked_value, is_of

_KIND_BY_MODEL = {"llama": "sentencepiece", "gpt2": "bpe"}
# All three mean Llama 3's way to split text, and that a token's own text is never joined from parts.
_LLAMA_3_PRE = ("llama-bpe", "llama3", "llama-v3")
_ID_KEYS = {
    "bos_id": "tokenizer.ggml.bos_token_id",
    "eos_id": "tokenizer.ggml.eos_token_id",
    "unk_id": "tokenizer.ggml.unknown_token_id",
    "pad_id": "tokenizer.ggml.padding_token_id",
}
_END_OF_TURN, _END_OF_MESSAGE = "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"
# What llama.cpp takes where a file is silent; its defaults for the other kind are GPT-2's.
_DEFAULT_IDS = {"bos_id": 1, "eos_id": 2, "unk_id": 0}
_NO_ID = 0xFFFFFFFF
_FILLER_SCORE = -10000.0


def parse(fields: Mapping[str, Any], origin: str) -> Vocabulary:
    """A Vocabulary from the plain values of the keys, without the fillers at its end."""
    reader = _Reader(fields, origin)
    model = reader.value("tokenizer.ggml.model", str)
    if model not in _KIND_BY_MODEL:
        raise FormatError(f"{origin}: tokenizer.ggml.model is {model!r:.80}; 'llama' and 'gpt2' can be converted")
    kind = _KIND_BY_MODEL[model]
    pre = reader.value("tokenizer.ggml.pre", str, None)
    if kind == "bpe" and pre not in _LLAMA_3_PRE:
        raise FormatError(
            f"{origin}: tokenizer.ggml.pre is {pre!r:.80}; of byte-level BPE only Llama 3's way to split text, "
            f"{_LLAMA_3_PRE[0]!r}, can be converted"
        )
    tokens, types = reader.array("tokenizer.ggml.tokens", str), reader.array("tokenizer.ggml.token_type", int)
    scores = reader.array("tokenizer.ggml.scores", float) if kind == "sentencepiece" else []
    if len(types) != len(tokens) or (kind == "sentencepiece" and len(scores) != len(tokens)):
        raise FormatError(
            f"{origin}: {len(tokens)} tokens, {len(types)} types and {len(scores)} scores do not go together"
        )
    count = len(tokens)
    while count and types[count - 1] == TokenType.UNUSED and FILLER.fullmatch(tokens[count - 1]):
        count -= 1
    defaults = _DEFAULT_IDS if kind == "sentencepiece" else {}
    stops = (reader.id(key) for key in (_END_OF_TURN, _END_OF_MESSAGE))
    return Vocabulary(
        kind=kind,
        tokens=tuple(tokens[:count]),
        types=tuple(types[:count]),
        scores=tuple(scores[:count]),
        merges=tuple(reader.array("tokenizer.ggml.merges", str)) if kind == "bpe" else (),
        **{name: reader.id(key, defaults.get(name)) for name, key in _ID_KEYS.items()},
        stop_ids=tuple(id for id in stops if id is not None),
        add_bos=reader.value("tokenizer.ggml.add_bos_token", bool, True),
        add_eos=reader.value("tokenizer.ggml.add_eos_token", bool, False),
        add_space_prefix=reader.value("tokenizer.ggml.add_space_prefix", bool, kind == "sentencepiece"),
        chat_template=reader.value("tokenizer.chat_template", str, None),
        origin=origin,
    )


def fields_of(vocabulary: Vocabulary, rows: int | None) -> dict[str, Any]:
    """The keys and values to write, with a filler for every row of the embedding that has no token."""
    vocabulary.require_portable("GGUF")
    count = len(vocabulary.tokens)
    rows = count if rows is None else rows
    if rows < count:
        raise vocabulary.error(f"has {count} tokens, the model only {rows} rows for them: it belongs to another model")
    fillers = [f"[PAD{id}]" for id in range(count, rows)]
    if taken := set(fillers) & set(vocabulary.tokens):
        raise vocabulary.error(f"has a token {min(taken)!r}, the name that a filler would get")
    pieces = vocabulary.kind == "sentencepiece"
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.pre": "default" if pieces else _LLAMA_3_PRE[0],
        "tokenizer.ggml.tokens": [*vocabulary.tokens, *fillers],
    }
    if pieces:
        fields["tokenizer.ggml.scores"] = [*vocabulary.scores, *[_FILLER_SCORE] * len(fillers)]
    fields["tokenizer.ggml.token_type"] = [*map(int, vocabulary.types), *[int(TokenType.UNUSED)] * len(fillers)]
    if not pieces:
        fields["tokenizer.ggml.merges"] = list(vocabulary.merges)
    ids = {key: getattr(vocabulary, name) for name, key in _ID_KEYS.items()} | _stops(vocabulary)
    fields |= {key: id for key, id in ids.items() if id is not None}
    fields |= {
        "tokenizer.ggml.add_bos_token": vocabulary.add_bos and vocabulary.bos_id is not None,
        "tokenizer.ggml.add_eos_token": vocabulary.add_eos and vocabulary.eos_id is not None,
        "tokenizer.ggml.add_space_prefix": vocabulary.add_space_prefix,
    }
    if vocabulary.chat_template is not None:
        fields["tokenizer.chat_template"] = vocabulary.chat_template
    return fields


def _stops(vocabulary: Vocabulary) -> dict[str, int]:
    """Up to two more tokens that end an answer, first those that llama.cpp does not know by name."""
    by_name = {vocabulary.tokens[id]: id for id in vocabulary.stop_ids if id != vocabulary.eos_id}
    unknown = [id for name, id in by_name.items() if name not in STOP_NAMES]
    if len(unknown) > 2:
        names = ", ".join(repr(vocabulary.tokens[id]) for id in unknown)
        raise vocabulary.error(f"{names} end an answer; GGUF has room for two such tokens beside its end of text")
    turn, message = by_name.get("<|eot_id|>", by_name.get("<|im_end|>")), by_name.get("<|eom_id|>")
    if unknown and (turn is None or len(unknown) == 2):
        turn = unknown.pop()
    if unknown:
        message = unknown.pop()
    return {key: id for key, id in ((_END_OF_TURN, turn), (_END_OF_MESSAGE, message)) if id is not None}


class _Reader:
    """Values of a GGUF file's keys, checked for their types."""

    def __init__(self, fields: Mapping[str, Any], origin: str) -> None:
        self._fields, self._origin = fields, origin

    def value(self, key: str, type: type, *default: Any) -> Any:
        return checked_value(self._fields, key, type, self._origin, *default)

    def id(self, key: str, default: int | None = None) -> int | None:
        value = self.value(key, int, default)
        return None if value in (-1, _NO_ID) else value

    def array(self, key: str, type: type) -> list[Any]:
        values = self.value(key, list)
        if not all(is_of(value, type) for value in values):
            raise FormatError(f"{self._origin}: {key} has other elements than {type.__name__}")
        return values
