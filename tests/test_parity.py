"""The tasks that lm-eval scores are what their generator makes, and what it reads from us is what transformers says.

`python -m tools.parity` compares all scores with lm-eval itself; here a few items take the same way without it.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from checkpoint_converter import convert
from demo import world
from demo.tasks import write
from engine.config import EngineConfig
from generate import LLM, Request
from handler.generation import Generation, Service
from handler.protocol import understand
from handler.responses import Choice, Usage
from tools import parity
from tools.parity import Evaluation, ParityError, Row

PROJECT = Path(__file__).resolve().parent.parent
MODEL = PROJECT / "demo" / "model"
SEQ_LEN = 256
ITEMS = 2  # of each task
WITHIN = 1e-4


@dataclass(frozen=True)
class Model:
    """The demo model in transformers and in our engine, with the tokenizer that lm-eval takes."""

    reference: LlamaForCausalLM
    tokenizer: Any
    llm: LLM

    def ids(self, text: str) -> list[int]:
        """With the one token for the beginning of a text that lm-eval is told to add."""
        return self.tokenizer(text, add_special_tokens=True).input_ids

    def expected(self, ids: list[int], context: int) -> tuple[float, bool]:
        """The log-likelihood of what follows `context` tokens, and whether greedy decoding says just that."""
        with torch.inference_mode():
            logprobs = self.reference(torch.tensor([ids])).logits[0].float().log_softmax(-1)[context - 1 : -1]
        wanted = torch.tensor(ids[context:])
        return logprobs.gather(1, wanted[:, None]).sum().item(), bool((logprobs.argmax(1) == wanted).all())

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """What our server would say to a request at /v1/completions."""
        tokenizer = self.llm.tokenizer
        service = Service(tokenizer, "llama", SEQ_LEN, self.llm.args.vocab_size, 0, {})
        request = understand("v1/completions", "application/json", json.dumps(body).encode(), service)
        assert isinstance(request, Generation)
        asked = [
            Request(prompt=list(ids), params=request.params_for(place)) for place, ids in enumerate(request.prompts)
        ]
        choices = [
            Choice(done.text, tuple(done.tokens), done.logprobs, done.prompt_logprobs, str(done.finish_reason))
            for done in self.llm.generate(asked)
        ]
        return json.loads(request.renderer.whole(choices, Usage(0, 0)))

    def scored(self, items: list[tuple[list[int], int]], **options: Any) -> list[tuple[float, bool]]:
        """Log-likelihoods as lm-eval 0.4 asks for them and reads them off the answer."""
        body = {"model": "llama", "prompt": [ids for ids, _ in items], "temperature": 0, "max_tokens": 1}
        choices = self.answer(body | {"logprobs": 1, "seed": 1234, "echo": True} | options)["choices"]
        found = []
        for choice, (_, context) in zip(sorted(choices, key=lambda each: each["index"]), items, strict=True):
            # The first token has none, and the last one was generated.
            values = choice["logprobs"]["token_logprobs"][context:-1]
            tops = choice["logprobs"]["top_logprobs"][context:-1]
            greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
            found.append((sum(values), greedy))
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("parity")
    hugging_face = convert(MODEL, folder / "hf", to="hf", progress=False)
    served = convert(MODEL, folder / "dcp", progress=False)
    return Model(
        LlamaForCausalLM.from_pretrained(hugging_face, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(hugging_face),
        LLM(served, EngineConfig(dtype="float32", device="cpu", max_batch_size=8, max_seq_len=SEQ_LEN)),
    )


@pytest.fixture(scope="module")
def tasks() -> list[write.Task]:
    return write.tasks()


def test_the_committed_tasks_are_what_the_generator_makes() -> None:
    wanted = write.files()
    committed = {path.name: path for path in write.FOLDER.iterdir() if path.suffix in write.SUFFIXES}
    assert committed.keys() == wanted.keys(), "run: python -m demo.tasks.write"
    for name, path in committed.items():
        assert path.read_text(encoding="utf-8") == wanted[name], f"{name}: run python -m demo.tasks.write"
    assert sum(path.stat().st_size for path in committed.values()) < 300_000


def test_there_is_a_choice_for_every_skill_and_every_kind_of_request(tasks: list[write.Task]) -> None:
    by_template = {name: [task for task in tasks if task.template == name] for name in write.TEMPLATES}
    assert {task.name for task in by_template["choice"]} == set(world.SKILLS)
    assert len(by_template["texts"]) >= 8 and len(by_template["continuation"]) >= 3 and len(by_template["generation"])
    assert len({task.name for task in tasks}) == len(tasks) >= 30


def test_the_answer_is_one_of_four_different_choices_and_not_always_the_same_one(tasks: list[write.Task]) -> None:
    for task in tasks:
        if task.template != "choice":
            continue
        for document, question in zip(task.documents, world.questions(task.name, write.ITEMS), strict=True):
            assert document["choices"][document["answer"]] == question.answer
            assert len(set(document["choices"])) == len(document["choices"]) == write.CHOICES
        assert len({document["answer"] for document in task.documents}) > 1


def test_some_texts_are_longer_than_the_window_and_no_prompt_is(tasks: list[write.Task], model: Model) -> None:
    for task in tasks:
        for document in task.documents:
            if task.template != "texts":
                endings = document.get("choices") or [document["target"]]
                assert all(len(model.ids(f"{document['text']} {ending}")) < parity.SEQ_LEN - 2 for ending in endings)
        if task.name.startswith("long_") and task.template == "texts":
            assert all(len(model.ids(document["text"])) > 2 * parity.SEQ_LEN for document in task.documents)


def test_a_prompt_reads_as_training_wrote_it(model: Model) -> None:
    """Its ids with lm-eval's tokenizer are those of the demo's own; end and beginning of text between turns, too."""
    from demo.tokenizer_training import Tokenizer

    trained = Tokenizer(MODEL / "tokenizer.model")
    for skill in world.SKILLS:
        for question in world.questions(skill, 4):
            assert model.ids(write.prompt_of(question)) == trained.prompt(question)


def test_typing_errors_leave_what_is_not_a_letter_and_most_of_the_rest() -> None:
    drawn = random.Random(0)
    text = "What is 7, 8 & [INST]? " * 20
    typed = write.mistyped(drawn, text, 0.2)
    assert [c for c in typed if not c.isalpha()] == [c for c in text if not c.isalpha()]
    assert typed != text and 0.9 < len(typed) / len(text) < 1.1
    assert write.mistyped(drawn, text, 0.0) == text


def items_of(task: write.Task, model: Model) -> Iterator[tuple[list[int], int]]:
    """The ids of a task's first documents, and how many of them are given."""
    for document in task.documents[:ITEMS]:
        if task.template == "texts":
            yield model.ids(document["text"])[: SEQ_LEN - 1], 1
        else:
            given = len(model.ids(document["text"]))
            for ending in document.get("choices") or [document["target"]]:
                yield model.ids(f"{document['text']} {ending}"), given


