"""The presets as nested keys written with dots."""

from pathlib import Path

from mtsql.run.config import flat
from mtsql.run.recipes import read_yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "presets"
PRESETS = {file.stem: flat(read_yaml(file)) for file in sorted(FOLDER.glob("*.yaml"))}
"""Name -> {key: value}."""
