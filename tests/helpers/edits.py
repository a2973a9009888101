"""Edits of the source as docs/change.md shows them, applied to copies of a file or of the tree."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Edit = tuple[str, str]
"""Lines of a file, and what becomes of them."""


def sections(page: Path) -> dict[str, str]:
    """Heading -> text of each `##` section of a page."""
    parts = re.split(r"^## (.+)\n", page.read_text(), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def shown_edit(section: str) -> tuple[str, list[Edit]]:
    """The file (`src/mtsql/...`, the last that is named before the lines) and its edits, of a
    section with one block of changed lines."""
    before, block = re.split(r"```diff\n", section)
    file = re.findall(r"`(src/mtsql/[\w/]+\.py)`", before)[-1]
    hunks = re.split(r"^@@\n", block.partition("```")[0], flags=re.M)
    return file, [_edit(hunk) for hunk in hunks]


def _edit(hunk: str) -> Edit:
    lines = [(line[:1] or " ", line[1:] + "\n") for line in hunk.splitlines()]
    assert {sign for sign, _ in lines} <= {" ", "-", "+"}, hunk
    old = "".join(line for sign, line in lines if sign != "+")
    return old, "".join(line for sign, line in lines if sign != "-")


def edited(text: str, *edits: Edit) -> str:
    """The text after each `old` has become `new`; every `old` must stand in it exactly once."""
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times in the file: {old}"
        text = text.replace(old, new)
    return text


def copied_tree(folder: Path, file: str, edits: list[Edit]) -> Path:
    """A copy of the source, the scripts and the tests, in which one file is edited."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    place = folder / file
    place.write_text(edited(place.read_text(), *edits))
    return folder


def run_in(tree: Path, *words: str) -> str:
    """What a command prints that runs in a copied tree and imports it."""
    path = os.pathsep.join([str(tree / "src"), str(tree)])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout


def result_in(tree: Path, program: str) -> dict:
    """The JSON that a program prints in a copied tree."""
    return json.loads(run_in(tree, "-c", program).splitlines()[-1])
