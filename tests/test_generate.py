"""The command line and `LLM`, on the demo model: what goes to stdout, and what bad input is told."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate
from checkpoint_converter import convert
from engine.config import EngineConfig, RequestError
from engine.parallel import Launch
from engine.sequence import FinishReason, SamplingParams
from generate import LLM, Request, main

PROJECT = Path(__file__).resolve().parent.parent
MODEL = PROJECT / "demo" / "model"
FRANCE = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
STORY = "Once upon a time there was a girl named Mia. Mia had a red ball."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(MODEL, tmp_path_factory.mktemp("demo") / "dcp", progress=False)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, EngineConfig(max_seq_len=256, max_batch_size=4))


def run(capsys: pytest.CaptureFixture[str], checkpoint: Path, *flags: str) -> tuple[int, str, str]:
    status = main(["--checkpoint", str(checkpoint), "--temperature", "0", *flags])
    out, err = capsys.readouterr()
    return status, out, err


def test_only_the_text_goes_to_stdout(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    status, out, err = run(capsys, checkpoint, "--mode", "chat", "--prompt", FRANCE, "--metrics")
    assert (status, out) == (0, ANSWER + "\n")
    for figure in ("generated tokens:", "time to first token:", "latency:", "per-token latency:", "throughput:"):
        assert figure in err


def test_the_first_token_is_timed_apart_from_all(llm: LLM) -> None:
    llm.generate([Request(prompt=STORY, params=SamplingParams(max_tokens=20, temperature=0.0))])
    assert llm.metrics.generated_tokens == 20
    assert 0 < llm.metrics.time_to_first_token_s < llm.metrics.latency_s


def test_streamed_or_not_the_text_is_the_same(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    streamed = run(capsys, checkpoint, "--prompt", STORY)
    assert streamed == run(capsys, checkpoint, "--prompt", STORY, "--no-stream")
    echoed = run(capsys, checkpoint, "--prompt", STORY, "--echo")
    assert echoed[1] == STORY + streamed[1]


def test_flags_may_be_spelt_with_underscores(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    flags = ("--max_new_tokens=3", "--max_seq_len", "64", "--top_p", "0.5", "--prompt", "_a_")
    status, out, _ = run(capsys, checkpoint, *flags)
    assert status == 0 and out.strip()


def test_a_dialog_is_answered_with_its_system_prompt_and_its_memory(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    dialog = [
        {"role": "system", "content": "Your name is Zora."},
        {"role": "user", "content": "What is your name?"},
    ]
    (tmp_path / "one.json").write_text(json.dumps(dialog))
    assert run(capsys, checkpoint, "--dialog", str(tmp_path / "one.json"))[1] == "My name is Zora.\n"
    memory = [
        {"role": "user", "content": "My name is Tom."},
        {"role": "assistant", "content": "Nice to meet you, Tom."},
        {"role": "user", "content": "What is my name?"},
    ]
    (tmp_path / "two.json").write_text(json.dumps([dialog, memory]))
    lines = run(capsys, checkpoint, "--dialog", str(tmp_path / "two.json"))[1].splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["My name is Zora.", "Your name is Tom."]
    (tmp_path / "three.json").write_text(json.dumps({"dialog": [dialog, memory], "max_new_tokens": 2}))
    lines = run(capsys, checkpoint, "--dialog", str(tmp_path / "three.json"))[1].splitlines()
    assert [json.loads(line)["generated_tokens"] for line in lines] == [2, 2]


def test_a_file_of_prompts_gives_a_line_of_json_each_in_order(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{FRANCE}\n\nHello!\n{FRANCE}\n")
    status, out, _ = run(capsys, checkpoint, "--prompts", str(prompts), "--mode", "chat", "--max-batch-size", "2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line["text"] for line in lines] == [ANSWER, "Hello! How can I help you?", ANSWER]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert {line["finish_reason"] for line in lines} == {"stop"}


def test_jsonl_prompts_have_options_of_their_own(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    bodies = [
        {"dialog": [{"role": "user", "content": FRANCE}], "stop": " France", "logprobs": 2},
        {"prompt": STORY, "max_new_tokens": 2, "prompt_logprobs": 1},
        {"prompt": STORY, "temperature": 1.0, "seed": 3, "logit_bias": {"9": 100}, "stop_token_ids": [9]},
    ]
    (tmp_path / "bodies.jsonl").write_text("\n".join(map(json.dumps, bodies)))
    out = run(capsys, checkpoint, "--prompts", str(tmp_path / "bodies.jsonl"))[1]
    stopped, short, ended = (json.loads(line) for line in out.splitlines())
    assert (stopped["text"], stopped["finish_reason"]) == ("The capital of", "stop")
    assert len(stopped["logprobs"]) == stopped["generated_tokens"] and len(stopped["logprobs"][0]["top"]) == 2
    assert (short["generated_tokens"], short["finish_reason"]) == (2, "length")
    assert short["prompt_logprobs"][0] is None and len(short["prompt_logprobs"]) == short["prompt_tokens"]
    assert {"id", "logprob", "top"} == short["prompt_logprobs"][1].keys() and "prompt_logprobs" not in stopped
    assert (ended["text"], ended["generated_tokens"], ended["finish_reason"]) == ("", 1, "stop")


def test_the_two_sample_files_are_answered_as_the_server_answers_them(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    (line,) = run(capsys, checkpoint, "--prompts", str(PROJECT / "sample_text.txt"))[1].splitlines()
    assert json.loads(line)["generated_tokens"] == 60 or json.loads(line)["finish_reason"] == "stop"
    text = run(capsys, checkpoint, "--dialog", str(PROJECT / "dialogs.txt"), "--max-new-tokens", "1")[1]
    assert "Paris" in text, "the file's own limit holds"


def test_prompts_are_read_whatever_other_programs_make_of_text_and_lines(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    bodies = [{"prompt": f"Say\u2028 {STORY}"}, {"prompt": FRANCE, "mode": "chat"}]
    for end in ("\r\n", "\r"):
        text = "\ufeff" + end.join(json.dumps(body, ensure_ascii=False) for body in bodies)
        (tmp_path / "bom.jsonl").write_bytes(text.encode())
        out = run(capsys, checkpoint, "--prompts", str(tmp_path / "bom.jsonl"))[1]
        lines = [json.loads(line) for line in out.split("\n")[:-1]]
        assert len(lines) == 2 and lines[1]["text"] == ANSWER
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": "What is your name?"}))
    flags = ("--prompts", str(tmp_path / "chat.jsonl"), "--mode", "chat", "--system", "Your name is Zora.")
    assert json.loads(run(capsys, checkpoint, *flags)[1])["text"] == "My name is Zora."


def test_only_the_first_rank_reads_what_all_could(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "generate.py"]
    flags = ["--checkpoint", str(checkpoint), "--temperature", "0", "--quiet", "--dialog", "-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    dialog = (PROJECT / "dialogs.txt").read_bytes()
    ended = subprocess.run(
        [*command, *flags], cwd=PROJECT, env=environment, input=dialog, capture_output=True, timeout=120
    )
    assert ended.returncode == 0 and b"Paris" in ended.stdout, ended.stderr


def test_a_full_disk_is_told_in_one_line(checkpoint: Path) -> None:
    command = [sys.executable, "generate.py", "--checkpoint", str(checkpoint), "--quiet", "--prompt", "x"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=PROJECT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr == "generate.py: error: the answer cannot be written: No space left on device\n"


def test_a_file_that_cannot_be_read_is_not_said_to_be_the_answer(monkeypatch, capsys) -> None:
    def run(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "/weights/__0_0.distcp")

    monkeypatch.setattr(generate, "run", run)
    assert main(["--prompt", "x"]) == 1
    assert capsys.readouterr().err == "generate.py: error: /weights/__0_0.distcp: Input/output error\n"


def test_a_closed_stdout_is_told_before_anything_is_loaded() -> None:
    command = f"{sys.executable} generate.py --checkpoint /nowhere --quiet --prompt x >&-"
    ended = subprocess.run(["bash", "-c", command], cwd=PROJECT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr == "generate.py: error: stdout is closed; send it somewhere, such as > FILE\n"


def test_the_same_seed_gives_the_same_text_in_a_crowd(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, seed=7, max_tokens=40)
    alone = llm.generate([Request(prompt=STORY, params=params)])[0]
    crowd = [Request(prompt=FRANCE, params=SamplingParams(temperature=1.5, max_tokens=9)) for _ in range(6)]
    beside = llm.generate([*crowd[:3], Request(prompt=STORY, params=params), *crowd[3:]])[3]
    assert beside.tokens == alone.tokens
    other = Request(prompt=STORY, params=SamplingParams(temperature=2.0, seed=8, max_tokens=40))
    assert llm.generate([other])[0].tokens != alone.tokens


def test_a_stop_string_ends_the_answer_before_it_and_frees_the_slot(llm: LLM) -> None:
    pieces: list[str] = []
    request = Request(
        dialog=[{"role": "user", "content": FRANCE}], params=SamplingParams(temperature=0.0), stop=("France is",)
    )
    completion = llm.generate([request], lambda _, text: pieces.append(text))[0]
    assert (completion.text, completion.finish_reason) == ("The capital of ", FinishReason.STOP)
    assert "".join(pieces) == completion.text
    llm.engine.step()
    assert (llm.engine.running, llm.engine.slots.free) == (0, 4)


def test_an_emoji_over_several_tokens_comes_in_one_piece(llm: LLM) -> None:
    pieces: list[str] = []
    request = Request(
        dialog=[{"role": "user", "content": "Show me the emoji for cat."}], params=SamplingParams(temperature=0.0)
    )
    completion = llm.generate([request], lambda _, text: pieces.append(text))[0]
    assert completion.text == "🐱" and pieces == ["🐱"] and len(completion.tokens) > 3


def test_guessed_tokens_change_no_answer(llm: LLM, checkpoint: Path) -> None:
    config = EngineConfig(256, 4, prefill_beside_decode=512, speculation="prompt_lookup")
    guessing = LLM(checkpoint, config)
    requests = [
        Request(
            prompt=prompt, params=SamplingParams(temperature=temperature, seed=8, max_tokens=150, **more), stop=stop
        )
        for prompt in (STORY, "Once")
        for temperature in (0.0, 1.2)
        for stop in ((), ("day in the", "red ball"))
        for more in ({"ignore_eos": True}, {"logprobs": 0, "repetition_penalty": 1.1})
    ]
    before = llm.engine.steps
    plain, guessed = llm.generate(requests), guessing.generate(requests)
    assert [(each.text, each.tokens, each.finish_reason) for each in guessed] == [
        (each.text, each.tokens, each.finish_reason) for each in plain
    ]
    assert [len(each.logprobs or ()) for each in guessed] == [len(each.logprobs or ()) for each in plain]
    assert guessing.engine.steps < llm.engine.steps - before and guessing.engine.slots.free == 4


def test_one_refused_request_stops_the_whole_call_and_leaves_nothing_behind(llm: LLM) -> None:
    good = Request(prompt=STORY, params=SamplingParams(max_tokens=5))
    with pytest.raises(RequestError, match="with max_seq_len 256 at most 255 fit"):
        llm.generate([good, Request(prompt="word " * 400)])
    llm.engine.step()
    assert not llm.engine.busy


def test_stops_may_come_as_a_list(llm: LLM) -> None:
    request = Request(dialog=[{"role": "user", "content": FRANCE}], params=SamplingParams(temperature=0), stop=[" Fra"])
    assert llm.generate([request])[0].text == "The capital of"


def test_prompt_logprobs_come_with_the_completion(llm: LLM) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    completion = llm.generate([Request(prompt=STORY, params=params)])[0]
    assert completion.text == "" and completion.tokens == []
    assert len(completion.prompt_logprobs) == completion.prompt_tokens - 1


def test_the_demo_model_answers_when_no_checkpoint_is_given_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "generate.py"), "--mode", "chat", "--prompt", FRANCE, "--temperature=0"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, ANSWER + "\n"), ended.stderr
    assert "using the embedded demo model" in ended.stderr


def test_a_reader_that_leaves_ends_the_program_quietly(checkpoint: Path) -> None:
    command = f"{sys.executable} generate.py --checkpoint {checkpoint} --prompt x --ignore-eos --max-new-tokens 500"
    ended = subprocess.run(
        ["bash", "-c", f"{command} --max-seq-len 600 | head -c 1"], cwd=PROJECT, capture_output=True, timeout=120
    )
    assert b"Traceback" not in ended.stderr


def damaged(checkpoint: Path, folder: Path, name: str, change) -> Path:
    """A copy of the checkpoint with one file changed."""
    copy = folder / "damaged"
    shutil.copytree(checkpoint, copy)
    path = copy / name
    content = change(path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    return copy


BAD_FLAGS = [
    (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0; it must be a finite number from 0 to 100"),
    (["--prompt", "x", "--temperature", "nan"], "temperature is nan"),
    (["--prompt", "x", "--top-p", "1.5"], "top_p is 1.5; it must be a finite number above 0, at most 1"),
    (["--prompt", "x", "--top-k", "-3"], "top_k is -3"),
    (["--prompt", "x", "--max-new-tokens", "-3"], "max_tokens is -3"),
    (["--prompt", "x", "--max-seq-len", "0"], "max_seq_len is 0; it must be a whole number of at least 1"),
    (["--prompt", "x", "--threads", "100000"], "threads is 100000; it must be at most 1024"),
    (["--prompt", "x", "--max-batch-size", "600"], "max_tokens_per_step is 512; it must be at least max_batch_size"),
    (["--prompt", "x", "--max-batch-size", "500", "--max-seq-len", "9999999"], "not enough memory: weights"),
    (["--prompt", "x", "--dtype", "float32", "--device", "cuda"], "device is 'cuda' but this machine"),
    (["--prompt", "x " * 60, "--max-seq-len", "16"], "tokens; with max_seq_len 16 at most 15 fit"),
    (["--prompt", "x", "--system", "Be kind."], "--system needs --mode chat"),
    (["--dialog", str(PROJECT / "dialogs.txt"), "--mode", "chat", "--system", "Hi."], "a dialog has its own"),
    (["--prompt", "x", "--mode", "chat", "--echo"], "--echo needs a --prompt that is completed"),
    (["--prompt", "x", "--logprobs", "2"], "--logprobs needs --prompts"),
    (["--prompt", "x", "--stop", ""], "stop must be at most 4 strings, none of them empty"),
    (["--prompt", "\ud800"], "surrogate"),
    (["--prompts", "/nowhere/prompts.txt"], "/nowhere/prompts.txt: cannot be read: No such file or directory"),
    (["--dialog", "/nowhere"], "/nowhere: cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[message[:40] for _, message in BAD_FLAGS])
def test_a_bad_flag_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, flags: list[str], message: str
) -> None:
    import torch

    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("says what happens without CUDA; this machine has it")
    status = main(["--checkpoint", str(checkpoint), "--quiet", *flags])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("generate.py: error: ") and err.count("\n") == 1 and message in err


BAD_FILES = [
    ("prompts", b"", "holds no prompt"),
    ("prompts", b'{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
    ("prompts", b'{"prompt": "a"}\n[1]', 'line 2: needs an object such as {"prompt": "..."}, not list'),
    ("prompts", b'{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens is 0; only prompt_logprobs can be had"),
    ("prompts", b'{"prompt": "a", "temprature": 1}', "unknown option 'temprature'; did you mean 'temperature'?"),
    ("prompts", b'{"prompt": "a", "dialog": []}', "a request needs either 'prompt' or 'dialog'"),
    ("prompts", b'{"prompt": "a", "temperature": "hot"}', "temperature is 'hot'"),
    ("prompts", b'{"prompt": "a"}\n{"prompt": [1.5, 2]}', "line 2: prompt has token id 1.5; ids are 0 to"),
    ("prompts", b'{"prompt": "a"}\n{"prompt": {"a": 1}}', "line 2: prompt must be a text or a list of token ids"),
    ("prompts", b'{"prompt": "a"}\n{"prompt": [5, 99999]}', "line 2: prompt has token id 99999"),
    ("prompts", b"Hello\n" + b"word " * 3000, "line 2: the prompt has"),
    ("prompts", b'{"prompt": "a", "stop": {"a": 1}}', "stop must be at most 4 strings"),
    ("prompts", b'{"prompt": "a", "stop_token_ids": ["a"]}', "stop_ids has token id 'a'"),
    ("prompts", b'{"prompt": "a", "mode": "poem"}', "mode is 'poem'; allowed: text_completion, chat"),
    ("prompts", b'{"prompt": "a"}\n' + b'{"prompt": ' + b"[" * 100_000, "line 2: not JSON"),
    ("prompts", b"\xff\xfe", "it is not UTF-8 text"),
    ("dialog", b"{}", "needs a list of messages"),
    ("dialog", b"not json", "not JSON"),
    ("dialog", b'[{"role": "robot", "content": "x"}]', "robot"),
    ("dialog", b'[{"role": "assistant", "content": "x"}]', "user"),
    ("dialog", b'[{"role": "user"}]', "content"),
    ("dialog", b'{"dialog": [{"role": "user", "content": "x"}], "temprature": 5}', "did you mean 'temperature'?"),
]


@pytest.mark.parametrize(("flag", "content", "message"), BAD_FILES)
def test_a_bad_file_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, flag: str, content: bytes, message: str
) -> None:
    (tmp_path / "file").write_bytes(content)
    status = main(["--checkpoint", str(checkpoint), "--quiet", f"--{flag}", str(tmp_path / "file")])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("generate.py: error: ") and err.count("\n") == 1 and message in err


BAD_CHECKPOINTS = [
    ("tokenizer.model", lambda content: content[:-20], "cut short"),
    ("model_args.json", lambda content: content.replace(b'"dim"', b'"dmi"'), "model_args.json"),
    ("model_args.json", lambda content: None, "missing"),
    ("manifest.json", lambda content: b"{}", "manifest.json"),
    (".metadata", lambda content: content[:-1] + b"x", "does not match its hash"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_CHECKPOINTS)
def test_a_damaged_checkpoint_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, name: str, change, message: str
) -> None:
    status = main(["--checkpoint", str(damaged(checkpoint, tmp_path, name, change)), "--quiet", "--prompt", "x"])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("generate.py: error: ") and err.count("\n") == 1 and message in err


def test_a_folder_that_is_not_converted_says_how_to_convert_it(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, MODEL, "--quiet", "--prompt", "x")
    assert status == 1 and err.count("\n") == 1 and "python checkpoint_converter.py" in err


def test_usage_errors_name_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        ([], "one of the arguments --prompt --prompts --dialog is required"),
        (["--prompt", "x", "--dialog", "y"], "not allowed with argument"),
        (["--prompt", "x", "--mode", "poem"], "invalid choice: 'poem'"),
        (["--prompt", "x", "--max-new-tokens", "many"], "invalid int value: 'many'"),
        (["--prompt", "x", "--temprature", "1"], "unrecognized arguments: --temprature"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(flags)
        err = capsys.readouterr().err
        assert ended.value.code == 2
        assert err.startswith("generate.py: error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_rank_that_is_not_the_first_speaks_only_if_it_is_still_there_after_a_while(
    local_rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    said_before, waited = [], []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        said_before.append(capsys.readouterr().err)

    def launch() -> Launch:
        return Launch(rank=local_rank, size=2, local_rank=local_rank, local_size=2)

    monkeypatch.setattr(Launch, "from_environment", staticmethod(launch))
    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["--prompt", "x", "--checkpoint", "/nowhere"]) == 1
    assert (waited, said_before) == (([], []) if local_rank == 0 else ([generate.FIRST_RANK_SPEAKS_WITHIN_S], [""]))
    assert capsys.readouterr().err.startswith("generate.py: error: /nowhere: ")


@pytest.mark.parametrize(("flags", "slots"), [([], 1), (["--max-batch-size", "3"], 3)])
def test_one_prompt_takes_one_slot_unless_more_are_wanted(
    checkpoint: Path, flags: list[str], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    class Watched(generate.LLM):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            loaded.append(self)

    monkeypatch.setattr(generate, "LLM", Watched)
    assert main(["--checkpoint", str(checkpoint), "--quiet", "--prompt", "x", "--max-new-tokens", "1", *flags]) == 0
    assert loaded[0].engine.limits.max_batch_size == slots


@pytest.mark.parametrize(("length", "warned"), [(4096, False), (4097, True)])
def test_more_positions_than_a_model_was_made_for_are_warned_of(
    checkpoint: Path, length: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "engine")
    generate.LLM(checkpoint, EngineConfig(max_seq_len=length, max_batch_size=1)).close()
    said = "max_seq_len is 4097, but the model was made for 4096 tokens; what it says behind them may be nonsense"
    assert [record.getMessage() for record in caplog.records] == [said] * warned
