"""SentencePiece's tokenizer.model: a protocol buffer with the pieces, how they were trained and how text is normalized.

The few fields that matter are read and written here, since `sentencepiece` itself does neither without `protobuf`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from sentencepiece import SentencePieceProcessor

from formats.source import FormatError, first_line
from formats.vocabulary import MARKER, MAX_TOKENS, TokenType, Vocabulary
from formats.vocabulary_chat import LLAMA_2_TEMPLATE

Value = int | bytes

# Field numbers of sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK, _UNK_SURFACE = 3, 4, 24, 35, 44
_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_PIECES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
_DEFAULT_PIECES = {"unk": b"<unk>", "bos": b"<s>", "eos": b"</s>", "pad": b"<pad>"}
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_WHITESPACES, _ESCAPE_WHITESPACES = 1, 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2


def parse(content: bytes, origin: str) -> Vocabulary:
    """A Vocabulary from the content of a tokenizer.model."""
    try:
        return _parse(content, origin)
    except (_Damaged, UnicodeDecodeError, struct.error) as error:
        raise FormatError(
            f"{origin}: is neither a SentencePiece model nor a tiktoken file, or damaged ({first_line(error)})"
        ) from None


def _parse(content: bytes, origin: str) -> Vocabulary:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    denormalizer: dict[int, Value] = {}
    for number, value in _fields(content):
        if number == _PIECE:
            piece = dict(_fields(_bytes(value)))
            tokens.append(_bytes(piece.get(_TEXT, b"")).decode())
            scores.append(struct.unpack("<f", _bytes(piece.get(_SCORE, bytes(4))))[0])
            types.append(_int(piece.get(_TYPE, TokenType.NORMAL)))
            if len(tokens) > MAX_TOKENS:
                raise FormatError(f"{origin}: has more than {MAX_TOKENS} pieces")
        elif number in (_TRAINER, _NORMALIZER, _DENORMALIZER):
            section = {_TRAINER: trainer, _NORMALIZER: normalizer, _DENORMALIZER: denormalizer}[number]
            section.update(_fields(_bytes(value)))
    if not tokens:
        raise _Damaged("it has no pieces")
    names = {name: _bytes(trainer.get(_PIECES[name], _DEFAULT_PIECES[name])).decode() for name in _PIECES}
    ids = {
        name: next((id for id, token in enumerate(tokens) if token == names[name] and types[id] == wanted), None)
        for name, wanted in [("bos", TokenType.CONTROL), ("eos", TokenType.CONTROL), ("pad", TokenType.CONTROL)]
    }
    unknown = [id for id, type in enumerate(types) if type == TokenType.UNKNOWN]
    chats = ids["bos"] is not None and ids["eos"] is not None
    return Vocabulary(
        kind="sentencepiece",
        tokens=tuple(tokens),
        types=tuple(types),
        scores=tuple(scores),
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        unk_id=unknown[0] if unknown else None,
        add_bos=ids["bos"] is not None,
        add_space_prefix=bool(normalizer.get(_DUMMY_PREFIX, True)),
        chat_template=LLAMA_2_TEMPLATE if chats else None,
        origin=origin,
        originals={"tokenizer.model": content},
        only_original=_only_original(trainer, normalizer, denormalizer),
    )


def _only_original(
    trainer: dict[int, Value], normalizer: dict[int, Value], denormalizer: dict[int, Value]
) -> str | None:
    """What the other formats cannot say of a tokenizer that is not made like Llama's."""
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _BPE:
        return "its model type is not BPE"
    if normalizer.get(_CHARSMAP) or denormalizer.get(_CHARSMAP):
        return "it rewrites characters (its normalization is not 'identity')"
    if normalizer.get(_REMOVE_WHITESPACES, True):
        return "it removes extra spaces"
    if not normalizer.get(_ESCAPE_WHITESPACES, True) or trainer.get(_WHITESPACE_AS_SUFFIX, False):
        return "it treats spaces unlike Llama's"
    return None


