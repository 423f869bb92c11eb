"""Hugging Face's tokenizer.json: the two kinds that Llama models have, each as the tokenizer of its generation.

A file says how to cut text into words in a language of its own, with regular expressions. Only the ways that Llama
models are published with are taken; what reaches the tokenizers package is written here, not by the file.

Words used below:
    piece    a token of Llama 1 or 2, which is text with U+2581 for spaces, or one byte
    control  tokens that are no text, and that no text can become: they are kept from the encoder altogether
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import llama2_tokenizer
import llama3_tokenizer
from llama3_tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, SPLIT_PATTERN, ByteLevelModel, byte_alphabet, control_tokens
from tokenizing import Tokenizer, TokenizerError, read_json, stop_ids_beside

MAX_TOKENS = 1 << 20

_MARKER = "\u2581"
_REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _MARKER}
_PREPEND_SPACE = {"type": "Prepend", "prepend": _MARKER}
# How pieces are made of a text: by a normalizer, as Llama 2 came, or by a pre-tokenizer, as newer releases write it.
_PIECE_LAYOUTS: list[tuple[Any, Any]] = [
    ({"type": "Sequence", "normalizers": [_PREPEND_SPACE, _REPLACE_SPACES]}, None),
    ({"type": "Sequence", "normalizers": [_REPLACE_SPACES]}, None),
    (_REPLACE_SPACES, None),
    *(
        (None, {"type": "Metaspace", "replacement": _MARKER, "prepend_scheme": scheme, "split": False})
        for scheme in ("first", "always", "never")
    ),
]
_SPLIT = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
_BYTE_LAYOUTS: list[tuple[Any, Any]] = [
    (None, {"type": "Sequence", "pretokenizers": [_SPLIT, byte_level]})
    for byte_level in (
        # Offsets tell where words were in the text, which nobody asks.
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": False}
        for trim_offsets in (True, False)
    )
]
_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_UNKNOWN = "<unk>"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def bare(tokens: Iterable[str]) -> dict[str, Any]:
    """What follows Llama 2's normalizers where added tokens are found as SentencePiece finds pieces that users define.

    The space in front is put in front of such a token too, before it is looked for; this takes it away again.
    """
    every = "|".join(sorted(re.escape(token.replace(" ", _MARKER)) for token in tokens))
    return {"type": "Replace", "pattern": {"Regex": rf"\A{_MARKER}(?=(?:{every})\z)"}, "content": ""}


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json; the settings beside it are heeded."""
    path = Path(path)
    file = _File(path)
    if file.model.get("byte_fallback") is True:
        return llama2_tokenizer.Tokenizer(path, _Pieces(file), file.stop_ids)
    return llama3_tokenizer.Tokenizer(path, _byte_level_model(file), file.stop_ids)


