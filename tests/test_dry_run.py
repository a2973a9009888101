"""The dry run: its model, its environment, its configuration, its table; and all of it at once."""

import json
from pathlib import Path

import eval as eval_script
import pytest
import torch
import train_rl
import train_sft
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from helpers.chat_models import KINDS as TEMPLATES
from helpers.chat_models import byte_tokenizer
from helpers.episodes import GOLD, HISTORY, singers
from helpers.recipes import ROOT, config_of
from helpers.runs import SMALL_RL, SMALL_SFT, finish, metrics, start
from mtsql.agent.env import EnvConfig, Outcome
from mtsql.dry.guided import GuidedEnv, gold_replies, is_guided
from mtsql.dry.report import phases_of
from mtsql.dry.run import check, dry_run, leave_out_most, make_folder
from mtsql.dry.small import small, value_of, with_values
from mtsql.dry.stand_in import (
    MARK,
    count_parameters,
    folder_of_shape,
    original,
    small_shape,
    write_mark,
    write_stand_in,
)
from mtsql.model.adapters import DEFAULT_TARGETS
from mtsql.model.policy import ModelConfig
from mtsql.run.config import config_diff, parse_config
from mtsql.sql.datasets import read_leave_out
from mtsql.sql.dialogues import Turn

SIZE = dict(
    vocab_size=400,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=5,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=40960,
)
KINDS = {
    "qwen": lambda: Qwen3Config(**SIZE, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SIZE, tie_word_embeddings=False),
}


def shape_folder(folder: Path, kind: str = "qwen") -> Path:
    """A model folder without weights."""
    KINDS[kind]().save_pretrained(folder)
    byte_tokenizer(*TEMPLATES[kind]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_stand_in_is_a_small_model_whose_replies_end(kind, tmp_path):
    real = original(ModelConfig(), str(shape_folder(tmp_path / "real", kind)))
    write_stand_in(real, tmp_path / "small", temperature=0.7, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    shape = model.config
    assert (shape.num_hidden_layers, shape.num_key_value_heads) == (2, 2)
    assert shape.num_attention_heads == 6 and shape.hidden_size % 6 == 0
    assert shape.tie_word_embeddings is (kind == "qwen")
    ids = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(0))
    probs = torch.softmax(model(ids).logits[:, 10:] / 0.7, -1)
    end = probs[..., real.tokenizer.eos_token_id]
    assert 0.02 < end.mean() < 0.4, end.mean()
    assert (tmp_path / "small/tokenizer.json").is_file()


def test_the_shape_is_that_of_the_model_of_an_earlier_stage_or_of_shape_from(tmp_path):
    model = tmp_path / "runs/sft/model"
    with pytest.raises(ValueError, match="dry-run that stage first, or name a folder"):
        folder_of_shape(ModelConfig(path=str(model)))
    with pytest.raises(ValueError, match="model.shape_from nowhere/Qwen is not there either"):
        folder_of_shape(ModelConfig(path=str(model), shape_from="nowhere/Qwen"))
    shape = tmp_path / "shape"
    shape.mkdir()
    config = ModelConfig(path=str(model), shape_from=str(shape))
    assert folder_of_shape(config) == str(shape)
    earlier = tmp_path / "runs/sft-dry"
    earlier.mkdir(parents=True)
    write_mark(earlier, str(tmp_path))
    assert folder_of_shape(config) == str(tmp_path)
    model.mkdir(parents=True)
    assert folder_of_shape(config) == str(model)


def test_parameters_are_counted_with_those_of_adapters():
    shape = KINDS["llama"]()
    num_all, num_trained = count_parameters(shape, 0, DEFAULT_TARGETS)
    width, heads, keys, inner = 96, 12 * 64, 4 * 64, 128
    layer = 2 * width * heads + 2 * width * keys + 3 * width * inner + 2 * width
    assert num_all == num_trained == 5 * layer + 2 * 400 * width + width
    sides = 2 * (width + heads) + 2 * (width + keys) + 3 * (width + inner)
    assert count_parameters(shape, 4, DEFAULT_TARGETS) == (num_all, 5 * 4 * sides)
    assert small_shape(shape, 300).vocab_size == 300


def test_both_stages_are_measured_without_the_held_out_databases(monkeypatch, tmp_path):
    def load(data, splits, is_training):
        raise ValueError(f"{splits} {is_training}")

    monkeypatch.setattr("mtsql.dry.run.load_corpora", load)
    for config, said in (
        (train_sft.Config(source="self"), "'train', 'dev'.* True"),
        (train_rl.Config(), "'train', .* True"),
    ):
        with pytest.raises(ValueError, match=said):
            check(config, tmp_path)


def test_some_episodes_are_guided_to_the_gold_query(tmp_path):
    database = singers(tmp_path / "shows.sqlite")
    turn = Turn("dev:0:1", 1, "shows", "and the old ones ?", GOLD, HISTORY)
    texts = [f"junk {number}" for number in range(40)]
    guided = [text for text in texts if is_guided(turn.turn_id, text)]
    assert 8 <= len(guided) <= 24
    for text in texts:
        env = GuidedEnv(turn, database, EnvConfig(), "full")
        seen = env.step(text)
        if text not in guided:
            assert seen is Outcome.NO_ACTION
            continue
        assert "Ann" in seen and "Memory of this conversation" in env.step("junk")
        assert env.step("") is Outcome.ANSWERED and env.final_sql == GOLD
        assert [record.sql for record in env.records] == [GOLD, GOLD, None]
    env = GuidedEnv(turn, database, EnvConfig(), "full")
    assert env.step("<answer_sql>SELECT 1</answer_sql>") is Outcome.ANSWERED
    assert env.final_sql == "SELECT 1"


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (EnvConfig(), 3),
        (EnvConfig(max_replies=2), 2),
        (EnvConfig(tools=("memory_retrieve",)), 2),
        (EnvConfig(horizon="short", tools=(), max_replies=1), 1),
    ],
)
def test_the_guide_keeps_to_tools_and_replies(config, count, tmp_path):
    turn = Turn("dev:0:1", 1, "shows", "and the old ones ?", GOLD, HISTORY)
    env = GuidedEnv(turn, singers(tmp_path / "shows.sqlite"), config, "full")
    assert len(gold_replies(env)) == count


