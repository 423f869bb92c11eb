"""Imports point down only, and what must stay free of torch, text or the environment does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
FLOORS = {
    "command_line": 0,
    "llama2": 0,
    "llama2_tokenizer": 0,
    "llama3_tokenizer": 0,
    "tokenizer_json": 0,
    "tokenizing": 0,
    "quant": 0,
    "engine": 1,
    "formats": 1,
    "checkpoint_converter": 2,
    "generate": 2,
    "prompt_files": 2,
    "handler": 3,
    "deploy": 4,
    "tools": 4,
}
# The engine is shipped and speaks token ids; the formats are neither.
TEXT = ("llama2_tokenizer", "llama3_tokenizer", "tokenizer_json", "tokenizing")
FORBIDDEN = {
    "llama2": {"os", "pathlib"},
    **{name: {"torch", "numpy", "transformers"} for name in TEXT},
    "engine": {"formats", *TEXT, "sentencepiece", "tiktoken", "tokenizers", "yaml"},
    "prompt_files": {"torch"},
    "engine/drafts.py": {"torch"},
    "engine/pace.py": {"torch", "time"},
    "engine/scheduler.py": {"torch"},
    "engine/sequence.py": {"torch"},
    "engine/slots.py": {"torch"},
    "handler": {"formats", "checkpoint_converter", "generate", "demo", "tools"},
}


def sources() -> list[Path]:
    return sorted(
        path for name in FLOORS for path in (PROJECT / name).rglob("*.py") if (PROJECT / name).is_dir()
    ) + sorted(PROJECT / f"{name}.py" for name in FLOORS if (PROJECT / f"{name}.py").exists())


def imported(path: Path) -> set[str]:
    """The modules that a file imports, in full and by their top-level name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the archive needs absolute ones"
            names.add(node.module)
    return names | {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_point_down_and_keep_away_from_what_is_not_theirs(path: Path) -> None:
    relative = path.relative_to(PROJECT)
    room = relative.parts[0].removesuffix(".py")
    names = imported(path)
    above = sorted(name for name in names & FLOORS.keys() if FLOORS[name] > FLOORS[room])
    assert not above, f"{relative} (floor {FLOORS[room]}) imports {above}"
    forbidden = FORBIDDEN.get(room, set()) | FORBIDDEN.get(str(relative), set())
    assert not names & forbidden, f"{relative} imports {sorted(names & forbidden)}"


def test_every_room_is_looked_at() -> None:
    rooms = {path.relative_to(PROJECT).parts[0].removesuffix(".py") for path in sources()}
    assert rooms == set(FLOORS)


def test_no_code_touches_the_import_path_and_only_the_edges_read_the_environment() -> None:
    for path in sources():
        text = path.read_text()
        assert "sys.path" not in text, path
        room = path.relative_to(PROJECT).parts[0].removesuffix(".py")
        if FLOORS[room] <= 1 and path.name not in ("parallel.py", "lifeline.py"):  # torchrun's variables come in there
            assert "os.environ" not in text, path