def test_served_log_likelihoods_are_those_of_transformers(model: Model, tasks: list[write.Task]) -> None:
    greedy, count, worst = 0, 0, 0.0
    for task in tasks:
        items = list(items_of(task, model))
        expected = [model.expected(*item) for item in items]
        for (ids, given), ours, theirs in zip(items, model.scored(items), expected, strict=True):
            worst = max(worst, abs(ours[0] - theirs[0]) / (len(ids) - given))
            assert ours[1] == theirs[1], (task.name, ids)
            greedy, count = greedy + theirs[1], count + 1
    print(f"{count} log-likelihoods, {greedy} of them greedy: within {worst:.1e} a token")
    assert worst <= WITHIN
    assert 8 < greedy < count / 2, "too few items to tell what is greedy"


def test_a_prompt_after_which_the_model_stops_keeps_its_last_token(model: Model) -> None:
    """lm-eval drops the last entry as the generated token, so there must be one, also for the end mark."""
    ids = model.ids("[INST] What is the capital of France? [/INST] The capital of France is Paris.")
    body = {"model": "llama", "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    choice = model.answer(body)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["logprobs"]["tokens"][-2:] == [".", "</s>"]
    assert {len(values) for values in choice["logprobs"].values()} == {len(ids) + 1}
    scored = model.answer(body | {"max_tokens": 0})["choices"][0]["logprobs"]
    assert scored["tokens"] == choice["logprobs"]["tokens"][:-1]
    assert scored["token_logprobs"][1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:-1], abs=WITHIN)


