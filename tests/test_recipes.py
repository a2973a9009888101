"""Every recipe in configs/ is read by the script that its comment names, and sets known keys."""

import ast
import inspect
import itertools
from dataclasses import fields
from functools import cache
from pathlib import Path

import eval as eval_script
import pytest
import torch
import train_rl
import train_sft
from transformers import Qwen3Config

from helpers.presets import PRESETS
from mtsql.engine import config as engine_config
from mtsql.engine.config import check_engine, resolved_block_size
from mtsql.rl.checks import check_config
from mtsql.run.config import config_diff, flat, parse_config, to_dict

ROOT = Path(__file__).resolve().parents[1]


@cache
def with_preset(name: str) -> train_rl.Config:
    """The configuration of `--preset NAME`."""
    return parse_config(train_rl.Config, ["--preset", name], "", train_rl.PRESETS)


@pytest.mark.parametrize(
    "file",
    [
        *sorted((ROOT / "configs").glob("*.yaml")),
        *sorted((ROOT / "configs/presets").glob("*.yaml")),
    ],
    ids=lambda file: file.name,
)
def test_a_recipe_is_a_valid_configuration(file):
    script = train_sft if file.name.startswith("sft_") else train_rl
    config = parse_config(script.Config, ["--config", str(file)], "")
    assert config_diff(config, script.Config())
    if script is train_rl:
        check_config(config)


SHAPES = {
    "4B": dict(num_hidden_layers=36, num_key_value_heads=8, head_dim=128),
    "1.7B": dict(num_hidden_layers=28, num_key_value_heads=8, head_dim=128),
    "smollm2": dict(num_hidden_layers=30, num_key_value_heads=3, head_dim=64),
}
"""Of the models that recipes name: what the cache depends on."""
RECIPES = [None, *sorted((ROOT / "configs").glob("*.yaml"))]


@pytest.mark.parametrize("script", [train_rl, train_sft, eval_script], ids=lambda one: one.__name__)
@pytest.mark.parametrize("has_flash", [False, True], ids=["plain", "flash"])
def test_recipes_and_defaults_start_on_a_gpu(script, has_flash, monkeypatch):
    """Without a flag for the size of a block, and the longest trajectory fits in the cache."""
    monkeypatch.setattr(engine_config, "uses_flash", lambda device, dtype: has_flash)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    prefix = {train_rl: "rl_", train_sft: "sft_", eval_script: "eval_"}[script]
    for file in RECIPES:
        if file is not None and not file.name.startswith(prefix):
            continue
        words = [] if file is None else ["--config", str(file)]
        config = parse_config(script.Config, words, "")
        named = [name for name in SHAPES if name.lower() in (config.model.path or "").lower()]
        assert len(named) == (config.model.path is not None), file
        shape = Qwen3Config(**SHAPES[named[0]]) if named else config.model.embedded
        longest = config.max_prompt_tokens + config.sampling.max_trajectory_tokens
        check_engine(config.engine, shape, longest, torch.bfloat16)
        size = resolved_block_size(config.engine, has_flash)
        assert size == 256 if has_flash else size in (32, 256)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("env: 3", "recipe own.yaml: env is 3, but it has keys of its own"),
        (
            "model: {embedded: [1]}",
            "recipe own.yaml: model.embedded is [1], but it has keys of its own",
        ),
        (
            "warm_start: {optim: 3}",
            "recipe own.yaml: warm_start.optim is 3, but it has keys of its own",
        ),
        ("", "recipe own.yaml: it has no keys"),
        ("optim:", "recipe own.yaml: optim is null, but it needs a value"),
        ("optim: null", "recipe own.yaml: optim is null, but it needs a value"),
        ("optim.lr: null", "recipe own.yaml: optim.lr is null, but it needs a value"),
        (
            "max_prompt_tokens: null",
            "recipe own.yaml: max_prompt_tokens is null, but it needs a value",
        ),
    ],
)
def test_a_recipe_is_not_ignored_in_silence(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        parse_config(train_rl.Config, ["--config", "own.yaml"], "")
    assert str(error.value) == words
    (tmp_path / "own.yaml").write_text("{warm_start: null, data: {train: null}, preset: null}")
    assert parse_config(train_rl.Config, ["--config", "own.yaml"], "").warm_start is None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_sets_what_it_lists_and_flags_win(name):
    config = parse_config(train_rl.Config, ["--preset", name, "--seed", "5"], "", train_rl.PRESETS)
    changed = config_diff(config, train_rl.Config())
    assert changed.pop("preset") == name and changed.pop("seed") == 5
    assert changed.keys() <= PRESETS[name].keys()
    for key, value in PRESETS[name].items():
        assert changed.get(key, value) == value
    check_config(config)


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        *((name, "--config {} --loss.clip_high 0.7 --preset {}") for name in sorted(PRESETS)),
        ("cispo", "--config={} --preset={} --loss.clip_high 0.7"),
    ],
)
def test_a_preset_wins_over_a_recipe_and_flags_over_both(name, argv):
    recipe = ROOT / "configs/rl_sparc_qwen3_1.7b.yaml"
    flags = argv.format(recipe, name).split()
    config = parse_config(train_rl.Config, flags, "", train_rl.PRESETS)
    check_config(config)
    values = flat(to_dict(config))
    assert values["turns_per_update"] == 256
    assert values.items() >= (PRESETS[name] | {"loss.clip_high": 0.7}).items()


