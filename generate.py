"""Text from a converted checkpoint: `LLM` for scripts, and a command line, alone or under torchrun."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import Parser
from engine.config import (
    DEVICES,
    DTYPES,
    KERNELS,
    QUANTIZATIONS,
    SPECULATIONS,
    ConfigError,
    DeviceError,
    EngineConfig,
    RequestError,
    nearest,
)
from engine.engine import Engine, Output
from engine.lifeline import die_with_parent
from engine.parallel import Launch
from engine.sequence import FinishReason, SamplingParams, Sequence, TokenLogprobs
from prompt_files import read_dialogs, read_prompts
from tokenizing import DialogError, StreamDecoder, TokenizerError, load_tokenizer

PROJECT = Path(__file__).resolve().parent
DEMO_MODEL = PROJECT / "demo" / "model"
DEMO_CHECKPOINT = PROJECT / "build" / "demo"
MODES = ("text_completion", "chat")
MAX_STOP_STRINGS = 4
FIRST_RANK_SPEAKS_WITHIN_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One prompt, as text to complete, as a dialog to answer, or as token ids, and how to draw its tokens."""

    prompt: str | list[int] | None = None
    dialog: list[dict[str, str]] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    stop: Ordered[str] = ()
    where: str = ""  # where it was read, which is said of what is wrong with it

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.dialog is None):
            raise RequestError("a request needs either 'prompt' or 'dialog'", "prompt")
        if not isinstance(self.prompt, str | list | tuple | None):
            raise RequestError("prompt must be a text or a list of token ids", "prompt")
        stop = self.stop if isinstance(self.stop, list | tuple) else [None]
        if len(stop) > MAX_STOP_STRINGS or not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop must be at most {MAX_STOP_STRINGS} strings, none of them empty", "stop")


@dataclass(frozen=True)
class Completion:
    """What came of one request; `tokens` holds a stop token too, `text` never does."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass
class Metrics:
    """The figures of one `generate` call; throughput is all generated tokens over wall time, prefill included."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    latency_s: float = 0.0
    time_to_first_token_s: float = 0.0

    @property
    def throughput(self) -> float:
        """Generated tokens per second of wall time."""
        return self.generated_tokens / self.latency_s if self.latency_s else 0.0

    @property
    def per_token_latency_ms(self) -> float:
        """Wall time per generated token."""
        return 1000 * self.latency_s / self.generated_tokens if self.generated_tokens else 0.0

    def __str__(self) -> str:
        return (
            f"prompt tokens: {self.prompt_tokens}\n"
            f"generated tokens: {self.generated_tokens}\n"
            f"time to first token: {1000 * self.time_to_first_token_s:.1f} ms\n"
            f"latency: {self.latency_s:.3f} s\n"
            f"per-token latency: {self.per_token_latency_ms:.2f} ms\n"
            f"throughput: {self.throughput:.1f} tokens/s"
        )


class _Answer:
    """A request on its way: its sequence and the text so far."""

    def __init__(self, sequence: Sequence, decoder: StreamDecoder) -> None:
        self.sequence, self.decoder = sequence, decoder
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []

    def take(self, output: Output) -> str:
        """Turn a step's output into the text that is safe to show now."""
        sequence, text = self.sequence, ""
        if output.logprobs is not None:
            self.logprobs.append(output.logprobs)
        if output.token is not None:
            self.tokens.append(output.token)
            if output.token not in sequence.stop_ids:
                text = self.decoder.push(output.token)
        if output.finish_reason is not None:
            text += self.decoder.finish()
        self.pieces.append(text)
        return text

    def completion(self) -> Completion:
        """The finished answer."""
        sequence, params = self.sequence, self.sequence.params
        return Completion(
            "".join(self.pieces),
            self.tokens,
            FinishReason.STOP if self.decoder.stopped else sequence.finish_reason,
            sequence.prompt_length,
            sequence.error,
            self.logprobs if params.logprobs is not None else None,
            sequence.prompt_logprobs if params.prompt_logprobs is not None else None,
        )


