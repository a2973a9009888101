"""The farming table: what policies that understand nothing earn with the default reward and with
the paper's."""

import io
import json
import random
import re
from dataclasses import replace
from functools import cache

import pytest
from rich.console import Console

from mtsql.agent.env import EnvConfig
from mtsql.agent.reply import Answer, Verdict
from mtsql.audit.config import Config
from mtsql.audit.farming import (
    MAX_TERM,
    MAX_TOTAL,
    Earned,
    FarmingReport,
    _broken_rules,
    farm,
    show_farming,
)
from mtsql.audit.policies import POLICIES, Scene
from mtsql.commands.audit import look
from mtsql.rl.rewards import RewardConfig, RewardWeights, total_reward
from mtsql.sql.datasets import DataConfig, load_split
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Column, Database, Schema, Table
from mtsql.toyworld.world import WorldConfig, write_toy_world

DEFAULT = RewardConfig()
PAPER = RewardConfig(process_after="any", proposals="all")
TERMS = ("ex", "em", "propose", "exec_verify", "memory_verify")
NUM_TURNS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("farming") / "world"
    size = WorldConfig(num_train_databases=4, num_dev_databases=1, train_dialogues=6)
    write_toy_world(folder, 0, size)
    names = {name: str(folder / f"{name}.json") for name in ("train", "dev", "tables")}
    return DataConfig(**names, databases=str(folder / "database"))


@pytest.fixture(scope="module")
def play(data):
    """Plays all policies and returns the report, once for each configuration."""
    corpus = load_split(data, "train")

    @cache
    def play(reward: RewardConfig = DEFAULT, **env) -> FarmingReport:
        limits = EnvConfig(num_sql_workers=1, **env)
        config = Config(data=data, reward=reward, env=limits, num_farming_turns=NUM_TURNS)
        return farm(corpus, config)

    return play


def test_no_blind_policy_breaks_a_rule_with_the_default_reward(play):
    report = play()
    assert report.broken == []
    assert report.num_turns == NUM_TURNS and 0 < report.num_follow_ups < NUM_TURNS
    for earned in report.earned.values():
        assert set(earned.means) == {*TERMS, "total"}
        terms = {term: earned.means[term] for term in TERMS}
        assert earned.means["total"] == pytest.approx(total_reward(terms, RewardWeights()))
        if earned.kind == "honest":
            assert earned.means["ex"] == earned.means["em"] == 1
            assert earned.means["propose"] == earned.means["exec_verify"] == 1
            # the share of the turns that have something to remember
            remembered = report.num_follow_ups / NUM_TURNS
            assert earned.means["memory_verify"] == pytest.approx(remembered)
        if earned.kind == "blind":
            assert earned.means["total"] <= MAX_TOTAL * report.honest["total"]
            assert all(earned.means[t] <= MAX_TERM * report.honest[t] for t in TERMS)


def test_blind_policies_earn_full_verdicts_with_the_papers_reward(play):
    report = play(PAPER)
    junk = report.earned["junk and no_pass"].means
    assert junk["ex"] == junk["em"] == junk["propose"] == 0
    assert junk["exec_verify"] == 1
    assert junk["memory_verify"] > report.honest["memory_verify"]
    broken = "\n".join(report.broken)
    assert "junk and no_pass: 100 % of the honest exec_verify" in broken
    assert re.search(r"^last SQL: \d+ % of the honest propose", broken, re.MULTILINE)
    # and looking a value up costs an honest policy a part of what it proposed
    means = {name: earned.means["propose"] for name, earned in report.earned.items()}
    assert means["looking: a column's values first"] < means["guessing: the answer after one call"]


def test_results_of_queries_cannot_be_farmed_even_after_any_end(play):
    report = play(replace(PAPER, weights=RewardWeights(result_columns=0.4, result_rows=0.4)))
    assert report.honest["result_columns"] > 0.5 and report.honest["result_rows"] > 0.5
    assert not any("result_" in line for line in report.broken)
    assert any("propose" in line for line in report.broken)
    for name in ("the whole table", "junk and no_pass", "SELECT 1, no call"):
        assert report.earned[name].means["result_rows"] < 0.1


def test_process_rewards_need_a_right_answer_with_the_default_reward(play):
    spared = play().earned["right calls, no answer"].means
    assert spared == dict.fromkeys((*TERMS, "total"), 0)
    assert play(PAPER).earned["right calls, no answer"].means["propose"] == 1


def test_a_call_of_an_unknown_tool_earns_nothing_even_with_the_papers_reward(play):
    unknown = "last SQL to a tool that is not offered"
    assert play(PAPER).earned[unknown].means["total"] == 0
    without = play(PAPER, tools=("exec_sql",))
    assert all(earned.means["memory_verify"] == 0 for earned in without.earned.values())
    assert not any("memory_verify" in line for line in without.broken)


def test_a_run_is_repeatable(play):
    assert play() == play.__wrapped__()


def test_the_table_is_readable_in_80_columns():
    terms = [*TERMS, "result_columns", "result_rows", "total"]
    report = FarmingReport(1, 0, honest=dict.fromkeys(terms, 1.0))
    report.earned = {name: Earned("blind", dict.fromkeys(terms, 0.25)) for name in POLICIES}
    file = io.StringIO()
    show_farming(report, "train", Console(file=file, width=80))
    printed = file.getvalue()
    assert printed.count("0.25") == len(terms) * len(POLICIES) and "…" not in printed


