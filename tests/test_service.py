"""A real TorchServe with one rank and with two: the same answers as the engine, at once, whole, and without a trace."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import psutil
import pytest
import requests
from service import (
    CHOICES,
    LENGTH,
    PROJECT,
    PROMPTS,
    SECRET,
    SECRET_NAME,
    SEQ_LEN,
    SHARED,
    SLOTS,
    WAITING,
    Service,
    lines_of,
    reference,
    text_of,
    wait_until,
)

from demo import world
from deploy.configuration import PORTS
from engine.sequence import SamplingParams
from generate import Request

pytest_plugins = ("service",)
pytestmark = SHARED

SKILLS = list(world.SKILLS)
QUESTIONS, QUESTIONS_OF_TWO = 12, 4
AT_ONCE = 16
# "At once", for a client: generous for a request of some 20 ms, so that a slow machine does not fail the test.
QUICK_S = 2.0

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
STREAMS = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])


@pytest.fixture(params=["service", "service_of_two"], ids=["one rank", "two ranks"])
def either(request: pytest.FixtureRequest) -> Service:
    """Each of the servers."""
    return request.getfixturevalue(request.param)


# --- the same answers as the engine's ---


@pytest.fixture(scope="module")
def expected(service: Service) -> dict[str, list[str]]:
    """The engine's own answers to each skill's questions, of which nearly all are right."""
    questions = [question for skill in SKILLS for question in world.questions(skill, QUESTIONS)]
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH)
    given = [Request(q.prompt, None if q.dialog is None else list(q.dialog), params) for q in questions]
    texts = [completion.text for completion in reference(service.record.checkpoint, given)]
    right = sum(text.strip() == q.answer.strip() for text, q in zip(texts, questions, strict=True))
    assert right >= 0.95 * len(questions), "equal answers would prove little"
    answers = iter(texts)
    return {skill: [next(answers) for _ in range(QUESTIONS)] for skill in SKILLS}


def ask(service: Service, question: world.Question, stream: bool) -> str:
    """The answer to a question by the OpenAI endpoint that fits it."""
    body: dict[str, Any] = {"model": "llama", "temperature": 0, "max_tokens": LENGTH, "stream": stream}
    if question.dialog is None:
        body["prompt"], path = question.prompt, "v1/completions"
    else:
        body["messages"], path = question.dialog, "v1/chat/completions"
    answer = service.post(body, path)
    assert answer.status_code == 200, answer.text
    choices = [choice for event in events_of(answer, stream) for choice in event["choices"]]
    assert choices[-1]["finish_reason"] in ("stop", "length")
    pieces = [choice.get("delta", choice.get("message", choice)) for choice in choices]
    return "".join(piece.get("content") or piece.get("text") or "" for piece in pieces)


def events_of(answer: requests.Response, stream: bool) -> list[dict[str, Any]]:
    """What an OpenAI endpoint answered: the events up to [DONE], or the one object."""
    if not stream:
        return [answer.json()]
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_held_out_questions_get_the_engines_very_answers_with_16_clients_at_once(
    either: Service, expected: dict[str, list[str]]
) -> None:
    count = QUESTIONS if either.record.ranks == 1 else QUESTIONS_OF_TWO
    questions = [question for skill in SKILLS for question in world.questions(skill, count)]
    with ThreadPoolExecutor(AT_ONCE) as clients:
        answers = list(clients.map(lambda pair: ask(either, pair[1], pair[0] % 2 == 0), enumerate(questions)))
    wanted = [text for skill in SKILLS for text in expected[skill][:count]]
    wrong = [(q.key, got, want) for q, got, want in zip(questions, answers, wanted, strict=True) if got != want]
    assert not wrong


# --- the ends of what can be asked ---


@STREAMS
@pytest.mark.parametrize(
    ("limit", "text", "reason"),
    [({"max_new_tokens": 1}, "The", "length"), ({"logit_bias": {"2": 100}}, "", "stop")],
    ids=["max_new_tokens 1", "immediate end of text"],
)
def test_an_answer_of_one_token_is_complete_at_once(
    either: Service, stream: bool, limit: dict, text: str, reason: str
) -> None:
    body = {"mode": "chat", "dialog": FRANCE, "temperature": 0, "stream": stream, **limit}
    answer = either.post(body, timeout=QUICK_S)
    assert text_of(answer) == text
    assert lines_of(answer)[-1]["finish_reason"] == reason
    assert lines_of(answer)[-1]["usage"]["completion_tokens"] == 1
    answer = either.post(
        {"messages": FRANCE, "temperature": 0, "stream": stream}
        | ({"max_tokens": 1} if text else {"logit_bias": limit["logit_bias"]}),
        "v1/chat/completions",
        timeout=QUICK_S,
    )
    choices = [choice for event in events_of(answer, stream) for choice in event["choices"]]
    assert "".join(choice.get("delta", choice.get("message"))["content"] for choice in choices[:1]) in ("", text)
    assert choices[-1]["finish_reason"] == reason


@STREAMS
def test_a_stop_string_across_chunks_ends_the_answer_in_front_of_it(service: Service, stream: bool) -> None:
    body = {"mode": "chat", "dialog": FRANCE, "temperature": 0}
    stop = "nce is Pa"
    pieces = [line["text"] for line in lines_of(service.post(body, timeout=QUICK_S))]
    assert "".join(pieces) == ANSWER and not any(stop in piece for piece in pieces), "it would not cross chunks"
    answer = service.post({**body, "stop": [stop, "never"], "stream": stream}, timeout=QUICK_S)
    assert text_of(answer) == ANSWER.partition(stop)[0]
    assert lines_of(answer)[-1]["finish_reason"] == "stop"
    # What only begins like a stop string comes in the end.
    answer = service.post({**body, "stop": "Paris. And", "stream": stream}, timeout=QUICK_S)
    assert text_of(answer) == ANSWER


def test_an_emoji_of_several_tokens_arrives_whole(service: Service) -> None:
    dialog = [{"role": "user", "content": "Draw fire as an emoji."}]
    answer = service.post({"dialog": dialog, "temperature": 0}, timeout=QUICK_S)
    lines = [line for line in lines_of(answer) if "🔥" in line["text"]]
    assert text_of(answer) == "🔥" and len(lines) == 1
    assert len(lines[0]["ids"]) >= 4, "it came in one token, so nothing was put together"
    for event in events_of(
        service.post({"messages": dialog, "temperature": 0, "stream": True}, "v1/chat/completions", timeout=QUICK_S),
        True,
    ):
        assert event["choices"][0]["delta"].get("content") in (None, "", "🔥")


@STREAMS
def test_a_prompt_exactly_at_the_limit_is_answered(service: Service, stream: bool) -> None:
    prompt = [5] * (SEQ_LEN - 1)
    answer = service.post({"prompt": prompt, "stream": stream, "ignore_eos": True}, timeout=QUICK_S)
    last = lines_of(answer)[-1]
    assert last["finish_reason"] == "length"
    assert last["usage"].pop("cached_tokens") < SEQ_LEN - 1
    assert last["usage"] == {"prompt_tokens": SEQ_LEN - 1, "completion_tokens": 1, "total_tokens": SEQ_LEN}


@STREAMS
@pytest.mark.parametrize("path", ["", "v1/completions"])
def test_a_prompt_one_token_too_long_is_refused_with_both_numbers(service: Service, stream: bool, path: str) -> None:
    answer = service.post({"prompt": [5] * SEQ_LEN, "stream": stream}, path, timeout=QUICK_S)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "prompt" and str(SEQ_LEN) in error["message"] and str(SEQ_LEN - 1) in error["message"]


@STREAMS
@pytest.mark.parametrize("path", ["", "v1/completions"])
def test_an_empty_prompt_is_answered_from_the_start_of_text_alone(service: Service, stream: bool, path: str) -> None:
    answer = service.post({"prompt": "", "max_tokens": 4, "ignore_eos": True, "stream": stream}, path, timeout=QUICK_S)
    assert answer.status_code == 200
    if not path:
        usage = {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5, "cached_tokens": 0}
        assert lines_of(answer)[-1]["usage"] == usage
    else:
        assert events_of(answer, stream)[-1]["choices"][0]["finish_reason"] == "length"


def test_an_empty_body_is_refused_with_what_to_send(service: Service) -> None:
    for headers in ({"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}):
        answer = service.post(b"", headers=headers, timeout=QUICK_S)
        assert answer.status_code == 400 and "the body is empty" in answer.json()["error"]["message"]


# --- what people type ---


def curl(service: Service, *words: str) -> str:
    """What curl prints, as a user runs it."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    key = [word for name, value in service.headers.items() for word in ("-H", f"{name}: {value}")]
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "20", *key, *words]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=30)
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout.decode()