def test_the_configuration_is_made_small(tmp_path):
    real = config_of(ROOT / "configs/rl_cosql_qwen3_4b.yaml")
    tried = small(real, tmp_path, tmp_path / "stand-in")
    assert (tried.num_updates, tried.turns_per_update, tried.group_size) == (3, 4, 4)
    assert (tried.eval_every, tried.eval_turns, tried.checkpoint.every) == (2, 8, 1)
    assert tried.curriculum.max_probe_turns == 12 and tried.curriculum.probe_samples == 4
    assert tried.sampling.max_reply_tokens == 32 and tried.engine.cache_bytes == 64 << 20
    assert tried.model.path == str(tmp_path / "stand-in") and tried.model.shape_from is None
    kept = ("reward", "loss", "advantage", "env", "data", "optim", "max_prompt_tokens")
    assert all(getattr(tried, name) == getattr(real, name) for name in kept)
    assert tried.sampling.max_trajectory_tokens == 8000 and tried.curriculum.shares == (
        0.4,
        0.4,
        0.2,
    )
    branch = with_values(real, {"from_run": "runs/old", "keep": ("curriculum",)})
    tried = small(branch, tmp_path, tmp_path)
    assert tried.from_run is None and tried.keep == train_rl.Config.keep
    off = with_values(real, {"eval_every": 0, "curriculum.probe_samples": 0, "nothing.here": 3})
    tried = small(off, tmp_path, tmp_path)
    assert tried.eval_every == 0 and tried.curriculum.probe_samples == 0
    assert value_of(real, "sft.epochs") is None
    sft = small(config_of(ROOT / "configs/sft_cosql_qwen3_4b.yaml"), tmp_path, tmp_path)
    assert (sft.selftaught.rounds, sft.max_turns, sft.sft.epochs) == (2, 24, 1.0)
    assert sft.sft.max_samples == 0  # it has no effect on the model's own rollouts
    embedded = with_values(train_sft.Config(), {"sft.whole_text_frac": 0.3})
    sft = small(embedded, tmp_path, tmp_path)
    assert (sft.sft.max_samples, sft.sft.whole_text_frac) == (32, None)
    train_sft.check(sft)  # the stand-in has a path, so a fraction would be refused


