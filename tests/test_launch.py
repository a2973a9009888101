"""How a script ends under a launcher, and Accelerate files with which the launcher is silent."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from helpers.runs import ROOT, launch
from mtsql.run import launch as module
from mtsql.run.launch import QUIET_HINT, Launcher, end_with

FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
ERROR = "error: group_size is 1"


@pytest.fixture
def repeated(monkeypatch):
    """The lines that last_line.py was started with. No signal is ignored."""
    lines = []
    monkeypatch.setattr(module, "ignore_stops", lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: lines.append(words[4]))
    return lines


def under(monkeypatch, words, world_size="1"):
    """Have this process believe that it was started by `accelerate launch` with these words."""
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(module, "find_launcher", lambda: Launcher(1, words, None))


ONE_LINE = ["error: x"]
WITH_HINT = ["error: x", QUIET_HINT]


@pytest.mark.parametrize(
    ("words", "world_size", "code", "said", "said_again"),
    [
        (("train_rl.py",), "1", 1, WITH_HINT, True),
        (("train_rl.py",), "1", 3, WITH_HINT, True),
        (("train_rl.py",), "1", 130, [], True),  # said once, after the launcher's traceback
        (("train_rl.py",), "2", 1, ONE_LINE, True),  # -q has no effect on several processes
        (("-q", "train_rl.py"), "1", 1, ONE_LINE, False),
        (("--quiet", "train_rl.py"), "1", 3, ONE_LINE, False),
        (("-q", "train_rl.py"), "1", 130, [], True),
        (("-q", "train_rl.py"), "2", 1, ONE_LINE, True),
        (("-q", "train_rl.py"), "2", 143, [], True),
    ],
)
def test_the_line_comes_again_if_the_launcher_prints_after_it(
    words, world_size, code, said, said_again, repeated, monkeypatch, capsys
):
    under(monkeypatch, words, world_size)
    with pytest.raises(SystemExit) as end:
        end_with("error: x", code)
    assert end.value.code == code
    assert repeated == (["error: x"] if said_again else [])
    assert capsys.readouterr().err.splitlines() == said


def test_without_a_launcher_there_is_one_line(repeated, monkeypatch, capsys):
    monkeypatch.setattr(module, "find_launcher", lambda: None)
    with pytest.raises(SystemExit):
        end_with("error: x", 1)
    assert not repeated and capsys.readouterr().err == "error: x\n"


def test_a_stopped_rank_that_is_not_the_first_says_nothing(repeated, monkeypatch, capsys):
    under(monkeypatch, ("train_rl.py",), "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        end_with("interrupted", 130)
    assert not repeated and capsys.readouterr().err == ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_in_an_accelerate_file_names_this_file(file):
    commands = re.findall(r"^#   (accelerate launch .+)$", file.read_text(), flags=re.M)
    assert commands and all(f"configs/accelerate/{file.name}" in line for line in commands)
    assert all((ROOT / line.split()[-1]).is_file() for line in commands)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_with_an_accelerate_file_the_launcher_says_nothing(file, tmp_path):
    (tmp_path / "script.py").write_text(
        # One write, so that the lines of two processes do not mix.
        "import os; os.write(1, os.environ.get('WORLD_SIZE', '1').encode() + b'\\n')"
    )
    num_processes = 1 if file.stem == "single" else 2
    flags = ["--config_file", str(file), "--num_processes", str(num_processes)]
    if num_processes > 1:
        flags += ["--main_process_port", "0"]
    done = launch(flags, tmp_path / "script.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.split() == [str(num_processes)] * num_processes


@pytest.mark.slow
def test_a_mistake_on_one_process_is_one_line_if_the_launcher_is_quiet(tmp_path):
    flags = ["-q", "--config_file", str(ROOT / "configs/accelerate/single.yaml")]
    done = launch(flags, ROOT / "train_rl.py", "--group_size", "1", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(ERROR) and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_mistake_on_one_process_is_the_first_and_last_line_of_a_loud_launcher(tmp_path):
    flags = ["--config_file", str(ROOT / "configs/accelerate/single.yaml")]
    done = launch(flags, ROOT / "train_rl.py", "--group_size", "1", cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0].startswith(ERROR) and lines[-1] == lines[0]
    assert lines[1:3] == [QUIET_HINT, "Traceback (most recent call last):"]


@pytest.mark.slow
def test_no_optimizer_step_is_exit_code_1_under_the_launcher(tmp_path):
    """As docs say: the launcher knows the codes 0 and 1 only."""
    (tmp_path / "script.py").write_text("raise SystemExit(3)")
    flags = ["-q", "--config_file", str(ROOT / "configs/accelerate/single.yaml")]
    assert launch(flags, tmp_path / "script.py", cwd=tmp_path).returncode == 1
    assert subprocess.run([sys.executable, tmp_path / "script.py"]).returncode == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_gpu_memory_grows_in_place_unless_the_user_says_otherwise(given, expected, monkeypatch):
    environment = dict(given)
    monkeypatch.setattr(module.os, "environ", environment)
    module.grow_gpu_memory_in_place()
    assert environment == expected


def test_torch_reads_the_allocators_variable_after_its_import():
    program = (
        "import os, torch; from mtsql.run.launch import grow_gpu_memory_in_place as grow; grow();"
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "expandable_segments:True", done.stderr


@dataclass(frozen=True)
class Asking:
    """A configuration that is completed by what the GPU can compute."""

    asked_with: str = "not asked"

    def completed(self) -> "Asking":
        return Asking(asked_with=os.environ["PYTORCH_ALLOC_CONF"])


def test_the_allocator_is_configured_before_anybody_asks_what_the_gpu_can(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is restored
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(module.sys, "argv", ["script"])
    seen = []
    module.run_script(seen.append, Asking, "")
    assert seen == [Asking("expandable_segments:True")]
