"""The command mtsql compare: its tables, its files, and the line that a wrong word ends it with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtsql.__main__ import main


def scores(verdicts: str, start: int = 0) -> dict:
    """One part with a turn for each letter: r is right in execution, w is wrong."""
    turns = []
    for place, verdict in enumerate(verdicts, start):
        ids = {"turn_id": f"dev:{place}:0", "dialogue_id": f"dev:{place}", "turn": "1"}
        answer = {"prediction": f"SELECT\t{verdict}", "ex": verdict == "r", "em": False}
        turns.append({**ids, "hardness": "easy", **answer})
    return {"data": "cosql dev", "split": "dev", "history": "gold", "turns": turns}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, part in (("a", scores("wwwwwwwwrr")), ("b", scores("rrrrrrwwwr", start=1))):
        (tmp_path / name).mkdir()
        predicted = {**part, "history": "predicted", "turns": scores("r" * 9)["turns"]}
        content = {"is_complete": name == "a", "results": [part, predicted][: 2 - (name == "b")]}
        (tmp_path / name / "scores.json").write_text(json.dumps(content))
    return tmp_path


def test_tables_are_printed_and_files_written(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["compare", "a", "b", "--out", "out"])
    text = capsys.readouterr().out
    assert text.startswith("# A: a, B: b\n")
    written = (folder / "out" / "compare.md").read_text()
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if line.startswith("all ")]
    assert [row[:4] for row in rows] == [["all", "9", "22.2", "66.7"], ["all", "9", "0.0", "0.0"]]
    assert "Note: B is not finished; only A has cosql dev, predicted history." in written
    assert "9 turns of 9 dialogues are in both." in written
    assert "Only A has 1 turns, which are left out: dev:0:0." in written
    line, _ = [line for line in written.splitlines() if line.startswith("| all ")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:5] == ["9", "22.2", "66.7"] and cells[5].startswith("+44.4 (")
    assert cells[6:9] == ["6", "2", "0.289"]
    found = json.loads((folder / "out" / "compare.json").read_text())
    assert found["runs"] == ["a", "b"] and found["seed"] == 0
    [part] = found["results"]
    assert part["groups"][0]["mended"] == 6 and part["broken"] == ["dev:8:0", "dev:9:0"]
    changed = [line.split("\t") for line in (folder / "out/changed.tsv").read_text().splitlines()]
    assert len(changed) == 1 + 6 + 2 + 1 + 1
    assert changed[1] == ["cosql dev", "gold", "mended", "dev:1:0", "SELECT w", "SELECT r"]
    assert changed[-1] == ["cosql dev", "gold", "only_b", "dev:10:0", "", ""]


def test_the_same_evaluations_give_the_same_text(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    main(["compare", "a", "b"])
    first = capsys.readouterr().out
    main(["compare", "--runs", "a", "b"])
    assert capsys.readouterr().out == first


def test_two_histories_of_an_evaluation(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["compare", "a", "a/scores.json", "--histories", "gold", "predicted"])
    assert "## cosql dev (dev), gold against predicted history" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("", "compare needs two evaluations, A and B; found 0"),
        ("a b a", "compare needs two evaluations, A and B; found 3"),
        ("a nowhere", "nowhere: cannot be read"),
        ("a b --out a/scores.json", "a/scores.json"),
        ("a b --out done", "--out done: it holds a comparison"),
        ("a b --num_resamples 10", "num_resamples must be at least 100, not 10"),
        ("a ./a", "A and B are the same evaluation: name two of them"),
        ("a a --histories gold gold", "A and B are the same evaluation"),
        ("a b --seed -1", "seed must not be negative, found -1"),
        ("a b --histories gold", "histories: expected two, found 1"),
        ("a b --histories gold predicted", "b/scores.json: results[0]: no part has predicted"),
    ],
)
def test_wrong_words_are_named(
    folder: Path, capsys: pytest.CaptureFixture, words: str, error: str
) -> None:
    (folder / "done").mkdir()
    (folder / "done" / "compare.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words.split()])
    assert error in stop.value.code and capsys.readouterr().out == ""


def test_it_imports_no_torch() -> None:
    code = """
import sys
import mtsql.commands.compare
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
