"""A tokenizer apart from any file format: read from one kind of file, written as any other, with the same ids."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from formats.source import TOKENIZERS, FormatError
from formats.vocabulary_merges import BYTE_BY_CHARACTER
from tokenizing import Tokenizer, TokenizerError, load_tokenizer

MAX_TOKENS = 1 << 20
MAX_FILE_BYTES = 100_000_000
MARKER = "\u2581"
"""How SentencePiece writes a space inside a piece."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
FILLER = re.compile(r"\[PAD\d+\]")
"""The name of a token that stands for a row of the embedding which no text uses, as llama.cpp writes it."""
LLAMA_3_STOPS = frozenset({"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"})
STOP_NAMES = LLAMA_3_STOPS | {"<|im_end|>"}
"""Control tokens that end an answer whatever the settings say."""
GENERATION = "generation_config.json"

# Joining is about quadratic in a token's length; by this measure Llama 3's vocabulary has less than 10 million.
_MAX_SQUARED_LENGTHS = 1 << 25
_LARGEST_SCORE = 3.4e38
_REQUIRED = object()


class TokenType(IntEnum):
    """What a token is for, as SentencePiece and GGUF number it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a model and how text is cut into them; making one checks it, as files come from strangers.

    Kind "sentencepiece" (Llama 1 and 2) joins the neighbours whose piece has the highest of `scores`; spaces are U+2581
    and characters without a piece become BYTE tokens. Kind "bpe" (Llama 3) joins by the order of `merges`, each
    "left right"; NORMAL tokens are bytes, written in GPT-2's alphabet, all others are text.
    """

    kind: Literal["sentencepiece", "bpe"]
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    """Every token that ends an answer, ascending: the given ones, `eos_id`, and those of `STOP_NAMES`."""
    add_bos: bool = True
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    origin: str = "tokenizer"
    """The file that it was read from, for messages."""
    originals: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """The files that it was read from, by their usual names; they are written again as they were."""
    only_original: str | None = None
    """Why no other kind of file can express it, if so."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "types", tuple(map(TokenType, self.types)))
        except ValueError as error:
            raise self.error(f"{error}; token types are 1 to {len(TokenType)}") from None
        check_tokens(self.tokens, self.origin)
        if len(self.types) != len(self.tokens):
            raise self.error(f"has {len(self.tokens)} tokens but {len(self.types)} token types")
        _check_ids(self)
        (_check_pieces if self.kind == "sentencepiece" else _check_byte_level)(self)
        named = (id for id in self.ids_of(TokenType.CONTROL) if self.tokens[id] in STOP_NAMES)
        stops = {*self.stop_ids, *named} | ({self.eos_id} - {None})
        object.__setattr__(self, "stop_ids", tuple(sorted(stops)))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], origin: str = "tokenizer.ggml") -> Vocabulary:
        """From the `tokenizer.*` keys of a GGUF file and their plain Python values; `origin` names it in errors."""
        from formats import vocabulary_gguf

        return vocabulary_gguf.parse(fields, origin)

    def gguf_fields(self, rows: int | None = None) -> dict[str, Any]:
        """The `tokenizer.*` keys of a GGUF file for a model whose embedding has `rows` rows (default: no padding)."""
        from formats import vocabulary_gguf

        return vocabulary_gguf.fields_of(self, rows)

    def sentencepiece(self) -> bytes:
        """A SentencePiece tokenizer.model."""
        from formats import vocabulary_sentencepiece

        return self._written("sentencepiece", vocabulary_sentencepiece, "a SentencePiece model")

    def tiktoken(self) -> bytes:
        """A tiktoken tokenizer.model, as Meta publishes Llama 3's; the names of its control tokens are Meta's."""
        from formats import vocabulary_tiktoken

        return self._written("bpe", vocabulary_tiktoken, "a tiktoken file")

    def huggingface(self) -> dict[str, bytes]:
        """tokenizer.json and the files beside it, by name."""
        from formats import vocabulary_huggingface

        return vocabulary_huggingface.serialize(self)

    def served_files(self) -> dict[str, bytes]:
        """What a server needs, by name: the tokenizer's own kind of file, or Hugging Face's where it cannot be that.

        Where both are there, Hugging Face's has the say on the spaces around added tokens that are text.
        """
        own = "tokenizer.model" in self.originals and TokenType.USER_DEFINED not in self.types
        if own or "tokenizer.json" not in self.originals:
            try:
                model = self.sentencepiece() if self.kind == "sentencepiece" else self.tiktoken()
                return {"tokenizer.model": model} | self.stops_file()
            except FormatError:
                pass
        files = self.huggingface() | self.stops_file()
        files.pop("tokenizer.model", None)  # says less than tokenizer.json, and would go before it
        return files

    def served(self) -> Tokenizer:
        """The tokenizer that a server makes of the served files; what it refuses is an error."""
        files = self.served_files()
        with tempfile.TemporaryDirectory(prefix="llama-tokenizer-") as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            path = Path(folder, next(name for name in TOKENIZERS if name in files))
            try:
                return load_tokenizer(path)
            except TokenizerError as error:
                raise self.error(f"cannot be served: {str(error).removeprefix(f'{path}: ')}") from None

    def generation_config(self) -> dict[str, Any]:
        """What transformers, and a server, need to know for generating: the ends of a text, and of answers."""
        stops = list(self.stop_ids)
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
            "pad_token_id": self.pad_id,
        }
        return {key: value for key, value in ids.items() if value is not None}

    def stops_file(self) -> dict[str, bytes]:
        """generation_config.json, by name, where something ends an answer that is not known to by its name.

        A tiktoken file does not say which token is the end of a text.
        """
        named = {id for id in self.stop_ids if self.kind == "bpe" and self.tokens[id] in LLAMA_3_STOPS}
        if set(self.stop_ids) <= (named if self.kind == "bpe" else {self.eos_id}):
            return {}
        return {GENERATION: (json.dumps(self.generation_config(), indent=2) + "\n").encode()}

    def ids_of(self, *types: TokenType) -> list[int]:
        """The ids of the tokens of these types, ascending."""
        return [id for id, type in enumerate(self.types) if type in types]

    def token(self, id: int | None) -> str | None:
        """A token's name, None for a special token that the vocabulary does not have."""
        return None if id is None else self.tokens[id]

    def error(self, message: str) -> FormatError:
        """An error that names the file."""
        return FormatError(f"{self.origin}: {message}")

    def require_portable(self, target: str) -> None:
        """Refuse a target that cannot express the vocabulary."""
        if self.only_original is not None:
            raise self.error(f"cannot be written as {target}: {self.only_original}")

    def _written(self, kind: str, module: ModuleType, target: str) -> bytes:
        if self.kind != kind:
            raise self.error(f"cannot be written as {target}: it is of the other kind, {self.kind!r}")
        return module.serialize(self)


