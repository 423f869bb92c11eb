"""What `make serve KEY=VALUE ...` means: the effective model-config.yaml and config.properties."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deploy.checkpoint import check_ranks, converted
from engine.config import DEVICES, ConfigError, nearest
from handler.settings import FRONTEND_KEYS, HandlerSettings, parse

PROJECT = Path(__file__).resolve().parent.parent
BUILD = PROJECT / "build"
MODEL_CONFIG = PROJECT / "model-config.yaml"
PROPERTIES = PROJECT / "deploy" / "config.properties"

HANDLER_KEYS = tuple(each.name for each in dataclasses.fields(HandlerSettings))
# What this file owns, by the names in upper case that make users give.
OWN_KEYS = ("checkpoint", "tp", "port", "host", "device", "token_auth", "nodes", "master", "config", "build")
DEFAULT_PORT = 8080
# Keys that follow from these words.
INSTEAD = {"converted_ckpt_dir": "CHECKPOINT=DIR", "deviceType": "DEVICE=cpu or cuda", "parallelType": "TP=N"}
# What model-config.yaml says as it comes; it stands for the demo model, which is converted where that is needed.
DEMO = "build/demo"
# inference, management, metrics, gRPC inference, gRPC management
PORTS = 5


@dataclass(frozen=True)
class Options:
    """What the user asked for; `values` are keys of model-config.yaml that replace those of the file."""

    checkpoint: Path | None = None
    tp: int | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    device: str | None = None
    token_auth: bool = False
    nodes: int | None = None
    master: str | None = None
    config: Path = MODEL_CONFIG
    build: Path = BUILD
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least, most in (("tp", 1, 1024), ("nodes", 1, 1024), ("port", 1, 65536 - PORTS)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and least <= value <= most):
                raise ConfigError(f"{name.upper()} is {value!r}; it must be a whole number from {least} to {most}")
        if self.device not in (None, *DEVICES):
            raise ConfigError(f"DEVICE is {self.device!r}; allowed: {', '.join(DEVICES)}")
        if not isinstance(self.token_auth, bool):
            raise ConfigError(f"TOKEN_AUTH is {self.token_auth!r}; it must be true or false")
        if self.nodes is not None and self.nodes > 1 and not self.master:
            raise ConfigError(f"NODES={self.nodes} needs MASTER=ADDRESS:PORT, this machine's on the private network")
        place = re.fullmatch(r"[A-Za-z0-9.-]+:(\d{1,5})", self.master or "none:1")
        if not place or not 1 <= int(place[1]) <= 65535:
            raise ConfigError(f"MASTER is {self.master!r}; it must be ADDRESS:PORT, such as 10.0.0.1:29500")
        if not re.fullmatch(r"[A-Za-z0-9.-]+", self.host):
            raise ConfigError(f"HOST is {self.host!r}; it must be an address or a name of this machine")

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The words that all commands take."""
        parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="TP=2, CHECKPOINT=DIR, max_seq_len=2048 ...")

    @classmethod
    def from_words(cls, words: list[str]) -> Options:
        """Options from KEY=VALUE words; keys in any case, values as YAML would read them."""
        allowed = {key.lower(): key for key in (*HANDLER_KEYS, *FRONTEND_KEYS, *OWN_KEYS)}
        own: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for word in words:
            key, equals, text = word.partition("=")
            name = allowed.get(key.lower().replace("-", "_"))
            if name is None or not equals:
                known = [each for each in allowed.values() if each not in INSTEAD]
                shown = [each.upper() if each in OWN_KEYS or each in HANDLER_KEYS else each for each in known]
                raise ConfigError(f"{word!r} is no KEY=VALUE known here; {nearest(key.upper(), shown)}")
            if name in INSTEAD:
                raise ConfigError(f"{word!r}: {name} follows from {INSTEAD[name]}; say that instead")
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                value = text
            if name not in OWN_KEYS:
                values[name] = value
            elif name in ("checkpoint", "config", "build"):
                if text:
                    own[name] = Path(os.path.expanduser(text)).resolve()
            elif value is not None:  # `make serve TP=` is the same as no TP
                own[name] = str(text) if name in ("host", "device", "master") else value
        return cls(**own, values=values)


