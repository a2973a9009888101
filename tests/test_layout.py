"""The house rules that can be read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = [ROOT / name for name in ("train_sft.py", "train_rl.py", "eval.py")]
LEAVES = {"files"}  # may be imported by every room
MAY_IMPORT = {
    "__init__": set(),
    "files": set(),
    "toyworld": set(),
    "run": set(),
    "sql": {"toyworld"},
    "judge": {"sql"},
    "agent": {"sql"},
    "model": set(),
    "engine": {"model"},
    "learner": {"model", "run"},
    "rl": {"agent", "judge", "engine", "learner", "model", "sql"},
    "schema": {"sql"},
    "played": {"run", "agent", "engine"},
    "workbench": {"rl", "agent", "engine", "model", "sql", "played"},
    "warm_start": {"run", "workbench"},
    "audit": {"rl", "agent", "judge", "engine", "learner", "model", "sql", "run"},
}
"""Every room, and the rooms that it may import."""


def imported(path: Path) -> set[str]:
    """Every module name an import statement in the file mentions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("mtsql.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT / "src" / "mtsql").parts[0].removesuffix(".py")
    assert rooms(path) <= MAY_IMPORT[room] | LEAVES | {room}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_blanket_except_and_no_long_file(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught and "BaseException" not in caught and caught != "Exception"


def test_scripts_exist_and_are_short():
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) <= 400


def test_no_absolute_path_in_the_product():
    for path in [*SOURCES, *SCRIPTS, ROOT / "README.md"]:
        for start in ("/work/", "/home/", "/root/", "/tmp/"):
            assert start not in path.read_text(), f"{path} names {start}"


def test_sql_and_agent_import_without_torch():
    code = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split('.')[0] in ('torch', 'transformers', 'accelerate'):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import importlib, pkgutil, mtsql.sql, mtsql.agent
for package in (mtsql.sql, mtsql.agent):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):
        importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_file_map_names_files_that_exist():
    import re

    for name in re.findall(
        r"`((?:src/|train_|eval)[\w/.]+\.py)`", (ROOT / "README.md").read_text()
    ):
        assert (ROOT / name).is_file(), name
