"""The command that prints the official tables."""

import json
from pathlib import Path

import pytest

from helpers.scoring import AGES, NAMES, OLDEST, make_scoring_folder, score
from mtsql.__main__ import main
from mtsql.judge.official_scorer import format_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_scoring_folder(tmp_path)


def test_the_report_of_a_small_file_has_the_expected_tables(folder: Path) -> None:
    golds = [NAMES, AGES, OLDEST, "", NAMES, NAMES, "", OLDEST]
    preds = [NAMES, AGES, NAMES, "", NAMES, "SELECT name , age FROM singer", ""]
    preds += [OLDEST.replace("35", "39")]
    lines = [line.split() for line in format_report(score(folder, golds, preds)).splitlines()]
    assert lines[:4] == [
        ["easy", "medium", "hard", "extra", "all", "joint_all"],
        ["count", "4", "0", "2", "0", "6", "3"],
        ["exact", "match", "0.750", "0.000", "0.500", "0.000", "0.667", "0.333"],
        ["execution", "0.750", "0.000", "0.500", "0.000", "0.667", "0.333"],
    ]
    assert lines[5] == ["partial", "accuracy", "easy", "medium", "hard", "extra", "all"]
    assert lines[-3:] == [
        ["count", "3", "2", "1", "0", "0"],
        ["exact", "match", "1.000", "0.500", "0.000", "0.000", "0.000"],
        ["execution", "1.000", "0.500", "0.000", "0.000", "0.000"],
    ]


def test_bad_gold_queries_are_printed_first(folder: Path) -> None:
    text = format_report(score(folder, ["SELECT age FROM singer )"], [NAMES]))
    assert text.startswith("gold error, line 1 (shows): does not run on shows.sqlite")


def test_a_verdict_that_was_not_computed_is_not_printed(folder: Path) -> None:
    text = format_report(score(folder, [NAMES], [NAMES], etype="match"))
    assert "exact match" in text
    assert "execution" not in text


def test_the_command_prints_the_tables_and_writes_the_verdicts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(folder, [NAMES, AGES], [NAMES, NAMES])
    arguments = ["score", "--databases", str(folder)]
    for flag, name in (
        ("--gold", "gold.txt"),
        ("--pred", "pred.txt"),
        ("--tables", "tables.json"),
        ("--json", "out.json"),
    ):
        arguments += [flag, str(folder / name)]
    main(arguments)
    assert "exact match" in capsys.readouterr().out
    written = json.loads((folder / "out.json").read_text())
    assert written["summary"]["by_hardness"]["all"] == {"count": 2, "em": 0.5, "ex": 0.5}
    assert [line["em"] for line in written["scores"]] == [True, False]
    (folder / "pred.txt").write_text("")
    with pytest.raises(SystemExit, match="1 and 0 interactions"):
        main(arguments)
