"""The files that tell others what they may do with this repository agree with each other."""

import hashlib
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""SHA-256 of the text at apache.org/licenses/LICENSE-2.0.txt."""


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_licence_is_the_whole_unchanged_text():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_version_and_licence_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1]
    assert project()["version"] == citation["version"] == newest
    assert project()["license"] == citation["license"] == "Apache-2.0"


def test_files_that_the_notices_and_the_guide_name_exist():
    for name in ("NOTICE", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text()
        paths = set(re.findall(r"\b(?:src|tests|tools|configs|docs)/[\w./]*\w", text))
        assert paths
        missing = [path for path in paths if not (ROOT / path).exists()]
        assert not missing, (name, missing)


def test_rooms_of_the_guide_are_those_of_the_layout_test():
    """The table of rooms, read back, equals MAY_IMPORT of test_layout.py."""
    table = re.search(r"\| room \|.*?\n\n", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)[0]
    source = (ROOT / "tests" / "test_layout.py").read_text()
    may_import = re.search(r"^MAY_IMPORT = (\{.*?^\})", source, flags=re.S | re.M)[1]
    allowed = eval(may_import)  # a literal with set()
    shown = {}
    for line in table.strip().splitlines()[2:]:
        rooms, modules = line.strip("|").split("|")
        for room in re.findall(r"`(\w+)/`", rooms):
            shown[room] = set(re.findall(r"`([\w.]+)`", modules))
    assert len(shown) == 10
    assert shown == {room: allowed[room] for room in shown}


def test_the_workflow_runs_the_script_on_supported_versions():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    needed = project()["requires-python"].removeprefix(">=")
    assert min(job["strategy"]["matrix"]["python-version"]) == needed


def test_hooks_and_ci_run_the_same_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    said = (ROOT / ".ci" / "run").read_text()
    for hook in hooks:
        command = hook["entry"].removesuffix(" --force-exclude")
        assert f'"{command}' in said, command