def test_prompts_of_ids_get_no_beginning_of_text_from_us(model: Model) -> None:
    """lm-eval counts the context in its own ids: one token more would shift every score by one place."""
    ids = model.ids("Once upon a time there was a girl named Mia.")
    for given in (ids, ids[1:]):
        (ours,) = model.scored([(given, 4)])
        assert model.scored([(given, 4)], prompt=given) == [ours]
        theirs = model.expected(given, 4)
        assert ours[0] == pytest.approx(theirs[0], abs=len(ids) * WITHIN) and ours[1] == theirs[1]
    assert model.scored([(ids, 4)])[0][0] != pytest.approx(model.scored([(ids[1:], 3)])[0][0], abs=0.01)


def test_a_prompt_may_fill_the_window_but_for_the_token_to_generate(model: Model) -> None:
    ids = (model.ids("the garden ") * SEQ_LEN)[: SEQ_LEN - 1]
    (ours,) = model.scored([(ids, 1)])
    assert ours[0] == pytest.approx(model.expected(ids, 1)[0], abs=len(ids) * WITHIN)


def rows(*differences: float) -> list[Row]:
    return [Row(f"task{place}", "acc", 1 + difference, 1.0) for place, difference in enumerate(differences)]


def test_a_difference_is_relative_to_the_reference_and_nothing_is_small_beside_zero() -> None:
    assert Row("a", "acc", 0.55, 0.5).difference == pytest.approx(0.1)
    assert Row("a", "acc", 0.45, 0.5).difference == pytest.approx(0.1)
    assert Row("a", "acc", 0.0, 0.0).difference == 0
    assert Row("a", "acc", 0.0, 0.5).difference == 1
    assert Row("a", "acc", 1e-9, 0.0).difference == math.inf
    assert parity.mean_difference(rows(0.0, 0.0, 0.03)) == pytest.approx(0.01)


def test_scores_that_one_side_lacks_or_that_are_no_numbers_are_refused() -> None:
    key, other = ("demo_capital", "acc"), ("demo_words", "acc")
    assert parity.rows_of({key: 0.5}, {key: 0.25}) == [Row(*key, 0.5, 0.25)]
    for served, reference in (({key: 1.0}, {key: 1.0, other: 1.0}), ({key: 1.0, other: 1.0}, {key: 1.0})):
        with pytest.raises(ParityError, match="only one side has demo_words acc"):
            parity.rows_of(served, reference)
    for served, reference in (({key: math.nan}, {key: 1.0}), ({key: 1.0}, {key: math.inf}), ({}, {})):
        with pytest.raises(ParityError, match="no number|no scores"):
            parity.rows_of(served, reference)


@pytest.mark.parametrize(
    ("differences", "status"),
    [((0.0, 0.0), 0), ((0.9 * parity.LIMIT, parity.LIMIT), 0), ((0.0, 2.1 * parity.LIMIT), 1)],
)
def test_the_status_tells_whether_the_mean_is_within_the_limit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    differences: tuple[float, ...],
    status: int,
) -> None:
    found = [Row("task", str(place), 1.0, 1.0 / (1.0 + value)) for place, value in enumerate(differences)]
    monkeypatch.setattr(parity, "WORK", tmp_path)
    monkeypatch.setattr(parity, "compare", lambda folder, fault, through, words: found)
    assert parity.main([]) == status
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["mean_difference"] == pytest.approx(sum(differences) / 2) and len(written["rows"]) == 2
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out.removesuffix("\n")