@dataclass(frozen=True)
class Plan:
    """Everything that a start follows from."""

    options: Options
    checkpoint: Path
    model_config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where this server's files are."""
        return self.options.build / "serve"

    @property
    def port(self) -> int:
        """Where requests are taken; the next ones are for management, metrics and gRPC."""
        return self.options.port or DEFAULT_PORT

    @property
    def ranks(self) -> int:
        """Ranks on this machine."""
        return self.model_config["torchrun"]["nproc-per-node"]

    def model_config_text(self) -> str:
        """The effective model-config.yaml."""
        head = "# Written by tools/serve.py from model-config.yaml, which explains the keys.\n"
        return head + yaml.safe_dump(dict(self.model_config), sort_keys=False)

    def write_model_config(self) -> Path:
        """Write the effective model-config.yaml, for the archive."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "model-config.yaml"
        path.write_text(self.model_config_text(), encoding="utf-8")
        return path


def plan_model(options: Options) -> Plan:
    """Settle the checkpoint and all settings; whatever cannot work is refused here, before anything starts."""
    model_config = read_yaml(options.config)
    handler = _section(model_config, "handler")
    if options.checkpoint is not None and options.config == MODEL_CONFIG:
        handler["max_batch_size"] = None  # the number in that file is the demo model's
    for key, value in options.values.items():
        (handler if key in HANDLER_KEYS else model_config)[key] = value
    torchrun = _section(model_config, "torchrun")
    device = _device(options.device or handler.get("device") or "auto")
    handler["device"] = device
    model_config["deviceType"] = "gpu" if device == "cuda" else "cpu"
    torchrun["nproc-per-node"] = options.tp or torchrun.get("nproc-per-node", 1)
    if options.nodes is not None:
        torchrun["nnodes"] = options.nodes
    if options.master is not None:
        if torchrun.get("nnodes", 1) == 1:
            raise ConfigError(f"MASTER={options.master} needs NODES=N, how many machines there are")
        torchrun.update({"rdzv-backend": "static", "rdzv-endpoint": options.master})
    model_config.setdefault("parallelType", "tp")
    checkpoint, given = options.checkpoint, handler.get("converted_ckpt_dir") or DEMO
    if checkpoint is None and given != DEMO:
        checkpoint = options.config.parent / os.path.expanduser(str(given))
    for key in {"tokenizer_path", "model_args_path"} & handler.keys():
        if isinstance(handler[key], str):  # the archive is unpacked elsewhere
            base = Path.cwd() if key in options.values else options.config.parent
            handler[key] = str((base / os.path.expanduser(handler[key])).resolve())
    # The settings are checked before minutes go into a conversion, but for what describes its outcome.
    handler["converted_ckpt_dir"] = str(options.build / "demo")
    _fit_queue(model_config, options.values)
    parse({**model_config, "handler": {**handler, "model_args_path": None}}, options.build)
    folder = converted(checkpoint, options.build)
    handler["converted_ckpt_dir"] = str(folder)
    parse(model_config, options.build)
    check_ranks(folder, torchrun["nproc-per-node"] * torchrun.get("nnodes", 1))
    return Plan(options, folder, model_config)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of settings."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping of settings is needed")
    return content


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the file, made if it is not there."""
    section = content[name] = content.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{name} is {section!r}; it must be a section")
    return section


def _fit_queue(model_config: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Make room in TorchServe's batch and queue for the answers that may run and wait, unless the user set them."""
    handler = model_config["handler"]
    counts = [handler.get("max_batch_size") or 8, handler.get("max_waiting", HandlerSettings.max_waiting)]
    if not all(isinstance(count, int) for count in counts):
        return  # refused with its name by what checks the settings
    for key, room in (("batchSize", 2 * sum(counts)), ("jobQueueSize", 4 * sum(counts))):
        if key not in given and isinstance(model_config.get(key), int):
            model_config[key] = max(model_config[key], room)


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if not Path("/dev/nvidiactl").exists():
        return "cpu"  # without asking torch, which takes seconds
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def properties_text(plan: Plan) -> str:
    """The effective config.properties: the file's, with this server's addresses, paths and authorisation."""
    options, port = plan.options, plan.port
    changes = {
        "inference_address": f"http://{options.host}:{port}",
        "management_address": f"http://127.0.0.1:{port + 1}",
        "metrics_address": f"http://127.0.0.1:{port + 2}",
        "grpc_inference_port": str(port + 3),
        "grpc_management_port": str(port + 4),
        "disable_token_authorization": str(not options.token_auth).lower(),
        "model_store": str(options.build / "model_store"),
        "metrics_config": str(plan.folder / "metrics.yaml"),
        "max_request_size": str(max(2 << 20, 2 * plan.model_config["handler"].get("max_body_bytes", 1 << 20))),
    }
    # As a URI, which torchserve's own --log-config does not make of a path with # or ? in it.
    logging = f"-Dlog4j.configurationFile={(plan.folder / 'log4j2.xml').as_uri()}"
    text = PROPERTIES.read_text(encoding="utf-8").replace("\nvmargs=", f"\nvmargs={logging} ")
    return replace_properties(text, changes)


def replace_properties(text: str, changes: Mapping[str, str]) -> str:
    """A properties file with other values for keys that it has."""
    left, lines = dict(changes), []
    for line in text.splitlines():
        key, equals, _ = line.partition("=")
        # As Java reads it, which is Latin-1 with escapes.
        lines.append(f"{key}={json.dumps(left.pop(key))[1:-1]}" if equals and key in left else line)
    assert not left, f"config.properties has no {', '.join(left)}"
    return "\n".join(lines) + "\n"
