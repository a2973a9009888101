"""What the documentation shows exists and works in its order: commands and their flags, recipes,
keys, files and tests."""

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from helpers.pages import (
    PAGES,
    ROOT,
    SOURCES,
    blocks,
    page_commands,
    recipes,
    source_commands,
)
from helpers.presets import PRESETS
from mtsql.run.config import flat, parse_config, to_dict

ON_PAGES = [(page, command) for page in PAGES for command in page_commands(page)]
IN_SOURCES = [(source, command) for source in SOURCES for command in source_commands(source)]
COMMANDS = list(dict.fromkeys([*ON_PAGES, *IN_SOURCES]))
KNOWN = (
    "python3 -m venv .venv",
    "python -c ",
    "pip install ",
    "pytest ",
    "ruff ",
    "mypy",
    "pre-commit ",
    "nvcc --version",
    "cp ",
    "tensorboard ",
    "trackio ",
)
"""How a command may begin that is not one of ours."""


def words_of(command: str) -> list[str]:
    """The words of a command without its redirection and the variables before it."""
    words = shlex.split(re.sub(r"^(\w+=\S* )+", "", command), comments=True)
    return words[: words.index(">")] if ">" in words else words


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder like the root of the repository, for the recipes that a page describes."""
    for path in ROOT.iterdir():
        if path.is_file() or path.name in ("configs", "benchmarks", "tests", "tools"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return tmp_path


@cache
def config_of(where: Path, command: str) -> object | None:
    """The configuration that a shown command runs with; None for a command of others. The recipes
    of its page are written into the working directory, which is `place`."""
    for name, text in recipes(where).items() if where.suffix == ".md" else ():
        Path(name).write_text(text)
    words = words_of(command)
    return script_config(words) if is_ours(words) else None


def script_config(words: list[str]) -> object | None:
    """The configuration that a command of ours runs with: a script or `mtsql NAME`. None if the
    command takes no flags, or continues a run, whose configuration is not here."""
    if words[:3] == ["python", "-m", "mtsql"]:
        words = ["mtsql", *words[3:]]
    if words[0] == "mtsql":
        return sub_command_config(words[1], words[2:])
    if words[:2] == ["accelerate", "launch"]:
        launch_command_parser().parse_args(words[2:])  # it exits at an unknown flag
    number = next(i for i, word in enumerate(words) if word.endswith(".py"))
    path = ROOT / words[number]
    flags = words[number + 1 :]
    assert path.is_file(), path
    if path.parent.name in ("docs", "tools"):
        return None  # it takes no flags, or a positional argument
    module = importlib.import_module(path.stem)
    kind = getattr(module, "Config", None) or module.Flags
    if hasattr(module, "COMMANDS"):  # its first word is one of them
        assert flags[0] in module.COMMANDS
        flags = flags[1:]
    if "--from" in flags:  # its run is not there; `--from` itself has tests of its own
        place = flags.index("--from")
        flags = flags[:place] + flags[place + 2 :]
    return None if "--resume" in flags else parsed(kind, flags, module)


def parsed(kind: type, flags: list[str], module: object) -> object:
    """The configuration with these flags. `--help` and `--print_config` only print."""
    flags = [flag for flag in flags if flag not in ("--help", "--print_config")]
    presets = getattr(module, "PRESETS", None)
    return parse_config(kind, flags, "", *([] if presets is None else [presets]))


def sub_command_config(name: str, words: list[str]) -> object | None:
    """The configuration of a sub-command of `mtsql`; None for one that takes files and no flags."""
    commands = importlib.import_module("mtsql.__main__").COMMANDS
    if name in ("--help", "--version"):
        return None
    assert name in commands, f"mtsql has no command {name}: it has {', '.join(commands)}"
    module = importlib.import_module(f"mtsql.commands.{name}")
    arguments = importlib.import_module("mtsql.commands.arguments")
    if name == "plan":  # a recipe, flags of its own, and flags of the recipe's script
        [recipe], words, others = module.split_words(words)
        importlib.import_module("mtsql.plan.recipe").read_recipe(recipe, others, None, 0, 0)
    if hasattr(module, "Config"):
        return parsed(module.Config, arguments.spelled_out(words, module.Config), module)
    arguments.positional(words, module.__doc__, "FILE" if words else "")
    return None


def is_ours(words: list[str]) -> bool:
    """Whether a command starts a script of ours or `mtsql`."""
    has_script = words[0] in ("accelerate", "python") and any(w.endswith(".py") for w in words)
    return words[0] == "mtsql" or has_script or words[:3] == ["python", "-m", "mtsql"]


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=lambda value: str(value)[-90:])
def test_a_shown_command_exists_with_its_flags(where, command, place):
    words = words_of(command)
    config_of(where, command)
    if is_ours(words):
        return
    assert " ".join(words).startswith(KNOWN), f"{where}: {command}"
    files = [word.partition("::")[0] for word in words if word.startswith(("tests/", "require"))]
    assert all((ROOT / file).exists() for file in files), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_work_in_its_order(page, place):
    """A run folder is made once, and before a command reads it. On pages other than README.md the
    first command of README.md has already been run."""
    made = set() if page.name == "README.md" else {"runs/rl", "runs/warm-start"}
    for command in page_commands(page):
        words = words_of(command)
        read = [word for word in words[1:] if words[0] == "cp" and word.startswith("runs/")]
        config = config_of(page, command)
        run = None
        read += [words[words.index(flag) + 1] for flag in ("--resume", "--from") if flag in words]
        if "--resume" not in words and config is not None and hasattr(config, "run"):
            values = flat(to_dict(config))
            run = values.pop("run")
            values.pop("warm_start_folder", None)
            read += [value for value in values.values() if str(value).startswith("runs/")]
        if "--dry_run" in words:  # it makes another folder, and needs no model
            continue
        for path in read:
            assert "/".join(path.split("/")[:2]) in made, f"{page.name}: no {path} for {command}"
        if run is not None and not {"--help", "--print_config"} & set(words):
            assert run not in made, f"{page.name}: {run} already exists for {command}"
            made.add(run)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_yaml_block_is_a_recipe(page, place):
    for name, text in recipes(page).items():
        file = place / name
        file.write_text(text)
        parse_config(importlib.import_module("train_rl").Config, ["--config", str(file)], "")


def test_commands_of_every_kind_of_place_are_found():
    found = {command for _, command in COMMANDS}
    for command in (
        "accelerate launch train_rl.py",
        "python eval.py --model.path runs/rl/model --run runs/eval",  # a script's docstring
        "accelerate launch train_rl.py --config configs/rl_sparc_qwen3_1.7b.yaml",  # a recipe
        "python tools/convert_smollm2.py models/smollm2",
    ):
        assert command in found
    for start in ("python benchmarks/rollout.py", "mtsql score", "mtsql audit", "mtsql schema"):
        assert any(command.startswith(start) for command in found), start


def test_a_page_is_short():
    for page in PAGES:
        if page.name not in ("README.md", "files.md"):  # the second is a list
            assert len(page.read_text().splitlines()) <= 120, page


def test_the_readme_links_every_page():
    text = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        name = str(page.relative_to(ROOT))
        assert f"`{name}`" in text or f"({name})" in text, name


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
    [block] = blocks(ROOT / "docs" / "files.md", "text")
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


def num_lines(path: Path) -> int:
    """Lines of a file, or of all Python files in a folder."""
    files = [path] if path.is_file() else path.rglob("*.py")
    return sum(len(file.read_text().splitlines()) for file in files)


def sizes_of_definitions(file: Path) -> dict[str, int]:
    """Name -> lines of the functions, classes and methods (`Class.method`) of a file."""
    sizes = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = node.body if isinstance(node, ast.ClassDef) else []
            methods = [one for one in inner if isinstance(one, ast.FunctionDef)]
            for name, one in [(node.name, node), *((f"{node.name}.{m.name}", m) for m in methods)]:
                sizes[name] = one.end_lineno - one.lineno + 1
    return sizes


def is_about(shown: str, lines: int) -> bool:
    """Whether a number on a page is still right, within a tenth."""
    return abs(int(shown.replace(",", "")) - lines) <= max(3, lines / 10)


def test_the_tree_of_the_readme_has_the_sizes_of_the_source():
    text = "".join(blocks(ROOT / "README.md", "text"))
    rows = re.findall(r"^( *)([\w./]+(?:/|\.py)) +([\d,]+)(?:  |$)", text, flags=re.M)
    assert len(rows) >= 12
    for indent, name, shown in rows:
        path = ROOT / "src" / "mtsql" / name if indent else ROOT / name
        assert path.exists() and is_about(shown, num_lines(path)), f"{path}: {num_lines(path)}"


def test_the_reading_order_of_the_readme_names_functions_with_their_sizes():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(
        r"^\|[^|]+\| `([\w/.]+\.py)` \| ((?:`[\w.]+`(?:, )?)+) \| (\d+) \|$", text, re.M
    )
    assert len(rows) >= 12
    total = 0
    for file, names, shown in rows:
        sizes = sizes_of_definitions(ROOT / file)
        lines = sum(sizes[name] for name in re.findall(r"`([\w.]+)`", names))
        assert is_about(shown, lines), f"{file}: {lines}"
        total += lines
    [shown] = re.findall(r"the ([\d,]+) lines of one update", text)
    assert is_about(shown, total), total


def test_the_tests_to_learn_from_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) >= 7
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), test


def test_a_page_names_no_path_of_some_machine():
    for page in [*PAGES, ROOT / "LOG.md"]:
        for start in ("/work/", "/home/", "/root/", "/tmp/"):
            assert start not in page.read_text(), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page):
    pattern = r"`((?:docs|tests|configs|tools|benchmarks|src)/[\w./-]+|(?:train_|eval)\w*\.py)`"
    for name in re.findall(pattern, page.read_text()):
        if "NAME" not in name:  # which stands for any name
            assert (ROOT / name).exists(), name
