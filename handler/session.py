"""One HTTP request on its way: its sequences, the text so far, and what the client has not heard yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.config import RequestError
from engine.engine import Output
from engine.sequence import FinishReason, Sequence, TokenLogprobs
from handler.generation import Generation
from handler.responses import Choice, Piece, Usage
from tokenizing import StreamDecoder, Tokenizer


class _Answer:
    """One choice: a sequence, its text, and what of it waits to be sent."""

    def __init__(self, sequence: Sequence, decoder: StreamDecoder) -> None:
        self.sequence, self.decoder = sequence, decoder
        self.text: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.begun = False
        self.finish_reason: str | None = None
        self._sent = 0

    def take(self, output: Output) -> str:
        """Take a step's token; the text that became safe to show."""
        text = ""
        if output.token is not None:
            self.ids.append(output.token)
            if output.logprobs is not None:
                self.logprobs.append(output.logprobs)
            if output.token not in self.sequence.stop_ids:
                text = self.decoder.push(output.token)
        if self.decoder.stopped:
            self.finish_reason = FinishReason.STOP
        elif output.finish_reason is not None:
            text += self.decoder.finish()
            self.finish_reason = str(output.finish_reason)
        self.text.append(text)
        return text

    def unsent(self) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """Ids and log-probabilities since the last piece; text that was held back travels with later ids."""
        start, self._sent = self._sent, len(self.ids)
        return tuple(self.ids[start:]), tuple(self.logprobs[start:])

    def choice(self) -> Choice:
        """The finished answer."""
        params = self.sequence.params
        return Choice(
            text="".join(self.text),
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs) if params.logprobs is not None else None,
            prompt_logprobs=tuple(self.sequence.prompt_logprobs) if params.prompt_logprobs is not None else None,
            finish_reason=self.finish_reason or str(FinishReason.STOP),
        )


@dataclass
class Times:
    """When what happened, by the monotonic clock."""

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(frozen=True)
class News:
    """What there is to tell about a request at one moment."""

    chunks: list[Callable[[], bytes]]
    done: bool
    error: RequestError | None

    def render(self) -> bytes:
        """The bytes for the client."""
        return b"".join(chunk() for chunk in self.chunks)


class Session:
    """A request that the engine works on; the engine's thread feeds it, the handler's thread empties it."""

    def __init__(
        self, request_id: str, generation: Generation, sequences: list[Sequence], tokenizer: Tokenizer, deadline: float
    ) -> None:
        self.request_id, self.generation, self.sequences = request_id, generation, sequences
        self.deadline = deadline
        self.times = Times(arrived=time.monotonic())
        self.committed = False  # status and content type are on their way
        self.last_sent = 0.0
        self.left_at: float | None = None  # when the frontend last called, if it seems to have dropped the request
        self.error: RequestError | None = None
        self.done = False
        # What the client has not heard yet, to be rendered by whoever sends it.
        self._chunks: list[Callable[[], bytes]] = []
        strips = generation.chat and tokenizer.answer_begins_with_space
        self._answers = [
            _Answer(sequence, StreamDecoder(tokenizer, generation.stop, strip_leading_space=strips))
            for sequence in sequences
        ]
        self._suspended: list[Sequence] = []
        self._places = {sequence.number: place for place, sequence in enumerate(sequences)}

    @property
    def usage(self) -> Usage:
        """Tokens in and out; a prompt counts once, however many answers it gets."""
        prompts = sum(map(len, self.generation.prompts))
        # Of several answers to a prompt the first is the one that may have found it new.
        cached = sum(sequence.cached for sequence in self.sequences[:: self.generation.n])
        return Usage(prompts, sum(len(answer.ids) for answer in self._answers), cached)

    def take(self, output: Output) -> bool:
        """Take one token of one choice; True when its sequence should be stopped, as a stop string was found."""
        place = self._places[output.sequence.number]
        answer = self._answers[place]
        if self.done or answer.finish_reason is not None:
            return False
        if output.finish_reason is FinishReason.ERROR:
            self.fail(RequestError(output.sequence.error or "the engine failed", status=500))
            return False
        now = time.monotonic()
        if self.times.first_token is None:
            self.times.first_token = now
            self.times.admitted = output.sequence.admitted_at
        self.times.last_token = now
        text = answer.take(output)
        if self.generation.stream:
            self._render(place, answer, text)
        if all(other.finish_reason is not None for other in self._answers):
            self._finish()
        return answer.decoder.stopped and not output.sequence.finished

    def fail(self, error: RequestError) -> None:
        """End with an error: a proper status if none is out yet, else an event in the stream."""
        if not self.done:
            self.error, self.done = error, True

    def news(self) -> News:
        """What the client has not heard yet, taken out; the engine's thread may go on while it is rendered."""
        chunks, self._chunks = self._chunks, []
        return News(chunks, self.done, self.error)

    def suspend(self) -> list[Sequence]:
        """The sequences that still run, from now on suspended."""
        running = [each for each in self.sequences if not each.finished]
        self._suspended += running
        return running

    def resume(self) -> bool:
        """Put a copy in the place of each suspended sequence, for the engine may not have let go of it yet."""
        for old in self._suspended:
            new = old.again()
            place = self._places.pop(old.number)
            self._places[new.number] = place
            self.sequences[place] = self._answers[place].sequence = new
        resumed, self._suspended = bool(self._suspended), []
        return resumed

    @property
    def has_news(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._chunks) or self.done

    def _render(self, place: int, answer: _Answer, text: str) -> None:
        renderer = self.generation.renderer
        if not answer.begun:
            answer.begun = True
            wanted = answer.sequence.params.prompt_logprobs is not None
            prompt = tuple(answer.sequence.prompt_logprobs) if wanted else None
            self._chunks.append(partial(renderer.begin, place, prompt))
        if text or answer.finish_reason is not None:
            ids, logprobs = answer.unsent()
            self._chunks.append(partial(renderer.piece, Piece(place, text, ids, logprobs, answer.finish_reason)))

    def _finish(self) -> None:
        renderer = self.generation.renderer
        if self.generation.stream:
            self._chunks.append(partial(renderer.end, self.usage))
        else:
            self._chunks.append(partial(renderer.whole, [answer.choice() for answer in self._answers], self.usage))
        self.done = True
