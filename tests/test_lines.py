"""The lines of a run: the first, one for each update or interval, and the time that is left."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import train_rl
import train_sft
from transformers import LlamaConfig

from helpers.pages import ROOT
from mtsql import lines
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packing import Sample
from mtsql.lines import (
    StepLines,
    UpdateLines,
    announce,
    change,
    embedded_rate,
    held_out_ex,
    listed,
    same_flags,
    secs_left,
    stage_2,
    took,
)
from mtsql.model.attention_path import AttentionPath
from mtsql.model.flops import FlopMeter, ModelFlops
from mtsql.model.policy import AdapterConfig, ModelConfig
from mtsql.rl.update_metrics import LOSS_STATS
from mtsql.run import screen
from mtsql.run.checkpoint import Checkpoint
from mtsql.run.config import parse_config, save_config
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import RunLog
from mtsql.sql.datasets import DataConfig

ROW = {
    "stage": "rl",
    "curriculum_stage": 1,
    "reward": 1.5627,
    "reward/ex": 0.5625,
    "reward/em": 0.75,
    "zero_variance_frac": 0.1,
    "truncated_frac": 0.0859,
    "malformed_frac": 0.0,
    "preemptions": 0,
    "num_trajectories": 128,
    "sql_wait_secs": 0.0,
    "rollout_flops": 1e9,
    "learn_flops": 1e9,
    "num_sampled": 9000,
    "num_computed": 20000.0,
    "num_steps": 1,
    "grad_norm": 0.0875,
    "engine_gap": 1e-6,
    **{f"loss/{name}": 0.06 for name in LOSS_STATS},
}
EVALUATION = {
    "stage": "eval",
    "update": 0,
    "dev_seen_ex": 46.0,
    "dev_seen_em": 85.0,
    "dev_ex": 34.0,
}


METER = FlopMeter(ModelFlops(per_token=10.0, per_pair=1.0, per_predicted=5.0), peak=2e9)


@dataclass(frozen=True)
class Config:
    run: str = "x"


def update_lines(folder, num_updates=40, **options):
    return UpdateLines(RunLog(folder, Config(), **options), num_updates, eval_every=20, meter=METER)


def test_an_update_is_one_line_under_a_header(tmp_path, capsys):
    shown = update_lines(tmp_path / "run")
    shown.log.metrics({**EVALUATION, "eval_secs": 30.0})
    shown.log._timings["learn_secs"] = 2.0
    shown.add({**ROW, "update": 1})
    shown.add({**ROW, "update": 2, "loss/kl": None, "grad_norm": None, "learn_flops": 0.0})
    *legend, header, one, two = capsys.readouterr().out.splitlines()
    assert legend and all(len(line) <= 80 for line in legend)
    names = "update st reward EX EM held entr KL grad trun roll learn mfu left".split()
    assert header.split() == names and len(header) == len(one) == len(two) <= 80
    cells = dict(zip(names, one.split(), strict=True))
    assert cells["update"] == "1/40" and cells["st"] == "2" and cells["reward"] == "1.563"
    assert (cells["EX"], cells["EM"], cells["held"]) == ("56.2", "75.0", "40.0")
    assert (cells["entr"], cells["KL"], cells["grad"]) == ("0.060", "0.060", "0.087")
    assert (cells["trun"], cells["learn"], cells["mfu"]) == ("8.6", "10000", "25.0")
    cells = dict(zip(names, two.split(), strict=True))
    assert (cells["KL"], cells["grad"], cells["mfu"]) == ("-", "-", "-")


@pytest.mark.parametrize("num_updates", [1, 999, 9999, 123_456])
def test_the_widest_line_has_80_columns(num_updates, tmp_path, capsys):
    shown = update_lines(tmp_path / "run", num_updates)
    worst = {
        **{key: -12345.678 for key in ROW if key.startswith("loss/")},
        "reward": -12.345,
        "reward/ex": 1.0,
        "reward/em": 1.0,
        "truncated_frac": 1.0,
        "malformed_frac": 1.0,
        "grad_norm": 1234567.0,
        "learn_flops": 1e30,
        "num_sampled": 9e14,
        "num_computed": 9e14,
    }
    shown.log.metrics({**EVALUATION, "eval_secs": 9e5})
    shown.add({**ROW, **worst, "update": num_updates})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_other_ranks_print_and_write_nothing(tmp_path, capsys):
    shown = update_lines(tmp_path / "run", is_main=False)
    shown.add({**ROW, "update": 1, "num_steps": 0})
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_a_warning_is_printed_once_and_kept_for_a_resumed_run(tmp_path, capsys):
    shown = update_lines(tmp_path / "run")
    shown.add({**ROW, "update": 1, "num_steps": 0})
    shown.add({**ROW, "update": 2, "num_steps": 0})
    assert capsys.readouterr().out.count("warning: no_step: update 1 took no") == 1
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["warning"] for row in rows] == ["no_step", None]
    assert all(row["rollout_tokens_per_sec"] and row["peak_flops"] == 2e9 for row in rows)
    size = (tmp_path / "run/metrics.jsonl").stat().st_size
    resumed = update_lines(tmp_path / "run", resume_at=(2, size))
    resumed.add({**ROW, "update": 3, "num_steps": 0})
    assert "warning" not in capsys.readouterr().out


def test_the_time_left_counts_the_evaluations_still_to_come():
    rows = [{"stage": "eval", "eval_secs": 30.0}]
    rows += [{"stage": "rl", "update": u, "wall_secs": 5.0} for u in range(1, 11)]
    assert secs_left(rows, 40, 20) == 30 * 5 + 30 * 2  # after 20 updates and after the last
    assert secs_left(rows, 40, 0) == 30 * 5 + 30
    assert secs_left(rows, 10, 20) == 30  # the last evaluation
    at_20 = [*rows, {"stage": "rl", "update": 20, "wall_secs": 5.0}]
    assert secs_left(at_20, 40, 20) == 20 * 5 + 30 * 2  # the one that is due now, and the last
    slower = [*rows, *({"stage": "rl", "update": 20, "wall_secs": 50.0} for _ in range(10))]
    assert secs_left(slower, 40, 0) == 20 * 50 + 30  # the newest updates count


def test_the_held_out_ex_is_the_mean_of_the_splits_in_the_newest_evaluation():
    rows = [{**EVALUATION, "dev_ex": 1.0}, EVALUATION, {"stage": "rl"}]
    assert held_out_ex(rows) == 0.4
    rows.append({"stage": "eval", "held_out_ex": 30.0, "dev_ex": 80.0})
    assert held_out_ex(rows) == 0.3  # the test data are shown, but not mixed in
    assert held_out_ex([{"stage": "rl"}]) is None


def test_sft_prints_the_first_step_the_last_one_and_some_between(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    log = RunLog(tmp_path / "run", Config())
    shown = StepLines(log, "sft", first=100, num_steps=130, meter=METER)
    for step in range(101, 131):
        now[0] += 1.0
        stats = {"loss": float(step), "grad_norm": 0.5, "num_computed": 640.0}
        shown.add(step, step, 3e-3, stats, [Sample([1], [2] * 64, [1] * 64)])
    header, *out = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "lr", "grad", "tokens/s", "left"]
    cells = [line.split() for line in out]
    assert [row[0] for row in cells] == ["101/130", "111/130", "121/130", "130/130"]
    assert [row[1] for row in cells] == ["101.0", "106.5", "116.5", "126.0"]  # means since the last
    assert cells[0][2:] == ["3.0e-3", "0.500", "640", "-"] and cells[1][-1] == "0:19"
    assert log.rows[0]["num_tokens"] == 64 and log.rows[0]["peak_flops"] == 2e9
    assert log.rows[0]["lr"] == 3e-3 and log.rows[0]["tokens_per_sec"] > 0


def test_the_first_line_has_what_the_user_changed(capsys):
    config = train_rl.Config(num_updates=3, optim=train_rl.OptimConfig(lr=1e-4, schedule="cosine"))
    announce(config.completed(), Ranks())
    announce(train_rl.Config().completed(), Ranks())
    announce(train_sft.Config(run="there").completed(), Ranks())
    announce(config, Ranks(1, 2))
    longer = train_rl.Config(num_updates=9, schedule_updates=7)
    announce(longer.completed(), Ranks())
    assert capsys.readouterr().out.splitlines() == [
        "run runs/rl; you changed: num_updates=3, optim.lr=0.0001",
        "run runs/rl with default settings",
        "run there with default settings",
        "run runs/rl; you changed: num_updates=9, schedule_updates=7",
        "optim.schedule=cosine ends after 7 updates: then the rate stays what it ends at",
    ]


def test_a_gpu_s_run_says_which_attention_runs(monkeypatch, capsys):
    path = AttentionPath("flash", "flash", "flash-attn 2.8.3")
    monkeypatch.setattr(lines, "main_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(lines, "path_for", lambda device, dtype: path)
    config = train_rl.Config(model=ModelConfig(dtype="bfloat16")).completed()
    announce(config, Ranks())
    announce(config, Ranks(1, 2))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "attention: flash-attn 2.8.3 (bfloat16, blocks of 256 tokens)"


def test_a_resumed_run_says_where_it_goes_on_or_that_it_is_finished(tmp_path, capsys):
    run = tmp_path / "run"
    config = replace(train_rl.Config(run=str(run)).completed(), num_updates=8)
    run.mkdir()
    save_config(config, run / "config.yaml")
    again = replace(config, resume=str(run))

    def said(config, begun):
        announce(config, Ranks(), begun)
        return " ".join(capsys.readouterr().out.split()).removeprefix(f"run {run} ")

    at = {update: Checkpoint(run, {"update": update}, {}) for update in (0, 5, 8)}
    assert said(again, at[5]) == "continues after 5 updates"
    changed = replace(again, eval_every=3)
    assert said(changed, at[5]) == "continues after 5 updates; you changed: eval_every=3"
    assert said(again, at[0]) == said(again, None) == "starts from its beginning"
    assert said(again, at[8]) == "is finished: nothing is left to train"


def test_changes_and_lists_are_aligned():
    assert change("EM", 81.7, 74.0) == "EM 81.7 -> 74.0 (-7.7)"
    assert change("EX", 41.3, 52.3) == "EX 41.3 -> 52.3 (+11.0)"
    assert listed({"took": "1", "best checkpoint": "2"}) == "took             1\nbest checkpoint  2"
    assert listed({"a": "b " * 50}).split("\n")[1].startswith("   b b")
    assert listed({"next": "b " * 50}) == "next  " + "b " * 50


def test_a_next_command_uses_the_same_data_and_memory():
    assert same_flags(train_rl.Config()) == ""
    data = DataConfig(train="t.csv", dev="my dev.csv", databases="dbs")
    engine = replace(train_rl.Config().engine, block_size=256)
    config = train_rl.Config(num_updates=3, data=data, engine=engine)
    flags = same_flags(config, without=("data.train",))
    assert flags == " --data.dev 'my dev.csv' --data.databases dbs --engine.block_size 256"


def test_stage_2_goes_on_by_the_recipe_that_begins_with_the_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert stage_2(train_sft.Config(), ROOT / "configs") == (
        "python train_rl.py --model.path runs/sft/model"
    )
    words = ["--config", "configs/sft_cosql_qwen3_4b_no_exec.yaml"]
    config = parse_config(train_sft.Config, [*words, "--data.hold_out", "3"], "")
    command = "python train_rl.py --config configs/rl_cosql_qwen3_4b_no_exec.yaml"
    assert stage_2(config, ROOT / "configs") == f"{command} --data.hold_out 3.0"
    mine = stage_2(replace(config, run="runs/mine"), ROOT / "configs")
    assert mine.startswith("python train_rl.py --model.path runs/mine/model --data.train data/")
    assert mine.endswith(
        "  # and a recipe: the defaults are for the embedded model (docs/recipes.md)"
    )


def test_a_duration_has_no_zeros_in_front(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(lines.time, "time", lambda: now[0])
    process = SimpleNamespace(create_time=lambda: 1000.0)
    monkeypatch.setattr(lines.psutil, "Process", lambda: process)
    texts = []
    for now[0] in (1020.0, 1090.0, 4660.0):
        texts.append(took(Config()))
    assert texts == ["20 s", "1 min 30 s", "1 h 1 min"]


def test_a_larger_model_with_the_embedded_models_rate_is_warned_of(tmp_path):
    for width in (192, 2048):
        folder = tmp_path / str(width)
        folder.mkdir()
        LlamaConfig(hidden_size=width, num_attention_heads=8).save_pretrained(folder)
    models = {width: ModelConfig(path=str(tmp_path / str(width))) for width in (192, 2048)}
    for usual, key in ((train_rl.Config(), "optim.lr"), (train_sft.Config(), "sft.optim.lr")):
        assert embedded_rate(usual) is None
        assert embedded_rate(replace(usual, model=models[192])) is None
        warned = embedded_rate(replace(usual, model=models[2048]))
        assert warned is not None and warned.startswith(f"warning: {key} is 0.00")
        adapted = replace(models[2048], lora=AdapterConfig(rank=8))
        assert embedded_rate(replace(usual, model=adapted)) is None
    slower = replace(train_rl.Config(), model=models[2048], optim=OptimConfig(lr=1e-6))
    assert embedded_rate(slower) is None
