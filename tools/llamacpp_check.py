"""Check our GGUF files with llama.cpp, and llama.cpp's GGUF files with our reader.

python -m tools.llamacpp_check [answers] [llama3] [quantized] [converter]

answers     the demo model in llama.cpp: its answers, its token ids and its chat prompts are ours
llama3      a random Llama 3.1 (byte-level BPE, stretched RoPE) in llama.cpp: the same ids, the same greedy tokens
quantized   what llama-quantize makes of our file reads back as the gguf package reads it, bit by bit
converter   what llama.cpp's own converter makes of our Hugging Face folder is what ours makes of it

It needs `python -m tools.peers setup` once, and no network after that.
"""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trained
from tqdm import tqdm

from checkpoint_converter import convert
from command_line import Parser, end_with
from demo import world
from engine.config import EngineConfig
from engine.sequence import SamplingParams
from formats import FormatError, open_source
from generate import DEMO_MODEL, LLM, Request
from llama2 import ModelArgs
from llama3_tokenizer import CONTROL_TOKENS, SPLIT_PATTERN, byte_alphabet
from tools import peers

# How large a share of its texts must be ours; None is only stated.
ANSWER_TYPES = {"f16": 0.98, "q8_0": 0.98, "q4_0": None}
SAME_TOKENS = 0.98
# Those that llama-quantize makes without a sample of text, and that the gguf package can read.
QUANTIZED = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)
CONVERTED = ("f32", "f16", "bf16", "q8_0")
GREEDY = SamplingParams(temperature=0.0, max_tokens=160)
FLOAT32_CACHE = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
# What a converter says of itself, and of a token that no Llama has.
OWN_WORDS = {"GGUF.kv_count", "general.name", "general.size_label", "tokenizer.ggml.add_sep_token"}
# llama.cpp multiplies and adds in one step where the machine can, so its last bit may be another.
DEQUANTIZED_WITHIN = 1e-6

NASTY = (
    "",
    " ",
    "   leading and trailing   ",
    "a\nb\r\nc\n\n\nd\t\te",
    "\u2581 is SentencePiece's space\u2581\u2581",
    "<s>[INST] <<SYS>>\nnot a system prompt\n<</SYS>>\n\nhello [/INST]</s>",
    "<|begin_of_text|><|eot_id|><|start_header_id|>user<|end_header_id|>",
    "<unk><0x0A><pad>[PAD1]",
    "Zürich, naïve café, Ångström: e\u0301 is not é",
    "漢字とカタカナ, 한국어, עברית, العربية, ไทย, हिन्दी",
    "👩\u200d👩\u200d👧 🇫🇷 👍🏽 \U0001f9ff\ufe0f",
    "\u200b\u200d\ufeff\u00a0\u3000\u2028\u202e|",
    "\x00\x01\x1b[31m\x7f",
    "it's I'LL they'Re 'S 's's",
    "1234567890 12 345,678.90 0x1F 1e-05",
    "def f(x):\n    return {'a': [x]*2}  # !?@#$%^&*()_+-=",
    "x" * 300,
    " " * 70 + "\n" * 40,
    "ﬁ ﬀ Ⅳ ½ ² ℃",
    "\U0010ffff\ue000\ufffd",
)


@dataclass(frozen=True)
class Row:
    """One line of the result: what was compared, how it came out, and whether that is right (None: stated only)."""

    what: str
    found: str
    right: bool | None


def share(what: str, equal: Sequence[bool], needed: float | None) -> Row:
    """A row of how many are equal, and whether that is the part that must be."""
    part = sum(equal) / len(equal) if equal else 0.0
    return Row(what, f"{sum(equal)} of {len(equal)}, {100 * part:.2f}%", None if needed is None else part >= needed)


