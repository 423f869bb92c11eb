"""From a converted checkpoint to a model on this rank's device: preflight, layout, shards, weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from engine.checkpoint import Checkpoint, read_tensors
from engine.config import ConfigError, DeviceError, EngineConfig
from engine.cpu.library import MOST_HEADS_PER_KEY, NoKernels, load
from engine.gpu import NotOnThisGpu
from engine.gpu.block import FusedBlock, FusedNorm, check_fusion
from engine.gpu.linear import QuantizedLinear, check_products
from engine.kv_cache import KVCache
from engine.parallel import Ranks
from engine.ragged_cache import check_ragged_attention
from engine.scheduler import MAX_PROMPT_LOGIT_ROWS
from llama2 import ModelArgs, RowwiseLinear, Transformer, localize, parallelize, tensor_parallel_mesh_shape
from quant import SCHEMES, Scheme

log = logging.getLogger(__name__)

# On a CPU float32 is the fast and exact choice as long as the weights are small.
FLOAT32_LIMIT_BYTES = 1 << 30
SINGLE_THREAD_WEIGHTS = 1 << 20
# The output matrix is the largest of small models, and the one that errors show most in: it has 8 bits in every scheme.
OUTPUT = "int8"


@dataclass(frozen=True)
class Limits:
    """The sizes that the engine runs with, after the checkpoint filled in what the settings left open."""

    max_seq_len: int
    max_batch_size: int
    max_tokens_per_step: int
    dtype: torch.dtype
    quantization: str = "none"
    native: bool = False
    """Whether the CPU's own kernels compute the steps."""
    packed: bool = False
    """Whether quantized weights are kept as such on a GPU; otherwise PyTorch computes with what they stand for."""
    ragged: bool = False
    """Whether a GPU's attention takes sequences of any length side by side."""
    fused: bool = False
    """Whether a GPU computes a layer in few kernels; then its attention is ragged, too."""
    prefix_reuse: bool = True
    prefill_beside_decode: int | None = None
    """Tokens of prompts in a step that others decode in; None learns it."""
    draft_tokens: int = 0
    """The most tokens of a sequence that are guessed and verified in one step; 0 guesses none."""
    cuda_graphs: bool = False
    """Whether a GPU's decode steps are captured and replayed."""

    @property
    def scheme(self) -> Scheme | None:
        """How weights are quantized, if they are."""
        return SCHEMES.get(self.quantization)

    def graphs(self, ranks: int) -> bool:
        """Whether that many ranks use CUDA graphs: not several, whose collectives nobody has tried in one."""
        return self.cuda_graphs and ranks == 1

    @classmethod
    def settle(cls, config: EngineConfig, args: ModelArgs, device: str) -> Limits:
        """Settings first, then the checkpoint's own defaults."""
        slots = config.max_batch_size or args.max_batch_size
        if config.max_tokens_per_step < slots:
            raise ConfigError(
                f"max_tokens_per_step is {config.max_tokens_per_step}; it must be at least max_batch_size ({slots})"
            )
        dtype = choose_dtype(config.dtype, args, device)
        native = choose_native(config, args, device)
        ours = device.startswith("cuda") and config.kernels != "torch"
        ragged = ours and choose_ragged(args, device, dtype)
        beside = config.prefill_beside_decode
        return cls(
            max_seq_len=config.max_seq_len or args.max_seq_len,
            max_batch_size=slots,
            max_tokens_per_step=config.max_tokens_per_step,
            dtype=dtype,
            quantization=config.quantization,
            native=native,
            packed=ours and choose_packed(config.quantization, device, dtype),
            ragged=ragged,
            fused=ragged and choose_fused(args, device, dtype),
            prefix_reuse=config.prefix_reuse,
            prefill_beside_decode=None if beside == "auto" else beside,
            draft_tokens=0 if config.speculation == "none" else config.max_draft_tokens,
            cuda_graphs=config.cuda_graphs and device.startswith("cuda"),
        )


