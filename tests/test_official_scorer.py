"""Official files -> official tables, on a tiny database; figures worked out by hand."""

import json
import sqlite3
from pathlib import Path

import pytest

from mtsql.judge.exact_match import PARTS, Part
from mtsql.judge.official_scorer import (
    Figures,
    PartFigures,
    Score,
    ScorerConfig,
    aggregate,
    format_report,
    main,
    plugged,
    read_gold,
    read_predictions,
    score_files,
)

ENTRY = {
    "db_id": "shows",
    "table_names_original": ["singer"],
    "column_names_original": [[-1, "*"], [0, "name"], [0, "age"]],
    "column_types": ["text", "text", "number"],
    "primary_keys": [],
    "foreign_keys": [],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tables.json").write_text(json.dumps([ENTRY, ENTRY | {"db_id": "gone"}]))
    add_database(tmp_path, "shows", "('Ann', 30), ('Bob', 40)")
    return tmp_path


def add_database(folder: Path, name: str, values: str) -> None:
    (folder / "shows").mkdir(exist_ok=True)
    connection = sqlite3.connect(folder / "shows" / f"{name}.sqlite")
    connection.executescript(
        f"CREATE TABLE singer (name TEXT, age INT); INSERT INTO singer VALUES {values};"
    )
    connection.close()


def score(folder: Path, golds: list[str], preds: list[str], db_id: str = "shows", **options):
    """A blank text ends an interaction."""
    (folder / "gold.txt").write_text("\n".join(f"{sql}\t{db_id}" if sql else "" for sql in golds))
    (folder / "pred.txt").write_text("\n".join(preds))
    names = (folder / name for name in ("gold.txt", "pred.txt", "tables.json"))
    return score_files(*names, [folder], ScorerConfig(**options))


NAMES, AGES = "SELECT name FROM singer", "SELECT age FROM singer ORDER BY age"
RICH = "SELECT name FROM singer WHERE age > 35 ORDER BY age LIMIT 1"


def test_tables_of_a_small_file(folder):
    golds = [NAMES, AGES, RICH, "", NAMES, NAMES, "", RICH]
    preds = [
        NAMES,
        AGES,
        NAMES,
        "",
        NAMES,
        "SELECT name , age FROM singer",
        "",
        RICH.replace("35", "39"),
    ]
    report = score(folder, golds, preds)
    summary = report.summary
    assert summary.by_hardness == {
        "easy": Figures(4, 0.75, 0.75),
        "medium": Figures(0, 0.0, 0.0),
        "hard": Figures(2, 0.5, 0.5),
        "extra": Figures(0, 0.0, 0.0),
        "all": Figures(6, 4 / 6, 4 / 6),
    }
    assert summary.by_turn == {
        "1": Figures(3, 1.0, 1.0),
        "2": Figures(2, 0.5, 0.5),
        "3": Figures(1, 0.0, 0.0),
        "4": Figures(0, 0.0, 0.0),
        "> 4": Figures(0, 0.0, 0.0),
    }
    assert summary.interactions == Figures(3, 1 / 3, 1 / 3)
    assert (summary.question_match, summary.interaction_match) == (4 / 6, 1 / 3)
    # WHERE: two golds have it, one of them is met; the one prediction that has it is right.
    where = summary.parts["all"]["where"]
    assert (where.accuracy, where.recall, where.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert summary.parts["all"]["IUEN"] == PartFigures(0.0, 0.0, 1.0)  # quirk
    assert summary.parts["medium"]["select"] == PartFigures(0.0, 0.0, 0.0)
    assert report.gold_errors == ()
    text = format_report(report)
    assert text.splitlines()[1].split() == ["count", "4", "0", "2", "0", "6", "3"]
    assert text.splitlines()[3].split() == "execution 0.750 0.000 0.500 0.000 0.667 0.333".split()


def test_aggregate_without_files():
    parts = (Part(1, 1, 1),) * len(PARTS)
    scores = [Score("a", turn, "easy", em=turn != 6, ex=True, parts=parts) for turn in range(7)]
    scores.append(Score("b", 0, None, em=False, ex=False))
    summary = aggregate(scores, num_empty_interactions=2)
    assert summary.by_turn["> 4"] == Figures(3, 2 / 3, 1.0)
    assert summary.by_hardness["easy"].count == 7 and summary.by_hardness["all"].count == 8
    assert summary.interactions == Figures(4, 2 / 4, 3 / 4)
    assert aggregate([Score(1, 0, "easy", ex=True)]).by_hardness["all"] == Figures(1, None, 1.0)
    assert aggregate([]).interactions == Figures(0, 0.0, 0.0)


def test_reading(folder):
    (folder / "g").write_text("\n SELECT 1\tshows \n\n\nSELECT 2\tshows\textra\n\n")
    assert [
        [(gold.line, gold.sql, gold.db_id) for gold in turns] for turns in read_gold(folder / "g")
    ] == [
        [],
        [(2, "SELECT 1", "shows")],
        [],
        [(5, "SELECT 2", "shows")],
    ]
    assert read_predictions(folder / "g") == [[], ["SELECT 1"], [], ["SELECT 2"]]


def test_an_empty_interaction_is_fully_right(folder):
    summary = score(folder, [NAMES, "", "", NAMES], ["x", "", "", "x"]).summary
    assert summary.interactions == Figures(3, 1 / 3, 1 / 3)
    assert summary.by_hardness["all"] == Figures(2, 0.0, 0.0)


def test_bad_golds_are_listed_and_score_nothing(folder):
    golds = [
        "SELECT name FROM nowhere",
        "SELECT age FROM singer )",
        NAMES,
        NAMES + " WHERE name = 'value'",
    ]
    report = score(folder, golds, golds)
    assert [(error.gold.line, error.reason.split(":")[0]) for error in report.gold_errors] == [
        (1, "does not parse"),
        (2, "does not run on shows.sqlite"),
    ]
    verdicts = [(line.em, line.ex) for line in report.scores]
    assert verdicts == [(False, False), (True, False), (True, True), (True, True)]
    assert report.scores[0].hardness is None
    assert "gold error, line 2 (shows): does not run on shows.sqlite" in format_report(report)


def test_a_gold_that_says_value_cannot_be_met(folder):
    add_database(folder, "shows2", "('value', 30)")
    sql = "SELECT age FROM singer WHERE name = 'value'"
    (error,) = score(folder, [sql], [sql]).gold_errors
    assert error.reason.startswith("does not match itself")


def test_named_errors(folder):
    with pytest.raises(ValueError, match=r"gold.txt and .*pred.txt: 2 and 1 interactions"):
        score(folder, [NAMES, "", NAMES], [NAMES])
    with pytest.raises(
        ValueError, match=r"interaction 2 \(gold line 3\): 2 and 1 turns; --official-zip"
    ):
        score(folder, [NAMES, "", NAMES, NAMES], [NAMES, "", NAMES])
    with pytest.raises(ValueError, match=r"gold.txt:1: database 'lost' is not in .*tables.json"):
        score(folder, [NAMES], [NAMES], db_id="lost")
    with pytest.raises(ValueError, match=r"no gone.gone.sqlite"):
        score(folder, [NAMES], [NAMES], db_id="gone")
    with pytest.raises(ValueError, match="etype: expected match, exec or all, found 'both'"):
        score(folder, [NAMES], [NAMES], etype="both")
    (folder / "gold.txt").write_text("SELECT 1 shows")
    with pytest.raises(ValueError, match=r"gold.txt:1: expected SQL<TAB>database id"):
        read_gold(folder / "gold.txt")
    with pytest.raises(ValueError, match=r"none.txt: cannot be read"):
        read_predictions(folder / "none.txt")


def test_official_zip_drops_what_was_not_predicted(folder):
    summary = score(folder, [NAMES, AGES], [NAMES], is_official_zip=True).summary
    assert summary.by_hardness["all"] == Figures(1, 1.0, 1.0)


def test_etype(folder):
    assert score(folder, [NAMES], [NAMES], etype="exec").scores[0].em is None
    report = score(
        folder, [NAMES], [NAMES], db_id="gone", etype="match"
    )  # databases are not looked for
    assert report.summary.by_hardness["all"] == Figures(1, 1.0, None)
    assert "execution" not in format_report(report)


def test_every_database_of_the_folder_counts(folder):
    pred = "SELECT name FROM singer WHERE age < 50"
    assert score(folder, [NAMES], [pred]).scores[0].ex
    add_database(folder, "shows_test_suite", "('Cid', 60)")
    assert not score(folder, [NAMES], [pred]).scores[0].ex
    (folder / "shows" / "shows.sqlite-journal").write_text("no database")
    assert score(folder, [NAMES], [NAMES]).scores[0].ex


def test_switches(folder):
    ages, distinct = (
        "SELECT age FROM singer WHERE age > 35",
        "SELECT DISTINCT age FROM singer WHERE age > 0",
    )
    assert not score(folder, [ages], [ages.replace("35", "10")], compare_values=True).scores[0].em
    add_database(folder, "more", "('Ann', 50), ('Bob', 50)")
    assert score(folder, [distinct.replace("DISTINCT ", "")], [distinct]).scores[0].ex
    assert (
        not score(folder, [distinct.replace("DISTINCT ", "")], [distinct], keep_distinct=True)
        .scores[0]
        .ex
    )
    pred = "SELECT age FROM singer WHERE age > 1"
    assert not score(folder, [ages], [pred]).scores[0].ex
    assert score(folder, [ages], [pred], plug_value=True).scores[0].ex


def test_plugged():
    texts = list(
        plugged("SELECT T1.* FROM t WHERE A = 'Q' AND b > 3 AND c = d1", "x = 'L' AND y > -1.5")
    )
    assert texts == [
        f"select * from t where a = {one} and b > {two} and c = d1"
        for one in ("'L'", "-1.5")
        for two in ("'L'", "-1.5")
    ]
    assert list(plugged("SELECT A", "x = 1")) == ["select a"]
    assert list(plugged("SELECT A WHERE b = 1", "x")) == []


def test_command(folder, capsys):
    score(folder, [NAMES, AGES], [NAMES, NAMES])
    flags = {
        "--gold": "gold.txt",
        "--pred": "pred.txt",
        "--tables": "tables.json",
        "--json": "out.json",
    }
    flags["--databases"] = ""
    arguments = [word for flag, name in flags.items() for word in (flag, str(folder / name))]
    main(arguments)
    assert "exact match" in capsys.readouterr().out
    written = json.loads((folder / "out.json").read_text())
    assert written["summary"]["by_hardness"]["all"] == {"count": 2, "em": 0.5, "ex": 0.5}
    assert [line["em"] for line in written["scores"]] == [True, False]
    (folder / "pred.txt").write_text("")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "1 and 0 interactions" in capsys.readouterr().err


def test_official_dev_files_score_fully_against_themselves(shared, tmp_path):
    data = shared / "data"
    databases = [data / "database", data / "database_partial"]
    for name, num_turns, num_interactions in (("sparc", 1203, 422), ("cosql", 1007, 293)):
        gold = data / name / "dev_gold.txt"
        report = score_files(gold, gold, data / "tables.json", databases)
        assert report.summary.by_hardness["all"] == Figures(num_turns, 1.0, 1 - 1 / num_turns)
        assert report.summary.interactions.ex == pytest.approx(1 - 1 / num_interactions)
        assert len(report.gold_errors) == 1  # the one that does not run in the official data either