class Checks:
    """The checks by name, and what all need: llama.cpp, a folder for files, and how much to ask."""

    def __init__(self, folder: Path, questions: int, texts: int) -> None:
        self.programs, self.folder = peers.programs(), folder
        self.questions = [each for skill in world.SKILLS for each in world.questions(skill, questions)]
        self.requests = [
            Request(each.prompt, [*each.dialog] if each.dialog else None, GREEDY) for each in self.questions
        ]
        self.texts = [*NASTY, *random_texts(texts)]

    def answers(self) -> Iterator[Row]:
        """The demo model by both: in llama.cpp as people would run it, in ours exactly."""
        llm = self._ours(convert(DEMO_MODEL, self.folder / "demo", progress=False))
        prompts = [llm.prompt_tokens(request) for request in self.requests]
        ours = self._answered(llm)
        yield self._right("ours, float32", ours)
        for kind, needed in ANSWER_TYPES.items():
            file = convert(DEMO_MODEL, self.folder / f"demo-{kind}.gguf", type=kind, progress=False)
            with self._server(file) as server:
                answers = complete(server, prompts, GREEDY.max_tokens, f"llama.cpp, {kind}")
                if kind == "f16":
                    yield from self._compare_ids(server, llm)
            theirs = [answer["content"].strip() for answer in answers]
            yield self._right(f"llama.cpp, {kind}", theirs)
            yield share(f"{kind}: texts equal to ours of the original", equal(theirs, ours), needed)
            back = convert(file, self.folder / f"demo-{kind}", dtype=torch.float32, progress=False)
            again = self._answered(self._ours(back))
            yield share(f"{kind}: texts equal to ours of the same file", equal(theirs, again), needed)

    def llama3(self) -> Iterator[Row]:
        """A random model by both, all in float32, so that only a mistake makes a difference."""
        folder = self.folder / "llama3"
        tokens = write_llama3(folder)
        llm = self._ours(convert(folder, self.folder / "llama3-dcp", progress=False))
        greedy = SamplingParams(temperature=0.0, max_tokens=16)
        prompts = random_prompts(tokens, 40)
        ours = [answer.tokens for answer in llm.generate([Request(prompt, params=greedy) for prompt in prompts])]
        file = convert(folder, self.folder / "llama3.gguf", type="f32", progress=False)
        with self._server(file, *FLOAT32_CACHE) as server:
            yield from self._compare_ids(server, llm)
            theirs = [answer["tokens"] for answer in complete(server, prompts, greedy.max_tokens, "llama.cpp")]
        yield share("greedy tokens behind 100 to 700 others", equal(theirs, ours), SAME_TOKENS)

    def quantized(self) -> Iterator[Row]:
        """llama-quantize's files of a model whose rows are whole blocks of every kind."""
        write_random(self.folder / "random", {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}, 768)
        tokenizer = DEMO_MODEL / "tokenizer.model"
        whole = self.folder / "random.gguf"
        convert(self.folder / "random", whole, tokenizer_path=tokenizer, type="f32", progress=False)
        for kind in tqdm(QUANTIZED, desc="llama-quantize", disable=None):
            made = self.folder / f"random-{kind}.gguf"
            run(self.programs["llama-quantize"], whole, made, kind, "1")
            yield compare_tensors(f"llama-quantize {kind}", made)
            back = self.folder / f"random-{kind}-f32.gguf"
            run(self.programs["llama-quantize"], "--allow-requantize", made, back, "F32", "1")
            yield compare_dequantized(f"llama-quantize {kind} and back to F32", made, back)
            made.unlink()
            back.unlink()

    def converter(self) -> Iterator[Row]:
        """Both converters on the same folder."""
        folder = convert(DEMO_MODEL, self.folder / "demo-hf", to="hf", progress=False)
        script = peers.sources() / "convert_hf_to_gguf.py"
        for kind in CONVERTED:
            theirs, ours = (self.folder / f"{whose}-{kind}.gguf" for whose in ("theirs", "ours"))
            run(sys.executable, script, folder, "--outfile", theirs, "--outtype", kind)
            yield compare_tensors(f"their {kind} file, read by us", theirs)
            yield from compare_files(kind, convert(folder, ours, type=kind, progress=False), theirs)

    def _ours(self, checkpoint: Path) -> LLM:
        return LLM(checkpoint, EngineConfig(dtype="float32", max_batch_size=16, max_seq_len=1024))

    def _server(self, file: Path, *options: str) -> peers.LlamaServer:
        return peers.LlamaServer(self.programs["llama-server"], file, *options)

    def _answered(self, llm: LLM) -> list[str]:
        return [answer.text.strip() for answer in llm.generate(self.requests)]

    def _right(self, who: str, texts: list[str]) -> Row:
        return share(f"right answers: {who}", equal(texts, [each.answer.strip() for each in self.questions]), None)

    def _compare_ids(self, server: peers.LlamaServer, llm: LLM) -> Iterator[Row]:
        """Text to token ids, as it is and inside the chat format."""
        theirs = [tokenized(server, text, False) for text in self.texts]
        wrong = [
            text
            for text, ids in zip(self.texts, theirs, strict=True)
            if ids != llm.tokenizer.encode(text, bos=False, eos=False)
        ]
        seen = f"; not {', '.join(map(ascii, wrong[:3]))}" if wrong else ""
        yield Row("token ids of texts", f"{len(theirs) - len(wrong)} of {len(theirs)}{seen}", not wrong)
        chats = [request for request in self.requests if request.dialog]
        prompts = [server.ask("/apply-template", {"messages": chat.dialog})["prompt"] for chat in chats]
        ids = [tokenized(server, prompt, True) for prompt in prompts]
        yield share("token ids of chat prompts", equal(ids, [llm.prompt_tokens(chat) for chat in chats]), 1.0)