def test_curl_sends_the_prompt_file_as_it_is(service: Service) -> None:
    lines = [json.loads(line) for line in curl(service, service.url, "-T", "sample_text.txt").splitlines()]
    assert len(lines) > 5 and "finish_reason" not in lines[0]
    assert 0 < sum(len(line["ids"]) for line in lines) == lines[-1]["usage"]["completion_tokens"] <= 60
    assert lines[-1]["finish_reason"] in ("stop", "length")
    assert "Mia" in "".join(line["text"] for line in lines)


def test_curl_sends_the_dialog_file_as_it_is(either: Service) -> None:
    # The files say nothing of a temperature, but the model is sure of this answer.
    lines = [json.loads(line) for line in curl(either, either.url, "-T", "dialogs.txt").splitlines()]
    assert "".join(line["text"] for line in lines) == "Arr! The capital of France is Paris."
    assert lines[-1]["finish_reason"] == "stop"


def test_curl_posts_json_form_fields_and_plain_text(service: Service) -> None:
    body = json.dumps({"mode": "chat", "dialog": FRANCE, "temperature": 0, "stream": False})
    json_type = ("-H", "Content-Type: application/json")
    assert json.loads(curl(service, service.url, *json_type, "-d", body))["text"] == ANSWER
    fields = ("prompt=" + FRANCE[0]["content"], "mode=chat", "temperature=0", "stream=false")
    answer = curl(service, service.url, *(word for field in fields for word in ("--data-urlencode", field)))
    assert json.loads(answer)["text"] == ANSWER
    answer = curl(service, service.url, "-H", "Content-Type: text/plain", "-d", "Once upon a time")
    lines = [json.loads(line) for line in answer.splitlines()]
    assert lines[-1]["finish_reason"] in ("stop", "length") and "".join(line["text"] for line in lines)
    # JSON that curl calls a form: TorchServe has thrown it away, so all that can be done is to say what to do.
    refused = json.loads(curl(service, service.url, "-d", body))
    assert "-H 'Content-Type: application/json'" in refused["error"]["message"]


