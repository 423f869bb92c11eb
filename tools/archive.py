"""Pack the handler for TorchServe: stage the code that it imports, then run torch-model-archiver on it."""

from __future__ import annotations

import ast
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from command_line import Parser, end_with
from deploy.configuration import PROJECT, Options, plan_model
from deploy.server import only_one
from engine.config import ConfigError

MODEL_NAME = "llama"
ENTRY = Path("handler") / "llama_handler.py"
# What converts, trains and tests has no business in a server.
SUFFIXES = (".py", ".cpp", ".h")
NEVER_SHIPPED = {"checkpoint_converter", "demo", "deploy", "formats", "generate", "prompt_files", "tests", "tools"}


def sources(project: Path = PROJECT) -> list[Path]:
    """The project's files that the handler needs, relative to the project: whole packages, as far as imports lead."""
    wanted: set[Path] = set()
    ahead = _files_of(project, ENTRY.parts[0])
    while ahead:
        path = ahead.pop()
        relative = path.relative_to(project)
        if relative in wanted:
            continue
        wanted.add(relative)
        for name in sorted(_imported(path)) if path.suffix == ".py" else ():
            files = _files_of(project, name)
            if files and name in NEVER_SHIPPED:
                raise ConfigError(f"{relative} imports {name}, which is not shipped with a server")
            ahead += files
    return sorted(wanted)


def _files_of(project: Path, name: str) -> list[Path]:
    """The files of a top-level module or package; none if it is not the project's."""
    module = project / f"{name}.py"
    if module.is_file():
        return [module]
    if not (project / name / "__init__.py").is_file():
        return []
    files = (path for suffix in SUFFIXES for path in (project / name).rglob(f"*{suffix}"))
    return sorted(path for path in files if "__pycache__" not in path.parts)


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def digest(project: Path = PROJECT) -> str:
    """One number for all the code that a server runs."""
    total = hashlib.sha256()
    for relative in sources(project):
        total.update(f"{relative}\0{hashlib.sha256((project / relative).read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def stage(folder: Path) -> Path:
    """Copy the code to `folder`, replacing what an earlier run left; the entry file goes in by --handler, not here."""
    shutil.rmtree(folder, ignore_errors=True)
    for relative in sources():
        if relative == ENTRY:
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / relative, folder / relative)
    return folder


def archive(model_config: Path, build: Path, archive_format: str = "default") -> Path:
    """Run torch-model-archiver; the .mar, or with `no-archive` the folder, appears under `build`, whole or not at all.

    Nobody else may be at work in `build` meanwhile: see `only_one`.
    """
    export = build / ("model_folder" if archive_format == "no-archive" else "model_store")
    result = export / (MODEL_NAME if archive_format == "no-archive" else f"{MODEL_NAME}.mar")
    making = export / ".making"
    shutil.rmtree(making, ignore_errors=True)  # of one that was killed
    try:
        stage(making / "mar")
        made = making / "made"
        made.mkdir()
        _run_archiver(making, model_config, made, archive_format)
        try:
            if result.is_dir():
                result.rename(making / "old")
        finally:  # whatever signal came meanwhile
            (made / result.name).replace(result)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return result


def _run_archiver(making: Path, model_config: Path, made: Path, archive_format: str) -> None:
    """Have it pack what is staged in `making`/mar into the folder `made`."""
    command = [str(Path(sys.executable).parent / "torch-model-archiver"), "--model-name", MODEL_NAME]
    # A name alone: it takes brackets for patterns, and a comma for the end of a path.
    command += ["--version", "1.0", "--handler", str(PROJECT / ENTRY), "--extra-files", "mar"]
    command += ["--config-file", str(model_config), "--export-path", str(made), "--archive-format", archive_format]
    # It works in TMPDIR/MODEL_NAME, which it deletes first, whoever made it: so it gets a TMPDIR of its own.
    words = ["env", f"TMPDIR={making}", *command]
    done = subprocess.run(words, cwd=making, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ConfigError(f"{made.parent.parent}: torch-model-archiver failed: {said[-1]}")


def main(argv: list[str] | None = None) -> int:
    """Build the .mar and the folder form, with the same settings as `python -m tools.serve start`."""
    parser = Parser(prog="python -m tools.archive", description=main.__doc__)
    Options.add_arguments(parser)
    flags = parser.parse_args(argv)
    options = Options()
    try:
        options = Options.from_words(flags.words)
        with only_one(options.build / "serve"):
            path = plan_model(options).write_model_config()
            for archive_format in ("default", "no-archive"):
                print(archive(path, options.build, archive_format))
    except ConfigError as error:
        print(f"archive: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename2 or error.filename or options.build
        print(f"archive: error: {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    end_with(main)