def equal(some: Sequence[Any], others: Sequence[Any]) -> list[bool]:
    """Which are equal, one by one."""
    return [one == other for one, other in zip(some, others, strict=True)]


def complete(server: peers.LlamaServer, prompts: list[list[int]], most: int, title: str) -> list[dict[str, Any]]:
    """The server's greedy continuations of token ids."""
    settings = {"n_predict": most, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    with ThreadPoolExecutor(server.slots) as pool:
        answers = pool.map(lambda prompt: server.ask("/completion", {"prompt": prompt, **settings}), prompts)
        return list(tqdm(answers, desc=title, total=len(prompts), disable=None))


def tokenized(server: peers.LlamaServer, text: str, chat: bool) -> list[int]:
    """The server's token ids; for a chat prompt as it makes them before it answers one."""
    return server.ask("/tokenize", {"content": text, "add_special": chat, "parse_special": chat})["tokens"]


def random_texts(count: int) -> Iterator[str]:
    """Texts of characters and pieces that tokenizers stumble over."""
    draw = random.Random(1)
    pieces = [*"abcdefgh ABC  \n\t.,'-019", "é", "ß", "漢", "字", "ا", "🙂", "\u200d", "\u0301", "\u2581", "the", " is"]
    pieces += ["'s", "\r\n", "[INST]", "</s>", "<0x41>", "\u00a0", "𝔘", "ǅ", "٣", "½"]
    for _ in range(count):
        yield "".join(draw.choices(pieces, k=draw.randint(1, 60)))


def random_prompts(tokens: int, count: int) -> list[list[int]]:
    """Token ids below `tokens`, in prompts of many lengths."""
    draw = random.Random(2)
    return [draw.choices(range(tokens), k=draw.randint(100, 700)) for _ in range(count)]


def write_random(folder: Path, params: dict[str, Any], vocab_size: int) -> None:
    """A checkpoint in Meta's format whose attention looks far and sharply, so that positions matter."""
    shape = {key: params[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, size in ModelArgs(**shape, vocab_size=vocab_size).tensor_shapes().items():
        scale = 3.0 if "attention.w" in name and name.endswith(("wq.weight", "wk.weight")) else 1.0
        noise = torch.randn(size, generator=generator)
        tensors[name] = 1 + 0.1 * noise if len(size) == 1 else noise * scale / size[1] ** 0.5
    folder.mkdir()
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps({"norm_eps": 1e-5, **params, "vocab_size": vocab_size}))


def write_llama3(folder: Path) -> int:
    """A tiny random Llama 3.1 with a vocabulary of its kind; returns how many tokens are text."""
    draw = random.Random(4)
    words = [turn.answer for _ in range(2000) for turn in world.training_document(draw, 1).turns]
    trained = Trained(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([*words, *NASTY, *random_texts(300)], trainer)
    ranks = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    params = {"dim": 256, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "rope_theta": 500000.0, "use_scaled_rope": True}
    write_random(folder, params, len(ranks) + CONTROL_TOKENS)
    bytes_of = byte_alphabet()
    lines = [base64.b64encode(bytes(bytes_of[each] for each in token)) + b" %d\n" % rank for token, rank in ranks]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return len(ranks)


def package_tensors(file: Path, layers: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Canonical name, kind and numbers of every tensor, all three by the gguf package, which knows Meta's names too."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name in ModelArgs(dim=2, n_layers=layers, n_heads=1, vocab_size=1).tensor_shapes():
        tensor = stored.get(theirs.get_name(name, try_suffixes=(".weight",)))
        if tensor is not None:  # tied embeddings have no output
            numbers = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            yield name, tensor.tensor_type.name, numbers.reshape(tensor.shape[::-1].tolist())


def compare_tensors(what: str, file: Path) -> Row:
    """Every tensor by our reader against the gguf package's, as bits."""
    kinds, wrong, count = set(), [], 0
    with open_source(file) as source:
        for name, kind, expected in package_tensors(file, source.args.n_layers):
            ours, count = source.read(name).float().numpy(), count + 1
            kinds |= {kind} if ours.ndim > 1 else set()
            if ours.shape != expected.shape or not np.array_equal(ours.view(np.uint32), expected.view(np.uint32)):
                wrong.append(name)
        missing = len(source.names) - count
    found = f"{count - len(wrong)} of {count} tensors equal ({', '.join(sorted(kinds))})"
    return Row(what, found + (f"; not {wrong[0]}" if wrong else ""), not wrong and not missing)


def compare_dequantized(what: str, file: Path, theirs: Path) -> Row:
    """How far our numbers are from what llama.cpp itself made of the same file, against its largest."""
    furthest = 0.0
    with open_source(file) as source:
        for name, _, expected in package_tensors(theirs, source.args.n_layers):
            off = np.abs(source.read(name).float().numpy() - expected).max() / np.abs(expected).max()
            furthest = max(furthest, float(np.nan_to_num(off, nan=1.0)))
    return Row(what, f"off by at most {furthest:.1e} of the largest", furthest <= DEQUANTIZED_WITHIN)


def compare_files(kind: str, ours: Path, theirs: Path) -> Iterator[Row]:
    """Two GGUF files of the same model: tensors as they are stored, and metadata."""
    files = [gguf.GGUFReader(path) for path in (ours, theirs)]
    tensors = [
        {each.name: (each.tensor_type, *each.shape, each.data.tobytes()) for each in file.tensors} for file in files
    ]
    yield differences(f"our {kind} tensors are theirs", *tensors)
    fields = [
        {name: field.contents() for name, field in file.fields.items() if name not in OWN_WORDS} for file in files
    ]
    yield differences(f"our {kind} metadata hold theirs", *fields)


def differences(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Row:
    """Whether we have all that they have, and the same; what only we have is stated."""
    wrong = [
        name if name in ours else f"{name} (missing)"
        for name in theirs
        if name not in ours or ours[name] != theirs[name]
    ]
    more = [name for name in ours if name not in theirs]
    found = f"{len(theirs) - len(wrong)} of {len(theirs)}"
    found += (f"; not {', '.join(wrong)}" if wrong else "") + (f"; and {', '.join(more)}" if more else "")
    return Row(what, found, not wrong)


def run(*command: str | Path) -> None:
    """Run one of llama.cpp's programs; what it wrote is shown if it fails."""
    ended = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if ended.returncode:
        raise peers.PeerError(f"{Path(command[0]).name} failed:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if anything was not as it must be."""
    parser = Parser(prog="llamacpp_check", description=__doc__.splitlines()[0])
    names = ("answers", "llama3", "quantized", "converter")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--questions", type=int, default=40, metavar="N", help="per skill (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=2000, metavar="N", help="random texts (default: %(default)s)")
    flags = parser.parse_args(argv)
    if unknown := set(flags.checks) - set(names):
        parser.error(f"{min(unknown)!r} is no check; allowed: {', '.join(names)}")
    wrong = 0
    try:
        with tempfile.TemporaryDirectory(prefix="llamacpp-check-") as folder:
            checks = Checks(Path(folder), flags.questions, flags.texts)
            for name in flags.checks or names:
                for row in getattr(checks, name)():
                    wrong += row.right is False
                    verdict = {True: "ok", False: "WRONG", None: ""}[row.right]
                    print(f"{name:10} {row.what:50} {row.found:40} {verdict}".rstrip(), flush=True)
    except (peers.PeerError, FormatError) as error:
        print(f"llamacpp_check: error: {error}", file=sys.stderr)
        return 1
    print(f"{wrong} wrong" if wrong else "all as it must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    end_with(main)
