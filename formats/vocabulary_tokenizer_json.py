"""Reading Hugging Face's tokenizer.json, as far as Llama's two kinds of tokenizers need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formats.source import FormatError
from formats.vocabulary import (
    BYTE_TOKEN,
    MARKER,
    MAX_TOKENS,
    TokenType,
    Vocabulary,
    check_tokens,
    checked_value,
    is_of,
)
from formats.vocabulary_merges import Pair, disagreement, orphan, ranked, ranks_of, unmade
from llama3_tokenizer import SPLIT_PATTERN
from tokenizer_json import bare

PREPEND = {"type": "Prepend", "prepend": MARKER}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARKER}
_USUAL_NAMES = {"bos_id": ("<s>", "<|begin_of_text|>"), "eos_id": ("</s>", "<|end_of_text|>")}

Added = dict[int, tuple[str, bool]]
"""Tokens beside the model's own, by id: the text, and whether it is special."""


def parse(content: Mapping[str, Any], path: Path) -> Vocabulary:
    """A Vocabulary from what a tokenizer.json says; the special tokens are those of the usual names."""
    model = model_of(path, content)
    byte_level = any(part["type"] == "ByteLevel" for part in _parts(content, "pre_tokenizer"))
    tokens, types = _tokens(path, content, model, pieces=not byte_level)
    normal = [token for token, type in zip(tokens, types, strict=True) if type is TokenType.NORMAL]
    check_tokens(tokens, str(path))
    merges = _merges(path, model, set(tokens), set(normal))
    ranks: Mapping[str, int] = {}
    if byte_level:
        reason = _unlike_llama_3(content, model, normal, merges)
    else:
        ranks = ranks_of(normal, merges)
        reason = _unlike_llama_2(content, model, ranks, merges)
    places = ranked(tokens)
    ids = {
        name: next((places[token] for token in names if token in places), None) for name, names in _USUAL_NAMES.items()
    }
    reason = reason or conditional(content)
    return Vocabulary(
        kind="bpe" if byte_level else "sentencepiece",
        tokens=tuple(tokens),
        types=tuple(types),
        scores=() if byte_level else tuple(0.0 - ranks.get(token, 0) for token in tokens),
        merges=tuple(map(" ".join, merges)) if byte_level else (),
        unk_id=types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else None,
        add_space_prefix=not byte_level and _adds_prefix(content),
        origin=str(path),
        only_original=reason,
        **ids,
    )


def added_ends(content: Mapping[str, Any]) -> dict[str, bool]:
    """Whether encoding puts a token before and after every text, where the file says."""
    for step in _parts(content, "post_processor"):
        single = step.get("single")
        if step["type"] == "TemplateProcessing" and isinstance(single, list) and single:
            first, last = (isinstance(end, dict) and "SpecialToken" in end for end in (single[0], single[-1]))
            return {"add_bos": first, "add_eos": last}
    return {}


def model_of(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer.json says of its tokens and merges; another model than BPE is an error."""
    model = checked_value(content, "model", dict, str(path))
    if model.get("type", "BPE") != "BPE":
        raise FormatError(f"{path}: the model is of type {model['type']!r:.80}; only 'BPE' can be converted")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise FormatError(f"{path}: {key} is {model[key]!r:.80}; none is supported")
    return model


def _parts(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or the like, be it one or a sequence."""
    whole = content.get(key)
    if not isinstance(whole, dict):
        return []
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}[key]
    parts = whole.get(inner) if whole.get("type") == "Sequence" else [whole]
    return [part for part in parts if isinstance(part, dict) and "type" in part] if isinstance(parts, list) else []


def _tokens(
    path: Path, content: Mapping[str, Any], model: Mapping[str, Any], pieces: bool
) -> tuple[list[str], list[TokenType]]:
    """All tokens in the order of their ids and their types; an id without a token gets a filler."""
    vocab = checked_value(model, "vocab", dict, str(path))
    added = added_tokens(path, checked_value(content, "added_tokens", list, str(path), []))
    unknown = checked_value(model, "unk_token", str, str(path), "<unk>" if pieces else None)
    named = {id: text for id, (text, _) in added.items()}
    for token, id in vocab.items():
        if not is_of(id, int) or not 0 <= id < MAX_TOKENS:
            raise FormatError(f"{path}: token {token[:80]!r} has the id {id!r:.80}; allowed: 0 to {MAX_TOKENS - 1}")
        if named.setdefault(id, token) != token:
            raise FormatError(f"{path}: tokens {named[id][:80]!r} and {token[:80]!r} have the same id {id}")
    tokens, types = [], []
    for id in range(max(named, default=-1) + 1):
        token = named.get(id, f"[PAD{id}]")
        tokens.append(token)
        if id not in named:
            types.append(TokenType.UNUSED)
        elif token == unknown:
            types.append(TokenType.UNKNOWN)
        elif id in added:
            types.append(TokenType.CONTROL if added[id][1] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.BYTE if pieces and BYTE_TOKEN.fullmatch(token) else TokenType.NORMAL)
    return tokens, types