class LLM:
    """A model, its tokenizer and its engine in one process (or one per rank: all but rank 0 call `follow`)."""

    def __init__(self, checkpoint: Path, config: EngineConfig | None = None, launch: Launch | None = None) -> None:
        self.engine, opened = Engine.load(Path(checkpoint), config or EngineConfig(), launch)
        self.tokenizer = load_tokenizer(opened.tokenizer_path)
        self.args = opened.args
        self.metrics = Metrics()

    @property
    def leads(self) -> bool:
        """Whether this rank takes requests."""
        return self.engine.ranks.leads

    def follow(self) -> None:
        """Serve the leader's steps until it closes."""
        self.engine.follow()

    def close(self) -> None:
        """Release the other ranks."""
        self.engine.close()

    def prompt_tokens(self, request: Request) -> list[int]:
        """The token ids that the model is given for a request."""
        if request.dialog is not None:
            return self.tokenizer.encode_dialog(request.dialog)
        if isinstance(request.prompt, str):
            return self.tokenizer.encode(request.prompt, bos=True, eos=False)
        return list(request.prompt)

    def generate(
        self, requests: Ordered[Request], on_text: Callable[[int, str], None] | None = None
    ) -> list[Completion]:
        """Answer all requests, batched; `on_text(index, text)` hears each piece of text as it becomes safe to show."""
        answers: list[_Answer | None] = [None] * len(requests)
        for index, answer in self.stream(requests, on_text):
            answers[index] = answer
        return [answer.completion() for answer in answers]

    def stream(
        self, requests: Ordered[Request], on_text: Callable[[int, str], None] | None = None
    ) -> Iterator[tuple[int, _Answer]]:
        """Answer all requests, yielding each with its index as soon as it ends; nothing runs if any is refused."""
        started = time.perf_counter()
        prompts = []
        for request in requests:
            with _naming(request.where):
                prompts.append(self.prompt_tokens(request))
        self.metrics = Metrics(prompt_tokens=sum(map(len, prompts)))
        answers: dict[int, tuple[int, _Answer]] = {}
        try:
            for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
                with _naming(request.where):
                    sequence = self.engine.add(prompt, request.params, self.tokenizer.stop_ids)
                strips = request.dialog is not None and self.tokenizer.answer_begins_with_space
                decoder = StreamDecoder(self.tokenizer, request.stop, strip_leading_space=strips)
                answers[sequence.number] = (index, _Answer(sequence, decoder))
            while answers:
                for output in self.engine.step():
                    if output.sequence.number not in answers:  # a stop string ended it in this very step
                        continue
                    index, answer = answers[output.sequence.number]
                    text = answer.take(output)
                    self._count(output, started)
                    if answer.decoder.stopped:
                        self.engine.cancel(answer.sequence, FinishReason.STOP)
                    if text and on_text is not None:
                        on_text(index, text)
                    if answer.decoder.stopped or output.finish_reason is not None:
                        del answers[output.sequence.number]
                        yield index, answer
        finally:  # an interrupted or refused call leaves no sequence behind
            for _, answer in answers.values():
                self.engine.cancel(answer.sequence)

    def _count(self, output: Output, started: float) -> None:
        self.metrics.latency_s = time.perf_counter() - started
        if output.token is not None:
            self.metrics.generated_tokens += 1
            if self.metrics.generated_tokens == 1:
                self.metrics.time_to_first_token_s = self.metrics.latency_s


