"""Continuous batching over one model: rank 0 schedules, samples and answers, the other ranks follow its plans."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
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
from engine.sampler import NOT_FINITE, Chosen, finite_rows, rows_of, token_logprobs
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


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that is computed or still computing."""

    segments: tuple[Segment, ...]
    sequences: list[Sequence]
    logits_RV: Tensor


class Engine:
    """`add`, `step` and `cancel` on rank 0; `follow` everywhere else."""

    def __init__(self, runner: Runner | CpuRunner, limits: Limits, ranks: Ranks, vocab_size: int) -> None:
        self.limits, self.ranks, self.vocab_size = limits, ranks, vocab_size
        self.slots = SlotPool(limits.max_batch_size, limits.prefix_reuse)
        self.steps = 0
        self._runner = runner
        self._ahead: _Launched | None = None
        self._scheduler = Scheduler(
            self.slots,
            limits.max_tokens_per_step,
            Pace(limits.prefill_beside_decode),
            limits.draft_tokens,
            clears_unfinished=runner.reads_behind,
        )
        self._midway = False  # whether the other ranks are in a step that this one has not completed
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
        made_for = checkpoint.manifest.get("context_length")
        if launch.rank == 0 and isinstance(made_for, int) and limits.max_seq_len > made_for:
            log.warning(
                "max_seq_len is %d, but the model was made for %d tokens; what it says behind them may be nonsense",
                limits.max_seq_len,
                made_for,
            )
        # What a checkpoint says of these two is a default.
        args = replace(checkpoint.args, max_seq_len=limits.max_seq_len, max_batch_size=limits.max_batch_size)
        ranks.agree("the model and its limits", f"{args} {limits}")
        ranks.agree("the files of weights", checkpoint.weights)
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

    def rehearse(self) -> None:
        """Answer some prompts of every kind, and forget them: a GPU compiles its kernels and captures its steps when
        they first come up, and the first requests would wait for that.
        """
        rehearsal = Engine(self._runner, self.limits, self.ranks, self.vocab_size)
        slots, longest = self.limits.max_batch_size, self.limits.max_seq_len
        if longest < 2:
            return
        batches = [(min(1 << power, slots), 2, 0.0) for power in range((slots - 1).bit_length() + 1)]
        for count, length, temperature in [(1, 20, 1.0), (1, 100, 0.0), *batches]:
            for _ in range(count):
                params = SamplingParams(max_tokens=3, temperature=temperature, ignore_eos=True)
                rehearsal.add([0] * min(length, longest - 1), params)
            while rehearsal.busy:
                rehearsal.step()

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
                code="context_length_exceeded",
            )
        for name, ids in (("prompt", prompt), ("logit_bias", params.logit_bias), ("stop_ids", params.stop_ids)):
            for token in ids:
                if type(token) is not int or not 0 <= token < self.vocab_size:
                    raise RequestError(f"{name} has token id {token!r}; ids are 0 to {self.vocab_size - 1}", name)
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
        began = time.perf_counter()
        launched = self._launched_ahead() or self._launch()
        if launched is None:
            return []
        self.steps += 1
        outputs = self._take(launched, self._launch_ahead(launched))
        self._scheduler.took(time.perf_counter() - began)
        self._scheduler.reap()
        return outputs

    def _launch(self) -> _Launched | None:
        planned = self._scheduler.next()
        if planned is None:
            return None
        plan, sequences = planned
        if self.ranks.several:
            self._say(plan.to_numbers())
        self._midway = True
        logits_RV = self._runner.run(plan)
        self._midway = False
        return _Launched(plan.segments, sequences, logits_RV)

    def _launch_ahead(self, launched: _Launched) -> list[int] | None:
        """Launch the step behind this one before its tokens are known here, so that a GPU need not wait for that.

        The tokens, if it could be; sequences that turn out to end with theirs are computed once more for nothing.
        """
        rows = self._following(launched)
        if not rows:
            return None
        chosen = Chosen(launched.logits_RV, launched.sequences, self._runner.likeliest)
        sequences = [launched.sequences[row] for row in rows]
        segments = tuple(Segment(each.slot, len(each.tokens), (0,), 1) for each in sequences)
        tokens_N = rows_of(chosen.tokens_R, rows)
        self._ahead = _Launched(segments, sequences, self._runner.run(StepPlan(segments), tokens_N))
        return chosen.wait()

    def _following(self, launched: _Launched) -> list[int]:
        """The rows of a step that go on, by slot; none unless what follows is sure but for the tokens themselves."""
        sequences = launched.sequences
        if not self._runner.runs_ahead or not self._scheduler.only(sequences):
            return []
        for segment, sequence in zip(launched.segments, sequences, strict=True):
            drawn = segment.logits == 1 and len(segment.tokens) == sequence.pending and not sequence.finished
            plain = not sequence.params.has_penalties and sequence.params.logprobs is None
            if not drawn or not plain or len(sequence.tokens) >= sequence.limit:
                return []
        rows = [row for row, sequence in enumerate(sequences) if len(sequence.tokens) + 1 < sequence.limit]
        return sorted(rows, key=lambda row: sequences[row].slot)

    def _launched_ahead(self) -> _Launched | None:
        """The step that is already on its way, of those sequences that are still there."""
        ahead, self._ahead = self._ahead, None
        rows = [row for row, sequence in enumerate(ahead.sequences) if sequence.slot is not None] if ahead else []
        if ahead is not None and self._runner.reads_behind:
            for segment, sequence in zip(ahead.segments, ahead.sequences, strict=True):
                if sequence.slot is None:  # nobody looks at what was computed for it
                    self._scheduler.scrub(segment.slot, segment.start)
        if not rows:
            return None
        sequences = [ahead.sequences[row] for row in rows]
        self._scheduler.went_on(len(rows))
        segments = tuple(Segment(each.slot, each.computed, (each.tokens[-1],), 1) for each in sequences)
        return _Launched(segments, sequences, rows_of(ahead.logits_RV, rows))

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
        """Let the followers go and leave the process group, at once if a step failed here that they still compute."""
        if self.ranks.several and self.ranks.leads and not self._midway:
            self._say([_STOP])
        self.ranks.close()

    def _say(self, numbers: list[int]) -> None:
        self._plan[: len(numbers)] = torch.tensor(numbers)
        self.ranks.broadcast(self._plan)

    def _take(self, launched: _Launched, tokens: list[int] | None) -> list[Output]:
        """Advance every sequence of the step; sample those whose last known token was computed.

        `tokens` are those of all rows where they were drawn already.
        """
        outputs, drawn, logits_RV = [], [], launched.logits_RV
        finite = finite_rows(logits_RV) if tokens is None else [token != NOT_FINITE for token in tokens]
        row = 0
        for segment, sequence in zip(launched.segments, launched.sequences, strict=True):
            first, row = row, row + segment.logits
            self.slots.note(segment.slot, segment.start, segment.tokens)
            if sequence.finished:  # cancelled while the step ran
                if not all(finite[first:row]):
                    self._scheduler.clear(segment.slot)
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
        if tokens is None:
            return outputs + self._draw(drawn, logits_RV, finite)
        return outputs + self._advance([each.sequence for each in drawn], [tokens[each.row] for each in drawn], {})

    def _draw(self, drawn: list[_Row], logits_RV: Tensor, finite: list[bool]) -> list[Output]:
        """A token from each row, and from the next row of a sequence for as long as its draft says what is drawn.

        Row by row, since what is drawn may depend on all tokens before; each takes one key of its sequence's stream,
        so that the tokens are those that single steps would give.
        """
        outputs, ended = [], []
        turn = drawn
        while turn:
            rows = [each.row for each in turn]
            outputs += self._sample([each.sequence for each in turn], rows_of(logits_RV, rows))
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
        return self._advance(sequences, tokens, by_row)

    @staticmethod
    def _advance(sequences: list[Sequence], tokens: list[int], logprobs: dict[int, TokenLogprobs]) -> list[Output]:
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        pairs = enumerate(zip(sequences, tokens, strict=True))
        return [Output(each, token, logprobs.get(row), each.finish_reason) for row, (each, token) in pairs]

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
        self._scheduler.clear(slot)
        log.warning("sequence %d ended: %s", sequence.number, sequence.error)
        return Output(sequence, None, finish_reason=FinishReason.ERROR)
