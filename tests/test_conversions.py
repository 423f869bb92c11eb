"""Every format to every other: the same tensors bit for bit, the same model, the same tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    hf_config,
    hf_tensors,
    meta_shards,
    random_tensors,
    write_hf,
    write_meta,
    write_ranks,
)
from safetensors.torch import load_file
from tiny_models import limits, model_of, random_weights
from tokenizer_fixture import train_tokenizer

from checkpoint_converter import convert, main
from engine.runner import Runner
from engine.scheduler import Segment, StepPlan
from formats import FORMATS, SINKS, FormatError, open_source
from formats.conversion import ConversionError
from formats.output import HashedFile
from formats.sink import byte_size
from llama2 import ModelArgs, RopeScaling

ROWS, LLAMA_3_ROWS = 424, 520
BASE = dict(dim=64, n_layers=2, n_heads=4, multiple_of=32)
MODELS = {
    "all heads": ModelArgs(**BASE, vocab_size=ROWS, norm_eps=1e-6),
    "grouped queries": ModelArgs(**BASE, vocab_size=ROWS, n_kv_heads=2, ffn_dim_multiplier=1.3),
    "tied": ModelArgs(**BASE, vocab_size=ROWS, n_kv_heads=2, tie_embeddings=True),
    "Llama 3": ModelArgs(
        **BASE,
        vocab_size=LLAMA_3_ROWS,
        n_kv_heads=2,
        tie_embeddings=True,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(factor=32.0),
    ),
}
READABLE, WRITABLE = [source.name for source in FORMATS], [sink.name for sink in SINKS]
BOTH = [name for name in WRITABLE if name in READABLE]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    llama_2, llama_3 = train_tokenizer(folder / "tokenizer.model"), write_ranks(folder / "ranks")
    return {name: llama_3 if name == "Llama 3" else llama_2 for name in MODELS}


def params_of(args: ModelArgs) -> dict[str, Any]:
    """A params.json as Meta would have written it."""
    params = BASE | {"vocab_size": args.vocab_size, "n_kv_heads": args.n_kv_heads, "norm_eps": args.norm_eps}
    if args.ffn_dim_multiplier is not None:
        params["ffn_dim_multiplier"] = args.ffn_dim_multiplier
    if args.rope_scaling is not None:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": args.rope_scaling.factor}
    return params | {"rope_theta": args.rope_theta}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]) -> Callable[[str], Path]:
    """A model as Meta would publish it, in two shards of float32."""
    made: dict[str, Path] = {}

    def make(model: str) -> Path:
        if model not in made:
            args = MODELS[model]
            made[model] = write_meta(
                tmp_path_factory.mktemp("original"),
                random_weights(args, seed=7),
                params_of(args),
                tokenizers[model],
                2,
                embedding_dimension=0 if model == "Llama 3" else 1,
            )
        return made[model]

    return make


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, original: Callable[[str], Path]) -> Callable[[str, str], Path]:
    """A model in one of our formats, converted from Meta's."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, name: str) -> Path:
        if (model, name) not in made:
            folder = tmp_path_factory.mktemp("stored") / name
            made[model, name] = convert(original(model), folder, to=name, progress=False)
        return made[model, name]

    return make


def architecture(args: ModelArgs) -> ModelArgs:
    """What makes the model, without what to serve and without how Meta arrives at the feed-forward width."""
    return dataclasses.replace(args, max_seq_len=1, max_batch_size=1, multiple_of=1, ffn_dim_multiplier=None)


def logits_of(args: ModelArgs, weights: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    runner = Runner(model_of(args, weights), limits(max_seq_len=64, max_tokens_per_step=64), "cpu", 1)
    return runner.run(StepPlan((Segment(0, 0, tuple(tokens), len(tokens)),)))


def assert_is(path: Path, model: str) -> None:
    args, weights = MODELS[model], random_weights(MODELS[model], seed=7)
    with open_source(path) as source:
        assert architecture(source.args) == architecture(args)
        assert source.dtype == torch.float32
        assert sorted(source.names) == sorted(weights)
        found = {name: source.read(name).clone() for name in source.names}
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        tokens = list(range(5, 45))
        difference = logits_of(source.args, found, tokens) - logits_of(args, weights, tokens)
        assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("given", "to"), list(itertools.product(BOTH, WRITABLE)))
