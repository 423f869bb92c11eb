"""Pack the handler for TorchServe: stage the code that it imports, then run torch-model-archiver on it."""

from __future__ import annotations

import ast
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from command_line import Parser
from deploy.configuration import PROJECT, Options, plan_model
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
    """Run torch-model-archiver; the .mar, or with `no-archive` the folder, appears under `build`."""
    staged = stage(build / "mar")
    export = build / ("model_folder" if archive_format == "no-archive" else "model_store")
    export.mkdir(parents=True, exist_ok=True)
    result = export / (MODEL_NAME if archive_format == "no-archive" else f"{MODEL_NAME}.mar")
    if result.is_dir():
        shutil.rmtree(result)  # the archiver would leave files there that are no longer part of the model
    command = [str(Path(sys.executable).parent / "torch-model-archiver"), "--model-name", MODEL_NAME]
    command += ["--version", "1.0", "--handler", str(PROJECT / ENTRY), "--extra-files", str(staged)]
    command += ["--config-file", str(model_config), "--export-path", str(export)]
    command += ["--archive-format", archive_format, "--force"]
    # The archiver works in TMPDIR/MODEL_NAME, which it deletes first, whoever made it: so it gets a TMPDIR of its own.
    with tempfile.TemporaryDirectory(prefix="llama-archive-") as scratch:
        done = subprocess.run(["env", f"TMPDIR={scratch}", *command], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise ConfigError(f"torch-model-archiver failed: {(done.stderr or done.stdout).strip()}")
    return result


def main(argv: list[str] | None = None) -> int:
    """Build the .mar and the folder form, with the same settings as `python -m tools.serve start`."""
    parser = Parser(prog="python -m tools.archive", description=main.__doc__)
    Options.add_arguments(parser)
    flags = parser.parse_args(argv)
    try:
        plan = plan_model(Options.from_words(flags.words))
        path = plan.write_model_config()
        for archive_format in ("default", "no-archive"):
            print(archive(path, plan.options.build, archive_format))
    except (ConfigError, OSError) as error:
        print(f"archive: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
