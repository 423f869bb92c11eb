"""Computes a step: the plan's tokens through this rank's share of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.cpu.runner import CpuRunner
from engine.decode_graphs import Capture, CudaCapture, DecodeGraphs
from engine.kv_cache import KVCache
from engine.loader import Limits, fill, lay_out, load_model
from engine.parallel import Ranks
from engine.ragged_cache import RaggedCache
from engine.sampler import Likeliest, choose_tokens
from engine.scheduler import StepPlan
from llama2 import Transformer, tensor_parallel_mesh_shape


class Runner:
    """A model, its cache, and nothing that remembers requests."""

    def __init__(
        self, model: Transformer, limits: Limits, device: str, ranks: int, capture: Capture | None = None
    ) -> None:
        args = model.args
        if capture is None and limits.graphs(ranks):
            capture = CudaCapture(device)
        parts, _ = tensor_parallel_mesh_shape(args, ranks)
        self.model, self._device = model, device
        self.cache = (RaggedCache if limits.ragged else KVCache)(
            args.n_layers,
            limits.max_batch_size,
            args.n_kv_heads // parts,
            limits.max_seq_len + (capture is not None),
            args.head_dim,
            limits.dtype,
            device,
        )
        self.likeliest = _likeliest() if limits.fused else None
        self._graphs = DecodeGraphs(model, self.cache, limits, device, capture) if capture is not None else None

    @property
    def runs_ahead(self) -> bool:
        """Whether a step is worth launching before the tokens of the one before it are known here."""
        return self._graphs is not None and not self._graphs.failed

    @property
    def reads_behind(self) -> bool:
        """Whether what lies in a slot behind a sequence's last token is read, if only to be multiplied by zero."""
        return not isinstance(self.cache, RaggedCache)

    @torch.inference_mode()
    def run(self, plan: StepPlan, tokens_N: Tensor | None = None) -> Tensor | None:
        """Logits (R, V) of the rows that the plan wants, in its order; None on ranks that do not lead.

        `tokens_N` stand for the plan's own where only the device knows them so far.
        """
        self.cache.scrub(plan.scrub)
        self.cache.copy(plan.copies)
        if self._graphs is not None:
            logits_RV = self._graphs.run(plan.segments, tokens_N)
            if logits_RV is not None:
                return logits_RV
        tokens, positions, rows = [], [], []
        for segment in plan.segments:
            tokens += segment.tokens
            positions += range(segment.start, segment.start + len(segment.tokens))
            rows += range(len(tokens) - segment.logits, len(tokens))
        positions_N = torch.tensor(positions, device=self._device)
        self.cache.begin(plan.segments, positions_N)
        return self.model(
            torch.tensor(tokens, device=self._device) if tokens_N is None else tokens_N,
            positions_N,
            self.cache,
            torch.tensor(rows, dtype=torch.int64, device=self._device),
        )

    choose_tokens = staticmethod(choose_tokens)


def leave_threads_to_kernels() -> None:
    """Keep PyTorch to one thread: its others would spin, for milliseconds, on the cores of the kernels' threads."""
    torch.set_num_threads(1)


def _likeliest() -> Likeliest:
    from engine.gpu.choice import likeliest  # where there is no Triton, this module must be importable all the same

    return likeliest


def load_runner(checkpoint: Checkpoint, limits: Limits, ranks: Ranks) -> Runner | CpuRunner:
    """The checkpoint on whatever kernels the limits say."""
    if not limits.native:
        return Runner(load_model(checkpoint, limits, ranks), limits, ranks.device, ranks.launch.size)
    model = lay_out(checkpoint.args, limits, ranks)
    group = ranks.tp.get_group() if ranks.tp is not None else None
    # Layer by layer, so that no weight is held twice for long.
    runner = CpuRunner(model, limits, group, lambda module, prefix: fill(module, prefix, checkpoint, ranks.device))
    leave_threads_to_kernels()
    return runner