def read_vocabulary(path: Path) -> Vocabulary:
    """From a tokenizer.model, SentencePiece's or tiktoken's, or from a tokenizer.json, with the settings beside it.

    The settings are Hugging Face's: tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
    generation_config.json, and for a tokenizer.model the tokens which tokenizer.json or added_tokens.json add to it.
    """
    from formats import vocabulary_huggingface, vocabulary_sentencepiece, vocabulary_tiktoken

    if path.suffix == ".json":
        return vocabulary_huggingface.read(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FormatError(f"{path}: {size} bytes are too many for a tokenizer (at most {MAX_FILE_BYTES})")
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    kind = vocabulary_tiktoken if vocabulary_tiktoken.recognizes(content) else vocabulary_sentencepiece
    return vocabulary_huggingface.with_settings(kind.parse(content, str(path)), path.parent)


def checked_value(fields: Mapping[str, Any], key: str, type: type, origin: str, default: Any = _REQUIRED) -> Any:
    """The value at a key, which must be of the type; the default where it is missing or null."""
    value = fields.get(key)
    if value is None:
        if default is _REQUIRED:
            raise FormatError(f"{origin}: {key} is missing")
        return default
    if not is_of(value, type):
        raise FormatError(f"{origin}: {key} is {value!r:.80}; {type.__name__} is needed")
    return value


def is_of(value: object, type: type) -> bool:
    """Whether a value is of the type; a bool is no number."""
    return isinstance(value, type) and isinstance(value, bool) == (type is bool)


def check_tokens(tokens: Sequence[Any], origin: str) -> None:
    """Refuse what is no list of tokens, or too much to work with; to be called before tokens are joined."""
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise FormatError(f"{origin}: has {len(tokens)} tokens; 1 to {MAX_TOKENS} are allowed")
    ids: dict[str, int] = {}
    squares = 0
    for id, token in enumerate(tokens):
        if not isinstance(token, str) or not token:
            raise FormatError(f"{origin}: token {id} is {token!r:.80}; a text that is not empty is needed")
        if ids.setdefault(token, id) != id:
            raise FormatError(f"{origin}: tokens {ids[token]} and {id} are both {token[:80]!r}")
        squares += len(token) ** 2
    if squares > _MAX_SQUARED_LENGTHS:
        raise FormatError(f"{origin}: tokens are too long; the longest has {max(map(len, tokens))} characters")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{origin}: a token has a lone surrogate, which is no text") from None


def _check_ids(vocabulary: Vocabulary) -> None:
    named = {name: getattr(vocabulary, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    for name, id in [*named.items(), *(("stop", id) for id in vocabulary.stop_ids)]:
        if id is None:
            continue
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < len(vocabulary.tokens):
            raise vocabulary.error(f"the {name} token's id is {id!r}; allowed: 0 to {len(vocabulary.tokens) - 1}")


def _check_pieces(vocabulary: Vocabulary) -> None:
    if len(vocabulary.scores) != len(vocabulary.tokens):
        raise vocabulary.error(f"has {len(vocabulary.tokens)} tokens but {len(vocabulary.scores)} scores")
    if not all(isinstance(score, float) and abs(score) <= _LARGEST_SCORE for score in vocabulary.scores):
        raise vocabulary.error("has scores that are no finite numbers")
    for id in vocabulary.ids_of(TokenType.BYTE):
        if not BYTE_TOKEN.fullmatch(vocabulary.tokens[id]):
            raise vocabulary.error(f"token {id} is {vocabulary.tokens[id][:80]!r}; bytes are <0x00> to <0xFF>")
    count = len(vocabulary.ids_of(TokenType.BYTE))
    if count not in (0, 256):
        raise vocabulary.error(f"has tokens for {count} bytes; all 256 or none are needed")


def _check_byte_level(vocabulary: Vocabulary) -> None:
    normal = {vocabulary.tokens[id] for id in vocabulary.ids_of(TokenType.NORMAL)}
    if others := set("".join(normal)) - BYTE_BY_CHARACTER.keys():
        token = next(token for token in normal if not others.isdisjoint(token))
        raise vocabulary.error(f"token {token[:80]!r} has characters that stand for no byte")
    if missing := BYTE_BY_CHARACTER.keys() - normal:
        byte = min(BYTE_BY_CHARACTER[character] for character in missing)
        raise vocabulary.error(f"has no token for the byte 0x{byte:02X}; all are needed")
    if vocabulary.ids_of(TokenType.BYTE):
        raise vocabulary.error("mixes byte tokens (type 6) with byte-level BPE")
    seen = set()
    for merge in vocabulary.merges:
        parts = merge.split(" ") if isinstance(merge, str) else ()
        if len(parts) != 2 or not normal.issuperset((*parts, "".join(parts))):
            raise vocabulary.error(f"merge {str(merge)[:80]!r} is no pair of tokens that make a token")
        if merge in seen:
            raise vocabulary.error(f"merge {merge[:80]!r} is there twice")
        seen.add(merge)
