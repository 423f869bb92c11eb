"""Two ways to say how tokens are joined, and when they come to the same: a rank per token, or a list of pairs.

SentencePiece and tiktoken join the neighbours whose joint token ranks first; Hugging Face and GGUF's byte-level BPE
join the pair that comes first in a list. `merges_of` turns ranks into pairs, `disagreement` finds out whether pairs do
what ranks would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from llama3_tokenizer import byte_alphabet

Pair = tuple[str, str]

BYTE_BY_CHARACTER = byte_alphabet()
CHARACTER_BY_BYTE = {byte: character for character, byte in BYTE_BY_CHARACTER.items()}


def ranked(tokens: Iterable[str]) -> dict[str, int]:
    """Each token's rank in this order."""
    return {token: rank for rank, token in enumerate(tokens)}


def splits(token: str, ranks: Mapping[str, int]) -> list[Pair]:
    """Every pair of tokens that makes this one."""
    cuts = range(1, len(token))
    return [(token[:cut], token[cut:]) for cut in cuts if token[:cut] in ranks and token[cut:] in ranks]


def merges_of(ranks: Mapping[str, int]) -> list[Pair]:
    """The pairs that join as the ranks do: all splits of the first token, then of the second, and so on."""
    merges: list[Pair] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        merges += sorted(splits(token, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def ranks_of(tokens: Sequence[str], merges: Iterable[Pair]) -> dict[str, int]:
    """The ranks that these merges may stand for: tokens in the order in which pairs make them, then the others."""
    return ranked(dict.fromkeys([*map("".join, merges), *tokens]))


def disagreement(ranks: Mapping[str, int], merges: Sequence[Pair]) -> str | None:
    """Why joining these pairs may give other tokens than joining by rank, or None if it never does.

    Both do the same at every step if every split of every token is listed, in the order of the ranks. Trainers list
    one pair per token only. That is enough where it is the pair which the tokens of lower rank leave of the token:
    what becomes of a stretch of text between two tokens' bounds does not depend on its surroundings, so no other split
    of the token can ever stand in a text when its turn comes.
    """
    listed: dict[str, set[Pair]] = {}
    last = -1
    for pair in merges:
        token = "".join(pair)
        if ranks[token] < last:
            return f"{token[:80]!r} is joined later than tokens that come after it"
        last = ranks[token]
        listed.setdefault(token, set()).add(pair)
    every = {token: found for token in ranks if (found := splits(token, ranks))}
    if all(len(found) == len(listed.get(token, ())) for token, found in every.items()):
        return None
    for token in every:
        parts = tuple(join(token, ranks, below=ranks[token]))
        if len(parts) != 2 or parts not in listed.get(token, ()):
            return f"{token[:80]!r} is not joined from {' and '.join(repr(part[:80]) for part in parts)}"
    return None


def join(text: str, ranks: Mapping[str, int], below: int) -> list[str]:
    """The tokens of a text if only tokens of a rank below this one are joined."""
    return _join(text, lambda left, right: ranks.get(left + right, below), below)


def unmade(ranks: Mapping[str, int], merges: Sequence[Pair]) -> str | None:
    """The first token that these pairs do not make of its own text, or None if there is no such token."""
    order = {pair: rank for rank, pair in enumerate(merges)}
    for token in ranks:
        if len(_join(token, lambda left, right: order.get((left, right), len(order)), len(order))) > 1:
            return token
    return None


def orphan(ranks: Mapping[str, int]) -> str | None:
    """The first token with a character that is no token itself, or None; SentencePiece alone can join to such a one."""
    characters = {token for token in ranks if len(token) == 1}
    return next((token for token in ranks if len(token) > 1 and not characters.issuperset(token)), None)


def _join(text: str, rank_of: Callable[[str, str], int], below: int) -> list[str]:
    """Join the first of the neighbours that rank lowest until none rank below the limit."""
    parts = list(text)
    while len(parts) > 1:
        rank, place = min((rank_of(parts[n], parts[n + 1]), n) for n in range(len(parts) - 1))
        if rank >= below:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