def added_tokens(path: Path, entries: Sequence[Any]) -> Added:
    """The entries of a file that lists added tokens, checked."""
    added: Added = {}
    for entry in entries:
        id, text = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if not is_of(id, int) or not 0 <= id < MAX_TOKENS or not isinstance(text, str) or id in added:
            raise FormatError(f"{path}: {entry!r:.80} is no added token with an id of its own and a text")
        added[id] = text, entry.get("special") is True
    return added


def conditional(content: Mapping[str, Any]) -> str | None:
    """Which added token is text under conditions that other formats cannot say; to be called once they are checked."""
    for entry in content.get("added_tokens") or []:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if entry.get(flag) is True]
        if flags and entry.get("special") is not True:
            return f"its added token {entry['content'][:80]!r} is {' and '.join(flags)}"
    return None


def _merges(path: Path, model: Mapping[str, Any], tokens: set[str], normal: set[str]) -> list[Pair]:
    """The merges but for those of added tokens, which are cut out of a text before anything is joined."""
    merges: list[Pair] = []
    for merge in checked_value(model, "merges", list, str(path)):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise FormatError(f"{path}: merge {merge!r:.80} is no pair of tokens")
        joined = (parts[0], parts[1], "".join(parts))
        if not tokens.issuperset(joined):
            raise FormatError(f"{path}: merge {merge!r:.80} is no pair of tokens that make a token")
        if normal.issuperset(joined):
            merges.append(joined[:2])
    return merges


def _adds_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a space comes before every text. Newer files say so in a way that means none before another space;
    Llama 2 was trained with it everywhere, and so it is carried.
    """
    steps = _parts(content, "pre_tokenizer")
    scheme = steps[0].get("prepend_scheme", steps[0].get("add_prefix_space", True)) if steps else "never"
    return PREPEND in _parts(content, "normalizer") or scheme not in ("never", False)


def _unlike_llama_2(
    content: Mapping[str, Any], model: Mapping[str, Any], ranks: Mapping[str, int], merges: Sequence[Pair]
) -> str | None:
    """Why this is no SentencePiece model of Llama's kind in other words."""
    normalizers, steps = _parts(content, "normalizer"), _parts(content, "pre_tokenizer")
    metaspace = (
        not normalizers
        and len(steps) == 1
        and steps[0]["type"] == "Metaspace"
        and steps[0].get("replacement") == MARKER
        and steps[0].get("split") is False
    )
    found = [entry["content"] for entry in content.get("added_tokens") or [] if entry.get("special") is not True]
    known = ([PREPEND, REPLACE], [REPLACE], [PREPEND, REPLACE, bare(found)])
    if not metaspace and (steps or normalizers not in known):
        return "it treats spaces unlike Llama's"
    if model.get("ignore_merges"):
        return "it takes whole texts as tokens, whatever its merges say"
    if missing := orphan(ranks):
        return f"it has the token {missing[:80]!r} but not all of its characters"
    if problem := disagreement(ranks, merges):
        return f"no scores mean the same as its merges: {problem}"
    return None


def _unlike_llama_3(
    content: Mapping[str, Any], model: Mapping[str, Any], normal: Sequence[str], merges: Sequence[Pair]
) -> str | None:
    """Why this does not cut text as Llama 3's tokenizer does."""
    steps = _parts(content, "pre_tokenizer")
    splits = (
        len(steps) == 2
        and steps[0].get("pattern") == {"Regex": SPLIT_PATTERN}
        and (steps[0].get("behavior"), steps[0].get("invert")) == ("Isolated", False)
        and not steps[1].get("add_prefix_space", True)
        and steps[1].get("use_regex") is False
    )
    if not splits or content.get("normalizer"):
        return "it does not split text as Llama 3's does"
    if not model.get("ignore_merges") and (token := unmade(ranked(normal), merges)):
        return f"it has a token, {token[:80]!r}, that its merges do not make"
    return None
