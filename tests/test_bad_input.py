"""A user's mistake is one line that names the file, key or flag, before any training starts."""

import json
import sqlite3
import sys

import eval as eval_script
import pytest
import train_rl
import train_sft

from helpers.models import EMBEDDED, tiny_tokenizer
from mtsql.model.policy import build_embedded, save_policy
from mtsql.run.launch import run_script

TABLES = {
    "db_id": "one",
    "table_names_original": ["t"],
    "table_names": ["t"],
    "primary_keys": [],
    "foreign_keys": [],
    "column_names_original": [[-1, "*"], [0, "a"]],
    "column_names": [[-1, "*"], [0, "a"]],
    "column_types": ["text", "text"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model folders: `good`, and `mute` whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    policy = build_embedded(tokenizer, EMBEDDED, seed=1)
    save_policy(policy, tokenizer, folder / "good")
    tokenizer.chat_template = None
    save_policy(policy, tokenizer, folder / "mute")
    return folder


@pytest.fixture
def complaint(tmp_path, monkeypatch, capsys, models):
    """complaint(script, flags) starts a script in a folder with small data files and returns its
    one-line error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(models)
    (tmp_path / "database" / "one").mkdir(parents=True)
    sqlite3.connect(tmp_path / "database/one/one.sqlite").execute(
        "CREATE TABLE t (a)"
    ).connection.close()
    (tmp_path / "tables.json").write_text(json.dumps([TABLES]))
    good = [
        {"database_id": "one", "interaction": [{"utterance": "all?", "query": "SELECT a FROM t"}]}
    ]
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "elsewhere.json").write_text(json.dumps([{**good[0], "database_id": "two"}]))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "cut.json").write_text('[{"database_id": ')
    (tmp_path / "foreign.json").write_text('[{"db": 1}]')
    (tmp_path / "unknown.yaml").write_text("optimm:\n  lr: 1\n")
    (tmp_path / "broken.yaml").write_text("optim: [\n")
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    (tmp_path / "file").write_text("")

    def complaint(script, flags):
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags.split()])
        with pytest.raises(SystemExit) as stop:
            run_script(
                script.main,
                script.Config,
                script.__doc__,
                train_rl.PRESETS if script is train_rl else None,
            )
        assert stop.value.code not in (0, None)
        assert (
            not list(tmp_path.glob("runs/*/metrics.jsonl"))
            and not (tmp_path / "runs" / "warm-start").exists()
        )
        text = (
            stop.value.code
            if isinstance(stop.value.code, str)
            else capsys.readouterr().err.strip().splitlines()[-1]
        )
        assert text.startswith("error: ") and "\n" not in text, text
        return text

    return complaint


DATA = "--data.tables tables.json --data.databases database --data.dev good.json --data.train"
GOOD = "--model.path models/good"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # flags
        ("--nonsense 3", "nonsense"),
        ("--optim.lr fast", "optim.lr"),
        ("--optim.lr -1", "optim.lr"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--config unknown.yaml", "optimm.lr"),
        ("--config broken.yaml", "recipe broken.yaml"),
        ("--preset grppo", "preset"),
        ("--resume nowhere", "resume nowhere"),
        ("--run file", "run file"),
        (f"--run {'x' * 300}", "File name too long"),
        (f"--model.path {'x' * 300}", "File name too long"),
        (f"--resume {'x' * 300}", "too long"),
        # combinations
        ("--group_size 1", "group_size"),
        ("--num_updates 0", "num_updates"),
        ("--eval_every -1", "eval_every"),
        ("--checkpoint.keep_last 0", "checkpoint.keep_last"),
        ("--sampling.temperature 0", "sampling.temperature"),
        ("--sampling.top_p 0.9", "sampling.top_p"),
        ("--loss.aggregate constant", "loss.constant_length"),
        ("--preset cispo --loss.dual_clip 3", "loss.dual_clip"),
        ("--reward.overlong_buffer -1", "reward.overlong_buffer"),
        ("--model.lora.rank 8", "model.lora.rank"),
        # data
        ("--data.dev good.json", "data.dev"),
        (f"{DATA} good.json", "model.path"),
        (f"{DATA} nowhere.json {GOOD}", "nowhere.json"),
        (f"{DATA} cut.json {GOOD}", "cut.json"),
        (f"{DATA} foreign.json {GOOD}", "foreign.json: entry 0"),
        (f"{DATA} empty.json {GOOD}", "empty.json: no usable turn"),
        (f"{DATA} elsewhere.json {GOOD}", "database 'two'"),
        (f"{DATA} good.json --data.databases nowhere {GOOD}", "nowhere"),
        (f"{DATA} good.json --data.tables cut.json {GOOD}", "cut.json"),
        (f"{DATA.removesuffix('--data.train')} {GOOD}", "data.train"),
        # models
        (f"{DATA} good.json --model.path nowhere", "model.path nowhere"),
        (f"{DATA} good.json --model.path database", "model.path database"),
        (f"{DATA} good.json --model.path models/mute", "no chat template"),
        (
            f"{DATA} good.json {GOOD} --max_prompt_tokens 5",
            "max_prompt_tokens is 5, but the shortest",
        ),
        ("--warm_start_folder file", "warm_start_folder file: cannot create this folder"),
        (
            f"{DATA} good.json {GOOD} --model.lora.rank 4 --model.lora.targets [nope]",
            "model.lora.targets",
        ),
    ],
)
def test_train_rl_names_the_mistake(complaint, flags, words):
    assert words in complaint(train_rl, flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--source both", "source"),
        ("--sft.epochs 0", "sft.epochs"),
        ("--sft.whole_text_frac 1.5", "sft.whole_text_frac is 1.5"),
        (
            f"{DATA} good.json --model.path models/mute --source gold --sft.whole_text_frac 0.1",
            "0.1",
        ),
        (f"{DATA} good.json {GOOD}", "demonstrations is not set"),
        (f"{DATA} good.json {GOOD} --demonstrations nowhere.jsonl", "nowhere.jsonl"),
        (f"{DATA} good.json {GOOD} --demonstrations wrong.jsonl", "wrong.jsonl, line 1"),
        (f"{DATA} good.json {GOOD} --demonstrations empty.json", "empty.json"),
        (f"{DATA} good.json --model.path models/mute --source self", "no chat template"),
    ],
)
def test_train_sft_names_the_mistake(complaint, flags, words):
    assert words in complaint(train_sft, flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "model.path"),
        (f"{DATA} good.json {GOOD} --split test", "split"),
        (f"{DATA} good.json {GOOD} --split dev_seen", "dev_seen"),
        (f"{DATA} good.json {GOOD} --history none", "history"),
        (f"{DATA} good.json --model.path models/mute", "no chat template"),
        (f"{DATA} good.json --model.path file", "model.path file"),
    ],
)
def test_eval_names_the_mistake(complaint, flags, words):
    assert words in complaint(eval_script, flags)


def test_the_launcher_and_the_model_may_not_disagree_about_precision(complaint, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "model.dtype" in complaint(train_rl, f"{DATA} good.json {GOOD}")
