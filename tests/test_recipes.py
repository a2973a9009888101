"""Every recipe in configs/ is read by the script that its comment names, and sets known keys."""

import ast
import inspect
import itertools
import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import eval as eval_script
import pytest
import torch
import train_rl
import train_sft
from transformers import Qwen3Config

from helpers.presets import PRESETS
from helpers.recipes import RECIPES, SHAPES, config_of, model_of, script_of
from mtsql.engine import config as engine_config
from mtsql.engine.config import check_engine, resolved_block_size
from mtsql.rl.checks import check_config
from mtsql.run.config import config_diff, flat, parse_config, to_dict
from mtsql.run.recipes import read_recipe
from mtsql.workbench import load_corpora

ROOT = Path(__file__).resolve().parents[1]


@cache
def with_preset(name: str) -> train_rl.Config:
    """The configuration of `--preset NAME`."""
    return parse_config(train_rl.Config, ["--preset", name], "", train_rl.PRESETS)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_is_a_valid_configuration(file):
    config = config_of(file)
    assert config_diff(config, script_of(file).Config())
    if script_of(file) is train_rl:
        check_config(config)
    if script_of(file) is train_sft:
        train_sft.check(config)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_valid_configuration(name):
    assert config_diff(with_preset(name), train_rl.Config())
    check_config(with_preset(name))


@pytest.mark.parametrize("has_flash", [False, True], ids=["plain", "flash"])
def test_recipes_and_defaults_start_on_a_gpu(has_flash, monkeypatch):
    """Without a flag for the size of a block, and the longest trajectory fits in the cache."""
    monkeypatch.setattr(engine_config, "uses_flash", lambda device, dtype: has_flash)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    defaults = [script.Config() for script in (train_rl, train_sft, eval_script)]
    for config in [*defaults, *map(config_of, RECIPES)]:
        name = model_of(config)
        shape = Qwen3Config(**SHAPES[name]) if name else config.model.embedded
        longest = config.max_prompt_tokens + config.sampling.max_trajectory_tokens
        check_engine(config.engine, shape, longest, torch.bfloat16)
        size = resolved_block_size(config.engine, has_flash)
        assert size == 256 if has_flash else size in (32, 256)


def test_a_recipe_completes_with_a_model_of_its_shape(tmp_path):
    """Budgets, positions and cache, without weights: one recipe of each script and model."""
    settings = {"hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 40960}
    tried = set()
    for file in RECIPES:
        config = config_of(file)
        name = model_of(config)
        key = (script_of(file).__name__, name, config.sampling.max_trajectory_tokens)
        if name is None or key in tried:
            continue
        tried.add(key)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        kind = "llama" if "smollm" in name or "Llama" in name else "qwen3"
        shape = {"model_type": kind, **settings, **SHAPES[name]}
        (folder / "config.json").write_text(json.dumps(shape))
        model = replace(config.model, path=str(folder))
        done = replace(config, model=model).completed()
        assert done.style == (config.style or "full")
        assert done.model.dtype in ("float32", "bfloat16")
    assert len(tried) >= 9


@pytest.mark.slow
@pytest.mark.parametrize(("data", "counts"), [("sparc", (11761, 1144)), ("cosql", (9303, 948))])
def test_the_files_that_recipes_name_are_read(data, counts, shared):
    """By their names below the folder data/, from the real files. Some databases may be held out
    from training."""
    named = config_of(ROOT / f"configs/rl_{data}_qwen3_1.7b.yaml").data
    files = {
        name: str(shared / getattr(named, name)) for name in ("train", "dev", "tables", "databases")
    }
    corpora = load_corpora(replace(named, **files), ("train", "dev"))
    num_train, num_dev = (len(corpora[name].turns) for name in ("train", "dev"))
    assert 0.9 * counts[0] < num_train <= counts[0] and num_dev == counts[1]


def test_the_recipes_cover_the_paper():
    """Models, data sets, stages and ablations, each with a run folder of its own."""
    names = {file.stem for file in RECIPES}
    for model, data, stage in itertools.product(
        ("qwen3_1.7b", "qwen3_4b", "llama3.2_3b"), ("cosql", "sparc"), ("sft", "rl")
    ):
        assert f"{stage}_{data}_{model}" in names
    ends = ("no_exec", "no_memory", "outcome", "process_from_100", "budget_4000", "budget_2000")
    assert {f"rl_cosql_qwen3_4b_{end}" for end in (*ends, "short")} <= names
    runs = [read_recipe(file).values.get("run") for file in RECIPES]
    assert len(set(runs)) == len(runs) and None not in runs


@pytest.mark.parametrize("size", ["1.7b", "4b"])
def test_stage_2_begins_where_stage_1_ends(size):
    for data in ("cosql", "sparc"):
        rl = config_of(ROOT / f"configs/rl_{data}_qwen3_{size}.yaml")
        sft = config_of(ROOT / f"configs/sft_{data}_qwen3_{size}.yaml")
        assert rl.model.path == f"{sft.run}/model" and rl.model.shape_from == sft.model.path
        assert rl.env == sft.env and rl.data == sft.data


def test_the_old_recipes_keep_their_values():
    """Those of before recipes could inherit."""
    config = config_of(ROOT / "configs/rl_cosql_qwen3_4b.yaml")
    assert (config.num_updates, config.turns_per_update, config.group_size) == (150, 256, 5)
    assert config.curriculum.bounds == (0.7, 0.35, 0.0) and config.env.max_replies == 4
    assert (config.sampling.max_reply_tokens, config.sampling.max_trajectory_tokens) == (2048, 8000)
    assert config.engine.cache_bytes == 16 << 30 and config.model.gradient_checkpointing
    assert (config.loss.kl_coef, config.advantage.zero_variance) == (0.001, "count")
    sft = config_of(ROOT / "configs/sft_sparc_qwen3_1.7b.yaml")
    assert (sft.sft.epochs, sft.sft.samples_per_update, sft.sft.optim.lr) == (4.0, 16, 5e-6)
    assert (sft.source, sft.selftaught.rounds, sft.model.path) == ("self", 3, "models/Qwen3-1.7B")


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
