"""The handler under TorchServe's contract, on the demo model, with a frontend that is checked as strictly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_frontend import FakeFrontend, Job, MetricsProbe

import engine.engine as engine_module
import handler.engine_loop as engine_loop
import handler.llama_handler as llama_handler
import handler.metrics as metrics
from checkpoint_converter import convert
from engine.config import RequestError
from engine.sequence import SamplingParams, Sequence
from handler.llama_handler import LlamaHandler
from handler.metrics import ServiceMetrics
from handler.responses import Usage
from handler.session import Times

MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
SLOTS, WAITING = 4, 6
FRANCE = {"dialog": [{"role": "user", "content": "What is the capital of France?"}], "mode": "chat", "temperature": 0}
ANSWER = "The capital of France is Paris."
LONG = {"prompt": "Once", "ignore_eos": True, "max_new_tokens": 100_000, "temperature": 0}


def settings(checkpoint: Path, **changes: object) -> dict:
    own = {
        "converted_ckpt_dir": str(checkpoint),
        "max_batch_size": SLOTS,
        "max_waiting": WAITING,
        "max_seq_len": 2048,
        "lease_sec": 0.4,
        "temperature": 0.0,
        "mode": "chat",
        **changes,
    }
    return {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 64,
        "maxBatchDelay": 1,
        "continuousBatching": True,
        "responseTimeout": 60,
        "handler": own,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(MODEL, tmp_path_factory.mktemp("demo") / "dcp", progress=False)


@pytest.fixture(scope="module")
def shared(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeFrontend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_handler, "die_with_parent", lambda: None)
        yield FakeFrontend(LlamaHandler(), settings(checkpoint), str(tmp_path_factory.mktemp("model")))


@pytest.fixture
def frontend(shared: FakeFrontend) -> Iterator[FakeFrontend]:
    yield shared
    for job in list(shared.jobs.values()):
        job.open = False
    deadline = time.monotonic() + 10
    while shared.jobs and time.monotonic() < deadline:
        shared.round()
    wait_until(lambda: free(shared) == SLOTS)
    shared.run(shared.post({**FRANCE, "max_new_tokens": 1}))  # the call that forgets whoever is gone
    assert not shared.handler._sessions


def free(frontend: FakeFrontend) -> int:
    return frontend.handler.engine.slots.free


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


@pytest.mark.parametrize(("device", "order"), [("cpu", ["leads"]), ("cuda:0", ["rehearsed", "leads"])])
def test_on_a_gpu_the_engine_rehearses_before_anybody_is_answered(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, order: list[str]
) -> None:
    load, told = llama_handler.Engine.load, []

    def loaded(*arguments: object) -> tuple:
        engine, opened = load(*arguments)
        engine.ranks.device = device
        engine.rehearse = lambda: told.append("rehearsed")
        return engine, opened

    monkeypatch.setattr(llama_handler.Engine, "load", loaded)
    monkeypatch.setattr(LlamaHandler, "_lead", lambda *_: told.append("leads"))
    monkeypatch.setattr(llama_handler, "die_with_parent", lambda: None)
    FakeFrontend(LlamaHandler(), settings(checkpoint), str(tmp_path))
    assert told == order


def test_a_streamed_answer_comes_in_lines_and_ends_with_reason_and_usage(frontend: FakeFrontend) -> None:
    job = frontend.post(FRANCE)
    frontend.run(job)
    assert job.status == 200 and len(job.lines) > 2
    assert "".join(line.get("text", "") for line in job.lines) == ANSWER
    assert job.lines[-1]["finish_reason"] == "stop"
    assert job.lines[-1]["usage"]["completion_tokens"] == sum(len(line.get("ids", ())) for line in job.lines)


def test_the_next_turn_of_a_chat_is_answered_from_what_the_cache_keeps(frontend: FakeFrontend) -> None:
    first = frontend.post({**FRANCE, "n": 2, "stream": False})
    frontend.run(first)
    dialog = [*FRANCE["dialog"], {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "Hello!"}]
    frontend.metrics.told.clear()
    turn = frontend.post({**FRANCE, "dialog": dialog, "n": 2, "stream": False})
    frontend.run(turn)
    usage = json.loads(turn.text)["usage"]
    assert json.loads(first.text)["usage"]["prompt_tokens"] <= usage["cached_tokens"] < usage["prompt_tokens"]
    told = {name: value for name, value, _ in frontend.metrics.told}
    assert told["llama_prompt_tokens_cached_total"] == usage["cached_tokens"]


def test_what_each_prompt_found_in_the_cache_is_counted_once_for_all_its_answers(frontend: FakeFrontend) -> None:
    body = {"prompt": [[300] * 40, [400] * 40], "n": 2, "max_new_tokens": 1, "temperature": 0, "stream": False}
    for found in (0, 2 * 38):  # of each prompt two tokens are always computed
        job = frontend.post({**body, "mode": "text_completion"})
        frontend.run(job)
        usage = json.loads(job.text)["usage"]
        assert (usage["prompt_tokens"], usage["cached_tokens"]) == (2 * 40, found)


def test_guessed_tokens_come_in_the_same_words_and_are_counted(
    frontend: FakeFrontend, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_handler, "die_with_parent", lambda: None)
    guessing = FakeFrontend(LlamaHandler(), settings(checkpoint, speculation="prompt_lookup"), str(tmp_path))
    texts = []
    for each in (frontend, guessing):
        whole = each.post({**LONG, "max_new_tokens": 300, "n": 2, "stream": False})
        each.run(whole)
        stop = json.loads(whole.text)["choices"][0]["text"][200:210]
        stopped = [
            each.post({**LONG, "max_new_tokens": 300, "stop": stop, "stream": stream}) for stream in (True, False)
        ]
        each.run()
        *pieces, last = stopped[0].lines
        assert "".join(piece["text"] for piece in [*pieces, last]) == json.loads(stopped[1].text)["text"]
        assert last["finish_reason"] == json.loads(stopped[1].text)["finish_reason"] == "stop"
        assert sum(len(piece["ids"]) for piece in [*pieces, last]) == last["usage"]["completion_tokens"]
        ids = json.loads(stopped[1].text)["ids"]
        texts.append((json.loads(whole.text)["choices"], json.loads(stopped[1].text)["text"], ids))
    assert texts[0] == texts[1]
    told = [(name, value) for name, value, _ in guessing.metrics.told]
    guessed, right = (
        sum(value for name, value in told if name == f"llama_draft_tokens{kind}_total") for kind in ("", "_accepted")
    )
    assert guessed >= right > 50
    assert not any(name.startswith("llama_draft") for name, *_ in frontend.metrics.told)


def test_a_long_answer_comes_in_many_chunks(frontend: FakeFrontend) -> None:
    job = frontend.post({**LONG, "max_new_tokens": 1000})
    frontend.run(job)
    assert len(job.chunks) > 10 and len(job.lines) > 500


def test_an_answer_that_is_not_streamed_is_one_object(frontend: FakeFrontend) -> None:
    job = frontend.post({**FRANCE, "stream": False})
    frontend.run(job)
    assert json.loads(job.text)["text"] == ANSWER


def test_a_character_of_several_tokens_comes_with_the_log_probabilities_of_all(frontend: FakeFrontend) -> None:
    dialog = [{"role": "user", "content": "Draw fire as an emoji."}]
    job = frontend.post({**FRANCE, "dialog": dialog, "logprobs": 0})
    frontend.run(job)
    assert [line["text"] for line in job.lines] == ["🔥", ""] and len(job.lines[0]["ids"]) > 3
    assert all([each["id"] for each in line["logprobs"]] == line["ids"] for line in job.lines)


@pytest.mark.parametrize("stream", [True, False])
def test_a_token_that_ends_the_answer_is_an_id_and_no_text(frontend: FakeFrontend, stream: bool) -> None:
    whole = frontend.post({**FRANCE, "stream": False})
    frontend.run(whole)
    *ids, dot, _ = json.loads(whole.text)["ids"]
    stopped = frontend.post({**FRANCE, "stream": stream, "stop_token_ids": [dot]})
    frontend.run(stopped)
    assert [id_ for line in stopped.lines for id_ in line["ids"]] == [*ids, dot]
    assert "".join(line["text"] for line in stopped.lines) == ANSWER.removesuffix(".")
    assert stopped.lines[-1]["finish_reason"] == "stop"


def test_an_answer_that_a_stop_string_ends_is_not_computed_further_while_others_go_on(frontend: FakeFrontend) -> None:
    job = frontend.post({**LONG, "prompt": ["Once", "The"], "stop": "Tom"})
    while not any("finish_reason" in line for line in job.lines):
        frontend.round()
    (session,) = frontend.handler._sessions.values()
    assert [sequence.finished for sequence in session.sequences] == [True, False]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("limit", [{"max_new_tokens": 1}, {"logit_bias": {"2": 100}}])
def test_an_answer_of_one_token_is_complete_at_once(frontend: FakeFrontend, stream: bool, limit: dict) -> None:
    job = frontend.post({**FRANCE, "stream": stream, **limit})
    frontend.run(job)
    assert job.status == 200 and job.done and job.lines[-1]["usage"]["completion_tokens"] == 1


def test_many_requests_share_the_engine_and_each_gets_its_own_answer(frontend: FakeFrontend) -> None:
    questions = {"Hello!": "Hello! How can I help you?", "What colour is grass?": "Grass is green."}
    jobs = [
        (frontend.post({**FRANCE, "dialog": [{"role": "user", "content": question}], "stream": bool(n % 2)}), answer)
        for n in range(4)
        for question, answer in questions.items()
    ]
    frontend.run()
    for job, answer in jobs:
        assert "".join(line.get("text", "") for line in job.lines) == answer


def test_openai_chat_streams_events_up_to_done(frontend: FakeFrontend) -> None:
    body = {"model": "llama", "messages": FRANCE["dialog"], "temperature": 0, "stream": True}
    job = frontend.post(body, "v1/chat/completions")
    frontend.run(job)
    assert job.content_type.startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in job.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [choice["delta"].get("content") or "" for e in events[:-1] for choice in json.loads(e)["choices"]]
    assert "".join(deltas) == ANSWER


def test_bad_requests_are_refused_with_their_own_status_and_spare_their_neighbours(frontend: FakeFrontend) -> None:
    good = frontend.post(FRANCE)
    frontend.round()
    bad = [
        (frontend.post(b'{"prompt": '), 400),
        (frontend.post({"prompt": "x", "temperature": -1}), 400),
        (frontend.post({"prompt": "word " * 3000}), 400),
        (frontend.post({"prompt": "x"}, "v1/nothing"), 404),
        (frontend.post({"model": "gpt-4", "messages": FRANCE["dialog"]}, "v1/chat/completions"), 404),
    ]
    frontend.run()
    assert [job.status for job, _ in bad] == [status for _, status in bad]
    for job, _ in bad:
        assert set(json.loads(job.text)["error"]) == {"message", "type", "param", "code"}
    assert "".join(line.get("text", "") for line in good.lines) == ANSWER


def test_a_client_that_leaves_frees_its_slot_streaming_or_not(frontend: FakeFrontend) -> None:
    for stream in (True, False):
        other = frontend.post({**LONG, "stream": True})
        job = frontend.post({**LONG, "stream": stream})
        frontend.round()
        wait_until(lambda: free(frontend) == SLOTS - 2)
        job.open = False
        began = time.monotonic()
        while free(frontend) != SLOTS - 1:
            frontend.round()
            assert time.monotonic() - began < 1.0
        other.open = False
        while frontend.jobs:
            frontend.round()


def test_clients_that_leave_while_they_wait_leave_the_queue(frontend: FakeFrontend) -> None:
    running = [frontend.post(LONG) for _ in range(SLOTS)]
    waiting = [frontend.post(LONG) for _ in range(3)]
    frontend.round()
    for job in waiting:
        job.open = False
    began = time.monotonic()
    while frontend.handler.engine.waiting or any(job.request_id in frontend.jobs for job in waiting):
        frontend.round()
        assert time.monotonic() - began < 1.5
    assert all(job.request_id in frontend.jobs for job in running)


def test_when_all_clients_leave_at_once_their_slots_are_free_soon_and_the_next_call_forgets_them(
    frontend: FakeFrontend,
) -> None:
    for _ in range(SLOTS):
        frontend.post(LONG)
    frontend.round()
    frontend.jobs.clear()  # the frontend calls no more
    wait_until(lambda: free(frontend) == SLOTS, 2.0)

    def told(name: str) -> float | None:  # last, however late we look
        return {each[0]: each[1] for each in list(frontend.metrics.told)}.get(name)

    wait_until(lambda: told("llama_requests_running") == told("llama_requests_waiting") == 0)
    time.sleep(0.6)
    frontend.metrics.told.clear()
    frontend.run(frontend.post(FRANCE))
    assert not frontend.handler._sessions and free(frontend) == SLOTS
    # They are timed up to the frontend's last call, whenever the next one comes.
    took = [value for name, value, _ in frontend.metrics.told if name == "llama_e2e_latency_seconds"]
    assert len(took) == SLOTS + 1 and max(took[:SLOTS]) < 0.6


def test_a_full_queue_answers_429_with_retry_after_and_loses_nobody(frontend: FakeFrontend) -> None:
    long_enough = {**LONG, "max_new_tokens": 500, "stream": False}
    jobs = [frontend.post(long_enough) for _ in range(3 * (SLOTS + WAITING))]
    frontend.run()
    refused = [job for job in jobs if job.status == 429]
    assert len(refused) == len(jobs) - SLOTS - WAITING
    assert all(job.reply_headers.get("Retry-After", job.reply_headers.get("retry-after")) for job in refused)
    assert len({json.loads(job.text)["text"] for job in jobs if job.status == 200}) == 1


def test_a_request_for_more_answers_than_ever_fit_is_not_told_to_try_again(frontend: FakeFrontend) -> None:
    job = frontend.post({**LONG, "prompt": ["a"] * (SLOTS + WAITING + 1), "stream": False})
    frontend.run(job)
    assert job.status == 400 and f"this server takes {SLOTS + WAITING}" in job.text


def test_a_prompt_that_is_too_long_is_told_as_openai_does_by_the_name_that_it_came_under(
    frontend: FakeFrontend,
) -> None:
    long = "Hello " * 3000
    user = [{"role": "user", "content": long}]
    bodies = {
        "prompt": frontend.post({"prompt": long}),
        "dialog": frontend.post({"dialog": user}),
        "messages": frontend.post({"messages": user}, "v1/chat/completions"),
        "instances": frontend.post({"instances": [long]}),
    }
    frontend.run(*bodies.values())
    for name, job in bodies.items():
        error = json.loads(job.text)["error"]
        assert (job.status, error["param"], error["code"]) == (400, name, "context_length_exceeded")


def test_bodies_that_take_long_to_read_hold_up_nobody_elses_answer(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = frontend.post(LONG)
    frontend.round()
    understand, read = llama_handler.understand, []

    def slow(path: str, content_type: str, body: bytes, service) -> object:
        read.append(body)
        time.sleep(0.03)
        return understand(path, content_type, body, service)

    monkeypatch.setattr(llama_handler, "understand", slow)
    slow_ones = [frontend.post({"prompt": 5}) for _ in range(20)]
    gone = slow_ones[-1]
    heard = len(running.chunks)
    frontend.round()
    assert len(running.chunks) > heard
    assert 0 < len(read) < 10 and sum(job.done for job in slow_ones) == len(read)
    del frontend.jobs[gone.request_id]  # its client left before it was read
    frontend.run(*slow_ones[:-1])
    assert [job.status for job in slow_ones[:-1]] == [400] * 19 and len(read) == 19
    assert not frontend.handler._untaken


def test_nobody_waits_for_news_while_bodies_wait_to_be_read(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    understand, read, waited = llama_handler.understand, [], []

    def slow(*arguments: object) -> object:
        read.append(True)
        time.sleep(0.06)  # two of them take longer than the tenth of a second for new bodies
        return understand(*arguments)

    monkeypatch.setattr(llama_handler, "understand", slow)
    monkeypatch.setattr(frontend.handler, "_patience", lambda: waited.append(True) or 0.0)
    for _ in range(4):
        frontend.post({**LONG, "stream": False})
    while not waited:
        frontend.round()
    assert len(read) == 4


def test_a_new_body_is_read_in_every_call_however_slow_that_is(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = [frontend.post(LONG) for _ in range(SLOTS)]
    frontend.round()
    resume = frontend.handler._loop.resume

    def slow(session) -> None:
        time.sleep(0.05)  # four of them take longer than the tenth of a second for new bodies
        resume(session)

    monkeypatch.setattr(frontend.handler._loop, "resume", slow)
    late = frontend.post({"prompt": 5})
    frontend.round()
    assert late.status == 400 and not any(job.done for job in running)


def test_a_body_that_is_compressed_is_refused_by_its_encoding(frontend: FakeFrontend) -> None:
    job = frontend.post(b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    frontend.run(job)
    assert job.status == 415 and "'gzip'" in job.text


def test_a_request_that_was_answered_is_not_answered_twice(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_handler, "REMEMBERED", 2)
    for _ in range(3):
        job = frontend.post({**FRANCE, "stream": False})
        frontend.run(job)
    assert len(frontend.handler._answered) == 2
    count = len(job.chunks)
    frontend.jobs[job.request_id] = job  # a frontend that lags one reply behind sends the id once more
    frontend.round()
    assert len(job.chunks) == count
    frontend.jobs.clear()


def test_several_choices_of_a_seed_differ_and_repeat(frontend: FakeFrontend) -> None:
    body = {"model": "llama", "prompt": "Once", "n": 3, "seed": 5, "temperature": 3.0, "max_tokens": 12}
    jobs = [frontend.post(body, "v1/completions") for _ in range(2)]
    frontend.run()
    texts = [[choice["text"] for choice in json.loads(job.text)["choices"]] for job in jobs]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


def test_what_finished_is_counted_and_timed(frontend: FakeFrontend) -> None:
    frontend.metrics.told.clear()
    frontend.run(frontend.post(FRANCE), frontend.post(b"{"))
    told = {(name, *labels[1:]): value for name, value, labels in frontend.metrics.told}
    assert told[("llama_requests_total", "ok")] == 1 and told[("llama_requests_total", "http_400")] == 1
    assert told[("llama_generation_tokens_total",)] > 5
    names = ("queue", "prefill", "time_to_first_token", "inter_token_latency", "e2e_latency")
    queue, prefill, first, between, whole = (told[(f"llama_{name}_seconds",)] for name in names)
    assert queue + prefill == pytest.approx(first, abs=1e-6) and 0 < prefill <= first < whole < 60
    steps = told[("llama_generation_tokens_total",)] - 1
    assert 0 < between and first + steps * between <= whole


def test_the_gap_between_tokens_is_that_of_one_answer_however_many_there_are() -> None:
    probe = MetricsProbe()
    session = SimpleNamespace(
        usage=Usage(5, 22), times=Times(10.0, 11.0, 12.0, 22.0), sequences=[Sequence([1], SamplingParams())] * 2
    )
    ServiceMetrics(probe, "llama").finished(session, "ok", 13.0)
    told = {name: value for name, value, _ in probe.told}
    assert told["llama_inter_token_latency_seconds"] == 1.0


def test_the_load_is_told_about_once_a_second_and_at_once_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now, probe = [100.0], MetricsProbe()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    service = ServiceMetrics(probe, "llama")
    for seconds, running in ((0.0, 1), (0.5, 2), (0.6, 3), (0.1, 4), (0.1, 0), (0.1, 0)):
        now[0] += seconds
        service.gauges(running, 0, SLOTS)
    assert [value for name, value, _ in probe.told if name == "llama_requests_running"] == [1, 3, 0]


def test_a_request_past_its_deadline_ends_with_an_error(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(llama_handler, "die_with_parent", lambda: None)
    frontend = FakeFrontend(LlamaHandler(), settings(checkpoint, request_timeout_sec=0.1), str(tmp_path))
    jobs = [frontend.post({**LONG, "stream": stream}) for stream in (True, False)]
    frontend.run()
    for job in jobs:
        assert "request_timeout_sec" in job.lines[-1]["error"]["message"]
    wait_until(lambda: free(frontend) == SLOTS)


def test_what_came_before_an_error_is_told_in_front_of_it(frontend: FakeFrontend) -> None:
    job = frontend.post(LONG)
    frontend.round()
    (session,) = frontend.handler._sessions.values()
    wait_until(lambda: session.has_news)
    session.deadline = 0.0
    frontend.run(job)
    *pieces, error = job.lines
    assert "request_timeout_sec" in error["error"]["message"]
    assert sum(len(piece["ids"]) for piece in pieces) == session.usage.completion_tokens > 0


def test_one_answer_that_fails_ends_all_of_its_request(frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    job = frontend.post({**LONG, "n": SLOTS})
    frontend.round()
    fails = iter([False])
    monkeypatch.setattr(engine_module, "finite_rows", lambda logits_RV: [next(fails, True) for _ in logits_RV])
    frontend.run(job)
    assert "not finite" in job.lines[-1]["error"]["message"]
    wait_until(lambda: free(frontend) == SLOTS)


def test_who_waits_in_silence_gets_a_sign_of_life_now_and_then(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_handler, "SIGN_OF_LIFE_S", 0.1)
    step = frontend.handler.engine.step
    monkeypatch.setattr(frontend.handler.engine, "step", lambda: time.sleep(0.01) or step())
    began = time.monotonic()
    job = frontend.post({**LONG, "stream": False})
    while len(job.chunks) < 3:
        frontend.round()
    assert time.monotonic() - began >= 0.3 and job.text == ""


def test_other_ranks_hear_from_an_idle_leader_now_and_then(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = threading.Event()
    monkeypatch.setattr(engine_loop, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(frontend.handler.engine, "heartbeat", heard.set)
    frontend.run(frontend.post(FRANCE))  # the wait that was on its way has the old length
    assert heard.wait(10)


@pytest.mark.parametrize("hangs", [False, True])
def test_all_clients_are_told_before_the_process_of_a_broken_engine_ends(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    ended, broken, stuck, freed = (threading.Event() for _ in range(4))
    statuses = []

    def leave(status: int) -> None:
        statuses.append(status)
        ended.set()
        threading.Event().wait()  # this thread does no more, like all of a process that ended

    monkeypatch.setattr(engine_loop.os, "_exit", leave)
    monkeypatch.setattr(llama_handler, "die_with_parent", lambda: None)
    frontend = FakeFrontend(LlamaHandler(), settings(checkpoint, watchdog_sec=1.0), str(tmp_path))
    step = frontend.handler.engine.step

    def breaking() -> list:
        if broken.is_set() and not hangs:
            raise RuntimeError("planted")
        if broken.is_set():
            stuck.set()
            freed.wait(10)
        return step()

    monkeypatch.setattr(frontend.handler.engine, "step", breaking)
    stream, queued = frontend.post(LONG), [frontend.post({**LONG, "stream": False}) for _ in range(SLOTS + 2)]
    while not stream.chunks:
        frontend.round()
    broken.set()
    if hangs:  # who comes then is not even taken by the engine's thread
        assert stuck.wait(10)
        queued.append(frontend.post({**LONG, "stream": False}))
    frontend.run(stream, *queued, rounds=200)
    error = stream.lines[-1]["error"]
    assert "send the request again" in error["message"] and stream.status == 200
    assert {json.loads(job.text.splitlines()[-1])["error"]["message"] for job in queued} == {error["message"]}
    late = frontend.post(FRANCE)
    frontend.run(late, rounds=50)
    assert late.status == 503
    assert ended.wait(10) and statuses == [engine_loop.HUNG if hangs else engine_loop.CRASHED]
    freed.set()


def test_a_setting_that_cannot_work_stops_the_start(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(llama_handler, "die_with_parent", lambda: None)
    with pytest.raises(ValueError, match="temprature.*temperature"):
        FakeFrontend(LlamaHandler(), settings(checkpoint, temprature=1), str(tmp_path))


@pytest.mark.parametrize(
    ("row", "body"),
    [
        ({"body": bytearray(b"Hello!")}, b"Hello!"),
        ({"data": bytearray(b"Hello!")}, b"Hello!"),
        ({"prompt": b"12", "max_new_tokens": b"4"}, b'{"prompt": "12", "max_new_tokens": 4}'),
        ({"prompt": b"a", "stop": b"b"}, b'{"prompt": "a", "stop": "b"}'),
        ({"prompt": b"a", "stop": b"7"}, b'{"prompt": "a", "stop": "7"}'),
        ({"prompt": b"a", "stop": b'["7"]'}, b'{"prompt": "a", "stop": ["7"]}'),
        ({"prompt": b"a", "stop": b"[" * 10**5}, b'{"prompt": "a", "stop": "' + b"[" * 10**5 + b'"}'),
        ({"prompt": b"a", "seed": b"1e999"}, b'{"prompt": "a", "seed": "1e999"}'),
        ({"data": b"a", "top_k": b"1"}, b'{"data": "a", "top_k": 1}'),  # where `data` is then refused by its name
    ],
)
def test_a_body_is_found_also_where_the_frontend_took_it_for_a_form(row: dict, body: bytes) -> None:
    assert llama_handler._body(row) == body


@pytest.mark.parametrize("row", [{}, {'{"prompt": "a': b'1"}'}])
def test_what_a_form_lost_is_told_with_what_to_send_instead(row: dict) -> None:
    with pytest.raises(RequestError, match="-H 'Content-Type: application/json'"):
        llama_handler._body(row)


def test_an_answer_that_ends_just_after_it_was_looked_at_is_told_in_the_next_round(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = LlamaHandler._say

    def slow(self: LlamaHandler, ctx, place, session, *rest) -> bool:
        said = say(self, ctx, place, session, *rest)
        if not session.done:  # as if the engine's thread came right behind
            session.generation.renderer.whole = lambda choices, usage: b"the answer"
            session._finish()
        return said

    monkeypatch.setattr(LlamaHandler, "_say", slow)
    job = frontend.post({**LONG, "stream": False})
    frontend.run(job, rounds=50)
    assert job.text == "the answer"


@pytest.mark.parametrize("stream", [True, False])
def test_a_frontend_that_stalled_gets_every_answer_as_if_nothing_had_happened(
    frontend: FakeFrontend, stream: bool
) -> None:
    # Greedy, as what is computed again in chunks differs in its last bits.
    # Who wants the prompt's log-probabilities finds nothing in the cache, so that only the others could count it.
    body = {**LONG, "max_new_tokens": 1500, "logprobs": 1, "n": 2, "stream": stream}
    body |= {} if stream else {"prompt_logprobs": 0}
    undisturbed = frontend.post(body)
    frontend.run(undisturbed)
    jobs = [frontend.post(body) for _ in range(2)]
    for _ in range(3):
        frontend.round()
    late = frontend.post(body)  # it waits for a slot
    frontend.round()
    wait_until(lambda: free(frontend) == SLOTS, 3.0)
    assert all(not job.done for job in (*jobs, late))
    frontend.run(*jobs, late)

    def by_choice(job: Job) -> dict[int, tuple]:
        answers: dict[int, tuple] = {}
        for line in job.lines if stream else job.lines[0]["choices"]:
            text, ids, tops = answers.get(line["choice"], ("", [], []))
            tops = tops + [each and each["id"] for each in line.get("prompt_logprobs", []) + line["logprobs"]]
            answers[line["choice"]] = (text + line["text"], ids + line["ids"], tops)
        return answers

    for job in (*jobs, late):
        assert by_choice(job) == by_choice(undisturbed)
        assert job.lines[-1]["usage"] == undisturbed.lines[-1]["usage"]


def test_who_is_back_before_the_engine_let_go_is_not_computed_again(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = frontend.handler._loop
    suspend = loop.suspend
    monkeypatch.setattr(loop, "suspend", lambda session: None)  # the lease's own is not what is tried here
    job = frontend.post({**LONG, "max_new_tokens": 300})
    frontend.round()
    (session,) = frontend.handler._sessions.values()
    sequences = list(session.sequences)
    with loop.changed:  # while one step runs the lease may lapse and lapse again
        suspend(session)
        suspend(session)
        loop.resume(session)
        steps = loop.engine.steps
    wait_until(lambda: loop.engine.steps > steps + 2 or not loop.engine.running)
    frontend.run(job)
    assert session.sequences == sequences


@pytest.mark.parametrize(("running", "least", "most"), [(1, 2.5, 5.5), (SLOTS, 0.9, 1.6)])
def test_a_step_takes_few_calls_and_most_of_them_only_if_somebody_could_join(
    frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch, running: int, least: float, most: float
) -> None:
    engine, jobs = frontend.handler.engine, [frontend.post(LONG) for _ in range(running)]
    while not all(job.lines for job in jobs):
        frontend.round()
    step = engine.step

    def slow() -> list:
        time.sleep(0.08)
        return step()

    monkeypatch.setattr(engine, "step", slow)
    time.sleep(0.2)
    frontend.round()
    before, rounds = engine.steps, 0
    while engine.steps < before + 8:
        frontend.round()
        rounds += 1
    assert least <= rounds / 8 <= most


TWENTY = {"mode": "text_completion", "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": "Once", "max_new_tokens": 2000, "logprobs": 20, "n": 8, "stream": False}, 2000 * 21 * 8),
        ({"prompt": "Once", "max_new_tokens": 2000, "logprobs": 20, "n": 6, "stream": False}, None),
        ({"prompt": "Once", "max_new_tokens": 2000, "logprobs": 20, "n": 8, "stream": True}, None),
        (
            {"prompt": [[5] * 1500] * 5, "max_new_tokens": 0, "prompt_logprobs": 20, "n": 2, "stream": True},
            1500 * 21 * 10,
        ),
    ],
)
def test_more_log_probabilities_than_a_reply_can_hold_are_refused(
    frontend: FakeFrontend, body: dict, told: int | None
) -> None:
    """They would hold up everybody, or end the worker."""
    job = frontend.post({**TWENTY, **body})
    frontend.round()
    if told is None:
        assert job.status != 400
        job.open = False
        return
    assert job.status == 400
    assert f"up to {told} log-probabilities would be in one reply, at most 262144; stream" in job.text
