"""Compare the scores that EleutherAI's lm-eval gives the served demo model and the same weights in transformers.

python -m tools.parity                         the tasks of demo/tasks, about 3 minutes on 2 cores
python -m tools.parity TP=2                    any KEY=VALUE of `make serve` goes to the server; DTYPE=bfloat16 differs
python -m tools.parity --through gguf,hf       what is served was converted to these formats first, one after the other
python -m tools.parity --fault                 what is served has a RoPE base that is wrong by 1%, which has to fail

lm-eval asks the server as it asks any OpenAI-like one, with its model `local-completions`: log-probabilities of echoed
prompts. It lives in an environment of its own under build/parity, which sees this project's torch and transformers.
The status is 0 when the scores differ by at most LIMIT on average, 1 when by more, 2 when there are no scores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from command_line import Parser, interrupts
from demo.tasks.write import FOLDER as TASKS
from demo.tasks.write import PROMPTED, WHOLE_TEXTS
from deploy.configuration import PROJECT
from deploy.server import MODEL
from engine.config import ConfigError
from formats import SINKS, FormatError
from formats.conversion import ConversionError, convert
from formats.output import OutputError
from generate import DEMO_MODEL
from tools.own_server import MODEL_PATH, server

WORK = PROJECT / "build" / "parity"
LM_EVAL = "lm-eval[api,hf]==0.4.13"

# What is published of converters elsewhere allows 0.15%; a RoPE base that is wrong by 1% changes these scores by that.
LIMIT = 0.0001
SEQ_LEN = 512
BATCH, AT_ONCE = 8, 2  # prompts in a request, requests at a time
WRONG_ROPE_THETA = 10100.0  # instead of 10000
FORMATS = [sink.name for sink in SINKS]


class ParityError(Exception):
    """There are no scores to compare; the message says why."""


@dataclass(frozen=True)
class Row:
    """One score of one task."""

    task: str
    metric: str
    served: float
    reference: float

    @property
    def difference(self) -> float:
        """The relative difference; infinite if only the reference is 0, as nothing is small beside that."""
        if self.served == self.reference:
            return 0.0
        return abs(self.served - self.reference) / abs(self.reference) if self.reference else math.inf


def prepare_environment(folder: Path) -> Path:
    """Install lm-eval in an environment that sees this one's packages; the path of its command."""
    command, done = folder / "bin" / "lm_eval", folder / "installed"
    if done.exists() and done.read_text() == LM_EVAL:
        return command
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], "the environment could not be made")
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (folder / packages / "project.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    # These are what is compared, so lm-eval gets none of its own.
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pinned) + "\n")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*install, "--constraint", str(constraints), LM_EVAL], f"{LM_EVAL} could not be installed")
    done.write_text(LM_EVAL)
    return command


def served_weights(folder: Path, fault: bool, through: Sequence[str] = ()) -> Path:
    """The demo model as the server loads it, by way of other formats, and with wrong positions if there is a fault."""
    source = DEMO_MODEL
    if fault:
        source = folder / "faulty"
        shutil.copytree(DEMO_MODEL, source, dirs_exist_ok=True)
        settings = json.loads((source / "params.json").read_text()) | {"rope_theta": WRONG_ROPE_THETA}
        (source / "params.json").write_text(json.dumps(settings))
    for number, name in enumerate(through):
        output = folder / f"{number}.{name}"  # a single file where the format has one, else a folder
        source = convert(source, output, to=name, force=True, progress=False)
    return convert(source, folder / "dcp", max_seq_len=SEQ_LEN, force=True, progress=False)


class Evaluation:
    """lm-eval on one model; its own output goes to a log."""

    def __init__(self, command: Path, folder: Path, name: str, model: str, arguments: dict[str, Any]) -> None:
        self._command = [str(command), "run", "--model", model, "--include_path", ".", "--batch_size", str(BATCH)]
        self._command += ["--device", "cpu"]
        self.name, self._folder, self._arguments = name, folder / name, arguments
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def scores(self, tasks: str, *, begins_with_bos: bool) -> dict[tuple[str, str], float]:
        """The scores of tasks by task and metric."""
        arguments = {**self._arguments, "add_bos_token": begins_with_bos}
        given = [f"{key}={value}" for key, value in arguments.items()]
        command = [*self._command, "--tasks", tasks, "--model_args", ",".join(given)]
        with open(self._folder / f"{tasks}.log", "w+") as log:
            where = ["--output_path", str(self._folder / f"{tasks}.json")]
            # The tasks name their files relative to where they are.
            ended = subprocess.run(
                [*command, *where], cwd=TASKS, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            found = list(self._folder.glob(f"{tasks}_*.json"))  # with the date in its name
            if ended.returncode or len(found) != 1:
                log.seek(0)
                tail = "".join(log.readlines()[-15:])
                raise ParityError(f"lm-eval ended with {ended.returncode}, see {log.name}:\n{tail}")
        results = json.loads(found[0].read_text())["results"]
        return {
            (task, metric.partition(",")[0]): value
            for task, values in results.items()
            for metric, value in values.items()
            if "," in metric and "_stderr," not in metric
        }

    def _environment(self) -> dict[str, str]:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(WORK / "home")}
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OPENAI_API_KEY")}
        return kept | offline | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def evaluations(command: Path, folder: Path, reference: Path, port: int) -> tuple[Evaluation, Evaluation]:
    """lm-eval on the server and on transformers, cutting long texts at the same places.

    Of a length L, `local-completions` gives L - 1 tokens to a prompt, and windows of L - 2 to a long text; `hf` takes
    its length for both, one token more for a prompt.
    """
    served = {
        "model": MODEL,
        "base_url": f"http://127.0.0.1:{port}{MODEL_PATH}/1.0/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": reference,
        "num_concurrent": AT_ONCE,
        "max_length": SEQ_LEN,
    }
    same = {"pretrained": reference, "dtype": "float32", "max_length": SEQ_LEN - 2}
    return (
        Evaluation(command, folder, "served", "local-completions", served),
        Evaluation(command, folder, "reference", "hf", same),
    )


