"""The audit finds each check's and each attack's case in a data set that has one of each."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from helpers.databases import make_database
from mtsql.audit import checks
from mtsql.audit.checks import audit
from mtsql.audit.config import Config
from mtsql.audit.report import ATTACKS, CHECKS, Attack, Case, Report, leave_out_lines, show
from mtsql.audit.rewritings import REWRITINGS
from mtsql.commands.audit import look
from mtsql.rl.rewards import RewardConfig
from mtsql.sql.datasets import DataConfig, load_split
from mtsql.sql.sandbox import clear_result_cache
from mtsql.sql.worker_pool import set_num_workers

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


TABLE = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER);
INSERT INTO singer VALUES
    (1, 'Ann', 'USA', 30), (2, 'Bob', 'Peru', 25), (3, 'Cid', 'USA', 25);
"""
ENTRY = {
    "db_id": "shows",
    "table_names_original": ["singer"],
    "primary_keys": [1],
    "foreign_keys": [],
    "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [0, "country"], [0, "age"]],
    "column_types": ["text", "number", "text", "text", "number"],
}


@pytest.fixture
def files(tmp_path: Path) -> DataConfig:
    """The dialogues above as official files."""
    (tmp_path / "shows").mkdir()
    make_database(tmp_path / "shows" / "shows.sqlite", TABLE)
    dialogues = []
    for turns in DIALOGUES:
        interaction = [{"utterance": question, "query": sql} for question, sql in turns]
        dialogues.append({"database_id": "shows", "interaction": interaction})
    train = tmp_path / "train.json"
    tables = tmp_path / "tables.json"
    train.write_text(json.dumps(dialogues))
    tables.write_text(json.dumps([ENTRY]))
    return DataConfig(train=str(train), dev=str(train), tables=str(tables), databases=str(tmp_path))


def test_every_check_finds_its_case(files: DataConfig) -> None:
    report = audit(load_split(files, "train"), Config(data=files))
    found = {check: sorted(case.turn_id for case in cases) for check, cases in report.cases.items()}
    assert found == {
        "gold fails": ["train:2:0"],
        "gold unpaid ex": ["train:2:0"],
        "gold unpaid em": ["train:4:1", "train:6:0"],
        "gold empty": ["train:2:1"],
        # A tie at LIMIT, and a random number.
        "gold undetermined": ["train:1:2", "train:4:1"],
        "gold order tied": ["train:3:0"],
        "gold unguarded": [],
        "gold untellable": ["train:4:0", "train:6:1"],
        "duplicate": ["train:1:0", "train:5:0", "train:5:1"],
        "prompt over budget": [],
        "farmable": [],
    }


def test_a_case_says_what_was_found(files: DataConfig) -> None:
    cases = audit(load_split(files, "train"), Config(data=files)).cases
    assert cases["gold fails"][0].detail == "error: no such column: missing"
    reason = "ex and em: the gold fails: error: no such column: missing"
    assert cases["gold unpaid ex"][0].detail == reason
    assert all("outside of the grammar" in case.detail for case in cases["gold unpaid em"])
    assert {case.detail for case in cases["duplicate"]} == {"of train:0:0", "of train:0:1"}


def test_prompts_over_the_budget_are_listed_with_the_longest_first(files: DataConfig) -> None:
    corpus = load_split(files, "train")
    report = audit(corpus, Config(data=files, max_prompt_tokens=1))
    over = report.cases["prompt over budget"]
    assert len(over) == report.num_turns == NUM_TURNS
    tokens = [case.badness for case in over]
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) > 5
    assert report.longest_prompt == (tokens[0], over[0].turn_id)
    budget = int(tokens[4])
    fewer = audit(corpus, Config(data=files, max_prompt_tokens=budget)).cases["prompt over budget"]
    assert [case.badness for case in fewer] == [num for num in tokens if num > budget] != []


def test_every_attack_is_paid_only_without_the_guard(files: DataConfig) -> None:
    corpus = load_split(files, "train")
    config = Config(data=files)
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
    unguarded = audit(corpus, replace(config, reward=RewardConfig(guard=False)))
    for attack in unguarded.attacks.values():
        assert attack.num_paid == attack.num_paid_unguarded > 0
    farmable = {case.turn_id for case in unguarded.cases["farmable"]}
    assert {"train:0:2", "train:2:1", "train:3:1"} <= farmable


@pytest.mark.parametrize(
    ("scores", "check", "words"),
    [
        ((0.0, 1.0), "gold unpaid ex", "ex: the gold runs and returns 3 rows, but the reward"),
        ((0.0, 0.0), "gold unpaid ex", "ex and em: the gold runs"),
        ((1.0, 0.0), "gold unpaid em", "em: the official comparison finds a difference"),
    ],
)
def test_a_gold_that_the_reward_refuses_is_listed_with_the_reason(
    files: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
    scores: tuple[float, float],
    check: str,
    words: str,
) -> None:
    monkeypatch.setattr(checks, "answer_scores", lambda *_: scores)
    cases = audit(load_split(files, "train"), Config(data=files)).cases[check]
    details = {case.turn_id: case.detail for case in cases}
    assert details["train:0:0"].startswith(words)


def test_a_gold_without_ex_is_left_out_and_one_without_em_is_not() -> None:
    assert "gold unpaid ex" in Config().leave_out
    assert "gold unpaid em" not in Config().leave_out


