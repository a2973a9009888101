"""mtsql plots: the figures of runs and evaluations, the data beside them, and what is refused."""

import csv
import json
import warnings
from pathlib import Path

import pytest

from mtsql.__main__ import main
from mtsql.plots.bars import evaluation_figures
from mtsql.plots.curves import training_figures
from mtsql.plots.sources import Scored, distinct_names, read_sources
from mtsql.plots.style import save


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def turns(num_right: int, starts: str = "rrrrreef") -> list[dict]:
    """The rows of four dialogues of two turns, of which the first `num_right` turns are right."""
    kinds = {"r": "rows", "e": "empty", "f": "failed"}
    return [
        {
            "turn_id": f"dev:{n // 2}:{n % 2}",
            "dialogue_id": f"dev:{n // 2}",
            "turn": str(n % 2 + 1),
            "hardness": "easy",
            "ex": n < num_right,
            "em": n < num_right,
            "abilities": {"call_execute": 1.0, "call_memory": None, "propose": 0.5},
            "first_execution": kinds[start],
        }
        for n, start in enumerate(starts)
    ]


def training(folder: Path, num_right: int, num_updates: int = 4) -> Path:
    (folder / "eval").mkdir(parents=True)
    rows: list[dict] = []
    for update in range(num_updates + 1):
        if update:
            row = {"stage": "rl", "update": update, "curriculum_stage": int(update > 2)}
            rows.append(row | {"reward": float(update), "response_tokens": 50.0})
        if update in (0, 2, num_updates):
            ex = {0: 25.0, 2: 37.5}.get(update, 100 * num_right / 8)
            rows.append({"stage": "eval", "update": update, "dev_ex": ex, "dev_em": ex})
            content = {"turns": turns(int(ex / 12.5))}
            (folder / f"eval/dev-{update:05d}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluation(folder: Path, num_right: int) -> Path:
    folder.mkdir(parents=True)
    about = {"data": "sparc dev", "split": "dev"}
    results = [
        about | {"history": history, "turns": turns(num_right - (history == "predicted"))}
        for history in ("gold", "predicted")
    ]
    (folder / "scores.json").write_text(json.dumps({"results": results}))
    return folder


def table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open(encoding="utf-8")))