def test_every_format_becomes_every_other_bit_for_bit(stored, original, tmp_path, model, given, to):
    assert_is(convert(stored(model, given), tmp_path / "out", to=to, progress=False), model)


@pytest.mark.parametrize("model", ["grouped queries", "Llama 3"])
@pytest.mark.parametrize("to", WRITABLE)
def test_the_tokenizer_comes_through_every_format(stored, original, model, to):
    with open_source(original(model)) as first, open_source(stored(model, to)) as second:
        before, after = first.vocabulary(), second.vocabulary()
    used = len(before.tokens)
    assert (after.kind, after.tokens[:used], after.merges) == (before.kind, before.tokens, before.merges)
    assert (after.bos_id, after.eos_id, after.stop_ids) == (before.bos_id, before.eos_id, before.stop_ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", [sink.name for sink in SINKS])
def test_another_dtype_rounds_each_number_once(original, tmp_path, to, dtype):
    out = convert(original("grouped queries"), tmp_path / "out", to=to, dtype=dtype, progress=False)
    weights = random_weights(MODELS["grouped queries"], seed=7)
    with open_source(out) as source:
        assert source.dtype == dtype
        for name, weight in weights.items():
            assert torch.equal(source.read(name).to(dtype), weight.to(dtype)), name
    first = convert(out, tmp_path / "back", to="meta", progress=False)
    with open_source(first) as source:
        assert source.dtype == dtype
        assert torch.equal(source.read("output.weight"), weights["output.weight"].to(dtype))


@pytest.mark.parametrize("to", WRITABLE)
def test_only_one_tensor_is_in_memory_at_a_time(original, tmp_path, monkeypatch, to):
    from formats.meta import MetaSource

    read, alive, most = MetaSource.read, [], 0

    def counting(self: MetaSource, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name).clone()
        alive[:] = [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(MetaSource, "read", counting)
    convert(original("all heads"), tmp_path / "out", to=to, progress=False)
    # Megatron joins gate and up, and query, key and value.
    assert most == (3 if to == "megatron" else 1)


# Meta


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("model", ["all heads", "Llama 3"])
def test_metas_shards_are_those_that_meta_would_have_saved(stored, tmp_path, model, count):
    args = MODELS[model]
    if args.n_kv_heads % count:
        with pytest.raises(FormatError, match=f"--shards is {count}; this model divides into 1, 2$"):
            convert(stored(model, "dcp"), tmp_path / "out", to="meta", shards=count)
        return
    out = convert(stored(model, "dcp"), tmp_path / "out", to="meta", shards=count, progress=False)
    rows = model == "Llama 3"
    expected = meta_shards(random_weights(args, seed=7), count, 0 if rows else 1)
    assert len(list(out.glob("*.pth"))) == count
    for number, shard in enumerate(expected):
        del shard["rope.freqs"]  # Meta's code computes them anew
        loaded = torch.load(out / f"consolidated.{number:02d}.pth", weights_only=True)
        if args.tie_embeddings:  # Meta's code has an output layer always, so the file shows the embedding as one
            assert loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()
            shard["output.weight"] = shard["tok_embeddings.weight"]
        assert loaded.keys() == shard.keys()
        for name, tensor in shard.items():
            assert torch.equal(loaded[name], tensor) and loaded[name].is_contiguous(), name
    for line in (out / "checklist.chk").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.md5((out / name).read_bytes()).hexdigest() == digest
    assert len((out / "checklist.chk").read_text().splitlines()) == count + 1


def metas_own_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """The rule in the FeedForward of Meta's model.py."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


@pytest.mark.parametrize(
    ("dim", "width"),
    [
        (4096, 11008),
        (4096, 14336),
        (8192, 28672),
        (2048, 8192),
        (3072, 8192),
        (5120, 13824),
        (64, 171),
        (64, 7),
        (96, 1),
    ],
)
def test_params_json_gives_the_feed_forward_width_by_metas_rule(dim, width):
    from formats.meta_sink import params_of as written

    params = written(ModelArgs(dim=dim, n_layers=1, n_heads=2, vocab_size=8, ffn_hidden_dim=width))
    given = {key: params[key] for key in ("multiple_of", "ffn_dim_multiplier") if key in params}
    assert metas_own_width(dim, **given) == width
    assert params.keys() <= {
        "dim",
        "n_layers",
        "n_heads",
        "vocab_size",
        "norm_eps",
        "multiple_of",
        "ffn_dim_multiplier",
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 32}, "Meta's format has no heads of 32: 4 heads of a model 64 wide have 16"),
        ({"rope_scaling": RopeScaling(low_freq_factor=2.0)}, "Meta's format has no RopeScaling"),
        ({"dim": 100_000, "n_heads": 4, "ffn_hidden_dim": 1}, "Meta's format has no feed-forward width of 1"),
    ],
)
def test_what_metas_format_cannot_say_is_refused(changes, expected):
    from formats.meta_sink import params_of as written

    with pytest.raises(FormatError) as caught:
        written(ModelArgs(**{**BASE, "vocab_size": 8} | changes))
    assert expected in str(caught.value)


# Hugging Face


@pytest.mark.parametrize("model", MODELS)
def test_transformers_gives_the_same_logits(stored, model):
    from transformers import AutoModelForCausalLM

    args, tokens = MODELS[model], list(range(5, 45))
    theirs = AutoModelForCausalLM.from_pretrained(stored(model, "hf"), dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        found = theirs(torch.tensor([tokens])).logits[0]
    expected = logits_of(args, random_weights(args, seed=7), tokens)
    assert (found - expected).abs().max() <= 1e-4
    assert expected.std() > 0.3  # logits that are all alike would prove nothing
    rope = theirs.config.rope_parameters
    assert rope["rope_theta"] == args.rope_theta and rope.get("factor", 1.0) == (32.0 if model == "Llama 3" else 1.0)
    assert theirs.config.eos_token_id == ([261, 268, 269] if model == "Llama 3" else 2)
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (100_000, 9), (1, 21)])
def test_safetensors_are_cut_at_the_limit_and_hold_transformers_tensors(stored, tmp_path, limit, files):
    args = MODELS["grouped queries"]
    out = convert(stored("grouped queries", "dcp"), tmp_path / "out", to="hf", max_file_size=limit, progress=False)
    paths = sorted(out.glob("*.safetensors"))
    assert len(paths) == files
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    expected = hf_tensors(random_weights(args, seed=7), args)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    largest = max(tensor.nbytes for tensor in expected.values())
    assert all(path.stat().st_size <= max(limit, largest) + 4096 for path in paths)
    if files == 1:
        assert paths[0].name == "model.safetensors" and not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert all(name in load_file(out / file) for name, file in index["weight_map"].items())


def test_a_hugging_face_folders_own_words_survive_another_dtype(tmp_path, stored):
    args = MODELS["grouped queries"]
    source = write_hf(
        tmp_path / "in",
        hf_tensors(random_tensors(args), args),
        hf_config(args, max_position_embeddings=16384),
        stored("grouped queries", "hf") / "tokenizer.model",
    )
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 5], "bos_token_id": 1}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}", "bos_token": "<s>"}))
    out = convert(source, tmp_path / "out", to="hf", dtype=torch.bfloat16, progress=False)
    assert json.loads((out / "generation_config.json").read_text()) == generation
    config = json.loads((out / "config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"], config["torch_dtype"]) == (
        16384,
        [2, 5],
        "bfloat16",
    )
    through = convert(convert(source, tmp_path / "dcp", progress=False), tmp_path / "back", to="hf", progress=False)
    config = json.loads((through / "config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (16384, [2, 5])
    with open_source(through) as read:
        assert read.vocabulary().chat_template == "{{ messages }}"


def test_a_tokenizer_json_alone_is_enough(stored, tmp_path):
    given = tmp_path / "in"
    given.mkdir()
    for path in stored("Llama 3", "hf").iterdir():
        if path.name not in ("tokenizer.model", "manifest.json"):
            (given / path.name).write_bytes(path.read_bytes())
    assert_is(convert(given, tmp_path / "dcp", progress=False), "Llama 3")
    assert (tmp_path / "dcp" / "tokenizer.json").exists() and not (tmp_path / "dcp" / "tokenizer.model").exists()
    assert_is(convert(tmp_path / "dcp", tmp_path / "meta", to="meta", progress=False), "Llama 3")


# Any


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:  # a wrong command line
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def outputs(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_ino) for p in sorted(folder.rglob("*")) if p.is_file()}


OUTPUTS = [(name, "out") for name in WRITABLE] + [("gguf", "out.gguf")] * ("gguf" in WRITABLE)


@pytest.mark.parametrize(("to", "name"), OUTPUTS)
def test_a_finished_conversion_is_not_repeated_and_another_needs_force(original, tmp_path, capsys, to, name):
    given, out = original("grouped queries"), tmp_path / "new" / name
    assert run(capsys, given, out, "--to", to)[0] == 0
    before = outputs(out.parent)
    for flags in ([], ["--force"]):
        status, said = run(capsys, given, out, "--to", to, *flags)
        assert status == 0 and "were already converted" in said
    assert outputs(out.parent) == before
    other = original("all heads")
    status, said = run(capsys, other, out, "--to", to)
    assert (status, said.splitlines()[-1]) == (
        1,
        f"checkpoint_converter.py: error: {out}: is there already, damaged or from other files or settings; "
        "--force replaces it",
    )
    assert outputs(out.parent) == before
    assert run(capsys, other, out, "--to", to, "--force")[0] == 0
    assert_is(out, "all heads")
    assert len(outputs(out.parent)) == len(before)
    largest = max((path for path in out.parent.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-100] ^= 1
    largest.write_bytes(content)
    status, said = run(capsys, other, out, "--to", to, "--force")
    assert status == 0 and "were already" not in said  # the hashes tell


@pytest.mark.parametrize(
    ("to", "option", "same", "other"),
    [
        ("meta", "shards", 2, 1),
        ("hf", "max_file_size", 5 * 10**9, 100_000),
        ("gguf", "type", "f32", "f16"),
        ("megatron", "tensor_parallel", 1, 2),
        ("dcp", "max_seq_len", 2048, 7),
    ],
)
def test_naming_the_default_is_the_same_conversion_and_another_value_is_not(
    original, tmp_path, to, option, same, other
):
    given, out = original("grouped queries"), tmp_path / "out"
    convert(given, out, to=to, progress=False)
    before = outputs(out)
    convert(given, out, to=to, progress=False, **{option: same})
    assert outputs(out) == before
    with pytest.raises(ConversionError, match="--force replaces it"):
        convert(given, out, to=to, progress=False, **{option: other})
    assert outputs(out) == before


@pytest.mark.parametrize(("to", "name"), OUTPUTS)
def test_force_destroys_nothing_of_others(original, tmp_path, capsys, to, name):
    given, out = original("grouped queries"), tmp_path / name
    run(capsys, given, out, "--to", to)
    if out.is_dir():
        (out / "thesis.txt").write_text("years of work")
        expected = "is a folder with other files (thesis.txt); choose a new one"
    else:
        (tmp_path / "out.gguf.manifest.json").unlink()
        expected = "is there already, and not made by this program; choose a new name"
    before = outputs(tmp_path)
    status, said = run(capsys, original("all heads"), out, "--to", to, "--force")
    assert status == 1 and expected in said
    assert outputs(tmp_path) == before


@pytest.mark.parametrize(("to", "name"), OUTPUTS)
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing(original, tmp_path, monkeypatch, to, name, failure):
    write, written = HashedFile.write, 0

    def failing(self: HashedFile, data: Any) -> int:
        nonlocal written
        written += 1
        if written > 12:
            raise failure
        return write(self, data)

    monkeypatch.setattr(HashedFile, "write", failing)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        convert(original("all heads"), tmp_path / "new" / name, to=to, progress=False)
    assert written >= 13
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("to", WRITABLE)
def test_the_bound_on_the_disk_that_is_needed_holds_and_is_no_fantasy(original, tmp_path, monkeypatch, to):
    from formats.conversion import make_sink

    with open_source(original("Llama 3")) as source:
        bound = make_sink(source, to, None, {}).size_bound()
    out = convert(original("Llama 3"), tmp_path / "out", to=to, progress=False)
    used = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert used <= bound + (1 << 20)
    assert bound <= 1.1 * used + 1000 * 4096


def test_a_single_gguf_file_goes_in_and_out(original, tmp_path):
    out = convert(original("Llama 3"), tmp_path / "small.gguf", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.gguf", "small.gguf.manifest.json"]
    manifest = json.loads((tmp_path / "small.gguf.manifest.json").read_text())
    assert manifest["files"]["small.gguf"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert_is(convert(out, tmp_path / "dcp", progress=False), "Llama 3")


@pytest.mark.parametrize(
    ("to", "options", "expected"),
    [
        ("dcp", {"shards": 2}, "--shards is no option of --to dcp; it belongs to --to meta"),
        ("hf", {"max_seq_len": 5}, "--max_seq_len is no option of --to hf; it belongs to --to dcp"),
        ("meta", {"max_file_size": 5}, "--max_file_size is no option of --to meta; it belongs to --to hf"),
        ("meta", {"type": "f16"}, "--type is no option of --to meta; it belongs to --to gguf"),
        ("meta", {"colour": 5}, "--colour is no option of --to meta; no format has it"),
        ("zip", {}, "--to is 'zip'; allowed: dcp, meta, hf"),
    ],
)
def test_an_option_of_another_format_is_refused_by_name(original, tmp_path, to, options, expected):
    with pytest.raises(ConversionError) as caught:
        convert(original("all heads"), tmp_path / "out", to=to, **options)
    assert expected in str(caught.value)


def test_the_command_line_has_every_option_and_refuses_what_does_not_belong(original, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in [option.name for sink in SINKS for option in sink.options]:
        assert f"--{name}" in text
    given = original("all heads")
    status, said = run(capsys, given, tmp_path / "out", "--to", "hf", "--shards", 2)
    assert status == 1 and "--shards is no option of --to hf" in said
    status, said = run(capsys, given, tmp_path / "out.gguf", "--to", "hf")
    assert status == 1 and "is the name of a GGUF file" in said
    status, said = run(capsys, given, tmp_path / "out", "--to", "hf", "--max-file-size", "5 apples")
    assert status == 2 and "'5 apples' is no size; write it as 500MB or 5GB" in said
    assert not (tmp_path / "out").exists()
    status, said = run(capsys, given, tmp_path / "out", "--to", "hf", "--max-file-size", "100KB")
    assert status == 0 and "converted to Hugging Face" in said and len(list((tmp_path / "out").glob("*.s*"))) > 2


@pytest.mark.parametrize(("text", "size"), [("7", 7), ("500MB", 500e6), ("5gb", 5e9), ("1TB", 1e12), ("2KB", 2e3)])
def test_sizes_are_read(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "5 GB", "GB", "1.5GB", "9" * 13, "٣MB", "999999999999TB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        byte_size(text)


def test_a_file_is_hashed_while_it_grows_whatever_the_pieces(tmp_path, monkeypatch):
    write = HashedFile._write

    def late(self: HashedFile, view: memoryview) -> None:
        time.sleep(0.005)  # the hashing has all the time to run ahead
        write(self, view)

    monkeypatch.setattr(HashedFile, "_write", late)
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 70_000, 5, 65_535, 65_536, 3_000_001, 0, 12]
    pieces = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8).numpy() for n in lengths] * 5
    with HashedFile(tmp_path / "file", ("sha256", "md5")) as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
            piece += 1  # whoever writes may use his memory again at once
        assert file.tell() == sum(lengths) * 5
    content = (tmp_path / "file").read_bytes()
    assert content[:1] == bytes([(int(pieces[0][0]) - 5) % 256])
    assert file.entry() == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert file.digest("md5") == hashlib.md5(content).hexdigest()


def test_a_damaged_converted_folder_is_no_source(stored, tmp_path):
    out = convert(stored("all heads", "meta"), tmp_path / "dcp", progress=False)
    path = out / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match="the content does not match its hash in manifest.json"):
        convert(out, tmp_path / "meta", to="meta", progress=False)
    assert not (tmp_path / "meta").exists()
