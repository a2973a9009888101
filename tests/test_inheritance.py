"""Recipes that inherit from others: what wins, and which file a fault is in."""

import pytest
import train_rl
import yaml

from mtsql.run.config import config_diff, parse_config
from mtsql.run.recipes import merge, nested, read_recipe


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write recipes into the working directory: `write(name, text)`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()

    def write_file(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)

    return write_file


def parse(*flags: str) -> train_rl.Config:
    return parse_config(train_rl.Config, list(flags), "", train_rl.PRESETS)


def test_a_recipe_wins_over_its_bases_key_by_key_and_lists_are_replaced(write):
    write("base/a.yaml", "env: {max_replies: 4, preview_chars: 9}\noptim: {betas: [0.9, 0.95]}\n")
    write("base/b.yaml", "base: a.yaml\noptim.betas: [0.5, 0.6]\nwarm_start: null\n")
    write("c.yaml", "base: base/b.yaml\nwarm_start: {epochs: 3}\noptim: {lr: 1e-4}\n")
    config = parse("--config", "c.yaml", "--env.preview_chars", "7")
    assert config_diff(config, train_rl.Config()) == {
        "env.max_replies": 4,
        "env.preview_chars": 7,
        "optim.betas": [0.5, 0.6],
        "optim.lr": 1e-4,
        "warm_start.epochs": 3.0,
    }


def test_several_recipes_and_presets_keep_their_order(write):
    write("a.yaml", "group_size: 3\nseed: 1\npreset: dapo\n")
    write("b.yaml", "base: a.yaml\nseed: 2\n")
    write("c.yaml", "seed: 5\n")
    config = parse("--config", "b.yaml", "--config", "c.yaml")
    assert (config.group_size, config.seed, config.preset) == (3, 5, "dapo")
    assert config.loss.clip_high == 0.28
    assert parse("--config", "c.yaml", "--config=b.yaml").seed == 2
    assert parse("--config", "b.yaml", "--preset", "rloo").advantage.baseline == "leave_one_out"


def test_print_config_shows_what_is_inherited(write, capsys):
    write("a.yaml", "group_size: 3\n")
    write("b.yaml", "base: a.yaml\n")
    with pytest.raises(SystemExit):
        parse("--config", "b.yaml", "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["group_size"] == 3 and "base" not in shown


@pytest.mark.parametrize(
    ("own", "base", "words"),
    [
        (
            "base: a.yaml",
            "base: c.yaml",
            "its bases form a circle: c.yaml -> a.yaml -> c.yaml",
        ),
        ("base: c.yaml", "", "its bases form a circle: c.yaml -> c.yaml"),
        ("base: no.yaml", "", "recipe c.yaml: its base no.yaml is not there: no file no.yaml"),
        ("base: a.yaml", "base: x/y.yaml", "recipe a.yaml: its base x/y.yaml is not there"),
        ("base: null\nseed: 1", "", "recipe c.yaml: base is None: expected the path of a recipe"),
        ("base: 3", "", "recipe c.yaml: base is 3: expected the path of a recipe"),
        ("base: [a.yaml]", "", "recipe c.yaml: base is ['a.yaml']: expected the path"),
        (
            "base: a.yaml",
            "optim: {lrr: 3}",
            "(did you mean optim.lr?) (recipe a.yaml)",
        ),
        (
            "base: a.yaml",
            "group_size: many",
            "expected a whole number (recipe a.yaml)",
        ),
        ("base: a.yaml", "optim: null", "recipe a.yaml: optim is null, but it needs a value"),
        ("base: a.yaml", "", "recipe a.yaml: it has no keys"),
        ("base: a.yaml", "config: x", "recipe a.yaml: config works only as a flag"),
        (
            "base: a.yaml",
            "env: {max_replies: 0}",
            "must be at least 1 (recipe a.yaml)",
        ),
        ("base: a.yaml\noptim: {lr: -1}", "seed: 1", "(recipe c.yaml)"),
    ],
)
def test_a_fault_is_said_to_be_in_its_file(own, base, words, write):
    write("c.yaml", own + "\n")
    write("a.yaml", base + "\n")
    with pytest.raises(ValueError) as error:
        parse("--config", "c.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_value_that_a_flag_replaces_is_no_fault_of_a_file(write):
    write("a.yaml", "env: {max_replies: 3}\n")
    with pytest.raises(ValueError, match="env.max_replies must be at least 1$"):
        parse("--config", "a.yaml", "--env.max_replies", "0")


def test_the_place_of_a_key_is_the_last_file_that_sets_it(write):
    write("a.yaml", "env: {max_replies: 3, preview_chars: 1}\n")
    write("b.yaml", "base: a.yaml\nenv.max_replies: 4\n")
    recipe = read_recipe("b.yaml")
    assert recipe.values == {"env": {"max_replies": 4, "preview_chars": 1}}
    assert recipe.places == {"env.max_replies": "b.yaml", "env.preview_chars": "a.yaml"}
    assert list(recipe.files) == ["b.yaml", "a.yaml"] and not recipe.is_one_file
    assert read_recipe("a.yaml").is_one_file


def test_sections_are_merged_and_other_values_replaced():
    assert nested({"a.b": 1, "a": {"c.d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}
    assert merge({"a": {"b": 1}, "c": [1, 2]}, {"a": {"d": 2}, "c": [3]}) == {
        "a": {"b": 1, "d": 2},
        "c": [3],
    }
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}
    assert merge({"a": None}, {"a": {"b": 1}}) == {"a": {"b": 1}}
