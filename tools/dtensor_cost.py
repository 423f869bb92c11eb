"""What a decode step costs through DTensor's dispatch, and on local shards with explicit collectives.

torchrun --standalone --nproc-per-node 2 -m tools.dtensor_cost
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from command_line import Parser
from engine.kv_cache import KVCache
from engine.loader import choose_threads
from engine.parallel import Launch, Ranks, choose_device
from engine.scheduler import Segment
from llama2 import ModelArgs, Transformer, localize, parallelize


def model_for(args: ModelArgs, ranks: Ranks, local: bool) -> Transformer:
    """A model with random weights, laid out by the plan and, if `local`, stripped to this rank's shards."""
    with torch.device("meta"):
        model = Transformer(args)
    model.requires_grad_(False)
    parallelize(model, ranks.tp, ranks.kv)
    model.to_empty(device=ranks.device)
    for parameter in model.parameters():
        shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        shard.normal_(0, 0.02)
    if local:
        localize(model, ranks.tp)
    model.set_rope(torch.device(ranks.device))
    return model


@torch.inference_mode()
def step_ms(model: Transformer, ranks: Ranks, steps: int) -> float:
    """Milliseconds of one decode step of one sequence, over `steps` of them."""
    args = model.args
    heads = args.n_kv_heads // ranks.kv.size()
    cache = KVCache(args.n_layers, 1, heads, 64, args.head_dim, torch.float32, ranks.device)
    positions = torch.tensor([16], device=ranks.device)
    token = torch.tensor([1], device=ranks.device)
    row = torch.tensor([0], device=ranks.device)
    cache.begin((Segment(0, 16, (1,), 1),), positions)
    started = time.perf_counter()
    for _ in range(steps):
        model(token, positions, cache, row)
    if ranks.device.startswith("cuda"):
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started) / steps


def main(argv: list[str] | None = None) -> int:
    """Measure both, in turn, and print the medians."""
    parser = Parser(prog="dtensor_cost", description=__doc__)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args(argv)
    launch = Launch.from_environment()
    if launch.size == 1:
        print("dtensor_cost: error: needs several ranks: torchrun --nproc-per-node 2 -m tools.dtensor_cost")
        return 1
    args = ModelArgs(dim=flags.dim, n_layers=flags.layers, n_heads=8, vocab_size=32000)
    torch.set_num_threads(choose_threads(args, launch.local_size))
    ranks = Ranks(launch, choose_device("auto", launch), args)
    models = {"DTensor": model_for(args, ranks, False), "local shards": model_for(args, ranks, True)}
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        step_ms(model, ranks, 3)
    for _ in range(flags.rounds):
        for name, model in models.items():
            times[name].append(step_ms(model, ranks, flags.steps))
    if ranks.leads:
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            print(f"{name}: {median:.2f} ms per decode step ({min(times[name]):.2f} to {max(times[name]):.2f})")
        print(f"DTensor / local shards: {medians['DTensor'] / medians['local shards']:.2f}")
    ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