FAKE = """
import json, os, pathlib, sys
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
seen = {"arguments": given, "cwd": os.getcwd(), "offline": os.environ.get("HF_HUB_OFFLINE")}
if given["--tasks"] == "broken":
    print("what went wrong")
    sys.exit(3)
path = pathlib.Path(given["--output_path"])
path.with_name(path.stem + "_2026-01-01.json").write_text(json.dumps({"results": {
    "demo_capital": {"alias": "x", "sample_len": 24, "acc,none": 0.5, "acc_stderr,none": 0.1, "brier_score,none": 0.2},
    "demo_counting": {"exact_match,stripped": 0.25, "exact_match_stderr,stripped": "N/A"},
}}))
path.with_name("seen").write_text(json.dumps(seen))
"""


@pytest.fixture
def fake_lm_eval(tmp_path: Path) -> Path:
    path = tmp_path / "lm_eval"
    path.write_text(f"#!{sys.executable}\n{FAKE}")
    path.chmod(0o755)
    return path


def test_lm_eval_is_run_offline_beside_the_tasks_and_its_scores_are_read(tmp_path: Path, fake_lm_eval: Path) -> None:
    served, reference = parity.evaluations(fake_lm_eval, tmp_path / "out", tmp_path / "hf", 1234)
    wanted = {
        ("demo_capital", "acc"): 0.5,
        ("demo_capital", "brier_score"): 0.2,
        ("demo_counting", "exact_match"): 0.25,
    }
    for evaluation, model, length in ((served, "local-completions", 512), (reference, "hf", 510)):
        assert evaluation.scores("some", begins_with_bos=True) == wanted
        seen = json.loads((tmp_path / "out" / evaluation.name / "seen").read_text())
        assert seen["cwd"] == str(write.FOLDER) and seen["offline"] == "1"
        assert seen["arguments"]["--model"] == model and seen["arguments"]["--tasks"] == "some"
        given = dict(pair.split("=") for pair in seen["arguments"]["--model_args"].split(","))
        assert given["max_length"] == str(length) and given["add_bos_token"] == "True"
        assert str(tmp_path / "hf") in (given.get("tokenizer"), given.get("pretrained"))


def test_an_lm_eval_that_fails_is_no_score(tmp_path: Path, fake_lm_eval: Path) -> None:
    evaluation = Evaluation(fake_lm_eval, tmp_path / "out", "served", "hf", {})
    with pytest.raises(ParityError, match="ended with 3.*\n.*what went wrong"):
        evaluation.scores("broken", begins_with_bos=False)


def test_the_fault_is_in_what_is_served(tmp_path: Path) -> None:
    thetas = {}
    for fault in (False, True):
        folder = parity.served_weights(tmp_path / str(fault), fault)
        thetas[fault] = json.loads((folder / "model_args.json").read_text())["rope_theta"]
    assert thetas == {False: 10000.0, True: parity.WRONG_ROPE_THETA}


def test_what_is_served_went_through_the_formats_that_were_named(tmp_path: Path) -> None:
    folder = parity.served_weights(tmp_path, False, ["hf", "gguf"])
    assert (tmp_path / "0.hf" / "config.json").is_file() and (tmp_path / "1.gguf").is_file()
    assert json.loads((folder / "manifest.json").read_text())["source_format"] == "gguf"
    with pytest.raises(SystemExit):
        parity.main(["--through", "hf,onnx"])


def test_writing_the_tasks_again_changes_nothing_and_removes_what_is_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "FOLDER", tmp_path)
    (tmp_path / "old.jsonl").write_text("{}\n")
    (tmp_path / "write.py").write_text("")
    assert write.main() == 0
    assert {path.name for path in tmp_path.iterdir()} == {*write.files(), "write.py"}
