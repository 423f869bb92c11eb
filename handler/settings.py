"""model-config.yaml, parsed once: what the handler runs with, and what TorchServe's own keys must say for it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ConfigError, EngineConfig, from_mapping, nearest
from engine.sequence import MAX_SEED, SamplingParams

MODES = ("text_completion", "chat")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
WHERE = "model-config.yaml"
SECTION = f"{WHERE}, section handler"

SAMPLING_KEYS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)

# Every top-level key that TorchServe 0.12 reads, with the type outside of which it warns and goes on with its default.
FRONTEND_KEYS: dict[str, type] = {
    "minWorkers": int,
    "maxWorkers": int,
    "batchSize": int,
    "maxBatchDelay": int,
    "responseTimeout": int,
    "startupTimeout": int,
    "deviceType": str,
    "deviceIds": list,
    "parallelType": str,
    "parallelLevel": int,
    "torchrun": dict,
    "maxRetryTimeoutInSec": int,
    "clientTimeoutInMills": int,
    "jobQueueSize": int,
    "useJobTicket": bool,
    "sequenceMaxIdleMSec": int,
    "sequenceTimeoutMSec": int,
    "maxSequenceJobQueueSize": int,
    "maxNumSequence": int,
    "continuousBatching": bool,
    "sequenceBatching": bool,
    "asyncCommunication": bool,
    "useVenv": bool,
}
TORCHRUN_KEYS: dict[str, type] = {
    "nnodes": int,
    "nproc-per-node": int,
    "rdzv-backend": str,
    "rdzv-endpoint": str,
    "OMP_NUMBER_THREADS": int,
}
# TorchServe reads these and passes them on to nobody; torchrun itself takes them from the environment.
DROPPED_TORCHRUN_KEYS = {
    "rdzv-conf": "PET_RDZV_CONF",
    "node-rank": "PET_NODE_RANK",
    "monitor-interval": "PET_MONITOR_INTERVAL",
}
TYPE_NAMES = {int: "a whole number", str: "a text", bool: "true or false", list: "a list", dict: "a section"}

# Longer would hold the first request back for nothing: the engine batches by itself.
MAX_BATCH_DELAY_MS = 50
WORKERS_ADVICE = "exactly one worker serves a model (its ranks are torchrun's); more load takes more servers"


@dataclass(frozen=True, kw_only=True)
class HandlerSettings(EngineConfig):
    """The section `handler`; None takes the checkpoint's own value, or leaves the choice to the engine."""

    converted_ckpt_dir: Path
    tokenizer_path: Path | None = None
    model_args_path: Path | None = None
    mode: str = "text_completion"

    max_new_tokens: int = 256
    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    manual_seed: int | None = None

    max_waiting: int = 256
    request_timeout_sec: float = 600.0
    watchdog_sec: float = 120.0
    lease_sec: float = 0.7
    poll_sec: float = 0.1
    max_body_bytes: int = 1 << 20
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("converted_ckpt_dir", "tokenizer_path", "model_args_path"):
            value = getattr(self, name)
            if value is None and name != "converted_ckpt_dir":
                continue
            if not isinstance(value, str | Path) or not str(value):
                raise ConfigError(f"{name} is {value!r}; it must be a path")
            object.__setattr__(self, name, Path(value))
        for name, allowed in (("mode", MODES), ("log_level", LOG_LEVELS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        SamplingParams(**{name: getattr(self, name) for name in SAMPLING_KEYS})
        for name, least in (("max_new_tokens", 1), ("max_waiting", 0), ("max_body_bytes", 1024)):
            _whole(name, getattr(self, name), least)
        if self.manual_seed is not None:
            _whole("manual_seed", self.manual_seed, -MAX_SEED, MAX_SEED)
        for name, least, most in (
            ("request_timeout_sec", 0.1, 86400),
            ("watchdog_sec", 1, 86400),
            ("lease_sec", 0.1, 60),
            ("poll_sec", 0.001, 0.2),
        ):
            _seconds(name, getattr(self, name), least, most)

    def sampling_defaults(self) -> dict[str, Any]:
        """What a request that does not say otherwise gets."""
        defaults = {name: getattr(self, name) for name in (*SAMPLING_KEYS, "mode", "max_new_tokens")}
        return defaults if self.manual_seed is None else {**defaults, "seed": self.manual_seed}


def parse(model_yaml: Mapping[str, Any], model_dir: Path) -> HandlerSettings:
    """Check all of model-config.yaml and return the handler's part, its paths resolved against the model folder."""
    if not isinstance(model_yaml, Mapping):
        raise ConfigError(f"{WHERE}: a mapping of settings is needed, not {type(model_yaml).__name__}")
    section = model_yaml.get("handler")
    if section is None:
        raise ConfigError(f"{WHERE}: the section 'handler' is missing; it needs at least: converted_ckpt_dir: FOLDER")
    settings = from_mapping(HandlerSettings, section, SECTION)
    folder = model_dir / settings.converted_ckpt_dir
    resolved = dataclasses.replace(
        settings,
        converted_ckpt_dir=folder,
        tokenizer_path=settings.tokenizer_path and model_dir / settings.tokenizer_path,
        model_args_path=settings.model_args_path and model_dir / settings.model_args_path,
    )
    check_frontend(model_yaml, resolved)
    if resolved.model_args_path is not None:
        _check_model_args(resolved.model_args_path, folder / "model_args.json")
    return resolved


def check_frontend(model_yaml: Mapping[str, Any], settings: HandlerSettings | None = None) -> None:
    """Refuse keys that TorchServe would ignore, and values with which streaming or tensor parallelism cannot work."""
    _check_keys(
        {key: value for key, value in model_yaml.items() if key != "handler"}, FRONTEND_KEYS, WHERE, ["handler"]
    )
    if model_yaml.get("continuousBatching") is not True:
        raise ConfigError(f"{WHERE}: streaming needs continuous batching; add the line: continuousBatching: true")
    for name in ("minWorkers", "maxWorkers"):
        if model_yaml.get(name) != 1:
            raise ConfigError(f"{WHERE}: {name} is {model_yaml.get(name)!r}; {WORKERS_ADVICE}. The line is: {name}: 1")
    _check_batching(model_yaml, settings)
    if "clientTimeoutInMills" in model_yaml:
        raise ConfigError(
            f"{WHERE}: clientTimeoutInMills leaves clients without an answer when it passes; remove the line and set "
            f"request_timeout_sec in the section handler"
        )
    for name in ("sequenceBatching", "asyncCommunication", "useJobTicket"):
        if model_yaml.get(name):
            raise ConfigError(f"{WHERE}: {name} does not go together with continuousBatching; remove the line")
    _check_parallel(model_yaml)


def _check_batching(model_yaml: Mapping[str, Any], settings: HandlerSettings | None) -> None:
    """TorchServe must hand every request over at once: whatever waits in its own queue gets no answer of ours."""
    running, waiting = 1, 0
    if settings is not None:
        running, waiting = settings.max_batch_size or 1, settings.max_waiting
    size = model_yaml.get("batchSize")
    if size is None or size <= running + waiting:
        given = "is missing (TorchServe takes 1)" if size is None else f"is {size}"
        raise ConfigError(
            f"{WHERE}: batchSize {given}; it must be above max_batch_size ({running}) + max_waiting ({waiting}), or "
            f"requests pile up in TorchServe's own queue, which answers 503 instead of our 429 with Retry-After. "
            f"The line is: batchSize: {max(64, 2 * (running + waiting))}"
        )
    delay = model_yaml.get("maxBatchDelay")
    if delay is None or not 1 <= delay <= MAX_BATCH_DELAY_MS:
        given = "is missing" if delay is None else f"is {delay}"
        note = " (0 makes TorchServe wait 100 ms)" if not delay else ""
        raise ConfigError(
            f"{WHERE}: maxBatchDelay {given}{note}; it delays first tokens, so it must be from 1 to "
            f"{MAX_BATCH_DELAY_MS} ms. The line is: maxBatchDelay: 1"
        )
    for name in ("responseTimeout", "startupTimeout", "maxRetryTimeoutInSec", "jobQueueSize"):
        if name in model_yaml and model_yaml[name] < 1:
            raise ConfigError(f"{WHERE}: {name} is {model_yaml[name]}; it must be at least 1")


def _check_parallel(model_yaml: Mapping[str, Any]) -> None:
    """Ranks are started by torchrun or there is one; TorchServe must know that rank 0 answers."""
    if model_yaml.get("deviceType", "cpu") not in ("cpu", "gpu"):
        raise ConfigError(f"{WHERE}: deviceType is {model_yaml['deviceType']!r}; allowed: cpu, gpu")
    kind, torchrun = model_yaml.get("parallelType"), model_yaml.get("torchrun")
    if kind is None and torchrun is None:
        if model_yaml.get("parallelLevel", 1) != 1:
            raise ConfigError(f"{WHERE}: parallelLevel needs: parallelType: tp, and torchrun: {{nproc-per-node: N}}")
        return
    if kind != "tp":
        raise ConfigError(f"{WHERE}: parallelType is {kind!r}; rank 0 answers, so the line is: parallelType: tp")
    if torchrun is None or "nproc-per-node" not in torchrun:
        raise ConfigError(f"{WHERE}: parallelType is tp without torchrun; add: torchrun: {{nproc-per-node: 1}}")
    for key, variable in DROPPED_TORCHRUN_KEYS.items():
        if key in torchrun:
            raise ConfigError(
                f"{WHERE}: TorchServe does not pass torchrun.{key} on; remove it and set {variable} in the environment "
                f"that TorchServe is started with"
            )
    _check_keys(torchrun, TORCHRUN_KEYS, f"{WHERE}, section torchrun", [])
    for name in ("nnodes", "nproc-per-node", "OMP_NUMBER_THREADS"):
        if torchrun.get(name, 1) < 1:
            raise ConfigError(f"{WHERE}: torchrun.{name} is {torchrun[name]}; it must be at least 1")
    if torchrun.get("nnodes", 1) > 1 and (torchrun.get("rdzv-backend") != "static" or "rdzv-endpoint" not in torchrun):
        raise ConfigError(
            f"{WHERE}: several machines meet at a fixed place, or rank 0 may not be TorchServe's; add to torchrun: "
            f"rdzv-backend: static, and rdzv-endpoint: ADDRESS_OF_THIS_MACHINE:29500"
        )
    ranks = torchrun["nproc-per-node"]
    if model_yaml.get("parallelLevel", ranks) != ranks:
        raise ConfigError(
            f"{WHERE}: parallelLevel is {model_yaml['parallelLevel']} and torchrun.nproc-per-node {ranks}; "
            f"remove parallelLevel"
        )


def _check_keys(given: Mapping[str, Any], known: Mapping[str, type], where: str, more: list[str]) -> None:
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), [*known, *more])}")
        kind = known[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{where}: {key} is {value!r}; it must be {TYPE_NAMES[kind]}")


def _check_model_args(given: Path, own: Path) -> None:
    """The converted folder says what its model is; another file may repeat that, not change it."""
    contents = []
    for path in (own, given):
        try:
            contents.append(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{SECTION}: {path}: cannot be read as JSON: {error}") from None
    if contents[0] != contents[1]:
        raise ConfigError(
            f"{SECTION}: model_args_path: {given} does not describe the model in {own.parent}; remove the key, or "
            f"convert the checkpoint again"
        )


def _whole(name: str, value: object, least: int, most: int | None = None) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not good:
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {limits}")


def _seconds(name: str, value: object, least: float, most: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}; it must be a number of seconds from {least:g} to {most:g}")