@dataclass(frozen=True)
class MemoryNeed:
    """What one rank is going to hold, in bytes."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working


def choose_dtype(name: str, args: ModelArgs, device: str) -> torch.dtype:
    """The dtype for `auto`: bfloat16, or float16 on GPUs without it; float32 for a small model on a CPU."""
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32 if 4 * args.parameter_count() <= FLOAT32_LIMIT_BYTES else torch.bfloat16


def choose_native(config: EngineConfig, args: ModelArgs, device: str) -> bool:
    """Whether to use the CPU's own kernels: always if this machine can have them, unless PyTorch's are asked for."""
    kernels = config.kernels
    if kernels == "torch" or device != "cpu":
        if kernels == "native":
            raise ConfigError(f"kernels is 'native', but those are for the CPU and device is {device!r}; use 'auto'")
        return False
    try:
        if args.n_heads // args.n_kv_heads > MOST_HEADS_PER_KEY:
            raise NoKernels(f"more than {MOST_HEADS_PER_KEY} heads share a key/value head")
        if config.quantization == "fp8":
            raise NoKernels("fp8 is for GPUs; int8 is as small and more exact")
        load()
    except NoKernels as reason:
        if kernels == "native":
            raise ConfigError(f"kernels is 'native', but they cannot be had: {reason}; use 'auto' or 'torch'") from None
        log.warning("PyTorch's kernels are used, which are slower, because %s", reason)
        return False
    return True


def choose_packed(quantization: str, device: str, dtype: torch.dtype) -> bool:
    """Whether quantized weights stay quantized on a GPU: if its kernels work."""
    schemes = {quantization, OUTPUT} if quantization != "none" else set()
    without = "quantization saves no memory and no time here, because %s"
    return bool(schemes) and all(_works(without, check_products, device, SCHEMES[each], dtype) for each in schemes)


def choose_ragged(args: ModelArgs, device: str, dtype: torch.dtype) -> bool:
    """Whether one call attends for all sequences on a GPU: if PyTorch's `varlen_attn` works there."""
    without = "attention reads more than it needs, because PyTorch's varlen_attn cannot be used: %s"
    return _works(without, check_ragged_attention, device, dtype, args.n_heads // args.n_kv_heads, 1, args.head_dim)


def choose_fused(args: ModelArgs, device: str, dtype: torch.dtype) -> bool:
    """Whether a GPU computes a layer in few kernels: if they work there."""
    return _works("a step takes more launches than it needs, because %s", check_fusion, device, dtype, args)


def _works(without: str, check: Callable[..., None], *arguments: object) -> bool:
    """Whether a check passes; a warning says what is lost if it does not."""
    try:
        check(*arguments)
        return True
    except NotOnThisGpu as reason:
        log.warning(without, reason)
    except Exception as error:  # Triton, the C compiler that it calls, PyTorch, the driver: each has its own kinds
        log.warning(without, f"{type(error).__name__}: {error}")
    return False


def memory_need(args: ModelArgs, limits: Limits, ranks: int) -> MemoryNeed:
    """Weights, cache and working memory of one rank, from sizes alone."""
    parts, _ = tensor_parallel_mesh_shape(args, ranks)
    weights = 0.0
    for name, shape in args.tensor_shapes().items():
        count = torch.Size(shape).numel()
        if len(shape) == 2:
            count = -(-count // (parts if ".wk." in name or ".wv." in name else ranks))
        columns = shape[-1] // (ranks if name.endswith(("wo.weight", "w2.weight")) else 1)
        weights += count * _bytes_per_weight(name, len(shape), columns, args, limits)
    graphs = limits.graphs(ranks)
    length = limits.max_seq_len + graphs  # padded rows write to the position behind the last one
    cache = KVCache.bytes_needed(
        args.n_layers, limits.max_batch_size, args.n_kv_heads // parts, length, args.head_dim, limits.dtype
    )
    heads, keys, hidden = args.n_heads // ranks, args.n_kv_heads // parts, args.ffn_hidden_dim // ranks
    # Per token: the residual stream and its normalised copy, one layer's heads (rotated in float32), its gates.
    per_token = limits.dtype.itemsize * (4 * args.dim + 3 * hidden) + 8 * (heads + 2 * keys) * args.head_dim
    # Per row of logits: float32, and in the sampler probabilities, their order and sums in double precision.
    rows = limits.max_batch_size + MAX_PROMPT_LOGIT_ROWS
    masks = limits.max_tokens_per_step * limits.max_seq_len
    if limits.native:  # float32 throughout: the residual stream, one layer's heads and gates, activations in any form
        widest = max(args.dim, heads * args.head_dim, hidden)
        per_token = 4 * (2 * args.dim + (heads + 2 * keys) * args.head_dim + 2 * hidden) + 8 * widest
        masks = 16 * args.head_dim * limits.max_seq_len  # RoPE's table, and the same again for a layer's packing
    working = limits.max_tokens_per_step * per_token + rows * args.vocab_size * 32 + masks
    if limits.packed:  # many tokens have a matrix unpacked: the largest there is, of those that lie side by side
        widest = max((heads + 2 * keys) * args.head_dim, 2 * hidden, args.vocab_size // ranks)
        working += widest * args.dim * limits.dtype.itemsize
    if graphs:
        # What graphs use is kept for them: activations, logits in both dtypes and in the buffer that all share, and one
        # layer of the slots that are brought together, fewer than half of them. What the driver itself keeps for a
        # graph cannot be known from here; the share of memory that memory_fraction leaves free is for such things.
        working += limits.max_batch_size * (per_token + 12 * args.vocab_size) + cache // args.n_layers // 2
    return MemoryNeed(int(weights), cache, working)


def _bytes_per_weight(name: str, dimensions: int, columns: int, args: ModelArgs, limits: Limits) -> float:
    scheme, table = limits.scheme, name.startswith("tok_embeddings")
    if scheme is None or not (limits.native or limits.packed) or dimensions < 2:
        return limits.dtype.itemsize
    if table and not (args.tie_embeddings and limits.native):
        return limits.dtype.itemsize
    if table or name.startswith("output"):
        scheme = SCHEMES[OUTPUT]
    return scheme.bits / 8 if scheme.fits(columns) else limits.dtype.itemsize


def available_memory(device: str, group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a new process may use: free device memory, or free host memory within the control group's limit."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, current = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files that were read, as the checkpoint is for its hashes, count as used, but make room.
        available = min(available, limit - current + int(told["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        pass
    return available


def preflight(args: ModelArgs, limits: Limits, ranks: Ranks, fraction: float) -> MemoryNeed:
    """Refuse, before anything is allocated, what the device cannot hold; say what it will hold."""
    need = memory_need(args, limits, ranks.launch.size)
    # Ranks on one host share its memory; each GPU is one rank's own.
    sharers = 1 if ranks.device.startswith("cuda") else ranks.launch.local_size
    usable = int(available_memory(ranks.device) * fraction)
    figures = (
        f"weights {_gib(need.weights)} ({str(limits.dtype).removeprefix('torch.')}) + KV cache {_gib(need.cache)} "
        f"({limits.max_batch_size} slots x {limits.max_seq_len} tokens) + working {_gib(need.working)} "
        f"= {_gib(need.total)} per rank; {sharers} rank(s) here, {_gib(usable)} usable on {ranks.device}"
    )
    if need.total * sharers > usable:
        if need.weights * sharers > usable:
            advice = "the weights alone do not fit: use dtype bfloat16, more ranks, or a larger device"
        else:
            each = max(1, need.cache // limits.max_batch_size)
            fit = (usable // sharers - need.weights - need.working) // each
            slots = f"max_batch_size to {fit} or " if fit >= 1 else ""
            advice = f"lower {slots}max_seq_len, or use more ranks"
        # Ranks on one CPU fail alike and one of them may speak for all; a GPU may be too full for its own rank only.
        kind = DeviceError if ranks.device.startswith("cuda") else ConfigError
        raise kind(f"not enough memory: {figures}; {advice}")
    log.info("memory: %s", figures)
    return need


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def load_model(checkpoint: Checkpoint, limits: Limits, ranks: Ranks) -> Transformer:
    """This rank's share of the weights, in the wanted dtype, on its device."""
    model = lay_out(checkpoint.args, limits, ranks)
    return fill_in(model, limits, ranks, lambda module, prefix: fill(module, prefix, checkpoint, ranks.device))


def fill_in(model: Transformer, limits: Limits, ranks: Ranks, fill: Callable[[nn.Module, str], None]) -> Transformer:
    """Have `fill` put weights where so far there are only shapes, part by part, each of which is quantized at once."""
    parts = [f"layers.{number}" for number in range(len(model.layers))] + ["tok_embeddings", "norm"]
    for name in parts + ["output"] * (model.output is not None):
        fill(model.get_submodule(name), f"{name}.")
        if limits.fused and name.startswith("layers."):
            model.set_submodule(name, FusedBlock(model.get_submodule(name)))
        if limits.fused and name == "norm":
            model.set_submodule(name, FusedNorm(model.norm))
        if limits.scheme is not None:
            _quantize(model, name, limits, ranks)
    if ranks.tp is not None:
        localize(model, ranks.tp)
    model.set_rope(torch.device(ranks.device))
    return model.eval()


def lay_out(args: ModelArgs, limits: Limits, ranks: Ranks) -> Transformer:
    """The model without any weights, sharded over the ranks."""
    with torch.device("meta"):
        model = Transformer(args).to(limits.dtype)
    model.requires_grad_(False)
    if ranks.tp is not None:
        parallelize(model, ranks.tp, ranks.kv)
    return model


def fill(module: nn.Module, prefix: str, checkpoint: Checkpoint, device: str) -> None:
    """Read a module's weights, whose names in the checkpoint begin with `prefix`."""
    module.to_empty(device=device)
    read_tensors(checkpoint, {prefix + name: tensor for name, tensor in module.state_dict().items()})


def _quantize(model: Transformer, part: str, limits: Limits, ranks: Ranks) -> None:
    """Quantize a part's matrices; where there is no kernel for that, they get the numbers that it leaves of them."""
    for name, module in list(model.get_submodule(part).named_modules(prefix=part)):
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.to_local() if isinstance(module.weight, DTensor) else module.weight
        scheme = SCHEMES[OUTPUT] if name == "output" else limits.scheme
        if not scheme.fits(weight.shape[1]):
            continue
        quantized = scheme.quantize(weight)
        if limits.packed:
            group = ranks.tp.get_group() if ranks.tp is not None and isinstance(module, RowwiseLinear) else None
            model.set_submodule(name, QuantizedLinear(quantized, group))
        else:
            weight.copy_(quantized.dequantize())


def choose_threads(args: ModelArgs, local_ranks: int) -> int:
    """This host's cores divided among its ranks (torchrun alone would leave each rank one), but one for tiny layers.

    Below about a million weights in a matrix the threads wait for one another longer than they compute.
    """
    if args.dim * args.ffn_hidden_dim // local_ranks < SINGLE_THREAD_WEIGHTS:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)
