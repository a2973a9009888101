"""Flags and recipes: what is written is what runs, and a fault is named in one line."""

import json
from pathlib import Path

import eval as eval_script
import pytest
import train_rl
import train_sft
import yaml

from helpers.presets import PRESETS
from mtsql.audit.config import Config as AuditConfig
from mtsql.commands.score import Config as ScoreConfig
from mtsql.run.config import as_yaml, flat, parse_config, to_dict

KINDS = [train_rl.Config, train_sft.Config, eval_script.Config, AuditConfig]


def parse(*flags: str, kind: type = train_rl.Config):
    return parse_config(
        kind, list(flags), "", train_rl.PRESETS if kind is train_rl.Config else None
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "1"], "unknown flag --lr (did you mean --optim.lr?)"),
        (["--group-size", "3"], "--group_size?"),
        (["--num_up", "3"], "--num_updates?"),
        (["--pres", "dapo"], "--preset?"),
        (["--optim.learning_rate", "1"], "unknown flag --optim.learning_rate"),
        (["runs/rl"], "'runs/rl' belongs to no flag"),
        (["--run"], "--run needs a value"),
        (["--optim.lr", "fast"], "optim.lr is fast: expected a number"),
        (["--optim.lr", ".nan"], "optim.lr is nan: expected a finite number"),
        (["--loss.clip_high", ".inf"], "loss.clip_high is inf"),
        (["--optim.betas", "[0.9, .nan]"], "optim.betas is [0.9, nan]"),
        (["--group_size", "2.5"], "group_size is 2.5: expected a whole number"),
        (
            ["--env.answer_fallback", "maybe"],
            "env.answer_fallback is maybe: expected true or false",
        ),
        (["--env.malformed_call", "x"], "expected one of end, observe"),
        (["--style", "BRIEF"], "style is BRIEF: expected one of full, brief or null"),
        (["--curriculum.bounds", "[1"], "expected a list"),
        (["--optim", "3"], "optim is 3: it has keys of its own"),
        (["--warm_start.optim.lr", "fast"], "warm_start.optim.lr is fast: expected a number"),
        (["--warm_start.epochs", "0"], "warm_start.epochs must be above 0"),
        (["--warm_start.optim.lr", "0"], "warm_start.optim.lr and warm_start.optim.max_grad_norm"),
        (["--num_updates="], "num_updates is empty: expected a whole number"),
        (["--optim.betas", "[0.9]"], "expected a list of 2 values"),
        (["--optim.betas", "[0.9, 1]"], "optim.betas is [0.9, 1.0]"),
        (["--optim.weight_decay", "-1"], "optim.weight_decay is -1.0"),
        (["--model.embedded.num_heads", "4"], "must be a multiple of model.embedded.num_kv_heads"),
        (["--model.embedded.head_dim", "31"], "model.embedded.head_dim is 31: it must be even"),
        (["--model.embedded.hidden_size", "0"], "model.embedded.hidden_size is 0"),
        (["--model.embedded.vocab_size", "10"], "model.embedded.vocab_size is 10"),
        (["--curriculum.bounds", "[]", "--curriculum.shares", "[]"], "curriculum.bounds"),
        (["--env.preview_chars", "-1"], "env.preview_chars must not be negative"),
        (["--env.query.max_memory_bytes", "5"], "env.query.max_memory_bytes"),
        (
            ["--engine.cache_bytes", "8gigs"],
            "engine.cache_bytes is 8gigs: expected a whole number or",
        ),
        (["--engine.cache_bytes", "1.5"], "a whole number or a size such as 8GB or 512MiB"),
        (
            ["--trackers", "[tensorbord]"],
            "a list such as [tensorboard] of tensorboard, wandb, trackio",
        ),
        (["--run", ""], "run is empty: give it a value, or leave it out"),
        (["--model.path="], "model.path is empty"),
        (["--config", ""], "--config is empty"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--config", "/"], "--config /: this is a folder"),
        (["--warm_start.optim.l", "1"], "unknown flag --warm_start.optim.l"),
        (["--warm_start", "3"], "warm_start is 3: expected keys of its own or null"),
    ],
)
def test_a_flag_that_cannot_be_read_is_named(flags, words):
    with pytest.raises(ValueError) as error:
        parse(*flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bytes_may_be_written_as_a_size(tmp_path):
    config = parse("--engine.cache_bytes", "8GB", "--env.query.max_memory_bytes=512MiB")
    assert config.engine.cache_bytes == 8_000_000_000
    assert config.env.query.max_memory_bytes == 2**29
    (tmp_path / "own.yaml").write_text("engine: {cache_bytes: 1.5GiB}\n")
    config = parse("--config", str(tmp_path / "own.yaml"))
    assert config.engine.cache_bytes == 3 * 2**29 and type(config.engine.cache_bytes) is int
    assert "cache_bytes: 1610612736\n" in as_yaml(config)
    assert parse("--engine.cache_bytes", "512").engine.cache_bytes == 512


def test_a_number_in_yaml_may_have_an_exponent(tmp_path):
    """YAML itself reads 1e-4 as a text."""
    (tmp_path / "own.yaml").write_text("optim: {lr: 1e-4, betas: [0.9, 99e-2]}\n")
    config = parse("--config", str(tmp_path / "own.yaml"))
    assert (config.optim.lr, config.optim.betas) == (1e-4, (0.9, 0.99))


@pytest.mark.parametrize("kind", KINDS)
def test_no_script_takes_shortened_flags(kind):
    for key in list(flat(to_dict(kind())))[::30]:
        with pytest.raises(ValueError, match=rf"unknown flag --{key[:-1]} \(did you mean --"):
            parse(f"--{key[:-1]}", "1", kind=kind)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x\n", "alias *x is not read"),
        ("a: &a [*a]\n", "alias *a is not read"),
        ("[" * 5000, "recursion"),
        ("- 1\n", "expected keys with values"),
        ("a: b: c\n", "line 1"),
        ("optim:\n  lr: .inf\n", "optim.lr is inf"),
        ("optim:\n  lr: fast\n", "optim.lr is fast: expected a number"),
        ("optim: 3\n", "optim is 3"),
        ("group_size: null\n", "group_size is null"),
        ("group_siz: 3\n", "unknown key group_siz (did you mean group_size?)"),
        ("reward:\n  weights:\n    exx: 1\n", "unknown key reward.weights.exx"),
        (
            "warm_start: {epoch: 1}\n",
            "unknown key warm_start.epoch (did you mean warm_start.epochs",
        ),
        ("warm_start: {optim: {schedule: x}}\n", "warm_start.optim.schedule is x: expected one of"),
        ("warm_start: {epochs: many}\n", "warm_start.epochs is many: expected a number"),
        ("a: \x01\n", "recipe.yaml"),
        ("group_size: 3\ngroup_size: 4\n", "the key group_size appears twice"),
        ("optim: {lr: 1}\nenv: {}\noptim: {betas: [0, 0]}\n", "the key optim appears twice"),
        ("? [a]\n: 1\n", "recipe.yaml"),
        ("config: other.yaml\n", "config works only as a flag"),
        ("print_config: true\n", "print_config works only as a flag"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, text, words):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    for flags in (["--config", str(recipe)], [f"--config={recipe}"]):
        with pytest.raises(ValueError) as error:
            parse(*flags)
        message = str(error.value)
        assert words in message and "\n" not in message
        assert "recipe.yaml" in message or "is inf" in message


def test_a_recipe_may_begin_with_a_byte_order_mark_and_have_windows_line_ends(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"\xef\xbb\xbfgroup_size: 3\r\nnum_updates: 5\r\n")
    config = parse("--config", str(recipe))
    assert (config.group_size, config.num_updates) == (3, 5)


def printed(capsys, *flags: str, kind: type = train_rl.Config) -> dict:
    with pytest.raises(SystemExit) as stop:
        parse(*flags, "--print_config", kind=kind)
    assert stop.value.code == 0
    return flat(yaml.safe_load(capsys.readouterr().out))


def test_print_config_shows_what_will_run(capsys, tmp_path):
    assert (
        printed(capsys, "--preset", "dapo")["loss.clip_high"] == PRESETS["dapo"]["loss.clip_high"]
    )
    assert printed(capsys)["style"] == "brief"
    assert printed(capsys, kind=train_sft.Config)["style"] == "brief"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(as_yaml(parse("--num_updates", "7", "--preset", "rloo")))
    found = printed(capsys, "--resume", str(run), "--eval_every", "3")
    assert (found["num_updates"], found["eval_every"], found["run"]) == (7, 3, str(run))
    assert found["advantage.baseline"] == PRESETS["rloo"]["advantage.baseline"]


def test_print_config_shows_the_notes_of_a_model_and_reads_back(capsys, tmp_path):
    size = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **size}))
    (tmp_path / "mtsql.json").write_text('{"style": "brief", "env": {"max_replies": 2}}')
    found = printed(capsys, "--model.path", str(tmp_path), kind=eval_script.Config)
    assert (found["style"], found["env.max_replies"]) == ("brief", 2)
    with pytest.raises(SystemExit):
        parse("--preset", "gspo", "--print_config")
    recipe = Path(tmp_path / "again.yaml")
    recipe.write_text(capsys.readouterr().out)
    again, config = parse("--config", str(recipe)), parse("--preset", "gspo").completed()
    assert to_dict(again) == to_dict(config)


