"""The tokenizer's files of a Hugging Face model: reading what stands beside tokenizer.json, and writing them anew."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chat_template import text_beside
from formats import vocabulary_tokenizer_json
from formats.source import FormatError, read_json
from formats.vocabulary import FILLER, GENERATION, MARKER, MAX_FILE_BYTES, TokenType, Vocabulary, checked_value
from formats.vocabulary_merges import Pair, merges_of, orphan, ranked, splits
from formats.vocabulary_tokenizer_json import (
    PREPEND,
    REPLACE,
    Added,
    added_ends,
    added_tokens,
    conditional,
    model_of,
)
from llama3_tokenizer import SPLIT_PATTERN
from tokenizer_json import bare
from tokenizing import TokenizerError, stop_ids_beside

TOKENIZER, CONFIG, SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED, TEMPLATE = "added_tokens.json", "chat_template.jinja"
_KEPT = (TOKENIZER, CONFIG, SPECIAL_MAP, ADDED, TEMPLATE)


def read(path: Path) -> Vocabulary:
    """From a tokenizer.json and the settings beside it."""
    content = read_json(path)
    return _with_settings(vocabulary_tokenizer_json.parse(content, path), content, path.parent)


def with_settings(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    """A tokenizer.model's vocabulary with what Hugging Face's files beside it say, if there are any."""
    if not any((folder / name).is_file() for name in (*_KEPT, GENERATION)):
        return vocabulary
    tokenizer = folder / TOKENIZER
    content = _optional(tokenizer)
    if content:
        _compare(vocabulary, tokenizer, checked_value(model_of(tokenizer, content), "vocab", dict, str(tokenizer)))
        added = added_tokens(tokenizer, checked_value(content, "added_tokens", list, str(tokenizer), []))
        if conditional(content):
            return read(tokenizer)  # says more than a tokenizer.model can
    else:
        listed = checked_value(_optional(folder / CONFIG), "added_tokens_decoder", dict, str(folder / CONFIG), {})
        entries = [{"id": _number(id)} | entry if isinstance(entry, dict) else id for id, entry in listed.items()]
        entries = entries or [{"id": id, "content": text} for text, id in _optional(folder / ADDED).items()]
        added = added_tokens(folder / (CONFIG if listed else ADDED), entries)
    return _with_settings(_with_added(vocabulary, added), content, folder)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _compare(vocabulary: Vocabulary, path: Path, vocab: Mapping[str, Any]) -> None:
    """Refuse the files of two different tokenizers in one folder."""
    for id in vocabulary.ids_of(TokenType.NORMAL):
        token = vocabulary.tokens[id]
        if vocab.get(token) != id:
            raise FormatError(
                f"{path}: {token[:80]!r} has the id {vocab.get(token)!r:.80} here, but {id} in {vocabulary.origin}: "
                "they are of different tokenizers; remove one of them or name the right one"
            )


def _with_added(vocabulary: Vocabulary, added: Added) -> Vocabulary:
    """The vocabulary with these tokens in their places, and fillers where there is neither."""
    tokens, types = list(vocabulary.tokens), list(vocabulary.types)
    for id in range(len(tokens), max(added, default=-1) + 1):
        tokens.append(f"[PAD{id}]")
        types.append(TokenType.UNUSED)
    for id, (text, special) in added.items():
        if tokens[id] != text:
            tokens[id], types[id] = text, TokenType.CONTROL if special else TokenType.USER_DEFINED
    scores = vocabulary.scores and (*vocabulary.scores, *[0.0] * (len(tokens) - len(vocabulary.tokens)))
    return dataclasses.replace(vocabulary, tokens=tuple(tokens), types=tuple(types), scores=scores)


def _with_settings(vocabulary: Vocabulary, content: Mapping[str, Any], folder: Path) -> Vocabulary:
    """The vocabulary with the special tokens and the chat template beside it; `content` is tokenizer.json's."""
    config, special_map = _optional(folder / CONFIG), _optional(folder / SPECIAL_MAP)
    ids = ranked(vocabulary.tokens)
    changes: dict[str, Any] = added_ends(content)
    for name in ("bos", "eos", "pad"):
        where, key = (CONFIG if f"{name}_token" in config else SPECIAL_MAP), f"{name}_token"
        entry = config.get(key, special_map.get(key))
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text in ids:
            changes[f"{name}_id"] = ids[text]
        elif text is not None and name != "pad":  # transformers makes a padding token that is missing
            raise FormatError(f"{folder / where}: {key} is {text!r:.80}, which is no token of the vocabulary")
    for name in ("add_bos", "add_eos"):
        if isinstance(config.get(f"{name}_token"), bool):
            changes[name] = config[f"{name}_token"]
    try:
        changes["chat_template"] = text_beside(folder / TOKENIZER)
        stops = stop_ids_beside(folder / TOKENIZER)
    except TokenizerError as error:
        raise FormatError(str(error)) from None
    changes["stop_ids"] = tuple(id for id in stops if id < len(ids))  # a padded model may have more
    # Tokens with a task of their own are no text, also where a file forgets to call them special.
    tasks = {*changes["stop_ids"], *(changes.get(f"{name}_id") for name in ("bos", "eos", "pad"))}
    changes["types"] = tuple(
        TokenType.CONTROL if id in tasks and type is TokenType.USER_DEFINED else type
        for id, type in enumerate(vocabulary.types)
    )
    if content:
        kept = {name: _content(folder / name) for name in _KEPT if (folder / name).is_file()}
        changes["originals"] = {**vocabulary.originals, **kept}
    return dataclasses.replace(vocabulary, **changes)


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FormatError(f"{path}: {path.stat().st_size} bytes are too many (at most {MAX_FILE_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None


def serialize(vocabulary: Vocabulary) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, if it has one, SentencePiece's tokenizer.model, by name."""
    if TOKENIZER in vocabulary.originals:
        return dict(vocabulary.originals)
    vocabulary.require_portable(TOKENIZER)
    pieces = vocabulary.kind == "sentencepiece"
    # This class takes tokenizer.json as it is. LlamaTokenizer would treat spaces at the beginning of a text otherwise.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            f"{name}_token": vocabulary.token(getattr(vocabulary, f"{name}_id"))
            for name in ("bos", "eos", "unk", "pad")
        },
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": vocabulary.chat_template,
    }
    files = {
        TOKENIZER: json.dumps(_pieces(vocabulary) if pieces else _byte_level(vocabulary), ensure_ascii=False),
        CONFIG: json.dumps({key: value for key, value in config.items() if value is not None}, indent=2) + "\n",
    }
    written = {name: text.encode() for name, text in files.items()}
    return written | ({"tokenizer.model": vocabulary.sentencepiece()} if pieces else {})


