"""What the pages of the documentation show: commands, blocks of code, recipes."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).is_file()),
    ROOT / "tests" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NOT_RUN = "<!-- not run -->\n"
"""It stands before a block of commands that need what we do not have."""
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


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of this language on a page, without those that are marked as not run."""
    text = page.read_text()
    text = re.sub(rf"{NOT_RUN}```.*?```", "", text, flags=re.S)
    return re.findall(rf"^```{language}\n(.*?)```", text, flags=re.S | re.M)


def page_commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, in their order, continued lines joined."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    commands = [line.partition(" #")[0].strip() for line in lines]
    return [command for command in commands if command and not command.startswith("#")]


def source_commands(source: Path) -> list[str]:
    """The indented command lines in docstrings of scripts and modules and in comments of recipes.
    A line with `...` is a pattern and no command."""
    text = source.read_text()
    text = re.sub(r"\\+\n *", "", text)  # continued lines; in a docstring the backslash is doubled
    # A module of the package is started by `mtsql` only.
    python = "python -m mtsql" if ROOT / "src" in source.parents else "python"
    start = f"(?:accelerate launch|{python}|mtsql)"
    found = re.findall(rf"^(?:    |#   )({start}\b.+)$", text, flags=re.M)
    commands = [re.split(r"\s#|\s{2,}", line)[0].strip() for line in found]
    return [command for command in commands if "..." not in command]


def recipes(page: Path) -> dict[str, str]:
    """File name -> text of the YAML blocks of a page. A name is the last that stands in backticks
    before the block; a block without one is named after its place."""
    found = {}
    parts = re.split(r"^```yaml\n", page.read_text(), flags=re.M)
    for number, (before, block) in enumerate(zip(parts, parts[1:], strict=False)):
        paragraph = before.rstrip().split("\n\n")[-1]
        names = re.findall(r"`[^`]*?(\w+\.yaml)`", paragraph)
        found[names[-1] if names else f"block{number}.yaml"] = block.partition("```")[0]
    return found
