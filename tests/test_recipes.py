"""Every recipe in configs/ is read by the script its comment names, and by no other key than documented ones."""

from pathlib import Path

import pytest

import train_rl
import train_sft
from mtsql.config import config_diff, parse_config
from mtsql.rl.advantages import PRESETS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").iterdir()), ids=lambda file: file.name)
def test_a_recipe_is_a_valid_configuration(file):
    script = train_sft if file.name.startswith("sft_") else train_rl
    config = parse_config(script.Config, ["--config", str(file)], "")
    assert config_diff(config, script.Config())
    if script is train_rl:
        train_rl.check(config)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_sets_what_it_lists_and_flags_win(name):
    config = parse_config(train_rl.Config, ["--preset", name, "--seed", "5"], "", PRESETS)
    changed = config_diff(config, train_rl.Config())
    assert changed.pop("preset") == name and changed.pop("seed") == 5
    assert changed.keys() <= PRESETS[name].keys()
