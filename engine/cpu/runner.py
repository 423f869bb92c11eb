"""Steps on the CPU's own kernels: this rank's weights, packed, and one call for a whole step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.cpu import library
from engine.cpu.arena import Arena
from engine.cpu.packing import KINDS, PANEL, pack
from engine.kv_cache import KVCache
from engine.loader import OUTPUT, Limits
from engine.sampler import adjust
from engine.scheduler import MAX_PROMPT_LOGIT_ROWS, StepPlan
from engine.sequence import Sequence
from llama2 import Transformer, TransformerBlock, first_vocabulary_row, gather_vocabulary, rope_frequencies
from quant import SCHEMES, Scheme


class _Matrix(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("group", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("counts", c_void_p),
        ("tightness", c_void_p),  # the kernels fill it in
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "wo", "gate_up", "w2")),
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
    ]


class _Shape(Structure):
    _fields_ = [
        *(
            (name, c_int64)
            for name in ("layers", "dim", "heads", "kv_heads", "width", "hidden", "vocabulary")
            + ("slots", "positions", "tokens", "rows")
        ),
        *((name, c_int32) for name in ("cache_kind", "threads", "partial")),
        ("epsilon", c_float),
    ]


class _Weights(Structure):
    _fields_ = [
        ("layers", c_void_p),
        ("norm", c_void_p),
        ("embedding", _Matrix),
        ("output", _Matrix),
        ("first_row", c_int64),
        ("embedding_is_packed", c_int32),
        ("rope", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("tokens", "singles", "chunks", "rows")),
        *((name, c_void_p) for name in ("ids", "positions", "slots", "chunk", "wanted", "logits")),
        ("logits_stride", c_int64),
        ("sums", c_void_p),
    ]


class _Draw(Structure):
    _fields_ = [
        ("top_p", c_double),
        *((name, c_float) for name in ("temperature", "min_p")),
        ("top_k", c_int32),
        ("key", c_int64),
    ]


class CpuRunner:
    """What `Runner` does, on the kernels; the model's own modules are emptied once their weights are packed."""

    runs_ahead = False
    reads_behind = False

    def __init__(
        self,
        model: Transformer,
        limits: Limits,
        group: dist.ProcessGroup | None = None,
        fill: Callable[[nn.Module, str], None] = lambda module, prefix: None,
    ) -> None:
        """`fill` puts the weights of a module, whose names begin so, where so far there are only shapes."""
        self._library, self._group, self._args = library.load(), group, model.args
        self._kept: list[Tensor] = []  # what the kernels have pointers to
        self._arena = Arena()
        self._layers = (_Layer * model.args.n_layers)()
        for number, block in enumerate(model.layers):
            fill(block, f"layers.{number}.")
            self._layers[number] = self._layer(block, limits.scheme)
            block.to_empty(device="meta")
        self._finish(model, limits, fill)

    def _layer(self, block: TransformerBlock, scheme: Scheme | None) -> _Layer:
        attention, feed_forward = block.attention, block.feed_forward
        wq, wk, wv, wo = (_local(getattr(attention, name)) for name in ("wq", "wk", "wv", "wo"))
        w1, w2, w3 = (_local(getattr(feed_forward, name)) for name in ("w1", "w2", "w3"))
        self._heads, self._kv_heads = (len(w) // attention.head_dim for w in (wq, wk))
        self._hidden = len(w1)
        return _Layer(
            self._matrix(torch.cat((wq, wk, wv)), scheme),
            self._matrix(wo, scheme),
            self._matrix(w1, scheme, w3),
            self._matrix(w2, scheme),
            self._keep(_local(block.attention_norm).float()),
            self._keep(_local(block.ffn_norm).float()),
        )

    def _finish(self, model: Transformer, limits: Limits, fill: Callable[[nn.Module, str], None]) -> None:
        args, ranks = model.args, dist.get_world_size(self._group) if self._group is not None else 1
        scheme = SCHEMES[OUTPUT] if limits.scheme is not None else None
        fill(model.norm, "norm.")
        # The two largest matrices one after the other, so that there is never more of them than needed.
        tied = model.output is None
        if not tied:
            fill(model.output, "output.")
            output = self._matrix(_local(model.output), scheme)
            model.output.to_empty(device="meta")
        fill(model.tok_embeddings, "tok_embeddings.")
        embedding = _local(model.tok_embeddings)
        if tied:
            table = output = self._matrix(embedding, scheme)
        else:
            plain = self._arena.take(embedding.shape, dtype=embedding.dtype).copy_(embedding)
            table = _Matrix(KINDS[plain.dtype], 0, *plain.shape, self._keep(plain), None)
        model.tok_embeddings.to_empty(device="meta")
        del embedding
        self.cache = KVCache(
            args.n_layers,
            limits.max_batch_size,
            self._kv_heads,
            limits.max_seq_len,
            args.head_dim,
            limits.dtype,
            "cpu",
            self._arena.take,
        )
        self._rows = limits.max_batch_size + MAX_PROMPT_LOGIT_ROWS
        self._logits_RV = torch.empty(0, -(-output.rows // PANEL) * PANEL)
        self._vocabulary = output.rows
        self._sums_ND = torch.zeros(limits.max_tokens_per_step if self._group is not None else 0, args.dim)
        weights = _Weights(
            ctypes.addressof(self._layers),
            self._keep(_local(model.norm).float()),
            table,
            output,
            first_vocabulary_row(args, dist.get_rank(self._group), ranks) if self._group is not None else 0,
            tied,
            self._keep(_rope_table(model, limits.max_seq_len)),
            self.cache.keys_LBKTH.data_ptr(),
            self.cache.values_LBKTH.data_ptr(),
        )
        shape = _Shape(
            args.n_layers,
            args.dim,
            self._heads,
            self._kv_heads,
            args.head_dim,
            self._hidden,
            output.rows,
            limits.max_batch_size,
            limits.max_seq_len,
            limits.max_tokens_per_step,
            self._rows,
            KINDS[limits.dtype],
            torch.get_num_threads(),
            self._group is not None,
            args.norm_eps,
        )
        self._model = self._library.model_new(ctypes.byref(shape), ctypes.byref(weights))
        model.norm.to_empty(device="meta")

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, weight: Tensor, scheme: Scheme | None = None, beside: Tensor | None = None) -> _Matrix:
        packed = pack(weight, scheme, beside, self._arena.take)
        places = (None if part is None else self._keep(part) for part in (packed.data, packed.scales, packed.counts))
        return _Matrix(packed.kind, packed.group, packed.rows, packed.columns, *places)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor | None:
        """Logits (R, V) of the rows that the plan wants, in its order; None on ranks that do not lead."""
        self.cache.copy(plan.copies)
        ids, positions, slots, wanted, chunks = [], [], [], [], []
        singles = 0
        for segment in plan.segments:
            first, count = len(ids), len(segment.tokens)
            ids += segment.tokens
            positions += range(segment.start, segment.start + count)
            slots += [segment.slot] * count
            wanted += range(first + count - segment.logits, first + count)
            if count == 1:
                singles += 1
            else:
                chunks += (segment.slot, segment.start, first, count)
        numbers = torch.tensor([*ids, *positions, *slots, *chunks, *wanted], dtype=torch.int64)
        at, tokens, rows = numbers.data_ptr(), len(ids), len(wanted)
        if len(self._logits_RV) < rows:
            self._logits_RV = torch.empty(rows, self._logits_RV.shape[1])
        step = _Step(
            tokens,
            singles,
            len(chunks) // 4,
            rows,
            at,
            at + 8 * tokens,
            at + 16 * tokens,
            at + 24 * tokens,
            at + 8 * (3 * tokens + len(chunks)),
            self._logits_RV.data_ptr(),
            self._logits_RV.shape[1],
            self._sums_ND.data_ptr(),
        )
        stages = 2 + 2 * self._args.n_layers
        if self._group is None:
            self._library.model_run(self._model, ctypes.byref(step), 0, stages)
            return self._logits_RV[:rows, : self._vocabulary]
        for stage in range(stages):
            self._library.model_run(self._model, ctypes.byref(step), stage, stage + 1)
            if stage < stages - 1:
                dist.all_reduce(self._sums_ND[:tokens], group=self._group)
        return gather_vocabulary(self._logits_RV[:rows, : self._vocabulary], self._args.vocab_size, self._group)

    def choose_tokens(self, logits_RV: Tensor, sequences: Ordered[Sequence]) -> list[int]:
        """What `engine.sampler.choose_tokens` does, in one call and without a pass over the vocabulary in Python."""
        logits_RV = adjust(logits_RV, sequences)
        options = (_Draw * len(sequences))()
        for option, sequence in zip(options, sequences, strict=True):
            params = sequence.params
            option.temperature, option.top_p, option.min_p = params.temperature, params.top_p, params.min_p
            option.top_k = min(params.top_k, logits_RV.shape[1])
            if params.temperature > 0.0:
                option.key = sequence.draw()
        tokens = (c_int64 * len(sequences))()
        place, (stride, _) = logits_RV.data_ptr(), logits_RV.stride()
        self._library.model_draw(self._model, place, stride, logits_RV.shape[1], len(sequences), options, tokens)
        return list(tokens)

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.model_delete(self._model)


def _local(module: nn.Module) -> Tensor:
    """This rank's share of a module's weight."""
    weight = module.weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _rope_table(model: Transformer, positions: int) -> Tensor:
    """For every position the cosines of its angles and their sines, each twice, the first of two sines negative."""
    angles = torch.arange(positions)[:, None].float() * rope_frequencies(model.args)
    cosine, sine = angles.cos(), angles.sin()
    table = torch.stack((torch.stack((cosine, cosine), -1), torch.stack((-sine, sine), -1)), 1)
    return table.flatten(2)
