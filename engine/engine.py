"""Continuous batching over one model: rank 0 schedules, samples and answers, the other ranks follow its plans."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.config import EngineConfig, RequestError
from engine.cpu.runner import CpuRunner
from engine.loader import Limits, choose_threads, preflight
from engine.pace import Pace
from engine.parallel import Launch, Ranks, choose_device
from engine.runner import Runner, load_runner
from engine.sampler import finite_rows, token_logprobs
from engine.scheduler import Scheduler, Segment, StepPlan
from engine.sequence import FinishReason, SamplingParams, Sequence, TokenLogprobs
from engine.slots import SlotPool

log = logging.getLogger(__name__)

_STOP = -1  # what the leader sends in place of a plan's length when it closes


@dataclass(frozen=True, slots=True)
class Output:
    """One generated token of one sequence, of which a step may give several; an end without a token has None.

    The reason to finish stands in the sequence's last output only.
    """

    sequence: Sequence
    token: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of logits to draw a sequence's next token from, and what was guessed to follow."""

    sequence: Sequence
    slot: int
    row: int
    draft: tuple[int, ...]
    drafted: int


class Engine:
    """`add`, `step` and `cancel` on rank 0; `follow` everywhere else."""

    def __init__(
        self,
        runner: Runner | CpuRunner,
        limits: Limits,
        ranks: Ranks,
        vocab_size: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limits, self.ranks, self.vocab_size = limits, ranks, vocab_size
        self.slots = SlotPool(limits.max_batch_size, limits.prefix_reuse)
        self.steps = 0
        self._runner, self._clock = runner, clock
        self._scheduler = Scheduler(
            self.slots, limits.max_tokens_per_step, Pace(limits.prefill_beside_decode), limits.draft_tokens
        )
        self._plan = torch.zeros(
            StepPlan.most_numbers(limits.max_batch_size, limits.max_tokens_per_step), dtype=torch.int64
        )

    @classmethod
    def load(cls, folder: Path, config: EngineConfig, launch: Launch | None = None) -> tuple[Engine, Checkpoint]:
        """Everything from a converted checkpoint's folder to an engine that is ready to step."""
        launch = launch or Launch()
        device = choose_device(config.device, launch)
        # One rank of each machine reads every byte for the hashes; the others check names, sizes and shapes.
        checkpoint = open_checkpoint(folder, verify=config.verify_checkpoint and launch.local_rank == 0)
        torch.set_num_threads(config.threads or choose_threads(checkpoint.args, launch.local_size))
        limits = Limits.settle(config, checkpoint.args, device)
        ranks = Ranks(launch, device, checkpoint.args)
        preflight(checkpoint.args, limits, ranks, config.memory_fraction)
        ranks.agree("the model and its limits", f"{checkpoint.args} {limits}")
        return cls(load_runner(checkpoint, limits, ranks), limits, ranks, checkpoint.args.vocab_size), checkpoint

    @property
    def running(self) -> int:
        """How many sequences hold a slot."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """How many sequences wait for a slot."""
        return len(self._scheduler.waiting)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._scheduler.running or self._scheduler.waiting)

    def add(self, prompt: list[int], params: SamplingParams, eos_ids: frozenset[int] = frozenset()) -> Sequence:
        """Queue a prompt; what can never be served is refused here."""
        sequence = self.prepare(prompt, params, eos_ids)
        self.enqueue(sequence)
        return sequence

    def prepare(self, prompt: list[int], params: SamplingParams, eos_ids: frozenset[int] = frozenset()) -> Sequence:
        """Make a sequence of a prompt, or refuse it; touches nothing of the engine, so any thread may call it."""
        longest = self.limits.max_seq_len
        scoring = params.max_tokens == 0
        if not prompt:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if len(prompt) > longest or (len(prompt) == longest and not scoring):
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; with max_seq_len {longest} at most "
                f"{longest if scoring else longest - 1} fit",
                "prompt",
            )
        for name, ids in (("prompt", prompt), ("logit_bias", params.logit_bias), ("stop_ids", params.stop_ids)):
            wrong = next((token for token in ids if not 0 <= token < self.vocab_size), None)
            if wrong is not None:
                raise RequestError(f"{name} has token id {wrong}; ids are 0 to {self.vocab_size - 1}", name)
        sequence = Sequence(prompt, params, eos_ids)
        wanted = longest if params.max_tokens is None else len(prompt) + params.max_tokens
        sequence.limit = min(longest, wanted)
        return sequence

    def enqueue(self, sequence: Sequence) -> None:
        """Queue a prepared sequence behind all that came before."""
        self._scheduler.add(sequence)

    def cancel(self, sequence: Sequence, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a sequence wherever it is; its slot is free before the next step is planned."""
        if not sequence.finished:
            sequence.finish_reason = reason

    def step(self) -> list[Output]:
        """Plan, compute and sample once; every sequence that got a token or ended by itself is in the answer."""
        began = self._clock()
        planned = self._scheduler.next()
        if planned is None:
            return []
        plan, sequences = planned
        if self.ranks.several:
            self._say(plan.to_numbers())
        logits_RV = self._runner.run(plan)
        self.steps += 1
        outputs = self._take(plan.segments, sequences, logits_RV)
        self._scheduler.took(self._clock() - began)
        self._scheduler.reap()
        return outputs

    def heartbeat(self) -> None:
        """Tell idle followers that the leader lives, and find out whether they do."""
        if self.ranks.several:
            self._say(StepPlan(()).to_numbers())

    def follow(self) -> None:
        """Obey the leader's plans until it closes."""
        while True:
            self.ranks.broadcast(self._plan)
            numbers = self._plan.tolist()
            if numbers[0] == _STOP:
                return
            plan = StepPlan.from_numbers(numbers)
            if plan.segments:
                self._runner.run(plan)

    def close(self) -> None:
        """Let the followers go and leave the process group."""
        if self.ranks.several and self.ranks.leads:
            self._say([_STOP])
        self.ranks.close()

    def _say(self, numbers: list[int]) -> None:
        self._plan[: len(numbers)] = torch.tensor(numbers)
        self.ranks.broadcast(self._plan)

    def _take(self, segments: Ordered[Segment], sequences: Ordered[Sequence], logits_RV: Tensor) -> list[Output]:
        """Advance every sequence of the step; sample those whose last known token was computed."""
        outputs, drawn = [], []
        finite = finite_rows(logits_RV)
        row = 0
        for segment, sequence in zip(segments, sequences, strict=True):
            first, row = row, row + segment.logits
            self.slots.note(segment.slot, segment.start, segment.tokens)
            if sequence.finished:  # cancelled while the step ran
                if not all(finite[first:row]):
                    self._clear(segment.slot)
                continue
            known = min(len(segment.tokens), sequence.pending)
            draft = segment.tokens[known:]
            at = row - 1 - len(draft)
            if not all(finite[first : at + 1]):
                if draft:  # which may be to blame, so the token goes on its own
                    self._judge(_Row(sequence, segment.slot, at, draft, len(draft)), finite)
                else:
                    outputs.append(self._fail(sequence, segment.slot))
                continue
            if sequence.wants_prompt_logprobs:
                self._take_prompt_logprobs(sequence, segment, logits_RV[first:row])
            sequence.computed += known
            if sequence.pending:
                continue
            if len(sequence.tokens) >= sequence.limit:  # scoring only: nothing is to be generated
                sequence.finish_reason = FinishReason.LENGTH
                outputs.append(Output(sequence, None, finish_reason=FinishReason.LENGTH))
                continue
            drawn.append(_Row(sequence, segment.slot, at, draft, len(draft)))
        return outputs + self._draw(drawn, logits_RV, finite)

    def _draw(self, drawn: list[_Row], logits_RV: Tensor, finite: list[bool]) -> list[Output]:
        """A token from each row, and from the next row of a sequence for as long as its draft says what is drawn.

        Row by row, since what is drawn may depend on all tokens before; each takes one key of its sequence's stream,
        so that the tokens are those that single steps would give.
        """
        outputs, ended = [], []
        turn = drawn
        while turn:
            rows = [each.row for each in turn]
            every = rows == list(range(len(logits_RV)))
            outputs += self._sample([each.sequence for each in turn], logits_RV if every else logits_RV[rows])
            following = []
            for each in turn:
                sequence = each.sequence
                right = bool(each.draft) and sequence.tokens[-1] == each.draft[0]
                sequence.accepted += right
                if right and not sequence.finished and finite[each.row + 1]:
                    sequence.computed += 1
                    following.append(_Row(sequence, each.slot, each.row + 1, each.draft[1:], each.drafted))
                else:
                    ended.append(each)
            turn = following
        for each in ended:
            if each.drafted:
                self._judge(each, finite)
        return outputs

    def _judge(self, ended: _Row, finite: list[bool]) -> None:
        """Learn from a draft; what it left behind is cleared if it is not finite, as a wrong guess must harm nobody."""
        sequence = ended.sequence
        sequence.drafted += ended.drafted
        sequence.lookup.judge(len(sequence.tokens), ended.drafted, ended.drafted - len(ended.draft))
        if not all(finite[ended.row : ended.row + 1 + len(ended.draft)]):
            self._scheduler.scrub(ended.slot, sequence.computed)
            self.slots.note(ended.slot, sequence.computed, ())

    def _sample(self, sequences: list[Sequence], logits_RV: Tensor) -> list[Output]:
        if not sequences:
            return []
        tokens = self._runner.choose_tokens(logits_RV, sequences)
        wanted = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
        by_row = {}
        if wanted:
            tops = [sequences[row].params.logprobs for row in wanted]
            logprobs = token_logprobs(logits_RV[wanted], [tokens[row] for row in wanted], tops)
            by_row = dict(zip(wanted, logprobs, strict=True))
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        pairs = enumerate(zip(sequences, tokens, strict=True))
        return [Output(each, token, by_row.get(row), each.finish_reason) for row, (each, token) in pairs]

    @staticmethod
    def _take_prompt_logprobs(sequence: Sequence, segment: Segment, logits_SV: Tensor) -> None:
        """The row at a position tells the probability of the token behind it; the first token has none."""
        behind = segment.start + 1
        following = sequence.tokens[behind : min(behind + len(segment.tokens), sequence.prompt_length)]
        tops = [sequence.params.prompt_logprobs] * len(following)
        sequence.prompt_logprobs += token_logprobs(logits_SV[: len(following)], following, tops)

    def _fail(self, sequence: Sequence, slot: int) -> Output:
        sequence.finish_reason = FinishReason.ERROR
        sequence.error = (
            f"the model gave numbers that are not finite at position {sequence.computed}"
            f" (dtype {self.limits.dtype}); a wider dtype may help"
        )
        self._clear(slot)
        log.warning("sequence %d ended: %s", sequence.number, sequence.error)
        return Output(sequence, None, finish_reason=FinishReason.ERROR)

    def _clear(self, slot: int) -> None:
        """Leave nothing of what a slot holds to others."""
        self._scheduler.scrub(slot)
        self.slots.forget(slot)