def test_a_plain_text_without_a_content_type_is_a_prompt(service: Service) -> None:
    answer = service.request("PUT", "", "Écoute: 🔥 Hello!".encode())
    assert text_of(answer) and answer.headers["content-type"].startswith("application/x-ndjson")


@pytest.mark.parametrize("path", ["v1/models/llama:predict", "/v1/models/llama:predict", ""])
def test_kserve_1_answers_one_prediction_for_each_instance(service: Service, path: str) -> None:
    parameters = {"temperature": 0, "mode": "chat", "max_tokens": 30}
    body = {"instances": [FRANCE[0]["content"], {"dialog": FRANCE}], "parameters": parameters}
    answer = service.post(body, path)
    assert answer.json() == {"predictions": [ANSWER, ANSWER]}


@pytest.mark.parametrize("path", ["v2/models/llama/infer", "/v2/models/llama/infer", ""])
def test_kserve_2_answers_tensors_of_texts(service: Service, path: str) -> None:
    tensor = {"name": "prompt", "shape": [2], "datatype": "BYTES", "data": [FRANCE[0]["content"], "Hello!"]}
    wanted = [{"name": "text"}, {"name": "finish_reason"}]
    parameters = {"temperature": 0, "mode": "chat"}
    body = {"id": "seven", "inputs": [tensor], "outputs": wanted, "parameters": parameters}
    answer = service.post(body, path).json()
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs == {"text": [ANSWER, "Hello! How can I help you?"], "finish_reason": ["stop", "stop"]}
    assert (answer["id"], answer["model_name"]) == ("seven", "llama")


def test_kserve_2_tells_of_the_model_and_that_it_is_ready(service: Service) -> None:
    assert service.request("GET", "v2/models/llama").json()["inputs"][0]["datatype"] == "BYTES"
    assert service.request("GET", "v2/models/llama/ready").json() == {"name": "llama", "ready": True}
    assert service.request("GET", "v2/models/other/ready").status_code == 404


def test_tokens_come_back_as_the_text_that_they_were(service: Service) -> None:
    text = "Égypte, 🔥 [INST] <s> fire"
    tokens = service.post({"prompt": text}, "v1/tokenize").json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["tokens"][0] == 1
    assert tokens["max_model_len"] == SEQ_LEN
    assert service.post({"tokens": tokens["tokens"]}, "v1/detokenize").json() == {"prompt": text}
    chat = service.post({"messages": FRANCE}, "v1/tokenize").json()["tokens"]
    assert "[INST]" in service.post({"tokens": chat}, "v1/detokenize").json()["prompt"]


