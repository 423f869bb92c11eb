"""Small seeded models, and engines on them, without any checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from engine.cpu.runner import CpuRunner
from engine.engine import Engine
from engine.loader import Limits
from engine.parallel import Launch, Ranks
from engine.runner import Runner
from engine.sequence import SamplingParams, Sequence
from llama2 import ModelArgs, Transformer

TINY = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=16, max_seq_len=64)


def random_weights(args: ModelArgs, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights of a model whose activations neither vanish nor explode, and whose logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in args.tensor_shapes().items():
        if len(shape) == 1:
            weights[name] = 1.0 + 0.1 * torch.randn(shape, generator=generator)
        else:
            spread = 1.0 if name.startswith("tok_embeddings") else shape[1] ** -0.5
            weights[name] = scale * spread * torch.randn(shape, generator=generator)
    return weights


def model_of(args: ModelArgs, weights: dict[str, torch.Tensor]) -> Transformer:
    """The weights in a model on the CPU, in float32."""
    with torch.device("meta"):
        model = Transformer(args)
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)
    model.set_rope(torch.device("cpu"))
    return model.eval()


def filling(args: ModelArgs, device: str = "cpu", seed: int = 5) -> Callable[[nn.Module, str], None]:
    """What puts the same random weights every time into a module whose names begin so."""
    weights = random_weights(args, seed)

    def fill(module: nn.Module, prefix: str) -> None:
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        module.to_empty(device=device).load_state_dict(own)

    return fill


def limits(slots: int = 4, max_seq_len: int = 64, max_tokens_per_step: int = 16, **choices: object) -> Limits:
    """Small limits in float32, on PyTorch's kernels unless `native` is chosen."""
    # Without a bound that is learnt, so that steps do not depend on the clock.
    choices = {"prefill_beside_decode": max_tokens_per_step} | choices
    return Limits(max_seq_len, slots, max_tokens_per_step, torch.float32, **choices)


def engine_of(model: Transformer, chosen: Limits | None = None) -> Engine:
    """An engine of one rank on a model that is already there."""
    chosen = chosen or limits()
    ranks = Ranks(Launch(), "cpu", model.args)
    if chosen.native:  # this one takes the weights out of the model that it is given
        return Engine(CpuRunner(copy.deepcopy(model), chosen), chosen, ranks, model.args.vocab_size)
    # Nothing can be captured on a CPU: what would be is computed in the same static shapes, every time anew.
    capture = (lambda forward: forward) if chosen.cuda_graphs else None
    runner = Runner(model, chosen, "cpu", 1, capture)
    return Engine(runner, chosen, ranks, model.args.vocab_size)


def finish(engine: Engine, sequence: Sequence) -> list[int]:
    """Step until a sequence ends, and give what it generated."""
    while not sequence.finished:
        engine.step()
    return sequence.tokens[sequence.prompt_length :]


def alone(model: Transformer, prompt: list[int], params: SamplingParams, chosen: Limits | None = None) -> list[int]:
    """What a prompt gives with nobody else in the engine."""
    engine = engine_of(model, chosen)
    return finish(engine, engine.add(prompt, params))