def test_a_broken_rule_is_named_with_its_policy():
    def earned(kind: str, *means: float) -> Earned:
        return Earned(kind, dict(zip(("ex", "exec_verify", "total"), means, strict=True)))

    report = FarmingReport(1, 0, honest={"ex": 0.8, "exec_verify": 1.0, "total": 0.9})
    report.earned = {
        "honest": earned("honest", 0.8, 1.0, 0.9),
        "knowing": earned("knowing", 0.8, 1.0, 0.9),
        "just below": earned("blind", 0.4, 0.5, 0.3),
        "a term": earned("blind", 0.48, 0.5, 0.3),
        "all": earned("blind", 0.0, 0.9, 0.4),
    }
    assert list(_broken_rules(report, RewardWeights())) == [
        "a term: 60 % of the honest ex; at most 50 % is allowed",
        "all: 90 % of the honest exec_verify; at most 50 % is allowed",
        "all: 44 % of the honest total; at most 33 % is allowed",
    ]
    report.honest["ex"] = -0.8
    report.earned["a penalty"] = earned("blind", -0.3, 0.0, 0.0)  # a smaller one is not farmed
    report.earned["a bonus"] = earned("blind", 0.1, 0.0, 0.0)
    assert not any(rule.startswith("a penalty") for rule in _broken_rules(report, RewardWeights()))
    assert any(rule.startswith("a bonus") for rule in _broken_rules(report, RewardWeights()))
    report.honest["ex"] = 0.8
    del report.earned["a penalty"], report.earned["a bonus"]
    without = RewardWeights(exec_verify=0)  # a term that no reward holds cannot be farmed
    assert len(list(_broken_rules(report, without))) == 2


def test_policies_play_what_they_say(data):
    corpus = load_split(data, "train")
    turn = next(turn for turn in corpus.turns if turn.history)
    scene = Scene(turn, corpus.databases[turn.db_id], EnvConfig())
    honest = POLICIES["correcting: after a query that failed"].play(scene)
    assert [reply.exec_verdict for reply in honest] == [None, Verdict.NO_PASS, Verdict.PASS, None]
    assert honest[-1].action == Answer(turn.sql) and honest[-1].memory_verdict is Verdict.PASS
    assert all(len(policy.play(scene)) <= EnvConfig().max_replies for policy in POLICIES.values())
    blind = [policy for policy in POLICIES.values() if policy.kind == "blind"]
    hidden = replace(scene, turn=replace(turn, sql="SELECT 'the gold'"))
    assert [policy.play(scene) for policy in blind] == [policy.play(hidden) for policy in blind]


def test_blind_policies_change_the_last_query_in_four_ways(tmp_path):
    columns = (Column("name", "text"), Column("age", "number"))
    schema = Schema("d", (Table("singer", columns),))
    last = 'SELECT name, age FROM singer WHERE age > 30 AND name != "x"'
    for sql, texts in {
        last: [
            'SELECT DISTINCT name, age FROM singer WHERE age > 30 AND name != "x"',
            'SELECT name, age FROM singer WHERE age > 30 AND name != "xx"',
            'SELECT age, name FROM singer WHERE age > 30 AND name != "x"',
            f"SELECT * FROM ({last})",
        ],
        "select distinct count(age) from singer where age < 9;": [
            "select count(age) from singer where age < 9;",
            "select distinct count(age) from singer where age < 10;",
            "select distinct count(age) from singer where age < 9",
            "SELECT * FROM (select distinct count(age) from singer where age < 9)",
        ],
    }.items():
        turn = Turn("train:0:1", 1, "d", "?", "SELECT 1", (("?", sql),))
        scene = Scene(turn, Database(schema, tmp_path / "none.sqlite"), EnvConfig())
        names = ("DISTINCT in or out", "another literal", "columns reversed", "wrapped")
        answers = [POLICIES[f"last SQL, {name}"].play(scene)[-1].action.sql for name in names]
        assert answers == texts


def test_the_command_prints_the_table_and_the_broken_rules(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    config = Config(data=data, farming=True, num_farming_turns=10, run=str(tmp_path / "default"))
    look(config)
    printed = capsys.readouterr().out
    assert all(name in printed for name in POLICIES)
    assert "No policy that understands nothing earns more than a third" in printed
    assert "understands nothing" in printed and "[bold]" not in printed
    assert not (tmp_path / "default" / "audit.json").exists()
    written = json.loads((tmp_path / "default" / "farming.json").read_text())
    assert written["num_turns"] == 10 and written["earned"].keys() == POLICIES.keys()
    with pytest.raises(ValueError, match="already holds an audit"):
        look(config)
    look(replace(config, reward=PAPER, run=str(tmp_path / "paper")))
    printed = " ".join(capsys.readouterr().out.split())
    assert "junk and no_pass: 100 % of the honest exec_verify; at most 50 %" in printed
    with pytest.raises(ValueError, match="num_farming_turns"):
        Config(num_farming_turns=-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparc", "cosql"])
def test_no_blind_policy_breaks_a_rule_on_real_data(shared, name):
    files = DataConfig(
        train=str(shared / "data" / name / "train.json"),
        dev=str(shared / "data" / name / "dev.json"),
        tables=str(shared / "data" / "tables.json"),
        databases=str(shared / "data" / "database"),
    )
    corpus = load_split(files, "train")
    corpus = replace(corpus, dialogues=random.Random(1).sample(corpus.dialogues, 200))
    assert farm(corpus, Config(data=files, num_farming_turns=200)).broken == []
