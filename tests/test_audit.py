"""The audit: each check and each attack on a data set that has one case of it."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mtsql.audit import golds
from mtsql.audit.__main__ import main
from mtsql.audit.attacks import attacks_on
from mtsql.audit.config import Config
from mtsql.audit.golds import audit
from mtsql.audit.report import ATTACKS, CHECKS, Attack, leave_out_lines
from mtsql.audit.rewritings import REWRITINGS
from mtsql.rl.rewards import RewardConfig
from mtsql.sql.datasets import DataConfig, load_split
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryResult, QueryStatus, clear_result_cache
from mtsql.sql.schema import Column, Schema, Table
from mtsql.sql.worker_pool import set_num_workers

ROOT = Path(__file__).resolve().parents[1]
NAMES = "SELECT name FROM singer"
DIALOGUES = [
    [
        ("who is there ?", NAMES),
        ("and from where ?", "SELECT country FROM singer"),
        ("only different", "SELECT DISTINCT country FROM singer"),
    ],
    [
        ("who is there ?", NAMES),
        ("how many ?", "SELECT count(*) FROM singer"),
        ("the youngest ?", f"{NAMES} ORDER BY age LIMIT 1"),
    ],
    [
        ("fails", "SELECT missing FROM singer"),
        ("from nowhere", f"{NAMES} WHERE country = 'nowhere'"),
    ],
    [
        ("by country", "SELECT name FROM singer ORDER BY country"),
        ("over 20 ?", f"{NAMES} WHERE age > 20"),
    ],
    [
        ("one", "SELECT count(*) FROM (SELECT * FROM singer LIMIT 1)"),
        ("chance", "SELECT max(random()) FROM singer"),
    ],
    [("who is there ?", NAMES), ("and from where ?", "SELECT country FROM singer")],
    [
        ("either ?", f"{NAMES} WHERE (country = 'USA' OR country = 'Peru')"),
        ("Ann ?", f"{NAMES} WHERE name = 'Ann'"),
    ],
]
NUM_TURNS = sum(map(len, DIALOGUES))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "shows").mkdir()
    with closing(sqlite3.connect(tmp_path / "shows" / "shows.sqlite")) as connection:
        connection.executescript(
            """
            CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER);
            INSERT INTO singer VALUES
                (1, 'Ann', 'USA', 30), (2, 'Bob', 'Peru', 25), (3, 'Cid', 'USA', 25);
            """
        )
    columns = ["id", "name", "country", "age"]
    entry = {
        "db_id": "shows",
        "table_names_original": ["singer"],
        "primary_keys": [1],
        "foreign_keys": [],
        "column_names_original": [[-1, "*"], *([0, name] for name in columns)],
        "column_types": ["text", "number", "text", "text", "number"],
    }
    dialogues = [
        {
            "database_id": "shows",
            "interaction": [{"utterance": q, "query": sql} for q, sql in turns],
        }
        for turns in DIALOGUES
    ]
    for name, content in (("train", dialogues), ("tables", [entry])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    train, tables = (str(tmp_path / f"{name}.json") for name in ("train", "tables"))
    return DataConfig(train=train, dev=train, tables=tables, databases=str(tmp_path))


def test_every_check_finds_its_case(files):
    report = audit(load_split(files, "train"), Config(data=files, max_prompt_tokens=1))
    found = {check: sorted(case.turn_id for case in cases) for check, cases in report.cases.items()}
    assert found["gold fails"] == ["train:2:0"]
    assert report.cases["gold fails"][0].detail == "error: no such column: missing"
    assert found["gold unpaid ex"] == ["train:2:0"]
    because = "ex and em: the gold fails: error: no such column: missing"
    assert report.cases["gold unpaid ex"][0].detail == because
    assert found["gold unpaid em"] == ["train:4:1", "train:6:0"]
    assert all("outside of the grammar" in case.detail for case in report.cases["gold unpaid em"])
    assert found["gold empty"] == ["train:2:1"]
    assert found["gold undetermined"] == ["train:1:2", "train:4:1"]  # a tie at LIMIT; chance
    assert found["gold order tied"] == ["train:3:0"]
    assert found["gold untellable"] == ["train:4:0", "train:6:1"]
    assert found["duplicate"] == ["train:1:0", "train:5:0", "train:5:1"]
    assert {case.detail for case in report.cases["duplicate"]} == {"of train:0:0", "of train:0:1"}
    assert found["farmable"] == []
    over = report.cases["prompt over budget"]
    assert len(over) == report.num_turns == NUM_TURNS
    tokens = [case.badness for case in over]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) > 5
    assert report.longest_prompt == (tokens[0], over[0].turn_id)
    budget = int(tokens[4])
    fewer = audit(load_split(files, "train"), Config(data=files, max_prompt_tokens=budget)).cases[
        "prompt over budget"
    ]
    assert [case.badness for case in fewer] == [n for n in tokens if n > budget] != []


def test_every_attack_is_paid_without_the_guard_only(files):
    corpus, config = load_split(files, "train"), Config(data=files)
    report = audit(corpus, config)
    assert report.attacks == {
        "SELECT 1": Attack(NUM_TURNS, 1, 0),
        "constant": Attack(5, 5, 0),
        "constant FROM": Attack(5, 5, 0),
        "no rows": Attack(1, 1, 0),
        "copied": Attack(9, 2, 0),
        "no filter": Attack(4, 2, 0),
        "values listed": Attack(10, 8, 0),
        "values between": Attack(10, 8, 0),
    }
    farmed = audit(corpus, replace(config, reward=RewardConfig(guard=False)))
    assert all(
        attack.num_paid == attack.num_paid_unguarded > 0 for attack in farmed.attacks.values()
    )
    assert {"train:0:2", "train:2:1", "train:3:1"} <= {
        case.turn_id for case in farmed.cases["farmable"]
    }


def test_a_filter_by_the_values_seen_is_no_attack_where_the_gold_filters_by_them():
    schema = Schema("d", (Table("t", (Column("name", "text"), Column("n", "number"))),))
    gold = QueryResult(QueryStatus.OK, (("x",), ("it's",), ("x",), (None,)))

    def attacks(sql: str) -> dict[str, str]:
        found = attacks_on(Turn("a:0:0", 0, "d", "?", sql), gold, schema)
        return {name: text for name, text in found if name.startswith("values")}

    assert attacks("SELECT name FROM t WHERE n > 3") == {
        "values listed": "SELECT name FROM t WHERE name IN ('x', 'it''s')",
        "values between": "SELECT name FROM t WHERE name BETWEEN 'it''s' AND 'x'",
    }
    assert attacks("SELECT a.name FROM t AS a") == attacks("SELECT name FROM t WHERE n > 3")
    for sql in ("SELECT name FROM t WHERE name = 'x'", "SELECT upper(name) FROM t", "SELECT 1"):
        assert attacks(sql) == {}


def test_a_gold_that_the_reward_refuses_is_listed_with_what_is_known(files, monkeypatch):
    corpus, config = load_split(files, "train"), Config(data=files)
    for scores, check, words in (
        ((0.0, 1.0), "gold unpaid ex", "ex: the gold runs and returns 3 rows, but the reward"),
        ((0.0, 0.0), "gold unpaid ex", "ex and em: the gold runs"),
        ((1.0, 0.0), "gold unpaid em", "em: the official comparison finds a difference"),
    ):
        monkeypatch.setattr(golds, "answer_scores", lambda *_, scores=scores: scores)
        cases = {case.turn_id: case.detail for case in audit(corpus, config).cases[check]}
        assert cases["train:0:0"].startswith(words)
    assert "gold unpaid ex" in Config().leave_out and "gold unpaid em" not in Config().leave_out


def test_any_number_of_threads_finds_the_same_in_the_same_order(files):
    corpus, reports = load_split(files, "train"), []
    for num_workers in (1, 3):
        set_num_workers(num_workers)
        clear_result_cache()
        report = audit(corpus, Config(data=files, max_prompt_tokens=1, rewritings=True))
        reports.append(replace(report, secs=0.0))
    set_num_workers(0)
    assert reports[0] == reports[1]


def test_rewritings_of_the_golds_are_tried_and_counted(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = Config(data=files, run=str(tmp_path / "run"), rewritings=True)
    main(config)
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in REWRITINGS)
    written = json.loads((tmp_path / "run" / "audit.json").read_text())
    tallies = written["rewritings"]
    # not for the gold that fails, and not for the two whose rows depend on how they are stored
    assert tallies["names in `quotes`"]["num_turns"] == NUM_TURNS - 3
    assert tallies["IN for ="]["num_turns"] == 2 and tallies["join order"]["num_turns"] == 0
    assert all(tally["num_set_aside"] == 0 for tally in tallies.values())
    unpaid = written["unpaid_rewritings"]
    num_unpaid = sum(tally["num_turns"] - tally["num_paid_ex"] for tally in tallies.values())
    assert len(unpaid) == num_unpaid
    assert all(tally["num_unpaid_telling"] == 0 for tally in tallies.values()), unpaid


def test_a_rewriting_with_other_rows_is_set_aside_and_not_tried(files, monkeypatch):
    others = {
        "IN for =": f"{NAMES} WHERE age > 25",
        "join order": "SELECT nonsense",
        "AND turned": f"{NAMES} ORDER BY name DESC",
    }
    monkeypatch.setattr(golds, "rewritings_of", lambda sql, schema: others if sql == NAMES else {})
    report = audit(load_split(files, "train"), Config(data=files, rewritings=True))
    assert report.rewritings["IN for ="].num_set_aside == 3  # it is the gold of three turns
    assert report.rewritings["IN for ="].num_turns == 0
    assert report.rewritings["AND turned"].num_turns == 3  # the gold has no order
    details = {case.detail for case in report.rewritings_set_aside}
    assert f"IN for =: 1 rows, not the gold's 3: {NAMES} WHERE age > 25" in details
    assert any("no such column: nonsense" in detail for detail in details)


def test_the_file_it_writes_is_one_that_training_reads(files, tmp_path, capsys):
    config = Config(data=files, run=str(tmp_path / "run"), leave_out=("gold fails", "duplicate"))
    main(config)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*CHECKS, *ATTACKS))
    written = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert written["num_turns"] == NUM_TURNS and len(written["cases"]["duplicate"]) == 3
    assert written["prompt_tokens"].startswith("estimated")
    lines = (tmp_path / "run" / "leave_out.tsv").read_text().splitlines()
    assert lines[0] == "train:2:0\tgold fails: error: no such column: missing" and len(lines) == 4
    rest = load_split(replace(files, leave_out=str(tmp_path / "run" / "leave_out.tsv")), "train")
    assert len(rest.turns) == NUM_TURNS - 4 and "train:2:0" not in {
        turn.turn_id for turn in rest.turns
    }
    with pytest.raises(ValueError, match="already holds an audit"):
        main(config)


def test_a_turn_is_left_out_once_for_its_first_reason(files):
    report = audit(load_split(files, "train"), Config(data=files, max_prompt_tokens=1))
    lines = leave_out_lines(report, ("duplicate", "prompt over budget"))
    assert len(lines) == NUM_TURNS == len({line.split("\t")[0] for line in lines})
    assert "train:1:0\tduplicate: of train:0:0" in lines


def test_a_real_tokenizer_counts_the_prompts(files, tmp_path):
    from mtsql.agent.protocol import TAGS
    from mtsql.model.tokenizer import train_tokenizer

    train_tokenizer(["who is there SELECT name FROM singer"] * 20, 400, TAGS).save_pretrained(
        tmp_path / "tok"
    )
    corpus = load_split(files, "train")
    report = audit(corpus, Config(data=files, tokenizer=str(tmp_path / "tok"), max_prompt_tokens=1))
    assert report.prompt_tokens.startswith("counted by")
    estimated = audit(corpus, Config(data=files, max_prompt_tokens=1))
    tokens = [[case.badness for case in r.cases["prompt over budget"]] for r in (report, estimated)]
    assert tokens[0] != tokens[1] and min(map(min, tokens)) > 50


def test_an_unknown_check_and_bad_flags_are_named(tmp_path):
    with pytest.raises(ValueError, match="leave_out: no check 'nonsense'; there are gold fails"):
        Config(leave_out=("nonsense",))
    for flags, words in ((["--nonsense", "3"], "nonsense"), (["--data.dev", "x"], "data.dev")):
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-m", "mtsql.audit", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert (
            done.returncode != 0
            and words in done.stderr.splitlines()[-1]
            and "Traceback" not in done.stderr
        )
