"""model-config.yaml: what is refused, with which words, and what the handler and TorchServe are given."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from engine.config import ConfigError, EngineConfig
from handler.settings import DROPPED_TORCHRUN_KEYS, FRONTEND_KEYS, TORCHRUN_KEYS, HandlerSettings, check_frontend, parse

PROJECT = Path(__file__).resolve().parent.parent
MODEL_DIR = Path("/models/llama")


def config(own: dict | None = None, **frontend: object) -> dict:
    """A configuration that is accepted, with changes; None takes a key away."""
    everything = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 640,
        "maxBatchDelay": 1,
        "continuousBatching": True,
        "parallelType": "tp",
        "torchrun": {"nproc-per-node": 2},
        "handler": {"converted_ckpt_dir": "weights", "max_batch_size": 8, **(own or {})},
        **frontend,
    }
    return {key: value for key, value in everything.items() if value is not None}


def jar_class(name: str) -> bytes:
    jar = Path(find_spec("ts").origin).parent / "frontend" / "model-server.jar"
    with zipfile.ZipFile(jar) as archive:
        return archive.read(f"org/pytorch/serve/{name}.class")


def test_paths_start_at_the_model_folder_and_default_to_the_checkpoint() -> None:
    settings = parse(config(), MODEL_DIR)
    assert settings.converted_ckpt_dir == MODEL_DIR / "weights"
    assert settings.tokenizer_path is None  # the checkpoint knows which file it has
    assert settings.model_args_path is None
    absolute = parse(config({"converted_ckpt_dir": "/data/7b", "tokenizer_path": "own.model"}), MODEL_DIR)
    assert absolute.converted_ckpt_dir == Path("/data/7b")
    assert absolute.tokenizer_path == MODEL_DIR / "own.model"


def test_the_engine_and_the_requests_get_their_parts() -> None:
    own = {"max_seq_len": 1024, "dtype": "bfloat16", "top_k": 5, "manual_seed": 40, "prefill_beside_decode": 9}
    settings = parse(config(own), MODEL_DIR)
    assert isinstance(settings, EngineConfig) and EngineConfig.dtype == settings.kernels == "auto"
    assert (settings.max_seq_len, settings.dtype, settings.prefill_beside_decode) == (1024, "bfloat16", 9)
    defaults = settings.sampling_defaults()
    assert (defaults["top_k"], defaults["seed"], defaults["mode"]) == (5, 40, "text_completion")
    assert "seed" not in parse(config(), MODEL_DIR).sampling_defaults()


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ({"temprature": 1}, ["'temprature'", "did you mean 'temperature'?"]),
        ({"max_sequence_len": 1}, ["'max_sequence_len'", "did you mean 'max_seq_len'?"]),
        ({"temperature": "hot"}, ["temperature is 'hot'", "number"]),
        ({"temperature": float("nan")}, ["temperature is nan"]),
        ({"top_p": 0}, ["top_p is 0"]),
        ({"top_p": True}, ["top_p is True"]),
        ({"repetition_penalty": -1}, ["repetition_penalty is -1"]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0"]),
        ({"max_new_tokens": "60"}, ["max_new_tokens is '60'"]),
        ({"manual_seed": 1.5}, ["manual_seed is 1.5"]),
        ({"mode": "completion"}, ["mode is 'completion'", "text_completion, chat"]),
        ({"device": "gpu"}, ["device is 'gpu'", "auto, cpu, cuda"]),
        ({"max_batch_size": 0}, ["max_batch_size is 0"]),
        ({"max_batch_size": 600}, ["max_tokens_per_step"]),
        ({"memory_fraction": 2}, ["memory_fraction is 2"]),
        ({"verify_checkpoint": "no"}, ["verify_checkpoint is 'no'", "true or false"]),
        ({"converted_ckpt_dir": None}, ["converted_ckpt_dir is None"]),
        ({"converted_ckpt_dir": ["a"]}, ["converted_ckpt_dir is ['a']"]),
        ({"tokenizer_path": 5}, ["tokenizer_path is 5"]),
        ({"max_waiting": -1}, ["max_waiting is -1"]),
        ({"poll_sec": 0}, ["poll_sec is 0"]),
        ({"poll_sec": 1}, ["poll_sec is 1", "0.2"]),
        ({"request_timeout_sec": "600s"}, ["request_timeout_sec is '600s'"]),
        ({"lease_sec": float("inf")}, ["lease_sec is inf"]),
        ({"log_level": "info"}, ["log_level is 'info'", "INFO"]),
        ({"max_body_bytes": 1.5}, ["max_body_bytes is 1.5"]),
    ],
)
def test_a_handler_key_that_cannot_be_is_named(handler: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(config(handler), MODEL_DIR)
    for word in ["model-config.yaml", *words]:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("frontend", "words"),
    [
        ({"continuousBatching": None}, ["continuousBatching: true"]),
        ({"continuousBatching": False}, ["continuousBatching: true"]),
        ({"continuousBatching": "true"}, ["continuousBatching is 'true'"]),
        ({"continousBatching": True}, ["'continousBatching'", "did you mean 'continuousBatching'?"]),
        ({"batchsize": 4}, ["'batchsize'", "did you mean 'batchSize'?"]),
        ({"batchSize": None}, ["batchSize is missing", "The line is: batchSize: 528"]),
        ({"batchSize": 264}, ["batchSize is 264", "max_batch_size (8) + max_waiting (256)", "503", "429"]),
        ({"batchSize": "640"}, ["batchSize is '640'", "whole number"]),
        ({"minWorkers": None}, ["minWorkers is None", "minWorkers: 1"]),
        ({"maxWorkers": 2}, ["maxWorkers is 2", "maxWorkers: 1"]),
        ({"maxBatchDelay": None}, ["maxBatchDelay is missing", "maxBatchDelay: 1"]),
        ({"maxBatchDelay": 0}, ["maxBatchDelay is 0", "100 ms"]),
        ({"maxBatchDelay": 500}, ["maxBatchDelay is 500", "maxBatchDelay: 1"]),
        ({"clientTimeoutInMills": 1000}, ["clientTimeoutInMills", "request_timeout_sec"]),
        ({"asyncCommunication": True}, ["asyncCommunication", "remove"]),
        ({"sequenceBatching": True}, ["sequenceBatching", "remove"]),
        ({"useJobTicket": True}, ["useJobTicket", "remove"]),
        ({"responseTimeout": 0}, ["responseTimeout is 0"]),
        ({"maxRetryTimeoutInSec": -1}, ["maxRetryTimeoutInSec is -1"]),
        ({"deviceType": "cuda"}, ["deviceType is 'cuda'", "cpu, gpu"]),
        ({"parallelType": "pp"}, ["parallelType is 'pp'", "parallelType: tp"]),
        ({"parallelType": None}, ["parallelType is None", "parallelType: tp"]),
        ({"torchrun": None}, ["torchrun: {nproc-per-node: 1}"]),
        ({"torchrun": {"nnodes": 1}}, ["torchrun: {nproc-per-node: 1}"]),
        ({"torchrun": {"nproc_per_node": 2, "nproc-per-node": 2}}, ["'nproc_per_node'", "'nproc-per-node'"]),
        ({"torchrun": {"nproc-per-node": 0}}, ["nproc-per-node is 0"]),
        ({"torchrun": {"nproc-per-node": 2, "rdzv-conf": "a=b"}}, ["torchrun.rdzv-conf", "PET_RDZV_CONF"]),
        ({"torchrun": {"nproc-per-node": 2, "nnodes": 2}}, ["rdzv-backend: static", "rdzv-endpoint"]),
        ({"parallelLevel": 4}, ["parallelLevel is 4", "nproc-per-node 2"]),
        ({"handler": "weights"}, ["mapping"]),
        ({"handler": None}, ["section 'handler' is missing", "converted_ckpt_dir"]),
        ({"handler": {}}, ["missing key 'converted_ckpt_dir'"]),
    ],
)
def test_a_key_of_torchserve_that_breaks_streaming_is_refused_with_the_line_to_write(
    frontend: dict, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(config(**frontend), MODEL_DIR)
    for word in words:
        assert word in str(raised.value)


def test_one_process_without_torchrun_and_several_machines_are_fine() -> None:
    check_frontend(config(parallelType=None, torchrun=None))
    static = {"nproc-per-node": 2, "nnodes": 2, "rdzv-backend": "static", "rdzv-endpoint": "10.0.0.1:29500"}
    check_frontend(config(torchrun=static))


def test_model_args_path_may_repeat_what_the_checkpoint_says_but_not_change_it(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model_args.json").write_text(json.dumps({"dim": 8}))
    (tmp_path / "same.json").write_text('{"dim":8}')
    (tmp_path / "other.json").write_text('{"dim":16}')
    assert parse(config({"model_args_path": "same.json"}), tmp_path).model_args_path == tmp_path / "same.json"
    for name, word in (("other.json", "does not describe"), ("none.json", "cannot be read")):
        with pytest.raises(ConfigError, match=word):
            parse(config({"model_args_path": name}), tmp_path)


def test_the_projects_own_file_is_accepted_and_explains_every_key() -> None:
    text = (PROJECT / "model-config.yaml").read_text()
    settings = parse(yaml.safe_load(text), PROJECT)
    assert settings.converted_ckpt_dir == PROJECT / "build" / "demo"
    missing = [name for name in HandlerSettings.__dataclass_fields__ if f"    {name}:" not in text.replace("# ", "")]
    assert not missing


def test_torchserve_reads_each_key_that_is_allowed() -> None:
    frontend, torchrun = jar_class("archive/model/ModelConfig"), jar_class("archive/model/ModelConfig$TorchRun")
    assert not [key for key in FRONTEND_KEYS if key.encode() not in frontend]
    assert not [key for key in (*TORCHRUN_KEYS, *DROPPED_TORCHRUN_KEYS) if key.encode() not in torchrun]
    flags = jar_class("wlm/WorkerLifeCycle")
    assert not [key for key in DROPPED_TORCHRUN_KEYS if f"--{key}".encode() in flags]


def test_settings_need_no_torch() -> None:
    code = "import sys, handler.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=120).returncode == 0
