"""What ends an answer, and what was added to a tokenizer, goes along through every format, to the server at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import hf_config, hf_tensors, random_tensors, write_hf
from tokenizer_fixture import train_ranks, train_tokenizer, write_byte_level, write_pieces

from engine.checkpoint import open_checkpoint
from formats import FormatError, open_source
from formats.conversion import convert
from llama2 import ModelArgs
from tokenizing import Tokenizer, TokenizerError, load_tokenizer

TURN_END, CUSTOM = "<|im_end|>", "<|stop_me|>"


def huggingface(
    folder: Path, kind: str, *, stops: list[str], eos: str | None = None, special: bool = True, text: str | None = None
) -> tuple[Path, dict[str, int]]:
    """A model with tokens added to its tokenizer, and their ids; a tokenizer.model beside knows nothing of them."""
    if kind == "pieces":
        original = train_tokenizer(folder / "t.model")
        written = write_pieces(folder / "tokenizer", original)
    else:
        original = train_ranks(folder / "t.model")
        written = write_byte_level(folder / "tokenizer", original)
    content = json.loads(written.read_text())
    config = json.loads(written.with_name("tokenizer_config.json").read_text())
    ids = content["model"]["vocab"] | {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    for token in [TURN_END, CUSTOM, *([text] if text else [])]:
        ids[token] = max(ids.values()) + 1
        entry: dict[str, Any] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append(
            entry | {"id": ids[token], "content": token, "special": special and token != text}
        )
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=max(ids.values()) + 4, ffn_hidden_dim=64)
    made = write_hf(folder / "hf", hf_tensors(random_tensors(args), args), hf_config(args), original)
    (made / "tokenizer.json").write_text(json.dumps(content))
    (made / "tokenizer_config.json").write_text(json.dumps(config | ({"eos_token": eos} if eos else {})))
    if stops:
        generation = {"eos_token_id": [ids[stop] for stop in stops]}
        (made / "generation_config.json").write_text(json.dumps(generation))
    return made, ids


def served(source: Path, folder: Path) -> Tokenizer:
    return load_tokenizer(open_checkpoint(convert(source, folder, progress=False)).tokenizer_path)


@pytest.mark.parametrize("kind", ["pieces", "byte level"])
@pytest.mark.parametrize("way", ["", "gguf", "megatron", "hf", "meta", "gguf megatron", "megatron hf gguf"])
def test_every_stop_reaches_the_server(tmp_path: Path, kind: str, way: str) -> None:
    source, ids = huggingface(tmp_path, kind, stops=[TURN_END, CUSTOM])
    if kind == "byte level" and "meta" in way:
        with pytest.raises(FormatError):  # tiktoken's file has Meta's control tokens only
            convert(source, tmp_path / "0", to="meta", progress=False)
        return
    for step, to in enumerate(way.split()):
        source = convert(source, tmp_path / f"{step}{'.gguf' * (to == 'gguf')}", to=to, progress=False)
    with open_source(source) as opened:
        stops = set(opened.vocabulary().stop_ids)
    assert {ids[TURN_END], ids[CUSTOM]} < stops
    assert served(source, tmp_path / "dcp").stop_ids == stops


def test_gguf_has_room_for_two_stops_that_nobody_knows_by_name(tmp_path: Path) -> None:
    source, ids = huggingface(tmp_path, "byte level", stops=[CUSTOM, "<|reserved_special_token_0|>"])
    with open_source(convert(source, tmp_path / "m.gguf", progress=False)) as opened:
        assert {ids[CUSTOM], ids["<|reserved_special_token_0|>"], ids[TURN_END]} < set(opened.vocabulary().stop_ids)
    stops = [ids[name] for name in (CUSTOM, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(FormatError, match="GGUF has room for two such tokens"):
        convert(source, tmp_path / "n.gguf", progress=False)


def test_a_tokenizer_model_that_says_less_is_not_served(tmp_path: Path) -> None:
    source, ids = huggingface(tmp_path, "byte level", stops=[], eos=TURN_END, text="<tool>")
    tokenizer = served(source, tmp_path / "dcp")
    assert (tokenizer.eos_id, ids["<tool>"]) == (ids[TURN_END], tokenizer.encode("<tool>", bos=False, eos=False)[0])
    assert tokenizer.encode("a <tool> b", bos=False, eos=False) == load_tokenizer(source / "tokenizer.json").encode(
        "a <tool> b", bos=False, eos=False
    )


@pytest.mark.parametrize("to", ["dcp", "hf", "gguf", "meta", "megatron"])
def test_the_end_of_a_text_is_no_text_though_nobody_called_it_special(tmp_path: Path, to: str) -> None:
    source, ids = huggingface(tmp_path, "pieces", stops=[], eos=TURN_END, special=False)
    made = convert(source, tmp_path / ("m.gguf" if to == "gguf" else "out"), to=to, progress=False)
    with open_source(made) as opened:
        assert opened.vocabulary().eos_id == ids[TURN_END]
    tokenizer = served(made, tmp_path / "served")
    assert tokenizer.eos_id == ids[TURN_END]
    assert ids[TURN_END] not in tokenizer.encode(f"a{TURN_END}", bos=False, eos=False)


@pytest.mark.parametrize("value", ["5", [1.5], [True], -1, {"a": 1}])
def test_stops_that_are_no_ids_are_refused(tmp_path: Path, value: Any) -> None:
    path = train_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(TokenizerError, match="generation_config.json: eos_token_id is .* must be token ids"):
        load_tokenizer(path)
