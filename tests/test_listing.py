"""mtsql runs: which runs it finds, how it ranks them, and what it does with damaged ones."""

import json
from pathlib import Path

import pytest
import yaml

from mtsql.__main__ import main
from mtsql.run.listing import find_runs, ranked
from mtsql.run.metrics_file import read_metrics

UPDATE = {"stage": "rl", "curriculum_stage": 0, "reward": 1.0, "wall_secs": 1800.0}


def write_run(folder: Path, rows: list[dict], **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def rl_run(folder: Path, ex: float, num_updates: int = 2, **config: object) -> Path:
    rows = [{"stage": "eval", "update": 0, "dev_ex": 10.0, "dev_em": 20.0}]
    rows += [UPDATE | {"update": n + 1, "reward": float(n)} for n in range(num_updates)]
    rows.append({"stage": "eval", "update": num_updates, "dev_ex": ex, "dev_em": 30.0})
    return write_run(folder, rows, run=str(folder), num_updates=2, **config)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rl_run(tmp_path / "runs/a", 40.0, seed=0, optim={"lr": 0.1, "warmup": 5})
    rl_run(tmp_path / "runs/b", 50.0, num_updates=1, seed=1, optim={"lr": 0.1, "warmup": 5})
    step = {"stage": "sft", "update": 1, "loss": 0.5, "wall_secs": 10.0}
    write_run(tmp_path / "runs/warm/x", [step], seed=3)
    folder = write_run(tmp_path / "runs/eval", [])
    part = {"data": "sparc dev", "split": "dev", "all": {"ex": 75.0, "em": 60.0}}
    results = [part | {"history": history} for history in ("gold", "predicted")]
    other = {"data": "cosql dev", "domain": "out-of-domain", "all": {"ex": 100.0, "em": 90.0}}
    results.append(part | {"history": "gold"} | other)
    (folder / "scores.json").write_text(json.dumps({"results": results}))
    write_run(tmp_path / "runs/a/checkpoints/update-00002", [step])  # part of a run
    return tmp_path


def test_runs_are_ranked_and_say_what_differs(runs, capsys):
    main(["runs", "runs"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "kind done time dev_ex dev_em cosql_dev_em run".split() or (
        lines[0].split()[:4] == ["kind", "done", "time", "dev_ex"]
    )
    found = [line.split() for line in lines[1:] if line.split()[-1] in ("a", "b", "eval", "warm/x")]
    assert [(row[0], row[-1]) for row in found] == [
        ("1", "eval"),
        ("2", "b"),
        ("3", "a"),
        ("-", "warm/x"),
    ]
    assert found[1][1:5] == ["rl", "1/2", "30:00", "50.0"] and found[0][4] == "75.0"
    assert lines[lines.index(next(x for x in lines if x.endswith("  b"))) + 1] == "      seed=1"
    assert max(map(len, lines)) <= 80 and "optim" not in " ".join(lines)


def test_any_key_ranks_also_the_lowest_first(runs, capsys):
    main(["runs", "runs", "--by", "reward", "--lowest"])
    lines = capsys.readouterr().out.splitlines()
    order = [line.split()[-1] for line in lines[1:] if not line.startswith("      ")]
    assert order == ["b", "a", "eval", "warm/x"]  # means of 0 and of 0, 1
    assert lines[0].split()[3] == "reward"


def test_the_scores_are_those_of_the_selected_model(runs):
    (runs / "runs/a/model").mkdir()
    (runs / "runs/a/model/selected.json").write_text('{"update": 0}')
    found = {run.name: run for run in find_runs(runs / "runs")[0]}
    assert found["a"].scores["dev_ex"] == 10.0 and found["b"].scores["dev_ex"] == 50.0
    assert found["eval"].scores == {
        "dev_ex": 75.0,
        "dev_em": 60.0,
        "dev_ex_predicted": 75.0,
        "dev_em_predicted": 60.0,
        "cosql_dev_ex": 100.0,
        "cosql_dev_em": 90.0,
    }
    assert [run.name for run in ranked(list(found.values()), "dev_ex", True)][:2] == ["a", "b"]


def test_the_table_as_csv_has_every_score_and_key(runs):
    main(["runs", "runs", "--csv", "out/runs.csv"])
    header, *rows = [line.split(",") for line in Path("out/runs.csv").read_text().splitlines()]
    assert {"dev_ex", "reward", "config:seed"} <= set(header) and len(rows) == 4
    assert dict(zip(header, rows[1], strict=True))["hours"] == "0.5"


def test_a_damaged_run_is_named_and_the_others_are_listed(runs, capsys):
    with (runs / "runs/a/metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "upd')
    (runs / "runs/\x1b[31mred\n").mkdir()
    (runs / "runs/\x1b[31mred\n/metrics.jsonl").write_text(json.dumps(UPDATE | {"update": 1}))
    main(["runs", "runs"])
    out = capsys.readouterr().out
    assert "left out: runs/a/metrics.jsonl, line 5: not JSON" in out
    assert "?[31mred?" in out and "\x1b" not in out
    assert "  b\n" in out and "  a\n" not in out


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"update": None}, "update is null: expected a number"),
        ({"update": 1.5}, "update is 1.5: expected a whole number"),
        ({"update": [1]}, "update is [1]: expected a whole number"),
        ({"curriculum_stage": "one"}, 'curriculum_stage is "one": expected a whole number'),
        ({"reward": "high"}, 'reward is "high": expected a finite number'),
        ({"reward": float("inf")}, "reward is Infinity: expected a finite number"),
        ({"wall_secs": True}, "wall_secs is true: expected a finite number"),
        ({"stage": ["rl"]}, 'stage is ["rl"]: expected a text'),
        ({"stage": "eval", "dev_ex": "x"}, 'dev_ex is "x": expected a finite number'),
    ],
)
def test_a_damaged_value_is_named_by_lists_and_figures(runs, capsys, change, fault):
    row = UPDATE | {"update": 1} | change
    file = write_run(runs / "bad", [UPDATE | {"update": 1}, row]) / "metrics.jsonl"
    file.write_text(file.read_text().replace("Infinity", "1e999"))  # valid JSON
    for command in ("plots", "runs"):
        with pytest.raises(SystemExit) as stop:
            main([command, "bad"])
        said = f"{stop.value.code}{capsys.readouterr().out}".replace("\n  ", " ")
        assert f"bad/metrics.jsonl, line 2: {fault}" in said, command
        assert (command == "runs") == ("bad: none of its runs can be read" in said)


def test_a_missing_key_is_named(runs):
    for key in ("stage", "update", "curriculum_stage", "reward"):
        row = {name: value for name, value in (UPDATE | {"update": 1}).items() if name != key}
        (runs / "bad.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=f"bad.jsonl, line 1: the key {key} is missing"):
            read_metrics(runs / "bad.jsonl")
    (runs / "bad.jsonl").write_text('{"stage": "eval", "data": "sparc dev", "dev_ex": null}')
    assert len(read_metrics(runs / "bad.jsonl")) == 1  # a row of eval.py


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "runs needs one folder, found 0: mtsql runs runs"),
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: no run in it, which would have a metrics.jsonl"),
        (["runs", "--csv", "runs/a/metrics.jsonl"], "--csv runs/a/metrics.jsonl: the table replac"),
        (["x" * 300], f"{'x' * 80}: File name too long"),
        (["runs", "--by", "dev_exx"], "by: no run has the score dev_exx; did you mean dev_ex?"),
    ],
)
def test_a_wrong_word_is_one_line(runs, words, error):
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match=f"^error: {error.replace('?', '[?]')}"):
        main(["runs", *words])
