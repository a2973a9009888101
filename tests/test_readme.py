"""Every command the README shows names scripts, recipes and flags that exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from mtsql.run.config import flat, parse_config, to_dict

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
LINES = sorted({line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()})
SCRIPTS = [line for line in LINES if re.match(r"(accelerate launch|python) .*\.py", line)]


@pytest.mark.parametrize("line", SCRIPTS)
def test_a_shown_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = importlib.import_module(words[place].removesuffix(".py"))
    flags = words[place + 1 :]
    if "--resume" not in flags:
        parse_config(script.Config, flags, "", getattr(script, "PRESETS", None))


@pytest.mark.parametrize("line", [line for line in LINES if line not in SCRIPTS])
def test_any_other_shown_command_is_known(line):
    if module := re.match(r"python -m ([\w.]+)", line):
        assert importlib.util.find_spec(module[1]), line
    else:
        assert line.startswith(
            ("python3 -m venv .venv", "pip install -r requirements.txt", "pytest -m")
        )


def test_every_key_in_a_table_is_a_key_of_the_script():
    keys = set(flat(to_dict(importlib.import_module("train_rl").Config())))
    tables = "\n".join(
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")
    )
    words = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:=\w+)?`", tables)
    named = {word for word in words if not word.endswith(".py")} - {"train"}
    assert named and named <= keys, named - keys