def test_a_run_leaves_each_figure_as_png_svg_and_csv(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training(tmp_path / "rl", 6)
    main(["plots", "rl"])
    names = ["reward", "reply_length", "held_out"]
    names += [f"{name}-dev" for name in ("ex_by_turn", "ex_by_hardness", "abilities", "aha")]
    files = {f"{name}.{kind}" for name in names for kind in ("png", "svg", "csv")}
    assert {file.name for file in Path("rl/figures").iterdir()} == files
    assert Path("rl/figures/reward.png").read_bytes().startswith(b"\x89PNG")
    assert "finished updates" in Path("rl/figures/reward.svg").read_text()  # text stays text
    assert capsys.readouterr().out.startswith("7 figures in rl/figures (PNG, SVG, CSV): reward, ")
    rewards = table(Path("rl/figures/reward.csv"))
    assert [(row["stage"], row["update"], row["reward"]) for row in rewards] == [
        ("1", "1", "1.0"),
        ("1", "2", "2.0"),
        ("2", "3", "3.0"),
        ("2", "4", "4.0"),
    ]
    # The mean and the deviation are those of the stage: of 1 and 2, and of 3 and 4.
    assert [(row["moving_mean"], row["low"]) for row in rewards][::2] == [
        ("1.5", "1.0"),
        ("3.5", "3.0"),
    ]
    held_out = [row for row in table(Path("rl/figures/held_out.csv")) if row["metric"] == "ex"]
    assert [(row["update"], row["percent"], row["turns"]) for row in held_out] == [
        ("0", "25.0", "8"),
        ("2", "37.5", "8"),
        ("4", "75.0", "8"),
    ]
    assert all(float(row["low"]) <= float(row["percent"]) for row in held_out)


def test_the_bars_are_the_figures_of_the_turns():
    rows = turns(6)
    sets = {"sparc dev": [Scored("a", "sparc dev", rows), Scored("b", "sparc dev", rows[:4])]}
    by_turn, by_hardness, abilities, aha = evaluation_figures(sets)
    assert by_turn.name == "ex_by_turn-sparc_dev"
    assert [(row[0], row[1], row[2], row[5]) for row in by_turn.rows] == [
        ("a", "1", 75.0, 4),
        ("a", "2", 75.0, 4),
        ("b", "1", 100.0, 2),
        ("b", "2", 100.0, 2),
    ]
    assert {row[1] for row in by_hardness.rows} == {"easy"}
    assert [(row[0], row[1], row[2]) for row in abilities.rows if row[1] in ("propose", "ex")] == [
        ("a", "propose", 0.5),
        ("b", "propose", 0.5),
        ("a", "ex", 75.0),
        ("b", "ex", 100.0),
    ]
    # Turns 6, 7 and 8 begin with an empty or a failed query; the first of them is right.
    assert [(row[2] and round(row[2], 1), row[5]) for row in aha.rows] == [
        (33.3, 3),
        (100.0, 5),
        (None, 0),
        (100.0, 4),
    ]


@pytest.mark.parametrize("num_right", [0, 8])
def test_an_axis_of_shares_has_no_mark_below_0_or_above_all(tmp_path, num_right):
    run = training(tmp_path / "rl", num_right)
    sources = read_sources([run])
    rows = turns(num_right, "rr")  # no episode whose first query failed
    models = [Scored(name, "dev", rows) for name in ("a", "b")]
    figures = [*training_figures(sources.trainings)[2:], *evaluation_figures({"dev": models})]
    assert len(figures) == 5
    for drawn in figures:
        drawn.figure.canvas.draw()
        for axes in drawn.figure.axes:
            marks = axes.get_yticks()
            most = 1 if axes.get_ylabel().endswith("0 to 1") else 100
            assert len(marks) > 2 and 0 <= min(marks) and max(marks) <= most, drawn.name
            low, high = axes.get_xlim()  # a group without bars has its room
            if drawn.name != "held_out":
                assert all(low < place < high for place in axes.get_xticks()), drawn.name
    by_turn, aha = (figures[place].figure.axes[0] for place in (1, 4))
    assert [label.get_text() for label in by_turn.get_xticklabels()] == ["1\n1 turn", "2\n1 turn"]
    assert aha.get_xticklabels()[0].get_text() == "failed or returned nothing (none)"


def test_several_runs_share_axes_and_evaluations_join_runs_with_the_same_turns(tmp_path):
    paths = [training(tmp_path / "x/rl", 6), training(tmp_path / "y/rl", 7, 3)]
    paths.append(evaluation(tmp_path / "eval", 5))
    sources = read_sources(paths)
    assert [one.name for one in sources.trainings] == ["x/rl", "y/rl"]
    assert [one.name for one in sources.sets["sparc dev"]] == [
        "x/rl, update 0",
        "x/rl, update 4",
        "y/rl, update 0",
        "y/rl, update 3",
        "eval",
    ]
    reward = training_figures(sources.trainings)[0]
    assert {row[0] for row in reward.rows} == {"x/rl", "y/rl"}
    chosen = read_sources(paths[:1], updates=[0, 2]).sets["dev"]
    assert [one.name for one in chosen] == ["rl, update 0", "rl, update 2"]
    own = read_sources(paths[2:], history="predicted").sets
    assert own["sparc dev, predicted history"][0].mean("ex").value == 50.0


def test_other_turns_have_figures_of_their_own(tmp_path):
    paths = [evaluation(tmp_path / name, 5) for name in ("a", "b")]
    found = json.loads((paths[1] / "scores.json").read_text())
    del found["results"][0]["turns"][0]
    (paths[1] / "scores.json").write_text(json.dumps(found))
    sources = read_sources(paths)
    assert list(sources.sets) == ["sparc dev", "sparc dev (2)"]
    assert "8 and 7 turns were played" in sources.notes[0]


def test_hostile_names_stay_text(tmp_path):
    names = ["_$x_{", "\x1b[31m</text><script>\n\u8868", "\udcff" + "long" * 99]
    paths = [training(tmp_path / str(number), 6) for number in range(3)]
    sources = read_sources(paths, names)
    for figure in training_figures(sources.trainings)[:1]:
        save(figure, tmp_path / "out")
    text = (tmp_path / "out/reward.svg").read_text()
    assert "_$x_{" in text and "<script>" not in text and "\x1b" not in text
    assert max(len(row["run"]) for row in table(tmp_path / "out/reward.csv")) <= 40


def test_the_same_data_give_the_same_files(tmp_path):
    run = training(tmp_path / "rl", 6)
    for out in ("one", "two"):
        save(training_figures(read_sources([run]).trainings)[2], tmp_path / out)
    for kind in ("png", "svg", "csv"):
        first, second = (tmp_path / f"{out}/held_out.{kind}" for out in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


def test_names_are_the_shortest_ends_that_differ():
    paths = [Path("/a/x/rl"), Path("/a/y/rl"), Path("/b/eval")]
    assert distinct_names(paths) == ["x/rl", "y/rl", "eval"]
    with pytest.raises(ValueError, match="^/a/x/rl is named twice"):
        distinct_names([Path("/a/x/rl"), Path("/a/x/rl")])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "plots needs a run: mtsql plots RUN; --help explains it"),
        (["nowhere"], "nowhere: no such folder or file"),
        (["rl", "--names", "a", "b"], "names: expected one for each run, found 2 for 1"),
        (["rl", "--updates", "3"], "updates: no run has an evaluation at update 3; found 0, 2, 4"),
        (["eval", "--history", "own"], "eval: it has no part with own history"),
        (["sft"], "sft: a run of train_sft.py has no updates and no held-out scores to draw"),
        (["new"], "new: this run has no update and no evaluation yet"),
        (["other"], "other: neither metrics.jsonl of a run nor scores.json of eval.py in it"),
        (["x" * 300], f"{'x' * 80}: File name too long"),
        (["torn"], "torn/metrics.jsonl, line 1: not JSON"),
        (["rl", "--out", "torn/metrics.jsonl"], "torn/metrics.jsonl/reward.csv: cannot be written"),
    ],
)
def test_a_wrong_word_is_one_line(tmp_path, monkeypatch, words, error):
    monkeypatch.chdir(tmp_path)
    training(tmp_path / "rl", 6)
    evaluation(tmp_path / "eval", 5)
    Path("other").mkdir()
    for name, text in (("sft", '{"stage": "sft"}\n'), ("new", ""), ("torn", '{"stage": ')):
        Path(name).mkdir()
        Path(name, "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["plots", *words])
    assert str(stop.value.code).startswith(f"error: {error}")