def test_the_number_of_workers_changes_no_finding(files: DataConfig) -> None:
    corpus = load_split(files, "train")
    reports = []
    for num_workers in (1, 3):
        set_num_workers(num_workers)
        clear_result_cache()
        report = audit(corpus, Config(data=files, max_prompt_tokens=1, rewritings=True))
        reports.append(replace(report, secs=0.0))
    set_num_workers(0)
    assert reports[0] == reports[1]


def test_rewritings_of_gold_queries_are_tried_and_counted(
    files: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    look(Config(data=files, run=str(tmp_path / "run"), rewritings=True))
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in REWRITINGS)
    written = json.loads((tmp_path / "run" / "audit.json").read_text())
    tallies = written["rewritings"]
    # Not for the gold that fails, and not for the two whose rows depend on how they are stored.
    assert tallies["names in `quotes`"]["num_turns"] == NUM_TURNS - 3
    assert tallies["IN for ="]["num_turns"] == 2
    assert tallies["join order"]["num_turns"] == 0
    assert all(tally["num_set_aside"] == 0 for tally in tallies.values())
    num_unpaid = sum(tally["num_turns"] - tally["num_paid_ex"] for tally in tallies.values())
    assert len(written["unpaid_rewritings"]) == num_unpaid
    assert all(tally["num_unpaid_telling"] == 0 for tally in tallies.values())


def test_a_rewriting_with_other_rows_is_set_aside_and_not_tried(
    files: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {
        "IN for =": f"{NAMES} WHERE age > 25",
        "join order": "SELECT nonsense",
        "AND reordered": f"{NAMES} ORDER BY name DESC",
    }

    def rewritings_of(sql: str, _: object) -> dict[str, str]:
        return others if sql == NAMES else {}

    monkeypatch.setattr(checks, "rewritings_of", rewritings_of)
    report = audit(load_split(files, "train"), Config(data=files, rewritings=True))
    assert report.rewritings["IN for ="].num_set_aside == 3  # NAMES is the gold of three turns
    assert report.rewritings["IN for ="].num_turns == 0
    assert report.rewritings["AND reordered"].num_turns == 3  # the gold has no order
    details = {case.detail for case in report.rewritings_set_aside}
    assert f"IN for =: 1 rows, not the gold's 3: {NAMES} WHERE age > 25" in details
    assert any("no such column: nonsense" in detail for detail in details)


def test_training_reads_the_file_of_turns_to_leave_out(
    files: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(data=files, run=str(tmp_path / "run"), leave_out=("gold fails", "duplicate"))
    look(config)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*CHECKS, *ATTACKS))
    written = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert written["num_turns"] == NUM_TURNS
    assert len(written["cases"]["duplicate"]) == 3
    assert written["prompt_tokens"].startswith("estimated")
    file = tmp_path / "run" / "leave_out.tsv"
    lines = file.read_text().splitlines()
    assert lines[0] == "train:2:0\tgold fails: error: no such column: missing"
    assert len(lines) == 4
    rest = load_split(replace(files, leave_out=str(file)), "train")
    assert len(rest.turns) == NUM_TURNS - 4
    assert "train:2:0" not in {turn.turn_id for turn in rest.turns}
    with pytest.raises(ValueError, match="already holds an audit"):
        look(config)


def test_a_turn_is_left_out_once_for_its_first_reason(files: DataConfig) -> None:
    report = audit(load_split(files, "train"), Config(data=files, max_prompt_tokens=1))
    lines = leave_out_lines(report, ("duplicate", "prompt over budget"))
    assert len(lines) == NUM_TURNS == len({line.split("\t")[0] for line in lines})
    assert "train:1:0\tduplicate: of train:0:0" in lines


def test_a_tokenizer_counts_the_prompts(files: DataConfig, tmp_path: Path) -> None:
    from mtsql.agent.protocol import TAGS
    from mtsql.model.tokenizer import train_tokenizer

    folder = tmp_path / "tokenizer"
    train_tokenizer(["who is there SELECT name FROM singer"] * 20, 400, TAGS).save_pretrained(
        folder
    )
    corpus = load_split(files, "train")
    counted = audit(corpus, Config(data=files, tokenizer=str(folder), max_prompt_tokens=1))
    estimated = audit(corpus, Config(data=files, max_prompt_tokens=1))
    assert counted.prompt_tokens.startswith("counted by")
    tokens = [
        [case.badness for case in report.cases["prompt over budget"]]
        for report in (counted, estimated)
    ]
    assert tokens[0] != tokens[1]
    assert min(map(min, tokens)) > 50


def test_an_unknown_check_is_named() -> None:
    with pytest.raises(ValueError, match="leave_out: no check 'nonsense'; there are gold fails"):
        Config(leave_out=("nonsense",))


def test_what_a_check_means_is_printed_if_a_turn_fails_it() -> None:
    report = Report(num_turns=1)
    report.cases["duplicate"].append(Case("train:0:0", "shows", "of train:1:0", "SELECT 1"))
    out = StringIO()
    show(report, "train", False, Console(file=out, width=200))
    meanings = [
        name for name, meaning in CHECKS.items() if f"{name}: {meaning}\n" in out.getvalue()
    ]
    assert meanings == ["duplicate"]