def test_resume_refuses_another_run_folder_and_a_run_of_another_script(tmp_path):
    (tmp_path / "config.yaml").write_text(as_yaml(parse()))
    with pytest.raises(ValueError, match="--run has no effect with resume"):
        parse("--resume", str(tmp_path), "--run", "runs/new")
    assert parse("--resume", str(tmp_path), "--run", f"{tmp_path}/").resume == str(tmp_path)
    with pytest.raises(ValueError, match="did another script or version of mtsql start it"):
        parse("--resume", str(tmp_path), kind=train_sft.Config)


def test_print_config_names_mistakes():
    with pytest.raises(ValueError, match="group_size"):
        parse("--group_size", "1", "--print_config")


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        (train_rl.Config, ["--engine.cache_bytes", "1000"], "engine.cache_bytes is 1000"),
        (train_rl.Config, ["--engine.cache_bytes", str(10**16)], "engine.cache_bytes 1000"),
        (train_rl.Config, ["--seed", "-1"], "seed is -1"),
        (train_sft.Config, ["--seed", str(10**20)], "seed is 1000"),
        (train_sft.Config, ["--max_turns", "-1"], "max_turns must not be negative"),
        (train_sft.Config, ["--max_prompt_tokens", "0"], "max_prompt_tokens is 0"),
        (train_sft.Config, ["--source", "self", "--demonstrations", "x"], "demonstrations has no"),
        (
            train_sft.Config,
            ["--source", "self", "--sft.max_samples", "2"],
            "sft.max_samples has no",
        ),
        (train_sft.Config, ["--selftaught.eval_turns", "-1"], "selftaught.eval_turns must not"),
        (eval_script.Config, ["--model.path", "x", "--max_dialogues", "-1"], "max_dialogues"),
        (train_rl.Config, ["--engine.block_size", "9000000"], "engine.cache_bytes"),
        (train_rl.Config, ["--max_batch_tokens", "1000"], "max_batch_tokens is 1000"),
        (train_rl.Config, ["--warm_start.max_batch_tokens", "9"], "warm_start.max_batch_tokens"),
        (train_rl.Config, ["--model.embedded.max_positions", "99"], "embedded.max_positions"),
        (train_rl.Config, ["--max_prompt_tokens", "8000", "--max_batch_tokens", "9999"], "8192"),
        (train_rl.Config, ["--model.path", "nowhere"], "model.path nowhere: no such folder"),
        (train_sft.Config, ["--sft.max_batch_tokens", "9"], "sft.max_batch_tokens is 9"),
        (train_sft.Config, ["--source", "self", "--engine.cache_bytes", "9"], "engine.cache_bytes"),
        (eval_script.Config, ["--model.path", "nowhere"], "model.path nowhere: no such folder"),
    ],
)
def test_sizes_that_do_not_fit_are_named_before_anything_is_loaded(kind, flags, words):
    with pytest.raises(ValueError) as error:
        parse(*flags, kind=kind).completed()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_flags_that_must_be_given_are_named_as_they_are_written():
    with pytest.raises(ValueError, match="^not given, but needed: --pred, --tables, --databases$"):
        parse("--gold", "a.txt", kind=ScoreConfig)


@pytest.mark.parametrize("recipe", ["--config {}", "--config={}"])
def test_flags_win_over_a_recipe_that_comes_after_them(recipe, tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("run: runs/first\nseed: 1\nnum_updates: 1\n")
    second.write_text("run: runs/second\nseed: 2\n")
    argv = f"--run runs/mine {recipe.format(first)} --seed=3 {recipe.format(second)}".split()
    config = parse_config(train_rl.Config, argv, "")
    assert (config.run, config.seed, config.num_updates) == ("runs/mine", 3, 1)
    config = parse_config(train_rl.Config, argv[2:], "")
    assert config.run == "runs/second"  # of two recipes, the later one