def demo_checkpoint() -> Path:
    """The embedded demo model, converted on first use."""
    from checkpoint_converter import convert

    log.info("no --checkpoint given: using the embedded demo model")
    try:
        return convert(DEMO_MODEL, DEMO_CHECKPOINT, max_seq_len=512, progress=False, force=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the demo model could not be converted to {DEMO_CHECKPOINT}: {error}") from None


def request_from(
    body: dict[str, Any], defaults: dict[str, Any], where: str, mode: str | None = None, system: str | None = None
) -> Request:
    """A request from a JSON object: `prompt` or `dialog`, and any sampling option over the defaults.

    In the mode `chat`, be it the given one or the object's own, a prompt is a message behind the system prompt.
    """
    options = {"mode": mode, **defaults, **body}
    mode, stop = options.pop("mode"), options.pop("stop", None) or ()
    prompt, dialog = options.pop("prompt", None), options.pop("dialog", None)
    with _naming(where):
        if mode not in (None, *MODES):
            raise RequestError(f"mode is {mode!r}; allowed: {', '.join(MODES)}", "mode")
        if dialog is not None and body.get("mode") == MODES[0]:
            raise RequestError("a dialog is a chat; leave mode out or say 'chat'", "mode")
        if mode == "chat" and isinstance(prompt, str) and dialog is None:
            dialog = [{"role": "system", "content": system}] if system else []
            prompt, dialog = None, [*dialog, {"role": "user", "content": prompt}]
        return Request(prompt, dialog, _sampling(options), (stop,) if isinstance(stop, str) else stop, where)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say where a request that cannot be served was read, if it was."""
    try:
        yield
    except (RequestError, DialogError, TokenizerError, TypeError) as error:
        if not where:
            raise
        raise RequestError(f"{where}: {error}", getattr(error, "param", None)) from None


def _sampling(options: dict[str, Any]) -> SamplingParams:
    renamed = {"max_new_tokens": "max_tokens", "stop_token_ids": "stop_ids"}
    allowed = [*renamed, *SamplingParams.__dataclass_fields__]
    shown = [*allowed, "prompt", "dialog", "stop", "mode"]
    shown.remove("stop_ids")
    values = {}
    for name, value in options.items():
        if name not in allowed:
            raise RequestError(f"unknown option {name!r}; {nearest(name, shown)}", name)
        values[renamed.get(name, name)] = value
    if isinstance(values.get("logit_bias"), dict):
        try:
            values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
        except ValueError:
            raise RequestError("logit_bias must map token ids to numbers", "logit_bias") from None
    if "stop_ids" in values:
        if not isinstance(values["stop_ids"], list):
            raise RequestError("stop_token_ids must be a list of token ids", "stop_token_ids")
        values["stop_ids"] = frozenset(values["stop_ids"])
    params = SamplingParams(**values)
    if params.max_tokens == 0 and params.prompt_logprobs is None:
        raise RequestError("max_new_tokens is 0; only prompt_logprobs can be had without any", "max_new_tokens")
    return params


def _number_or_auto(word: str) -> int | str:
    if word != "auto" and not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is neither auto nor a whole number")
    return word if word == "auto" else int(word)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="generate.py",
        description="Complete text or answer chats with a converted Llama checkpoint; alone or under torchrun. "
        "The generated text goes to stdout, everything else to stderr.",
        epilog="examples:  python generate.py --prompt 'Once upon a time'   |   "
        "torchrun --nproc-per-node 2 generate.py --mode chat --prompt 'Hello!' --temperature 0",
    )
    what = parser.add_argument_group("what to answer (one of these)").add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="a text to complete, or with --mode chat a message to answer")
    what.add_argument(
        "--prompts", metavar="FILE", help="one prompt per line, or JSONL with options; answers as JSONL; '-' is stdin"
    )
    what.add_argument("--dialog", metavar="FILE", help="a JSON list of messages, or a list of such lists; '-' is stdin")
    mode = parser.add_argument_group("how to read it")
    mode.add_argument("--mode", choices=MODES, help="how to take prompts (default: text_completion; --dialog is chat)")
    mode.add_argument("--system", metavar="TEXT", help="a system prompt for --mode chat")
    mode.add_argument("--echo", action="store_true", help="write the prompt in front of its completion")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint", metavar="DIR", help="what checkpoint_converter.py wrote (default: the demo model)"
    )
    model.add_argument("--device", choices=DEVICES, default="auto", help="auto: cuda where there is one (the default)")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: by the device and the size (the default)")
    model.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="of the weights (default: none)")
    model.add_argument("--kernels", choices=KERNELS, default="auto", help="auto: the CPU's own where they can be had")
    model.add_argument(
        "--max-seq-len", type=int, metavar="N", help="longest prompt plus answer, in tokens (default: the checkpoint's)"
    )
    model.add_argument(
        "--max-batch-size", type=int, metavar="N", help="how many requests run at once (default: the checkpoint's)"
    )
    model.add_argument(
        "--max-tokens-per-step", type=int, default=512, metavar="N", help="tokens that one step computes (default: 512)"
    )
    model.add_argument(
        "--prefill-beside-decode",
        type=_number_or_auto,
        default="auto",
        metavar="N",
        help="prompt tokens in a step that others decode in (default: auto)",
    )
    model.add_argument("--no-prefix-reuse", action="store_true", help="compute every prompt from its first token")
    model.add_argument(
        "--speculation", choices=SPECULATIONS, default="none", help="guess tokens and verify them (default: none)"
    )
    model.add_argument("--max-draft-tokens", type=int, default=8, metavar="N", help="guesses at once (default: 8)")
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads per rank (default: by model and cores)")
    model.add_argument("--no-cuda-graphs", action="store_true", help="launch a GPU's decode steps kernel by kernel")
    model.add_argument("--no-verify", action="store_true", help="do not compare the checkpoint with its hashes")
    draw = parser.add_argument_group("sampling")
    draw.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    draw.add_argument("--temperature", type=float, default=0.6, metavar="T", help="0 is greedy (default: 0.6)")
    draw.add_argument("--top-p", type=float, default=0.9, metavar="P", help="default: 0.9")
    draw.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (the default)")
    draw.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (the default)")
    draw.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is off (the default)")
    draw.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="0 is off (the default)")
    draw.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="0 is off (the default)")
    draw.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; up to 4 times")
    draw.add_argument("--ignore-eos", action="store_true", help="go on to the limit")
    draw.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (default: a new one)")
    draw.add_argument("--logprobs", type=int, metavar="N", help="with JSONL: log-probabilities and N alternatives")
    show = parser.add_argument_group("output")
    show.add_argument("--no-stream", action="store_true", help="write the text when it is complete")
    show.add_argument("--metrics", action="store_true", help="write tokens, latencies and throughput to stderr")
    show.add_argument("--quiet", action="store_true", help="write only errors to stderr")
    return parser


def requests_from(flags: argparse.Namespace) -> list[Request]:
    """What the command line asks for."""
    names = (
        "max_new_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty stop "
        "ignore_eos seed logprobs"
    ).split()
    defaults = {name: getattr(flags, name) for name in names}
    if flags.system and (flags.mode != "chat" or flags.dialog is not None):
        raise ConfigError("--system needs --mode chat, and prompts; a dialog has its own")
    if flags.echo and (flags.prompt is None or flags.mode == "chat"):
        raise ConfigError("--echo needs a --prompt that is completed")
    if flags.dialog is not None and flags.mode == MODES[0]:
        raise ConfigError("--dialog is a chat; leave --mode out or give --mode chat")
    if flags.dialog is not None:
        found = [(flags.dialog, body) for body in read_dialogs(flags.dialog)]
    else:
        found = [("--prompt", {"prompt": flags.prompt})] if flags.prompts is None else read_prompts(flags.prompts)
    if flags.logprobs is not None and flags.prompts is None and len(found) == 1:
        raise ConfigError("--logprobs needs --prompts, of which answers come as JSON")
    return [request_from(body, defaults, where, flags.mode, flags.system) for where, body in found]


def completion_line(index: int, completion: Completion) -> str:
    """One answer as a line of JSON."""
    line: dict[str, Any] = {
        "index": index,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "generated_tokens": len(completion.tokens),
    }
    if completion.error:
        line["error"] = completion.error
    if completion.logprobs is not None:
        line["logprobs"] = list(map(_logprob, completion.logprobs))
    if completion.prompt_logprobs is not None:  # the first token has none
        line["prompt_logprobs"] = [None, *map(_logprob, completion.prompt_logprobs)]
    return json.dumps(line, ensure_ascii=False)


def _logprob(token: TokenLogprobs) -> dict[str, Any]:
    return {"id": token.token, "logprob": token.logprob, "top": dict(token.top)}


def run(flags: argparse.Namespace, launch: Launch) -> None:
    """Load, answer, write."""
    requests = requests_from(flags) if launch.rank == 0 else []  # who follows could only drain a common stdin
    config = EngineConfig(
        max_seq_len=flags.max_seq_len,
        max_batch_size=flags.max_batch_size if flags.prompt is None else flags.max_batch_size or 1,
        max_tokens_per_step=flags.max_tokens_per_step,
        prefill_beside_decode=flags.prefill_beside_decode,
        prefix_reuse=not flags.no_prefix_reuse,
        speculation=flags.speculation,
        max_draft_tokens=flags.max_draft_tokens,
        device=flags.device,
        dtype=flags.dtype,
        quantization=flags.quantization,
        kernels=flags.kernels,
        cuda_graphs=not flags.no_cuda_graphs,
        threads=flags.threads,
        verify_checkpoint=not flags.no_verify,
    )
    llm = LLM(demo_checkpoint() if flags.checkpoint is None else Path(flags.checkpoint), config, launch)
    if not llm.leads:
        llm.follow()
        llm.close()
        return
    try:
        if len(requests) == 1 and flags.prompts is None:
            _write_text(llm, requests[0], flags)
        else:
            _write_lines(llm, requests)
        if flags.metrics:
            print(llm.metrics, file=sys.stderr)
    finally:
        llm.close()


def _write_text(llm: LLM, request: Request, flags: argparse.Namespace) -> None:
    """The text of one answer, as it comes."""
    if flags.echo and isinstance(request.prompt, str):
        _write(request.prompt)
    completion = llm.generate([request], None if flags.no_stream else lambda _, text: _write(text))[0]
    _write(f"{completion.text if flags.no_stream else ''}\n")
    if completion.error:
        raise RequestError(completion.error)


def _write_lines(llm: LLM, requests: list[Request]) -> None:
    """Each answer as a line of JSON, in the order of the requests, as soon as all before it are out."""
    done: dict[int, str] = {}
    written = 0
    for index, answer in llm.stream(requests):
        done[index] = completion_line(index, answer.completion())
        while written in done:
            _write(f"{done.pop(written)}\n")
            written += 1


class _Unwritable(Exception):
    """Stdout takes no more; why is the argument."""


def _write(text: str) -> None:
    """Write some of an answer at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise _Unwritable(error) from None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; one line on stderr and a non-zero status for what cannot be done."""
    flags = build_parser().parse_args(argv)
    launch = Launch()
    try:
        launch = Launch.from_environment()
        level = logging.ERROR if flags.quiet or launch.rank else logging.INFO
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        for name in ("engine", "__main__", __name__):
            logging.getLogger(name).setLevel(level)
        if launch.size > 1:
            die_with_parent()
        run(flags, launch)
    except (ConfigError, RequestError, TokenizerError, DialogError) as error:
        # The ranks of one machine mostly fail alike, so the first speaks, and torchrun ends those that wait for it; a
        # full GPU is its own rank's trouble. Who ended before the first had spoken would have it ended silently.
        if launch.local_rank != 0 and not isinstance(error, DeviceError):
            time.sleep(FIRST_RANK_SPEAKS_WITHIN_S)
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except _Unwritable as error:  # not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error.args[0], BrokenPipeError):  # the reader left
            return 141
        print(f"generate.py: error: the answer cannot be written: {error.args[0].strerror}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"generate.py: error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