def test_ping_says_healthy(either: Service) -> None:
    answer = either.request("GET", "/ping", timeout=QUICK_S)
    assert answer.status_code == 200 and answer.json() == {"status": "Healthy"}


# --- clients that leave ---


class Connection:
    """A client that can leave at any moment, before its answer or in the middle of it."""

    def __init__(self, service: Service, body: dict[str, Any]) -> None:
        self._connection = HTTPConnection("127.0.0.1", service.port, timeout=20)
        headers = {"Content-Type": "application/json", **service.headers}
        self._connection.request("POST", "/predictions/llama", json.dumps(body), headers)

    def taken(self) -> None:
        """Wait until the server has taken the request; one whose answer is not streamed says so with its status."""
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200

    def read(self) -> bytes:
        """The first bytes of the answer."""
        self.taken()
        return self._answer.read1()

    def leave(self) -> None:
        """Hang up."""
        if hasattr(self, "_answer"):
            self._answer.close()
        self._connection.close()


@pytest.fixture
def crowded(either: Service, stream: bool) -> Iterator[Connection]:
    """A client whose answers hold every slot and the whole queue."""
    connection = Connection(either, either.fill(stream=stream))
    connection.taken()  # before anything else asks: it needs every place that there is
    wait_until(lambda: not either.has_room(), 5, "the queue is full")
    yield connection
    connection.leave()
    wait_until(either.has_room, 20, "the queue is empty again")


@STREAMS
def test_a_client_that_leaves_gives_back_its_slots_and_its_places_in_the_queue(
    either: Service, crowded: Connection, stream: bool
) -> None:
    crowded.leave()
    # The answers would have run for ten seconds more.
    wait_until(either.has_room, 1, "there is room")


@STREAMS
def test_a_client_that_leaves_a_crowd_does_not_disturb_it(service: Service, stream: bool) -> None:
    question = world.questions("story", 1)[0]
    alone = ask(service, question, True)
    prompts = [f"Once upon a time {number}" for number in range(PROMPTS - 1)]
    leaver = Connection(service, service.fill(stream=stream, prompt=prompts))
    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(ask, service, question, number % 2 == 0) for number in range(6)]
        time.sleep(0.1)
        leaver.leave()
        assert {answer.result(20) for answer in answers} == {alone}


def test_an_idle_server_says_so_also_when_the_last_client_left(either: Service) -> None:
    connection = Connection(either, either.fill(stream=True))
    assert connection.read()
    # The numbers are told once a second.
    wait_until(lambda: either.metrics().get("llama_requests_running") == SLOTS, 5, "all slots are in use")
    # Its last sequences may have come after that count was taken.
    wait_until(lambda: either.metrics()["llama_requests_waiting"] == WAITING, 5, "the queue is full")
    connection.leave()  # TorchServe does not call the handler any more: that it has left is found out by a lease
    wait_until(lambda: either.metrics()["llama_requests_running"] == 0, 6, "no slot is in use")
    assert either.metrics()["llama_requests_waiting"] == 0
    assert either.metrics()["llama_kv_slots_used_ratio"] == 0


# --- what it leaves behind ---


def test_nothing_listens_beyond_this_machine(either: Service) -> None:
    sockets = [connection for process in either.processes() for connection in process.net_connections("inet")]
    listening = [each for each in sockets if each.status == psutil.CONN_LISTEN]
    ports = {each.laddr.port for each in listening}
    assert set(range(either.port, either.port + PORTS)) <= ports, "the server's own ports were not even seen"
    bound = [each for each in sockets if not each.raddr]
    assert {each.laddr.ip.removeprefix("::ffff:") for each in bound} <= {"127.0.0.1", "::1"}, bound


def test_there_are_as_many_ranks_as_were_asked_for_and_none_has_the_machines_secrets(either: Service) -> None:
    workers = either.workers()
    ranks = [each for each in workers if "LOCAL_RANK" in each.environ()]
    assert len(ranks) == either.record.ranks
    frontend = next(each for each in either.processes() if each not in workers)
    assert frontend.environ().get(SECRET_NAME) == SECRET, "it was not there to be inherited"
    assert workers and not [each for each in workers if SECRET_NAME in each.environ()]


MARKER = "Xyzzy-7421"


