"""The command mtsql: its list of sub-commands, their help, and how it ends."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

from mtsql import commands
from mtsql.__main__ import COMMANDS, main


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_the_help_lists_each_command_in_a_line(words, capsys):
    main(words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: mtsql COMMAND ..."
    for name, summary in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, summary] for line in lines)
    assert max(map(len, lines)) < 80


def test_each_command_is_a_module_and_each_module_is_listed():
    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert set(COMMANDS) == modules - {"arguments"}
    for name in COMMANDS:
        module = importlib.import_module(f"mtsql.commands.{name}")
        assert callable(module.main) and f"    mtsql {name}" in module.__doc__


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_it_and_shows_its_description(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/mtsql", name, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main()
    text = capsys.readouterr().out
    description = importlib.import_module(f"mtsql.commands.{name}").__doc__
    assert stop.value.code == 0
    assert text.startswith(f"usage: mtsql {name}")
    assert " ".join(description.split()) in " ".join(text.split())
    assert max(map(len, description.splitlines())) < 80


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["scor"], "error: unknown command scor (did you mean score?); mtsql --help lists all"),
        (["--nope"], "error: unknown command --nope; mtsql --help lists all"),
        (["env", "x"], "error: unrecognized arguments: x"),
        (["schema"], "error: FILE_OR_FOLDER is missing: --help explains it"),
    ],
)
def test_a_wrong_word_ends_the_command_with_one_line(words, error):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == error  # Python prints it and exits with 1


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    name, version = capsys.readouterr().out.split()
    assert name == "mtsql" and version[0].isdigit()


def test_ctrl_c_ends_a_command_with_its_exit_code(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("mtsql.commands.schema.main", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["schema", "x"])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["score", "schema"])
def test_a_command_without_tensors_imports_no_torch(name):
    code = f"""
import sys
from mtsql.__main__ import main
try:
    main(["{name}", "--help"])
except SystemExit:
    print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def without_torch(name):
    code = f"""
import sys
from mtsql.__main__ import main
sys.modules["torch"] = None
main(["{name}"])
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_report_of_env_says_that_torch_cannot_be_imported():
    done = without_torch("env")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("torch ")]
    assert len(lines) == 2 and "cannot be imported: " in lines[1]


def test_a_command_that_needs_torch_says_so_in_one_line():
    done = without_torch("audit")
    line = "error: mtsql audit needs the package torch, which is not installed\n"
    assert done.returncode == 1 and done.stderr == line
