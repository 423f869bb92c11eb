"""Settings, parsed once at the edge into frozen dataclasses, and the two errors that end a start or a request."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "int4", "int4-128", "fp8")
KERNELS = ("auto", "native", "torch")
SPECULATIONS = ("none", "prompt_lookup")
MOST_THREADS = 1024  # more than a system lets a process have would end it without a word


class ConfigError(ValueError):
    """A setting, file or machine that the engine cannot start with; the message says what to change."""


class DeviceError(ConfigError):
    """One rank's own device that cannot do its share."""


class RequestError(ValueError):
    """One request that cannot be served: why, the parameter at fault, the HTTP status and OpenAI's word for it."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build a settings dataclass; a key it does not have, lacks or rejects is an error that names `where`."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: a mapping of settings is needed, not {type(mapping).__name__}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in mapping:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), list(known))}")
    missing = [
        name
        for name, field in known.items()
        if name not in mapping and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(map(repr, missing))}")
    try:
        return cls(**mapping)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def nearest(given: str, allowed: list[str]) -> str:
    """The end of an error message: the closest allowed word, or all of them."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "allowed: " + ", ".join(sorted(allowed))


@dataclass(frozen=True)
class EngineConfig:
    """What the engine runs with; None takes the checkpoint's own default."""

    max_seq_len: int | None = None
    max_batch_size: int | None = None
    max_tokens_per_step: int = 512
    prefill_beside_decode: int | str = "auto"
    prefix_reuse: bool = True
    speculation: str = "none"
    max_draft_tokens: int = 8
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    kernels: str = "auto"
    cuda_graphs: bool = True
    threads: int | None = None
    memory_fraction: float = 0.9
    verify_checkpoint: bool = True

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_batch_size", "max_tokens_per_step", "max_draft_tokens", "threads"):
            value = getattr(self, name)
            if value is None and name not in ("max_tokens_per_step", "max_draft_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ConfigError(
                f"threads is {self.threads}; it must be at most {MOST_THREADS}, and best no more than cores"
            )
        beside = self.prefill_beside_decode
        if beside != "auto" and (isinstance(beside, bool) or not isinstance(beside, int) or beside < 1):
            raise ConfigError(f"prefill_beside_decode is {beside!r}; it must be auto or a whole number of at least 1")
        for name, allowed in (
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("quantization", QUANTIZATIONS),
            ("kernels", KERNELS),
            ("speculation", SPECULATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        fraction = self.memory_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ConfigError(f"memory_fraction is {fraction!r}; it must be above 0 and at most 1")
        for name in ("prefix_reuse", "cuda_graphs", "verify_checkpoint"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.max_batch_size is not None and self.max_tokens_per_step < self.max_batch_size:
            raise ConfigError(
                f"max_tokens_per_step is {self.max_tokens_per_step}; it must be at least max_batch_size "
                f"({self.max_batch_size}), so that every running sequence gets its token in each step"
            )