class _File:
    """A tokenizer.json whose parts have the types and the ids that they must have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = read_json(path)
        self.model = self._object(self.content.get("model"), "model")
        self._check_model()
        self.ids = dict(self._object(self.model.get("vocab"), "model.vocab"))
        self.added = self._added_tokens()
        self.tokens = self._tokens_by_id()
        self.size = max(self.tokens, default=-1) + 1
        config = self._beside("special_tokens_map.json") | self._beside("tokenizer_config.json")
        self.bos_id = self._named(config, "bos_token", ("<s>", BEGIN_OF_TEXT))
        self.eos_id = self._named(config, "eos_token", ("</s>", END_OF_TEXT))
        self.stop_ids = stop_ids_beside(path)
        self.control = self._control_tokens()

    def error(self, problem: str) -> TokenizerError:
        """An error that names the file."""
        return TokenizerError(f"{self.path}: {problem}")

    def layout(self, known: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Which of the known pairs of normalizer and pre-tokenizer the file has."""
        given = self.content.get("normalizer"), self.content.get("pre_tokenizer")
        for layout in known:
            if layout == given:
                return layout
        raise self.error(f"normalizer and pre_tokenizer are {short_repr(given)}; no Llama model cuts text so")

    def encoder(self, normalizer: Any, pre_tokenizer: Any) -> Callable[[str], list[int]]:
        """Text to ids, by the file's merges and what it adds to them that is text."""
        try:
            import tokenizers
        except ImportError as error:
            raise self.error("needs the package tokenizers; pip install tokenizers") from error
        # What is only added must not be found among the words, so both get places of their own here.
        text_tokens = [token for token in self.model["vocab"] if token not in self.control]
        specification = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "BPE",
                "vocab": {token: place for place, token in enumerate(text_tokens)},
                "merges": [
                    merge for merge in self._merges() if self.control.keys().isdisjoint((*merge, "".join(merge)))
                ],
                "byte_fallback": self.model.get("byte_fallback", False),
                "ignore_merges": self.model.get("ignore_merges", False),
            },
        }
        added = [
            tokenizers.AddedToken(token, **{flag: entry.get(flag) is True for flag in _FLAGS})
            for token, entry in self.added.items()
            if token not in self.control
        ]
        try:
            encoder = tokenizers.Tokenizer.from_str(json.dumps(specification))
            encoder.add_tokens(added)
        except Exception as error:  # the package has no exceptions of its own
            raise self.error(f"cannot be used: {str(error)[:200]}") from error
        ids = {encoder.token_to_id(token): id for token, id in self.ids.items() if token not in self.control}
        # A batch of one, for a batch lets other threads run.
        return lambda text: [ids[place] for place in encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids]

    def _object(self, value: object, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{name} is {short_repr(value)}, but must be an object")
        return value

    def _check_model(self) -> None:
        if self.model.get("type", "BPE") != "BPE":
            raise self.error(f"model.type is {short_repr(self.model['type'])}; Llama models have BPE")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(name):
                raise self.error(f"model.{name} is {short_repr(self.model[name])}; Llama models have none")
        for name in ("byte_fallback", "ignore_merges"):
            if not isinstance(self.model.get(name, False), bool):
                raise self.error(f"model.{name} is {short_repr(self.model[name])}, but must be true or false")

    def _added_tokens(self) -> dict[str, dict[str, Any]]:
        entries = self.content.get("added_tokens") or []
        added: dict[str, dict[str, Any]] = {}
        if not isinstance(entries, list):
            raise self.error(f"added_tokens is {short_repr(entries)}, but must be a list")
        for entry in entries:
            token = self._object(entry, "one of added_tokens").get("content")
            if not isinstance(token, str) or not token or token in added:
                raise self.error(f"added_tokens has {short_repr(token)} twice, or it is no text")
            if self.ids.setdefault(token, entry.get("id")) != entry.get("id"):
                raise self.error(f"{short_repr(token)} has the ids {self.ids[token]} and {short_repr(entry.get('id'))}")
            added[token] = entry
        return added

    def _tokens_by_id(self) -> dict[int, str]:
        tokens: dict[int, str] = {}
        for token, id in self.ids.items():
            if not token or type(id) is not int or not 0 <= id < MAX_TOKENS:
                given = f"the token {short_repr(token)} has the id {short_repr(id)}"
                raise self.error(f"{given}; tokens are texts with ids of 0 to {MAX_TOKENS - 1}")
            if tokens.setdefault(id, token) != token:
                raise self.error(f"the tokens {short_repr(tokens[id])} and {short_repr(token)} have the same id {id}")
            try:
                token.encode()
            except UnicodeEncodeError:
                raise self.error(f"the token {short_repr(token)} is no text") from None
        return tokens

    def _beside(self, name: str) -> dict[str, Any]:
        path = self.path.with_name(name)
        return read_json(path) if path.is_file() else {}

    def _named(self, config: dict[str, Any], key: str, usual: Iterable[str]) -> int:
        """The id of a token that a config names, else the first one of the usual ones that there is."""
        value = config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        if name is None:
            name = next((name for name in usual if name in self.ids), None)
        if name is None:
            raise self.error(f"does not say which token its {key} is; put tokenizer_config.json beside it")
        if not isinstance(name, str) or name not in self.ids:
            where = "tokenizer_config.json or special_tokens_map.json"
            raise self.error(f"has no token {short_repr(name)}, which {where} gives as {key}")
        return self.ids[name]

    def _control_tokens(self) -> dict[str, int]:
        """What is marked as special, and what must be although it is not marked."""
        names = {token for token, entry in self.added.items() if entry.get("special") is True}
        names |= {*control_tokens(), "<s>", "</s>", _UNKNOWN}
        ids = {self.bos_id, self.eos_id, *self.stop_ids}
        return {token: id for token, id in self.ids.items() if token in names or id in ids}

    def _merges(self) -> list[tuple[str, str]]:
        """The merges, which older files write as one text each and newer ones as two."""
        given = self.model.get("merges")
        if not isinstance(given, list):
            raise self.error(f"model.merges is {short_repr(given)}, but must be a list")
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in given]
        for merge in merges:
            if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
                raise self.error(f"model.merges has {short_repr(merge)}, but each merges two tokens")
        return merges


