"""What the documentation shows exists: commands and their flags, keys, files and tests."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from helpers.presets import PRESETS
from mtsql.run.config import flat, parse_config, to_dict

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for folder, pattern in [
        (".", "*.py"),
        ("benchmarks", "*.py"),
        ("tools", "*.py"),
        ("configs", "**/*.yaml"),
        ("src", "**/*.py"),
    ]
    for path in (ROOT / folder).glob(pattern)
]


def shown_commands() -> list[str]:
    """Lines of bash blocks of the pages, and indented command lines in docstrings of scripts and
    modules and in comments of recipes."""
    found = set()
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S):
            found.update(line.strip() for line in block.splitlines() if line.strip())
    for source in SOURCES:
        # A module of the package is started by -m only.
        start = "python -m" if ROOT / "src" in source.parents else "(?:accelerate launch|python)"
        found.update(re.findall(rf"^(?:    |#   )({start} .+)$", source.read_text(), flags=re.M))
    return sorted(command for command in found if "..." not in command and "\\" not in command)


COMMANDS = shown_commands()
SCRIPTS = [c for c in COMMANDS if re.match(r"(accelerate launch|python) .*\.py\b", c)]
OTHERS = [c for c in COMMANDS if c not in SCRIPTS]


@pytest.mark.parametrize("command", SCRIPTS)
def test_flags_of_a_shown_script_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    path = ROOT / words[place]
    flags = words[place + 1 :]
    assert path.is_file()
    if path.parent.name == "tools":
        return  # it has a positional argument
    if path.parent.name == "benchmarks":
        monkeypatch.syspath_prepend(path.parent)
    module = importlib.import_module(path.stem)
    kind = getattr(module, "Config", None) or module.Flags
    if "--resume" not in flags:  # that run does not exist
        parse_config(kind, flags, "", getattr(module, "PRESETS", None))


@pytest.mark.parametrize("command", OTHERS)
def test_any_other_shown_command_is_known(command):
    if module := re.match(r"python -m ([\w.]+)", command):
        assert importlib.util.find_spec(module[1]), command
    else:
        known = ("python3 -m venv .venv", "pip install -r requirements.txt", "pytest ")
        assert command.startswith(known)


def test_commands_of_every_kind_of_place_are_found():
    named = "\n".join(COMMANDS)
    for part in (
        "accelerate launch train_rl.py\n",
        "python eval.py --model.path runs/rl/model --run runs/eval",  # a script's docstring
        "python benchmarks/rollout.py",
        "python tools/convert_smollm2.py",
        "--config configs/rl_cosql_qwen3_4b.yaml",  # a recipe's comment
        "python -m mtsql.judge.official_scorer",
    ):
        assert part in named


def test_every_flag_of_a_shown_audit_exists():
    from mtsql.audit.config import Config

    audits = [
        shlex.split(c, comments=True) for c in OTHERS if c.startswith("python -m mtsql.audit")
    ]
    assert len(audits) >= 3
    for words in audits:
        parse_config(Config, words[3:], "")


def test_every_key_in_a_table_is_a_key_of_the_script():
    script = importlib.import_module("train_rl")
    keys = set(flat(to_dict(script.Config())))
    lines = (ROOT / "docs" / "objectives.md").read_text().splitlines()
    tables = "\n".join(line for line in lines if line.startswith("|"))
    words = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:=[\w.]+)?`", tables))
    named = words - set(PRESETS)
    assert len(named) > 20 and named <= keys, named - keys


def test_the_presets_of_the_page_are_those_of_the_recipes():
    shown = {}
    for line in (ROOT / "docs" / "objectives.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].strip("`") in PRESETS and len(cells) == 3:
            pairs = re.findall(r"`([\w.]+)=([\w.]+)`", cells[2])
            shown[cells[0].strip("`")] = dict(pairs)
    expected = {
        name: {key: "null" if v is None else str(v) for key, v in preset.items()}
        for name, preset in PRESETS.items()
    }
    assert shown == expected


def test_the_file_map_names_files_that_exist_and_leaves_none_out():
    block = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[1]
    package = ROOT / "src" / "mtsql"
    named = set()
    folder = ROOT
    for line in block.splitlines():
        name = line.split()[0]
        if line.startswith("src/mtsql/"):
            folder = package
        elif line.startswith("  ") and not line.startswith("    ") and name.endswith("/"):
            folder = package / name
            assert folder.is_dir(), name
        elif line.startswith("  ") and not line.startswith("    "):
            folder = package
        if folder != ROOT:
            names = line.strip().split("  ")[0]  # the rest of the line is a description
            named.update(folder / file for file in re.findall(r"\w+\.py", names))
    files = {path for path in package.rglob("*.py") if path.name != "__init__.py"}
    files = {path for path in files if path.parent.name != "audit"}  # one line stands for it
    assert named == files, f"missing {named - files}, not in the map {files - named}"


def test_the_tests_to_learn_from_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) >= 7
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), test


def test_a_page_names_no_path_of_some_machine():
    for page in [*PAGES, ROOT / "LOG.md"]:
        for start in ("/work/", "/home/", "/root/", "/tmp/"):
            assert start not in page.read_text(), page


def test_the_files_that_the_readme_names_exist():
    names = re.findall(
        r"`((?:docs|tests|configs|tools|src)/[\w./]+|(?:train_|eval)\w*\.py)`",
        (ROOT / "README.md").read_text(),
    )
    assert len(names) > 5
    for name in names:
        assert (ROOT / name).exists(), name
