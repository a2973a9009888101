"""The house rules that can be read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = [ROOT / name for name in ("train_sft.py", "train_rl.py", "eval.py")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
MAX_LINES = 400
LEAVES = {"choices", "files"}  # may be imported by every room
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"run"},
    "choices": set(),
    "files": set(),
    "eval_cells": {"rl.evaluate", "run", "sql"},
    "eval_report": {"run.screen", "judge", "rl.eval_figures"},
    "eval_run": {
        "agent",
        "engine",
        "eval_cells",
        "eval_report",
        "judge",
        "model",
        "model_notes",
        "rl",
        "run",
        "session",
        "sql",
        "workbench",
    },
    "toyworld": {"demos.plan"},
    "run": set(),
    "sql": {"toyworld"},
    "judge": {"sql"},
    "agent": {"sql", "judge.sql_parser", "judge.sql_query"},
    "demos": {"agent", "judge", "sql"},
    "model": set(),
    "engine": {"model"},
    "learner": {"model", "run.ranks"},
    "rl": {"agent", "demos", "judge", "engine", "learner", "model", "sql", "run.ranks"},
    "model_notes": {"run", "agent", "engine", "model"},
    "workbench": {"rl", "run.screen", "agent", "engine", "model", "sql", "model_notes"},
    "session": {"run", "learner", "model", "model_notes", "sql", "workbench"},
    "plan": {"engine", "learner", "model", "rl.checks", "rl.sweep", "run", "sql"},
    "copying": {"learner.packing", "toyworld"},
    "keeping": {"rl", "session"},
    "not_finite": {"run", "learner"},
    "panel": {"run"},
    "plots": {"judge", "run"},
    "lines": {"panel", "run", "rl", "learner.packing", "model", "model_notes"},
    "branch": {"run", "rl", "learner", "model", "session", "workbench"},
    "rl_run": {
        "run",
        "rl",
        "keeping",
        "learner.packing",
        "lines",
        "panel",
        "session",
        "branch",
        "sql.held_out",
    },
    "rounds": {"run", "rl", "engine", "judge", "learner.packing", "session", "sql"},
    "sources": {"run", "rl", "learner.packing", "model.sizes", "session"},
    "warm_start": {"copying", "run", "rl", "workbench"},
    "dry": {"run", "rl", "agent", "branch", "eval_cells", "model", "sql", "lines", "workbench"},
    "chat": {"agent", "engine", "judge", "model", "model_notes", "rl", "run", "sql"},
    "commands": {
        "agent",
        "audit",
        "chat",
        "demos",
        "engine",
        "judge",
        "learner",
        "model",
        "plan",
        "plots",
        "run",
        "sql",
        "viewer",
    },
    "viewer": set(),
    "audit": {"rl", "agent", "judge", "engine", "learner", "model", "sql", "run"},
}
"""Every room, and the rooms (or single modules of them) that it may import."""
WITHOUT_TORCH = ("sql", "judge", "toyworld", "agent", "demos")


def imported(path: Path) -> set[str]:
    """Every module that an import statement in the file names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "mtsql").parts[0].removesuffix(".py")


def is_allowed(name: str, allowed: set[str]) -> bool:
    """Whether a name such as mtsql.run.ranks.Ranks lies in one of the rooms or modules."""
    inner = name.removeprefix("mtsql.")
    return any(inner == one or inner.startswith(f"{one}.") for one in allowed)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    room = room_of(path)
    allowed = MAY_IMPORT[room] | LEAVES | {room}
    modules = {name for name in imported(path) if name.startswith("mtsql.")}
    # "from mtsql.run import ranks" names mtsql.run, too, and mtsql.run.ranks decides.
    parents = {name.rpartition(".")[0] for name in modules}
    assert not [name for name in modules - parents if not is_allowed(name, allowed)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_except_clause_catches_everything(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught and "BaseException" not in caught and caught != "Exception"


def test_no_file_is_longer_than_400_lines():
    files = [*SOURCES, *SCRIPTS, *TESTS, *BENCHMARKS, *(ROOT / "docs").glob("*.py")]
    assert all(script.is_file() for script in SCRIPTS)
    long = [path.name for path in files if len(path.read_text().splitlines()) > MAX_LINES]
    assert not long


def test_no_test_imports_another_test_file():
    for path in TESTS:
        names = {name.partition(".")[0] for name in imported(path)}
        assert not [name for name in names if name.startswith("test_")], path


def test_the_product_names_no_absolute_path():
    for path in [*SOURCES, *SCRIPTS, *BENCHMARKS]:
        for start in ("/work/", "/home/", "/root/", "/tmp/"):
            assert start not in path.read_text(), f"{path} names {start}"


def test_rooms_without_tensors_import_without_torch():
    code = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, *_):
        if name.split('.')[0] in ('torch', 'transformers', 'accelerate'):
            raise ImportError(name)

sys.meta_path.insert(0, Block())
for room in sys.argv[1:]:
    package = importlib.import_module('mtsql.' + room)
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):
        importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-c", code, *WITHOUT_TORCH], check=True)