def test_a_finished_request_is_one_line_of_the_log_and_no_prompt_is_in_it(either: Service) -> None:
    def lines(name: str) -> int:
        return either.log(name).count("\n")

    # Of clients that left and were the last ones, the next call tells.
    first = either.post({"prompt": "Hello", "max_tokens": 1}).headers["x-request-id"]
    wait_until(lambda: first in either.log("model_log.log"), 5, "the log has come so far")
    prompt = f"The word is {MARKER}.\nAnother line of {MARKER}"
    dialog = [{"role": "user", "content": prompt}]
    before = {name: lines(name) for name in ("model_log.log", "ts_log.log", "console.log")}
    finished = [
        either.post({"prompt": prompt, "max_tokens": 20, "stream": False}),
        either.post({"prompt": prompt, "max_tokens": 40, "ignore_eos": True}),
        either.post({"messages": dialog, "n": 3, "max_tokens": 20, "user": MARKER}, "v1/chat/completions"),
        either.post({"messages": dialog, "stream": True, "stop": MARKER}, "v1/chat/completions"),
        either.post({"prompt": [prompt] * 3, "echo": True, "logprobs": 2}, "v1/completions"),
        either.post({"instances": [prompt], "parameters": {"max_tokens": 5}}),
        either.request("PUT", "", prompt.encode()),
    ]
    refused = [
        either.post({"prompt": prompt, "temprature": 1}),
        either.post({"prompt": prompt, MARKER: 1}),
        either.post({"prompt": prompt, "mode": MARKER}),
        either.post({"messages": [{"role": MARKER, "content": prompt}]}, "v1/chat/completions"),
        either.post(f'{{"prompt": "{MARKER}'.encode(), headers={"Content-Type": "application/json"}),
        either.post({"prompt": MARKER * 500}),
        either.post({"prompt": prompt, "model": MARKER}, "v1/completions"),
    ]
    done = [either.post({"prompt": prompt}, "v1/tokenize")]
    assert {answer.status_code for answer in [*finished, *done]} == {200}
    assert {answer.status_code for answer in refused} == {400, 404}
    ids = [answer.headers["x-request-id"] for answer in finished]
    wait_until(lambda: all(id in either.log("model_log.log") for id in ids), 5, "every finished request is logged")
    time.sleep(0.3)  # for what should not come
    model_log = either.log("model_log.log").splitlines()
    for id in ids:
        (line,) = [line for line in model_log if id in line]
        assert f"request {id} ok prompt_tokens=" in line and "generated_tokens=" in line
    assert lines("model_log.log") - before["model_log.log"] == len(ids), "there are other lines"
    assert lines("ts_log.log") == before["ts_log.log"] and lines("console.log") == before["console.log"]
    everything = either.log("**/*.log")
    assert MARKER not in everything and "POST /predictions/llama" in either.log("access_log.log")


def test_metrics_count_requests_and_tokens(service: Service) -> None:
    names = ("llama_prompt_tokens_total", "llama_generation_tokens_total", "llama_requests_total ok")
    histograms = ("time_to_first_token", "e2e_latency", "inter_token_latency", "queue", "prefill")
    counted = (*names, "llama_requests_total http_400", *(f"llama_{name}_seconds_count" for name in histograms))
    before = service.metrics()
    usages = [
        lines_of(service.post({"dialog": FRANCE, "temperature": 0, "stream": stream}))[-1]["usage"]
        for stream in (True, False)
    ]
    assert service.post({"dialog": FRANCE, "temprature": 0}).status_code == 400
    wanted = [sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens")]
    wanted += [2, 1, *[2 for _ in histograms]]

    def grown() -> list[float]:
        now = service.metrics()
        return [now.get(name, 0) - before.get(name, 0) for name in counted]

    wait_until(lambda: grown() == wanted, 5, "what was asked is counted")


def test_answers_that_wait_for_a_slot_all_come(service: Service) -> None:
    body = {"prompt": [f"Once {number}" for number in range(PROMPTS)], "n": CHOICES, "max_tokens": 3}
    answer = service.post({**body, "temperature": 0}, "v1/completions").json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(PROMPTS * CHOICES))
    assert all(choice["finish_reason"] for choice in answer["choices"])


def test_the_management_interface_takes_no_models(service: Service) -> None:
    management = f"http://127.0.0.1:{service.port + 1}"
    with requests.Session() as session:
        session.trust_env = False
        for method, path in (("POST", "/models?url=other.mar"), ("DELETE", "/models/llama")):
            assert session.request(method, management + path, timeout=10).status_code in (403, 405)
        assert session.get(f"{management}/models/llama", timeout=10).json()[0]["workers"][0]["status"] == "READY"