def _pieces(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece vocabulary: pairs instead of scores."""
    tokens, scores = vocabulary.tokens, vocabulary.scores
    # Spaces become markers before anything is joined, so a piece with a space is never made.
    normal = [id for id in vocabulary.ids_of(TokenType.NORMAL) if " " not in tokens[id]]
    ranks = ranked(tokens[id] for id in sorted(normal, key=lambda id: (-scores[id], id)))
    _refuse_what_pairs_cannot_say(vocabulary, ranks)
    prefix = vocabulary.add_space_prefix
    found = [tokens[id] for id in vocabulary.ids_of(TokenType.USER_DEFINED)]
    normalizers = [*[PREPEND] * prefix, REPLACE, *[bare(found)] * (prefix and bool(found))]
    steps = [
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
    ]
    model = {
        "unk_token": vocabulary.token(vocabulary.unk_id),
        "fuse_unk": True,
        "byte_fallback": bool(vocabulary.ids_of(TokenType.BYTE)),
        "ignore_merges": False,
        "vocab": {token: id for id, token in enumerate(tokens) if not _is_filler(vocabulary, id)},
    }
    return _tokenizer(
        vocabulary,
        model,
        merges_of(ranks),
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        post_processor=_template(vocabulary),
        decoder={
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": MARKER}, "content": " "}, *steps],
        },
    )


def _refuse_what_pairs_cannot_say(vocabulary: Vocabulary, ranks: Mapping[str, int]) -> None:
    problem = None
    if missing := orphan(ranks):
        problem = f"the token {missing[:80]!r} has characters that are no tokens themselves"
    by_score: dict[float, str] = {}
    for id in vocabulary.ids_of(TokenType.NORMAL):
        token = vocabulary.tokens[id]
        if splits(token, ranks) and by_score.setdefault(vocabulary.scores[id], token) != token:
            other = by_score[vocabulary.scores[id]]
            problem = f"the tokens {other[:80]!r} and {token[:80]!r} have the same score {vocabulary.scores[id]:g}"
    for id in vocabulary.ids_of(TokenType.UNUSED):
        token = vocabulary.tokens[id]
        if len(token) == 1 or splits(token, ranks):
            problem = f"text may become the token {token[:80]!r}, which is marked as unused"
    if problem:
        raise vocabulary.error(f"cannot be written as {TOKENIZER}: {problem}")


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE vocabulary that cuts text as Llama 3's does."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    template = _template(vocabulary)
    model = {
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {vocabulary.tokens[id]: id for id in vocabulary.ids_of(TokenType.NORMAL)},
    }
    return _tokenizer(
        vocabulary,
        model,
        [tuple(merge.split(" ")) for merge in vocabulary.merges],
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]},
        post_processor={"type": "Sequence", "processors": [level, template]} if template else level,
        decoder=level,
    )


def _tokenizer(
    vocabulary: Vocabulary, model: dict[str, Any], merges: Iterable[Pair], **steps: dict[str, Any] | None
) -> dict[str, Any]:
    added = [
        {
            "id": id,
            "content": vocabulary.tokens[id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": vocabulary.kind == "sentencepiece" and vocabulary.types[id] is TokenType.USER_DEFINED,
            "special": vocabulary.types[id] is not TokenType.USER_DEFINED,
        }
        for id in vocabulary.ids_of(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    fixed = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **steps,
        "model": fixed | model | {"merges": list(map(" ".join, merges))},
    }


def _template(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What puts the tokens for the beginning and the end around a text."""
    before = [vocabulary.bos_id] if vocabulary.add_bos and vocabulary.bos_id is not None else []
    after = [vocabulary.eos_id] if vocabulary.add_eos and vocabulary.eos_id is not None else []
    if not before and not after:
        return None

    def around(name: str, type_id: int) -> list[dict[str, Any]]:
        marks = [
            [{"SpecialToken": {"id": vocabulary.tokens[id], "type_id": type_id}} for id in ids]
            for ids in (before, after)
        ]
        return [*marks[0], {"Sequence": {"id": name, "type_id": type_id}}, *marks[1]]

    names = {vocabulary.tokens[id]: id for id in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in names.items()},
    }


def _is_filler(vocabulary: Vocabulary, id: int) -> bool:
    return vocabulary.types[id] is TokenType.UNUSED and FILLER.fullmatch(vocabulary.tokens[id]) is not None