def serialize(vocabulary: Vocabulary) -> bytes:
    """The content of a tokenizer.model: the original where there is one, what it lacks added to its end."""
    original = vocabulary.originals.get("tokenizer.model")
    content = _new(vocabulary) if original is None else _extended(vocabulary, original)
    try:
        model = SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError) as error:
        raise vocabulary.error(f"cannot be written as a SentencePiece model: {first_line(error)}") from None
    for name, found in (("bos", model.bos_id()), ("eos", model.eos_id())):
        id = getattr(vocabulary, f"{name}_id")
        if id is not None and found != id:
            raise vocabulary.error(f"cannot be written as a SentencePiece model: its {name} token is no control token")
    return content


def _extended(vocabulary: Vocabulary, original: bytes) -> bytes:
    """Repeated fields of a protocol buffer that is continued are continued too, and of others the last counts."""
    base = parse(original, vocabulary.origin)
    count = len(base.tokens)
    if (vocabulary.tokens[:count], vocabulary.types[:count], vocabulary.scores[:count]) != (
        base.tokens,
        base.types,
        base.scores,
    ):
        vocabulary.require_portable("a SentencePiece model with other tokens")
        return _new(vocabulary)
    renamed = [
        _field(_PIECES[name], vocabulary.token(id).encode())
        for name in ("bos", "eos")
        if (id := getattr(vocabulary, f"{name}_id")) not in (None, getattr(base, f"{name}_id"))
    ]
    return original + _pieces(vocabulary, count) + (_field(_TRAINER, b"".join(renamed)) if renamed else b"")


def _new(vocabulary: Vocabulary) -> bytes:
    vocabulary.require_portable("a SentencePiece model")
    if vocabulary.ids_of(TokenType.UNKNOWN) != [vocabulary.unk_id]:
        raise vocabulary.error("cannot be written as a SentencePiece model: it has not exactly one unknown token")
    trainer = [
        _field(_MODEL_TYPE, _BPE),
        _field(_VOCAB_SIZE, len(vocabulary.tokens)),
        _field(_BYTE_FALLBACK, bool(vocabulary.ids_of(TokenType.BYTE))),
        _field(_UNK_SURFACE, " \u2047 ".encode()),
    ]
    for name in _IDS:
        id = getattr(vocabulary, f"{name}_id")
        trainer.append(_field(_IDS[name], -1 if id is None else id))
        if id is not None:
            trainer.append(_field(_PIECES[name], vocabulary.token(id).encode()))
    normalizer = [
        _field(_NAME, b"identity"),
        _field(_CHARSMAP, b""),
        _field(_DUMMY_PREFIX, vocabulary.add_space_prefix),
        _field(_REMOVE_WHITESPACES, False),
        _field(_ESCAPE_WHITESPACES, True),
    ]
    return _pieces(vocabulary, 0) + _field(_TRAINER, b"".join(trainer)) + _field(_NORMALIZER, b"".join(normalizer))


def _pieces(vocabulary: Vocabulary, first: int) -> bytes:
    pieces = []
    for token, score, type in list(zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True))[first:]:
        if type is TokenType.USER_DEFINED:  # is looked for after spaces have become markers
            token = token.replace(" ", MARKER)
        content = _field(_TEXT, token.encode()) + _field(_SCORE, score)
        pieces.append(_field(_PIECE, content if type is TokenType.NORMAL else content + _field(_TYPE, int(type))))
    return b"".join(pieces)


class _Damaged(ValueError):
    """Bytes that are no protocol buffer of this kind."""


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a protocol buffer's message: numbers of variable length as int, all others as their bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise _Damaged(f"field of the unknown type {wire_type}")
        if position + size > len(message):
            raise _Damaged("it ends in the middle of a field")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _Damaged("it ends in the middle of a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Damaged("it has a number of more than 64 bits")


def _field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return _number(number << 3 | 2) + _number(len(value)) + value
    if isinstance(value, float):
        return _number(number << 3 | 5) + struct.pack("<f", value)
    return _number(number << 3) + _number(value)


def _number(value: int) -> bytes:
    """A number of variable length; negative ones are written as 64 bits."""
    value &= (1 << 64) - 1
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*content, value])


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise _Damaged("a field that is a number has another type")
    return value


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged("a field that is a text has another type")
    return value