class _Pieces:
    """A vocabulary of Llama 1 or 2 that answers as SentencePieceProcessor does."""

    def __init__(self, file: _File) -> None:
        found = [token for token, entry in file.added.items() if entry.get("special") is not True]
        steps = [_PREPEND_SPACE, _REPLACE_SPACES, bare(found)]
        layout = file.layout([*_PIECE_LAYOUTS, ({"type": "Sequence", "normalizers": steps}, None)])
        self._pieces = [file.tokens.get(id, "") for id in range(file.size)]
        self._text = {piece: id for piece, id in file.ids.items() if piece not in file.control}
        self._unknown = file.ids.get(_UNKNOWN, -1)
        self._control = frozenset(file.control.values()) - {self._unknown}
        self._bos_id, self._eos_id = file.bos_id, file.eos_id
        if missing := _BYTE_PIECES - self._text.keys():
            raise file.error(f"has no token {min(missing)}, without which not every text has ids")
        self.encode = self.encode_behind = file.encoder(*layout)
        if (layout[1] or {}).get("prepend_scheme") == "first":  # only a text at the beginning gets a space
            self.encode_behind = file.encoder(None, layout[1] | {"prepend_scheme": "never"})

    def vocab_size(self) -> int:
        return len(self._pieces)

    def bos_id(self) -> int:
        return self._bos_id

    def eos_id(self) -> int:
        return self._eos_id

    def decode(self, ids: list[int]) -> str:
        return " \u2047 " * len(ids)  # asked of the unknown piece only, which SentencePiece writes so

    def id_to_piece(self, id: int) -> str:
        return self._pieces[id]

    def piece_to_id(self, piece: str) -> int:
        return self._text.get(piece, self._unknown)

    def is_control(self, id: int) -> bool:
        return id in self._control

    def is_byte(self, id: int) -> bool:
        return self._pieces[id] in _BYTE_PIECES

    def is_unknown(self, id: int) -> bool:
        return id == self._unknown


def _byte_level_model(file: _File) -> ByteLevelModel:
    layout = file.layout(_BYTE_LAYOUTS)
    alphabet = byte_alphabet()
    if missing := alphabet.keys() - (file.ids.keys() - file.control.keys()):
        byte = min(alphabet[character] for character in missing)
        raise file.error(f"has no token for the byte {byte:#04x}, without which not every text has ids")
    bytes_by_id = [b""] * file.size
    for id, token in file.tokens.items():
        if token in file.control:
            continue
        if token in file.added:
            bytes_by_id[id] = token.encode()
        elif alphabet.keys() >= set(token):
            bytes_by_id[id] = bytes(map(alphabet.__getitem__, token))
        else:
            raise file.error(f"the token {short_repr(token)} is not written in byte-level BPE's alphabet")
    return ByteLevelModel(file.encoder(*layout), bytes_by_id, file.control, file.bos_id, file.eos_id)