def test_a_recipe_that_names_a_preset_wins_over_it(tmp_path):
    (tmp_path / "own.yaml").write_text("preset: dapo\ncurriculum: {resample_rounds: 7}\n")
    config = parse_config(
        train_rl.Config, ["--config", str(tmp_path / "own.yaml")], "", train_rl.PRESETS
    )
    assert (
        config.curriculum.resample_rounds == 7
        and config.loss.clip_high == PRESETS["dapo"]["loss.clip_high"]
    )


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_may_be_given_as_a_recipe(name):
    file = str(train_rl.PRESETS / f"{name}.yaml")
    by_file = parse_config(train_rl.Config, ["--config", file], "", train_rl.PRESETS)
    assert config_diff(by_file, with_preset(name)) == {"preset": None}


def test_the_flag_preset_wins_over_the_preset_of_a_recipe(tmp_path):
    (tmp_path / "own.yaml").write_text("preset: dapo\nnum_updates: 3\n")
    recipe = ["--config", str(tmp_path / "own.yaml")]
    for argv in ([*recipe, "--preset", "rloo"], ["--preset=rloo", *recipe]):
        config = parse_config(train_rl.Config, argv, "", train_rl.PRESETS)
        assert (config.preset, config.num_updates) == ("rloo", 3)
        assert config.advantage.baseline == "leave_one_out" and config.loss.clip_high == 0.2
    config = parse_config(train_rl.Config, [*recipe, "--preset", "null"], "", train_rl.PRESETS)
    assert config.preset is None and config.loss.clip_high == 0.2


@pytest.mark.parametrize("name", ["../rl_no_exec", "dapo.yaml", "DAPO", "3"])
def test_an_unknown_preset_is_named_with_the_known_ones(name):
    with pytest.raises(
        ValueError, match=f"preset is {name}: expected one of cispo, dapo, .* or nu"
    ):
        parse_config(train_rl.Config, ["--preset", name], "", train_rl.PRESETS)


@cache
def documented_fields(kind: type) -> set[str]:
    """The fields of a dataclass that have a docstring of their own."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    names = {field.name for field in fields(kind)}
    return {
        line.target.id
        for line, after in itertools.pairwise(body)
        if isinstance(line, ast.AnnAssign) and line.target.id in names
        if isinstance(after, ast.Expr) and isinstance(after.value.value, str)
    }


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_made_of_documented_keys(name):
    """It also says how large the KL is and whether zero-variance groups count."""
    assert {"advantage.zero_variance", "loss.kl_coef"} <= PRESETS[name].keys()
    for key in PRESETS[name]:
        owner, *path = train_rl.Config(), *key.split(".")
        while len(path) > 1:
            owner = getattr(owner, path.pop(0))
        assert path[0] in documented_fields(type(owner)), key


def test_presets_have_the_values_written_by_hand():
    """What each paper changes, against what its preset resolves to from the embedded defaults."""
    resolved = {name: with_preset(name) for name in PRESETS}
    rows = {
        name: (
            c.advantage.baseline,
            c.advantage.scale,
            c.loss.aggregate,
            c.loss.clip_low,
            c.loss.clip_high,
            c.loss.kl_coef,
            c.advantage.kl_coef,
            c.advantage.zero_variance,
        )
        for name, c in resolved.items()
    }
    assert rows == {
        "grpo": ("mean", "group", "token", 0.2, 0.2, 0.001, 0.0, "count"),
        "dr_grpo": ("mean", "none", "constant", 0.2, 0.2, 0.0, 0.0, "count"),
        "dapo": ("mean", "group", "token", 0.2, 0.28, 0.0, 0.0, "drop"),
        "gspo": ("mean", "group", "trajectory", 3e-4, 4e-4, 0.0, 0.0, "count"),
        "cispo": ("mean", "group", "token", 1.0, 4.0, 0.0, 0.0, "count"),
        "rloo": ("leave_one_out", "none", "constant", 0.2, 0.2, 0.0, 0.03, "count"),
        "reinforce_pp": ("batch", "batch", "token", 0.2, 0.2, 0.0, 0.01, "count"),
    }
    dapo = resolved["dapo"]
    assert dapo.curriculum.resample_rounds and dapo.reward.overlong_buffer
    assert dapo.advantage.on_truncated == "mask"
    assert resolved["gspo"].old_logprobs == "recomputed"
    assert resolved["gspo"].loss.ratio == "sequence"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--curriculum.resample_rounds 1 --advantage.zero_variance count",
            "set advantage.zero_variance to drop",
        ),
        (
            "--curriculum.resample_rounds 1 --advantage.baseline batch",
            "resample_rounds needs advantage.baseline",
        ),
        ("--curriculum.resample_rounds 1 --advantage.kl_coef 0.1", "no advantage.kl_coef"),
        (
            "--advantage.kl_coef 0.1 --loss.kl_coef 0.1",
            "advantage.kl_coef and loss.kl_coef penalise the same KL",
        ),
        ("--minibatches 17", "minibatches is 17, more than turns_per_update"),
        ("--minibatches 0", "minibatches is 0: it must be at least 1"),
        ("--num_passes 0", "num_passes is 0: it must be at least 1"),
        ("--old_logprobs engine", "old_logprobs is engine: expected one of sampled, recomputed"),
        (
            "--reward.overlong_buffer 641",
            "reward.overlong_buffer is more than sampling.max_trajectory_tokens",
        ),
        ("--curriculum.resample_rounds=-1", "curriculum.resample_rounds must not be negative"),
    ],
)
def test_impossible_objectives_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        check_config(parse_config(train_rl.Config, flags.split(), ""))
