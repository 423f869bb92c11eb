"""What one rank does in tests/test_tensor_parallel.py: logits of small checkpoints, then the demo model's answers.

usage: torchrun ... tests/rank_worker.py JOB.json OUT.pt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from demo import world
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.loader import Limits
from engine.parallel import Launch, Ranks
from engine.runner import load_runner
from engine.scheduler import Copy, Segment, StepPlan
from engine.sequence import SamplingParams
from generate import LLM, Request

PREFILL, DECODE = 20, 12
SEQ_LEN = 768


def logits_of(folder: Path, launch: Launch, native: bool) -> torch.Tensor | None:
    """Logits of a prompt in two chunks and of cached steps beside another sequence; on rank 0 only."""
    checkpoint = open_checkpoint(folder)
    limits = Limits(64, 2, 64, torch.float32, native=native)
    ranks = Ranks(launch, "cpu", checkpoint.args)
    runner = load_runner(checkpoint, limits, ranks)
    vocabulary = checkpoint.args.vocab_size
    tokens = torch.randint(vocabulary, (2, PREFILL + DECODE), generator=torch.Generator().manual_seed(1)).tolist()
    plans = [StepPlan((Segment(0, 0, tuple(tokens[0][:9]), 9), Segment(1, 0, tuple(tokens[1][:PREFILL]), PREFILL)))]
    plans.append(StepPlan((Segment(0, 9, tuple(tokens[0][9:PREFILL]), PREFILL - 9),)))
    for at in range(PREFILL, PREFILL + DECODE):
        plans.append(StepPlan(tuple(Segment(slot, at, (tokens[slot][at],), 1) for slot in (0, 1))))
    behind = PREFILL + DECODE
    plans.append(StepPlan((Segment(1, behind, tuple(tokens[0][:2]), 2),), ((1, behind),), (Copy(0, 1, behind),)))
    rows = [logits.clone() if (logits := runner.run(plan)) is not None else None for plan in plans]
    return torch.cat(rows) if launch.rank == 0 else None


def demo_answers(llm: LLM, skills: list[str], count: int) -> list[str]:
    """The greedy answers to the demo model's held-out questions."""
    params = SamplingParams(temperature=0.0, max_tokens=160)
    questions = [question for skill in skills for question in world.questions(skill, count)]
    requests = [
        Request(
            prompt=question.prompt,
            dialog=None if question.dialog is None else list(question.dialog),
            params=params,
        )
        for question in questions
    ]
    return [completion.text.strip() for completion in llm.generate(requests)]


def work(job: dict, launch: Launch) -> dict | None:
    """Everything that the job asks of this rank."""
    logits = {
        f"{name}, {kernels}": logits_of(Path(folder), launch, kernels == "native")
        for name, folder in job["checkpoints"].items()
        for kernels in ("torch", "native")
    }
    answers: list[str] = []
    if job.get("demo"):
        # Several ranks guess tokens too, which must change nothing.
        speculation = "prompt_lookup" if launch.size > 1 else "none"
        config = EngineConfig(dtype="float32", max_batch_size=16, max_seq_len=SEQ_LEN, speculation=speculation)
        llm = LLM(Path(job["demo"]), config, launch)
        if llm.leads:
            answers = demo_answers(llm, job["skills"], job["count"])
        else:
            llm.follow()
        llm.close()
    return {"logits": logits, "answers": answers}


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch = Launch.from_environment()
    result = work(json.loads(Path(sys.argv[1]).read_text()), launch)
    if launch.rank == 0:
        torch.save(result, sys.argv[2])
