"""What pyproject.toml declares, and the wheel: built, installed into an empty environment, used."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from helpers.databases import make_database

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = [ROOT / name for name in ("train_sft.py", "train_rl.py", "eval.py")]
PRODUCT = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *SCRIPTS]
TESTS = [*(ROOT / "tests").rglob("*.py")]
BENCHMARKS = [*(ROOT / "benchmarks").rglob("*.py")]
PEERS = {"trl", "datasets"}
"""What only the benchmarks that compare with TRL import; benchmarks/trl_peer.py says so."""
TRACKERS = {"mlflow", "trackio"}
"""What run/trackers.py imports if the user names it, and says how to install if it is missing."""
PACKAGES = {"yaml": "pyyaml"}
"""Modules whose package has another name."""
TOOLS = {"ruff", "mypy", "pre-commit", "pytest-xdist", "types-psutil", "types-pyyaml"}
"""What is run, or read by mypy, and not imported."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    """The names of packages in lines such as `numpy>=2`."""
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in requirements}


def imported(paths: list[Path]) -> set[str]:
    """The names of the packages that these files import, as PyPI calls them. The standard library
    and files of this repository are left out."""
    modules = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.partition(".")[0])
    own = {path.stem for path in [*SCRIPTS, *BENCHMARKS]} | {"mtsql", "helpers"}
    others = modules - sys.stdlib_module_names - own
    return {normal(PACKAGES.get(module, module)) for module in others}


def test_what_the_product_imports_is_declared_and_nothing_else():
    optional = names(PROJECT["optional-dependencies"]["gpu"])
    assert imported(PRODUCT) == names(PROJECT["dependencies"]) | optional | TRACKERS


def test_what_tests_and_benchmarks_import_is_declared():
    product = names(PROJECT["dependencies"])
    dev = names(PROJECT["optional-dependencies"]["dev"])
    trackers = names(PROJECT["optional-dependencies"]["trackers"])
    skipped = {"datasets", "trl"}  # the test of the pool is skipped where they are missing
    assert imported(TESTS) - product - trackers - skipped == dev - TOOLS
    assert imported(BENCHMARKS) - product == PEERS


def test_a_version_stands_in_one_place():
    assert (ROOT / "requirements.txt").read_text() == "-e .[dev]\n"
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert listed == PROJECT["optional-dependencies"]["gpu"]


def run(*words: str | Path, cwd: Path) -> str:
    """What a program prints in another folder than the checkout. PYTHONPATH is left out, since the
    checkout in it would count as an installed mtsql."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without the network and from a copy. In the tree itself
    setuptools would leave a folder `build`, and would pack the old files in it, too."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "src",
        folder / "tree" / "src",
        ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "tree")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, folder / "tree"]
    run(sys.executable, "-m", "pip", *build, cwd=folder)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment that holds the wheel. Its dependencies come from
    the environment of the tests, so that they are not downloaded again."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    # A line of a .pth file is a folder to look in. Those of that folder's own .pth files, such as
    # an editable mtsql, are not read.
    (site_packages(python) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run(python, "-c", code, cwd=python.parent).strip())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.slow
def test_the_wheel_holds_all_modules_the_licence_and_complete_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    kinds = (".py", ".html", ".css", ".js")
    files = [path for path in (ROOT / "src" / "mtsql").rglob("*") if path.suffix in kinds]
    modules = {str(path.relative_to(ROOT / "src")) for path in files}
    folder = f"mtsql-{PROJECT['version']}.dist-info"
    own = {f"{folder}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt")}
    own |= {f"{folder}/entry_points.txt", f"{folder}/licenses/LICENSE", f"{folder}/licenses/NOTICE"}
    assert held == modules | own
    metadata = metadata_of(wheel)
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Summary"] == PROJECT["description"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "the mtsql contributors"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    required = metadata.get_all("Requires-Dist")
    always = [line for line in required if "extra ==" not in line]
    assert names(always) == names(PROJECT["dependencies"])
    assert set(metadata.get_all("Provides-Extra")) == {"gpu", "trackers", "dev"}


@pytest.mark.slow
def test_every_module_is_imported_from_the_installed_wheel(installed, tmp_path):
    code = """
import importlib, pkgutil, mtsql
for module in pkgutil.walk_packages(mtsql.__path__, "mtsql."):
    print(importlib.import_module(module.name).__file__)
"""
    files = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert len(files) > 100
    assert all(site_packages(installed / "python") in Path(file).parents for file in files)


@pytest.mark.slow
def test_the_installed_command_works_in_another_folder(installed, tmp_path):
    mtsql = installed / "mtsql"
    assert run(mtsql, "--version", cwd=tmp_path) == f"mtsql {PROJECT['version']}\n"
    assert run(installed / "python", "-m", "mtsql", cwd=tmp_path).startswith("usage: mtsql")
    env = run(mtsql, "env", cwd=tmp_path)
    assert re.search(rf"^mtsql +{re.escape(PROJECT['version'])}, installed$", env, re.MULTILINE)

    make_database(tmp_path / "database" / "one" / "one.sqlite")
    tables = run(mtsql, "schema", "database", cwd=tmp_path)
    assert [entry["db_id"] for entry in json.loads(tables)] == ["one"]

    (tmp_path / "tables.json").write_text(tables)
    (tmp_path / "gold.txt").write_text("SELECT a FROM t\tone\n")
    (tmp_path / "pred.txt").write_text("SELECT a FROM t\n")
    files = ["--gold", "gold.txt", "--pred", "pred.txt", "--tables", "tables.json"]
    scores = run(mtsql, "score", *files, "--databases", "database", cwd=tmp_path)
    assert re.search(r"^execution +1\.000", scores, re.MULTILINE)

    audit = run(mtsql, "audit", "--max_dialogues", "3", cwd=tmp_path)
    assert "every case in runs/audit/audit.json" in audit
    assert json.loads((tmp_path / "runs/audit/audit.json").read_text())["num_turns"] > 0