def test_the_table_counts_what_the_real_run_will_do():
    config = config_of(ROOT / "configs/rl_cosql_qwen3_4b.yaml")
    phases = phases_of(config, {"train": 7190, "dev": 948})
    assert [(p.num_episodes, p.num_steps) for p in phases] == [
        (948, 0),
        (143_800, 0),
        (150 * 256 * 5, 150),
        (15 * 948, 0),
    ]
    sft = config_of(ROOT / "configs/sft_cosql_qwen3_4b.yaml")
    rounds = phases_of(sft, {"train": 7190})
    assert len(rounds) == 3 and all(phase.is_most for phase in rounds)
    assert (rounds[0].num_episodes, rounds[0].num_steps) == (143_800, 2697)
    assert [p.num_episodes for p in phases_of(sft, {"train": 7190, "dev": 948})][-1] == 3 * 948
    [phase] = phases_of(eval_script.Config(history="gold"), {"dev": 948})
    assert (phase.num_episodes, phase.num_steps) == (948, 0)


def test_most_training_turns_are_left_out(tmp_path):
    turns = [Turn(f"train:0:{i}", i, "shows", "?", GOLD, ()) for i in range(300)]
    leave_out_most(turns[:200], None, tmp_path / "none.tsv")
    assert not (tmp_path / "none.tsv").exists()
    (tmp_path / "earlier.tsv").write_text("train:9:9\twrong\n")
    leave_out_most(turns, str(tmp_path / "earlier.tsv"), tmp_path / "out.tsv")
    reasons = read_leave_out(tmp_path / "out.tsv")
    assert reasons.pop("train:9:9") == "wrong"
    assert len(reasons) == 100 and set(reasons.values()) == {"dry run"}


def test_only_the_folder_of_a_dry_run_is_replaced(tmp_path):
    folder = tmp_path / "rl-dry"
    make_folder(folder)
    (folder / "run").mkdir()
    make_folder(folder)
    assert [file.name for file in folder.iterdir()] == [MARK]
    other = tmp_path / "mine-dry"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not that of a dry run"):
        make_folder(other)
    assert (other / "notes.txt").is_file()


def test_the_flag_needs_no_value(tmp_path):
    for flags in (["--dry_run"], ["--dry_run", "--seed", "1"], ["--dry_run", "true"]):
        assert parse_config(train_sft.Config, flags, "").dry_run
    config = parse_config(train_sft.Config, ["--dry_run", "false"], "")
    assert not config_diff(config, train_sft.Config())
    config = parse_config(train_rl.Config, ["--dry_run"], "")
    with pytest.raises(ValueError, match="leave out --resume"):
        dry_run(with_values(config, {"resume": str(tmp_path)}), print)


def said_by(script: Path, *flags: str, cwd: Path) -> str:
    """What a script prints."""
    said, _ = finish(start(*flags, cwd=cwd, script=script))
    return " ".join(said.split())  # long lines are wrapped


@pytest.mark.slow
def test_both_stages_and_eval_run_dry_on_the_small_world(tmp_path):
    shape_folder(tmp_path / "shape")
    flags = "--source self --selftaught.rounds 3 --model.path shape --dry_run"
    said = said_by(SMALL_SFT, *flags.split(), cwd=tmp_path)
    assert "what runs/sft will do" in said and "resumed: the same model bit for bit" in said
    assert "no score below means anything" in said
    stages = {row["stage"] for row in metrics(tmp_path / "runs/sft-dry/run")}
    assert {"round0", "round1"} <= stages
    assert json.loads((tmp_path / "runs/sft-dry" / MARK).read_text()) == {"shape": "shape"}
    assert not (tmp_path / "runs/sft").exists()

    flags = "--model.path runs/sft/model --eval_every 1 --dry_run"
    said = said_by(SMALL_RL, *flags.split(), cwd=tmp_path)
    assert "runs/sft/model is not there yet: the shape is of shape" in said
    assert "continues after 2 updates" in said and "resumed: the same model bit for bit" in said
    assert "what runs/rl will do" in said and "prompts of dev_seen" in said
    stages = [row["stage"] for row in metrics(tmp_path / "runs/rl-dry/run")]
    assert stages.count("rl") == 3 and "probe" in stages and "eval" in stages

    names = ("train", "dev")
    data = [f"--data.{name}=data/toyworld/{name}.json" for name in names]
    data += ["--data.tables=data/toyworld/tables.json", "--data.databases=data/toyworld/database"]
    data += ["--max_dialogues=2", "--out_of_domain=[data/toyworld/dev_seen.json]", "--dry_run"]
    said = said_by(ROOT / "eval.py", "--model.path=shape", *data, cwd=tmp_path)
    assert (
        "what runs/eval will do" in said and (tmp_path / "runs/eval-dry/run/scores.json").is_file()
    )
    for name in ("dev", "dev_seen"):
        turns = int(said.split(f"prompts of toyworld {name} ")[1].split()[0])
        assert 2 <= turns <= 14  # of two dialogues
