"""Official files -> verdicts and tables, on a tiny database; figures worked out by hand."""

import json
from pathlib import Path

import pytest

from helpers.scoring import AGES, NAMES, OLDEST, add_database, make_scoring_folder, score
from mtsql.judge.aggregate import Figures, PartFigures
from mtsql.judge.official_files import read_predictions
from mtsql.judge.score_files import ScorerConfig, plugged, score_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_scoring_folder(tmp_path)


def test_a_small_file_has_the_figures_written_by_hand(folder: Path) -> None:
    golds = [NAMES, AGES, OLDEST, "", NAMES, NAMES, "", OLDEST]
    preds = [NAMES, AGES, NAMES, "", NAMES, "SELECT name , age FROM singer", ""]
    preds += [OLDEST.replace("35", "39")]
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
    # Two gold queries have WHERE, and one is matched; the only prediction with WHERE is right.
    where = summary.parts["all"]["where"]
    assert (where.accuracy, where.recall, where.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert summary.parts["all"]["IUEN"] == PartFigures(0.0, 0.0, 1.0)  # quirk
    assert summary.parts["medium"]["select"] == PartFigures(0.0, 0.0, 0.0)
    assert report.gold_errors == ()


def test_an_empty_interaction_counts_as_right(folder: Path) -> None:
    summary = score(folder, [NAMES, "", "", NAMES], ["x", "", "", "x"]).summary
    assert summary.interactions == Figures(3, 1 / 3, 1 / 3)
    assert summary.by_hardness["all"] == Figures(2, 0.0, 0.0)


def test_bad_gold_queries_are_listed_and_get_zero(folder: Path) -> None:
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


def test_a_gold_that_contains_value_and_does_not_match_itself_is_listed(folder: Path) -> None:
    add_database(folder, "shows2", "('value', 30)")
    sql = "SELECT age FROM singer WHERE name = 'value'"
    (error,) = score(folder, [sql], [sql]).gold_errors
    assert error.reason.startswith("does not match itself")


def test_errors_name_the_file_and_the_line(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"gold.txt and .*pred.txt: 2 and 1 interactions"):
        score(folder, [NAMES, "", NAMES], [NAMES])
    words = r"interaction 2 \(gold line 3\): 2 and 1 turns; --official-zip"
    with pytest.raises(ValueError, match=words):
        score(folder, [NAMES, "", NAMES, NAMES], [NAMES, "", NAMES])
    with pytest.raises(ValueError, match=r"gold.txt:1: database 'lost' is not in .*tables.json"):
        score(folder, [NAMES], [NAMES], db_id="lost")
    with pytest.raises(ValueError, match=r"gold.txt:1: .*no gone.gone.sqlite"):
        score(folder, [NAMES], [NAMES], db_id="gone")
    with pytest.raises(ValueError, match="etype: expected match, exec or all, found 'both'"):
        score(folder, [NAMES], [NAMES], etype="both")


def test_official_zip_drops_turns_without_a_prediction(folder: Path) -> None:
    summary = score(folder, [NAMES, AGES], [NAMES], is_official_zip=True).summary
    assert summary.by_hardness["all"] == Figures(1, 1.0, 1.0)


def test_etype_exec_computes_no_exact_match(folder: Path) -> None:
    assert score(folder, [NAMES], [NAMES], etype="exec").scores[0].em is None


def test_etype_match_looks_for_no_databases(folder: Path) -> None:
    report = score(folder, [NAMES], [NAMES], db_id="gone", etype="match")
    assert report.summary.by_hardness["all"] == Figures(1, 1.0, None)


def test_every_database_of_the_folder_must_agree(folder: Path) -> None:
    pred = "SELECT name FROM singer WHERE age < 50"
    assert score(folder, [NAMES], [pred]).scores[0].ex
    add_database(folder, "shows_test_suite", "('Cid', 60)")
    assert not score(folder, [NAMES], [pred]).scores[0].ex
    (folder / "shows" / "shows.sqlite-journal").write_text("no database")
    assert score(folder, [NAMES], [NAMES]).scores[0].ex


def test_compare_values_makes_exact_match_compare_literals(folder: Path) -> None:
    gold = "SELECT age FROM singer WHERE age > 35"
    pred = gold.replace("35", "10")
    assert score(folder, [gold], [pred]).scores[0].em
    assert not score(folder, [gold], [pred], compare_values=True).scores[0].em


def test_keep_distinct_executes_distinct(folder: Path) -> None:
    add_database(folder, "more", "('Ann', 50), ('Bob', 50)")
    gold = "SELECT age FROM singer WHERE age > 0"
    pred = gold.replace("age", "DISTINCT age", 1)
    assert score(folder, [gold], [pred]).scores[0].ex
    assert not score(folder, [gold], [pred], keep_distinct=True).scores[0].ex


def test_plug_value_tries_the_literals_of_the_gold(folder: Path) -> None:
    gold = "SELECT age FROM singer WHERE age > 35"
    pred = gold.replace("35", "1")
    assert not score(folder, [gold], [pred]).scores[0].ex
    assert score(folder, [gold], [pred], plug_value=True).scores[0].ex


def test_plugged_replaces_literals_in_every_combination() -> None:
    pred = "SELECT T1.* FROM t WHERE A = 'Q' AND b > 3 AND c = d1"
    assert list(plugged(pred, "x = 'L' AND y > -1.5")) == [
        "select * from t where a = 'L' and b > 'L' and c = d1",
        "select * from t where a = 'L' and b > -1.5 and c = d1",
        "select * from t where a = -1.5 and b > 'L' and c = d1",
        "select * from t where a = -1.5 and b > -1.5 and c = d1",
    ]


def test_plugged_gives_the_text_without_literals_and_nothing_without_gold_literals() -> None:
    assert list(plugged("SELECT A", "x = 1")) == ["select a"]
    assert list(plugged("SELECT A WHERE b = 1", "x")) == []


@pytest.mark.parametrize(
    ("name", "num_turns", "num_interactions"), [("sparc", 1203, 422), ("cosql", 1007, 293)]
)
def test_official_dev_files_match_themselves(
    shared: Path, name: str, num_turns: int, num_interactions: int
) -> None:
    data = shared / "data"
    gold = data / name / "dev_gold.txt"
    databases = [data / "database", data / "database_partial"]
    report = score_files(gold, gold, data / "tables.json", databases)
    assert report.summary.by_hardness["all"] == Figures(num_turns, 1.0, 1 - 1 / num_turns)
    assert report.summary.interactions.ex == pytest.approx(1 - 1 / num_interactions)
    assert len(report.gold_errors) == 1  # this gold does not run in the official data either


def test_predictions_of_bird_are_scored_by_its_rule(folder: Path) -> None:
    golds = [NAMES, "SELECT CASE WHEN age > 35 THEN 1 ELSE 0 END FROM singer", NAMES, "SELECT x"]
    (folder / "dev.sql").write_text("".join(f"{sql}\tshows\n" for sql in golds))
    preds = [f"{NAMES} UNION ALL {NAMES}", "SELECT age > 35 FROM singer", AGES, "SELECT x"]
    predictions: dict[str, object] = {}
    for number, sql in enumerate(preds):
        predictions[str(number)] = f"{sql}\t----- bird -----\tshows"
    predictions["2"] = 0  # no answer
    (folder / "pred.json").write_text(json.dumps(predictions))
    files = (folder / name for name in ("dev.sql", "pred.json", "tables.json"))
    report = score_files(*files, [folder], ScorerConfig(ex="set", etype="exec"))
    assert [score.ex for score in report.scores] == [True, True, False, False]
    assert [error.gold.line for error in report.gold_errors] == [4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "pred.json: expected an object"),
        ('{"0": "x", "2": "y"}', "pred.json: no prediction 1, but there are 2"),
    ],
)
def test_malformed_predictions_of_bird_are_named(folder: Path, content: str, words: str) -> None:
    (folder / "pred.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_predictions(folder / "pred.json")
