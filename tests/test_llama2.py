"""The model against Hugging Face's on the same random weights, and its own arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import TINY, limits, model_of, random_weights

from engine.runner import Runner
from engine.scheduler import Segment, StepPlan
from llama2 import ModelArgs, RopeScaling, rope_frequencies, tensor_parallel_mesh_shape

BASE = dict(dim=64, n_layers=3, n_heads=8, vocab_size=96, multiple_of=32)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)
VARIANTS = {
    "multi-head": ModelArgs(**BASE),
    "grouped queries": ModelArgs(**BASE, n_kv_heads=2),
    "tied embeddings": ModelArgs(**BASE, n_kv_heads=4, tie_embeddings=True, rope_theta=500000.0),
    "Llama 3.1 RoPE scaling": ModelArgs(**BASE, n_kv_heads=2, rope_theta=500000.0, rope_scaling=SCALING),
    "Code Llama theta": ModelArgs(**BASE, rope_theta=1e6),
    "odd feed-forward multiplier": ModelArgs(**{**BASE, "multiple_of": 24}, ffn_dim_multiplier=1.3, norm_eps=1e-6),
    "wide heads": ModelArgs(**BASE, n_kv_heads=2, head_dim=24),
}
DECODE_STEPS = 64


def hugging_face_model(args: ModelArgs, weights: dict[str, torch.Tensor]):
    """An independent Llama: transformers' own, its weights mapped by the layout that its attention documents."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling.factor,
            "low_freq_factor": args.rope_scaling.low_freq_factor,
            "high_freq_factor": args.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
        }
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=512,
        tie_word_embeddings=args.tie_embeddings,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()

    def halves(weight: torch.Tensor) -> torch.Tensor:
        """Rows of each head from neighbouring pairs (0 1)(2 3)... to first halves, then second halves."""
        heads = weight.view(-1, args.head_dim, weight.shape[1])
        return torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).reshape(weight.shape)

    state = {"model.embed_tokens.weight": weights["tok_embeddings.weight"], "model.norm.weight": weights["norm.weight"]}
    state["lm_head.weight"] = weights["tok_embeddings.weight" if args.tie_embeddings else "output.weight"]
    for layer in range(args.n_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        state[theirs + "self_attn.q_proj.weight"] = halves(weights[ours + "attention.wq.weight"])
        state[theirs + "self_attn.k_proj.weight"] = halves(weights[ours + "attention.wk.weight"])
        state[theirs + "self_attn.v_proj.weight"] = weights[ours + "attention.wv.weight"]
        state[theirs + "self_attn.o_proj.weight"] = weights[ours + "attention.wo.weight"]
        state[theirs + "mlp.gate_proj.weight"] = weights[ours + "feed_forward.w1.weight"]
        state[theirs + "mlp.down_proj.weight"] = weights[ours + "feed_forward.w2.weight"]
        state[theirs + "mlp.up_proj.weight"] = weights[ours + "feed_forward.w3.weight"]
        state[theirs + "input_layernorm.weight"] = weights[ours + "attention_norm.weight"]
        state[theirs + "post_attention_layernorm.weight"] = weights[ours + "ffn_norm.weight"]
    model.load_state_dict(state)
    return model


def run(runner: Runner, slot: int, start: int, tokens: list[int], logits: int) -> torch.Tensor:
    return runner.run(StepPlan((Segment(slot, start, tuple(tokens), logits),)))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_over_prefill_and_64_cached_steps(name: str) -> None:
    args = VARIANTS[name]
    weights = random_weights(args, seed=1)
    tokens = torch.randint(args.vocab_size, (40 + DECODE_STEPS,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = hugging_face_model(args, weights)(torch.tensor([tokens])).logits[0]
    runner = Runner(model_of(args, weights), limits(max_seq_len=128), "cpu", 1)
    rows = [run(runner, 2, 0, tokens[:40], 40)]
    rows += [run(runner, 2, at, tokens[at : at + 1], 1) for at in range(40, len(tokens))]
    difference = (torch.cat(rows) - expected).abs().max().item()
    assert difference <= 1e-4, f"{name}: {difference}"
    assert expected.std() > 0.3  # logits that are all alike would prove nothing


def test_chunked_prefill_beside_decoding_gives_the_logits_of_one_pass() -> None:
    weights = random_weights(TINY, seed=3)
    model = model_of(TINY, weights)
    tokens = torch.randint(TINY.vocab_size, (3, 40), generator=torch.Generator().manual_seed(4)).tolist()
    whole = [run(Runner(model, limits(), "cpu", 1), 0, 0, row, 40) for row in tokens]
    runner = Runner(model, limits(), "cpu", 1)
    run(runner, 3, 0, tokens[0][:10], 0)
    run(runner, 1, 0, tokens[1][:7], 0)
    plan = StepPlan(
        (
            Segment(1, 7, tuple(tokens[1][7:8]), 1),
            Segment(3, 10, tuple(tokens[0][10:11]), 1),
            Segment(0, 0, tuple(tokens[2][:20]), 20),
        )
    )
    mixed = runner.run(plan)
    more = runner.run(
        StepPlan((Segment(0, 20, tuple(tokens[2][20:33]), 2), Segment(3, 11, tuple(tokens[0][11:20]), 9)))
    )
    expected = torch.cat((whole[1][7:8], whole[0][10:11], whole[2][:20], whole[2][31:33], whole[0][11:20]))
    assert (torch.cat((mixed, more)) - expected).abs().max() < 1e-5


def test_tokens_far_apart_in_the_slots_do_not_see_one_another() -> None:
    weights = random_weights(TINY, seed=5)
    model = model_of(TINY, weights)
    chosen = limits(slots=12)
    tokens = torch.randint(TINY.vocab_size, (12, 30), generator=torch.Generator().manual_seed(6)).tolist()
    for slots in ([0, 1, 2], [0, 2, 3], [0, 11], [5], [1, 4, 6, 9]):
        runner = Runner(model, chosen, "cpu", 1)
        for slot in range(12):  # every slot holds something, as after earlier requests
            run(runner, slot, 0, tokens[slot][: 3 + slot], 0)
        segments = tuple(Segment(slot, 3 + slot, (tokens[slot][3 + slot],), 1) for slot in slots)
        got = runner.run(StepPlan(segments))
        for row, slot in zip(got, slots, strict=True):
            whole = run(Runner(model, limits(), "cpu", 1), 0, 0, tokens[slot][: 4 + slot], 1)[0]
            assert (row - whole).abs().max() < 1e-5, slots


def test_keys_are_kept_already_rotated() -> None:
    weights = random_weights(TINY, seed=7)
    runner = Runner(model_of(TINY, weights), limits(), "cpu", 1)
    run(runner, 0, 0, [5, 5, 5], 1)
    keys = runner.cache.keys_LBKTH[0, 0]  # the same token in layer 0: equal keys but for the rotation
    assert torch.allclose(keys[:, 0].norm(dim=-1), keys[:, 2].norm(dim=-1), rtol=1e-5)
    assert not torch.allclose(keys[:, 0], keys[:, 2], atol=1e-2)


def test_metas_models_have_metas_sizes() -> None:
    llama2 = dict(vocab_size=32000)
    sizes = {
        "7B": (ModelArgs(dim=4096, n_layers=32, n_heads=32, **llama2), 11008, 6_738_415_616),
        "13B": (ModelArgs(dim=5120, n_layers=40, n_heads=40, **llama2), 13824, 13_015_864_320),
        "70B": (
            ModelArgs(
                dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, **llama2
            ),
            28672,
            68_976_648_192,
        ),
        "Llama 3 8B": (
            ModelArgs(
                dim=4096,
                n_layers=32,
                n_heads=32,
                n_kv_heads=8,
                multiple_of=1024,
                ffn_dim_multiplier=1.3,
                vocab_size=128256,
            ),
            14336,
            8_030_261_248,
        ),
        "Llama 3.2 1B": (
            ModelArgs(
                dim=2048,
                n_layers=16,
                n_heads=32,
                n_kv_heads=8,
                multiple_of=256,
                ffn_dim_multiplier=1.5,
                vocab_size=128256,
                tie_embeddings=True,
            ),
            8192,
            1_235_814_400,
        ),
    }
    for name, (args, hidden, parameters) in sizes.items():
        assert (args.ffn_hidden_dim, args.parameter_count()) == (hidden, parameters), name


def test_tensor_shapes_are_those_of_the_model() -> None:
    for args in VARIANTS.values():
        model = model_of(args, random_weights(args))
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == args.tensor_shapes()


def test_tensor_parallel_sizes_follow_from_heads_and_widths() -> None:
    args = ModelArgs(dim=96, n_layers=1, n_heads=12, n_kv_heads=4, vocab_size=10, ffn_hidden_dim=24)
    assert args.tensor_parallel_sizes() == [1, 2, 4, 12]
    assert tensor_parallel_mesh_shape(args, 2) == (2, 1)
    assert tensor_parallel_mesh_shape(args, 12) == (4, 3)
    with pytest.raises(ValueError, match="over 3 ranks does not fit.*sizes that work: 1, 2, 4, 12"):
        tensor_parallel_mesh_shape(args, 3)


def test_rope_scaling_keeps_high_frequencies_and_divides_low_ones() -> None:
    args = ModelArgs(dim=128, n_layers=1, n_heads=1, vocab_size=8, rope_theta=500000.0)
    plain = rope_frequencies(args)
    scaled = rope_frequencies(dataclasses.replace(args, rope_scaling=RopeScaling()))
    assert scaled[0] == plain[0]
    assert torch.isclose(scaled[-1], plain[-1] / 8)
    assert ((scaled <= plain) & (scaled >= plain / 8.001)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim is 0; it must be a whole number from 1 to"),
        ({"dim": 2.5}, "dim is 2.5"),
        ({"n_layers": True}, "n_layers is True"),
        ({"n_layers": 10**6}, "n_layers is 1000000; it must be a whole number from 1 to 4096"),
        ({"vocab_size": 10**4400}, "vocab_size is"),
        ({"rope_theta": 10**400}, "rope_theta is a number of 1329 bits"),
        ({"n_heads": 5}, "dim is 32; it must be a multiple of n_heads"),
        ({"n_kv_heads": 3}, "n_heads is 4; it must be a multiple of n_kv_heads"),
        ({"head_dim": 7}, "rotary embedding needs an even one"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1; it must be true or false"),
    ],
)
def test_impossible_arguments_are_refused_by_name(change: dict, message: str) -> None:
    base = dict(dim=32, n_layers=2, n_heads=4, vocab_size=64)
    with pytest.raises(ValueError, match=message):
        ModelArgs(**{**base, **change})
