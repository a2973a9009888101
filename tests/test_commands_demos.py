"""mtsql demos: the file that it writes, what it prints, and wrong flags."""

import pytest

from helpers.databases import make_database
from helpers.demos import MUSIC
from mtsql.__main__ import main
from mtsql.rl.replay import read_demonstrations


def test_it_writes_the_demonstrations_and_prints_what_was_made(tmp_path, capsys):
    make_database(tmp_path / "music.sqlite", MUSIC)
    rows = [
        "db_id,question,sql,dialogue",
        "music,who is there ?,SELECT name FROM singer,1",
        "music,who of them is 99 ?,SELECT name FROM singer WHERE age = 99,1",
    ]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    data = [f"--data.train={tmp_path}/train.csv", f"--data.dev={tmp_path}/train.csv"]
    words = ["demos", *data, f"--data.databases={tmp_path}", f"--run={tmp_path}/run"]
    shares = ["--gold.column=0", "--gold.literal=0", "--gold.dropped=0", "--gold.join=0"]
    main([*words, *shares, "--gold.aggregate=0", "--gold.kept=0", "--gold.look_up=0"])
    file = tmp_path / "run/demonstrations.jsonl"
    assert capsys.readouterr().out.splitlines() == [
        "1 of 2 turns have a demonstration",
        "  1 begin with the gold query",
        "  1 left out: the gold query finds nothing",
        f"written to {file}",
    ]
    assert list(read_demonstrations(file)) == ["train:0:0"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert "already holds demonstrations.jsonl: name another folder" in str(stop.value.code)


def test_databases_that_a_training_holds_out_have_no_demonstrations(tmp_path, capsys):
    for name in ("music", "songs"):
        make_database(tmp_path / f"{name}.sqlite", MUSIC)
    rows = [f"{name},who is there ?,SELECT name FROM singer" for name in ("music", "songs")]
    (tmp_path / "train.csv").write_text("\n".join(["db_id,question,sql", *rows]))
    data = [f"--data.train={tmp_path}/train.csv", f"--data.dev={tmp_path}/train.csv"]
    main(["demos", *data, f"--data.databases={tmp_path}", "--data.hold_out=1", f"--run={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: left out 1 turns (1 held out)"
    assert lines[1] == "1 of 1 turns have a demonstration"


def test_a_wrong_share_ends_it_with_one_line():
    with pytest.raises(SystemExit) as stop:
        main(["demos", "--gold.kept=2"])
    assert "gold.kept is 2.0: it must be between 0 and 1" in str(stop.value.code)