def rows_of(served: dict[tuple[str, str], float], reference: dict[tuple[str, str], float]) -> list[Row]:
    """The scores side by side; what only one side has would be a comparison that silently left something out."""
    if served.keys() != reference.keys():
        odd = ", ".join(sorted(" ".join(key) for key in served.keys() ^ reference.keys()))
        raise ParityError(f"only one side has {odd}")
    rows = [Row(task, metric, served[task, metric], value) for (task, metric), value in sorted(reference.items())]
    bad = [row for row in rows if not (math.isfinite(row.served) and math.isfinite(row.reference))]
    if bad or not rows:
        raise ParityError(f"no number: {bad}" if bad else "lm-eval gave no scores")
    return rows


def mean_difference(rows: Sequence[Row]) -> float:
    """Of all scores."""
    return sum(row.difference for row in rows) / len(rows)


def table(rows: Sequence[Row], title: str) -> str:
    """Markdown."""
    lines = [title, "", "| Task | Metric | Served | transformers | Relative difference |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.task} | {row.metric} | {row.served:.6g} | {row.reference:.6g} | {100 * row.difference:.5f}% |"
        for row in rows
    ]
    worst = max(rows, key=lambda row: row.difference)
    return "\n".join(lines) + (
        f"\n\nMean relative difference of {len(rows)} scores of {len({row.task for row in rows})} tasks: "
        f"{100 * mean_difference(rows):.5f}% (limit {100 * LIMIT:g}%); the largest: "
        f"{100 * worst.difference:.5f}% ({worst.task}, {worst.metric})\n"
    )


def compare(folder: Path, fault: bool, through: Sequence[str], words: Sequence[str]) -> list[Row]:
    """Both sides' scores of all tasks."""
    with tqdm(total=7, desc="parity", unit="step", bar_format="{desc}: {n}/{total} |{bar}| {elapsed} {postfix}") as bar:

        def begin(what: str) -> None:
            bar.set_postfix_str(what)

        begin("installing lm-eval")
        command = prepare_environment(WORK / "lm_eval")
        bar.update()
        begin("converting")
        reference = convert(DEMO_MODEL, folder / "hf", to="hf", force=True, progress=False)
        weights = served_weights(folder, fault, through)
        bar.update()
        begin("starting the server")
        limits = (f"MAX_SEQ_LEN={SEQ_LEN}", f"MAX_BATCH_SIZE={BATCH * AT_ONCE}")
        found: list[dict[tuple[str, str], float]] = []
        with server(f"CHECKPOINT={weights}", "DTYPE=float32", "DEVICE=cpu", *limits, *words) as running:
            bar.update()
            for evaluation in evaluations(command, folder, reference, running.port):
                scores: dict[tuple[str, str], float] = {}
                for tasks, bos in ((PROMPTED, True), (WHOLE_TEXTS, False)):
                    begin(f"{evaluation.name}: {tasks}")
                    scores |= evaluation.scores(tasks, begins_with_bos=bos)
                    bar.update()
                found.append(scores)
    return rows_of(*found)


def _run(command: list[str], failed: str) -> None:
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ended.returncode:
        raise ParityError(f"{failed}:\n{ended.stdout[-1000:]}{ended.stderr[-3000:]}")


def _formats(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed, with commas between them: {', '.join(FORMATS)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Compare, write the table, and tell by the status whether the scores are the same."""
    parser = Parser(prog="parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="of make serve: TP=2, MAX_TOKENS_PER_STEP=64 ...")
    parser.add_argument("--fault", action="store_true", help="serve it with a wrong RoPE base, to see this fail")
    parser.add_argument("--through", type=_formats, default=[], metavar="FORMAT,...", help=f"of {', '.join(FORMATS)}")
    flags = parser.parse_args(argv)
    if any(word.upper().startswith("CHECKPOINT=") for word in flags.words):
        parser.error("CHECKPOINT is the demo model here, whose scores in transformers these are compared with")
    name = "fault" if flags.fault else "table"
    try:
        rows = compare(WORK / name, flags.fault, flags.through, flags.words)
    except (ParityError, FormatError, ConversionError, OutputError, ConfigError) as error:
        print(f"parity: error: {error}", file=sys.stderr)
        return 2
    title = "The demo model under lm-eval: served by TorchServe and in transformers"
    said = [*flags.words, *(f"through {each}" for each in flags.through)]
    said += [f"rope_theta {WRONG_ROPE_THETA:g}"] if flags.fault else []
    text = table(rows, f"{title} ({', '.join(said)})" if said else title)
    (WORK / f"{name}.md").write_text(text)
    (WORK / f"{name}.json").write_text(
        json.dumps(
            {
                "rows": [asdict(row) | {"difference": row.difference} for row in rows],
                "mean_difference": mean_difference(rows),
            },
            indent=1,
        )
    )
    print(text)
    return 0 if mean_difference(rows) <= LIMIT else 1


if __name__ == "__main__":
    try:
        with interrupts():  # so that the server ends, too
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("parity: interrupted")
