"""Two evaluations are paired turn by turn, and what does not fit is named."""

import json
from pathlib import Path

import pytest

from mtsql.judge.comparison import compare, paired, read_evaluation, under
from mtsql.judge.intervals import difference_interval, mcnemar

Row = dict[str, object]


def row(turn_id: str, ex: int, em: int = 0, **others: object) -> Row:
    """A row of scores.json. turn_id: "dev:3:1" is the second turn of dialogue 3."""
    dialogue, _, turn = turn_id.rpartition(":")
    level = "easy" if turn == "0" else "hard"
    ids = {"turn_id": turn_id, "dialogue_id": dialogue, "turn": str(int(turn) + 1)}
    return {**ids, "hardness": level, "ex": bool(ex), "em": bool(em), **others}


def result(*rows: Row, history: str = "gold", **others: object) -> dict[str, object]:
    part = {"data": "sparc dev", "split": "dev", "history": history}
    return {**part, "turns": list(rows), **others}


def write(folder: Path, name: str, *results: dict[str, object]) -> Path:
    """The folder of an evaluation."""
    (folder / name).mkdir()
    content = {"config": {}, "results": list(results)}
    (folder / name / "scores.json").write_text(json.dumps(content))
    return folder / name


A = [row("dev:0:0", 1, 1), row("dev:0:1", 0), row("dev:1:0", 1), row("dev:2:0", 0)]
B = [row("dev:0:0", 1, 1), row("dev:0:1", 1, 1), row("dev:1:0", 0), row("dev:2:0", 1)]


def test_turns_are_paired_by_their_ids_and_not_by_their_places(tmp_path: Path) -> None:
    a = write(tmp_path, "a", result(*A, row("dev:8:0", 1)))
    b = write(tmp_path, "b", result(row("dev:9:0", 0), row("dev:9:1", 0), *reversed(B)))
    [(one, other)], alone = paired(read_evaluation(a), read_evaluation(b))
    found = compare(one, other)
    assert alone == [] and (found.data, found.history) == ("sparc dev", "gold")
    assert found.mended == ["dev:0:1", "dev:2:0"] and found.broken == ["dev:1:0"]
    assert found.only_a == ["dev:8:0"] and found.only_b == ["dev:9:1", "dev:9:0"][::-1]
    groups = {group.name: group for group in found.groups}
    assert list(groups) == ["all", "interactions", "turn 1", "turn 2", "easy", "hard"]
    everything = groups["all"]
    assert (everything.count, found.num_dialogues) == (4, 3)
    assert (everything.ex.a, everything.ex.b, everything.em.a, everything.em.b) == (50, 75, 25, 50)
    assert (everything.mended, everything.broken, everything.p) == (2, 1, mcnemar(2, 1))
    pairs = [(r["dialogue_id"], 100.0 * r["ex"], 100.0 * s["ex"]) for r, s in zip(A, B)]
    assert everything.ex.interval == difference_interval(pairs)
    assert groups["turn 2"].count == 1 and groups["turn 2"].ex.interval is None
    # Dialogue 0 is right as a whole in B, dialogue 1 in A, dialogue 2 in B.
    whole = groups["interactions"]
    assert (whole.count, whole.mended, whole.broken) == (3, 2, 1)
    assert (whole.ex.a, whole.em.b) == pytest.approx((100 / 3, 100 / 3))


def test_the_seed_decides_the_interval(tmp_path: Path) -> None:
    turns = [f"dev:{i}:0" for i in range(40)]
    a = write(tmp_path, "a", result(*[row(turn, i % 2) for i, turn in enumerate(turns)]))
    b = write(tmp_path, "b", result(*[row(turn, i % 3 == 0) for i, turn in enumerate(turns)]))
    [pair], _ = paired(read_evaluation(a), read_evaluation(b))
    assert compare(*pair) == compare(*pair)
    assert compare(*pair, seed=1, num_resamples=200).groups[0].ex.interval != (
        compare(*pair, seed=2, num_resamples=200).groups[0].ex.interval
    )


def test_other_figures_are_compared_where_both_have_them(tmp_path: Path) -> None:
    a = row("dev:0:0", 1, abilities={"propose": 0.5, "recall": None}, first_execution="failed")
    b = row("dev:0:0", 1, abilities={"propose": 1.0, "recall": 1.0}, first_execution="rows")
    votes = {"samples": [{"ex": False}, {"ex": True}], "voted": 1, "num_replies": 3}
    parts = [
        read_evaluation(write(tmp_path, "a", result({**a, **votes}))),
        read_evaluation(write(tmp_path, "b", result({**b, **votes, "voted": 0}))),
    ]
    found = compare(parts[0][0], parts[1][0])
    figures = {f.name: (f.count, f.value.a, f.value.b) for f in found.figures}
    assert figures == {
        "propose": (1, 0.5, 1),
        "aha of all %": (1, 100, 0),
        "EX of the vote %": (1, 100, 0),
        "num_replies": (1, 3, 3),
    }


def test_levels_of_bird_have_rows_of_their_own(tmp_path: Path) -> None:
    rows = [row("dev:0:0", 1, difficulty="simple"), row("dev:1:0", 1, difficulty="moderate")]
    [part] = read_evaluation(write(tmp_path, "a", result(*rows)))
    groups = {group.name: group.count for group in compare(part, part).groups}
    assert groups["simple"] == groups["moderate"] == 1


def test_a_goal_is_drawn_with_its_dialogue(tmp_path: Path) -> None:
    rows = [row("train:0:0", 1), row("train:0:goal:0", 0), row("train:1:0", 1)]
    [part] = read_evaluation(write(tmp_path, "a", result(*rows)))
    found = compare(part, part)
    assert found.num_dialogues == 2 and found.groups[1].count == 3  # as a dialogue, it is alone


def test_parts_are_paired_by_data_set_split_and_history(tmp_path: Path) -> None:
    a = write(tmp_path, "a", result(*A), result(*A, history="predicted"))
    b = write(tmp_path, "b", result(*B, data="cosql dev"), result(*B))
    pairs, alone = paired(read_evaluation(a), read_evaluation(b))
    assert [(one.name, other.where) for one, other in pairs] == [
        ("sparc dev, gold history", f"{b}/scores.json: results[1]")
    ]
    assert alone == [
        "only A has sparc dev, predicted history",
        "only B has cosql dev, gold history",
    ]
    with pytest.raises(ValueError, match="nothing to compare: only A has sparc dev, predicted"):
        paired(read_evaluation(a)[1:], read_evaluation(b))


def test_one_history_can_be_compared_with_another(tmp_path: Path) -> None:
    a = read_evaluation(write(tmp_path, "a", result(*A), result(*B, history="predicted")))
    [pair], alone = paired(under(a, "gold", "both"), under(a, "predicted", "both"))
    assert alone == [] and compare(*pair).groups[0].ex.b == 75
    with pytest.raises(ValueError, match="a/scores.json: results.0.: no part has own history"):
        under(a, "own", "both")


def test_files_of_a_training_run_and_old_ones_name_no_data_set(tmp_path: Path) -> None:
    run = tmp_path / "run" / "eval"
    run.mkdir(parents=True)
    (run / "dev_seen-00020.json").write_text(json.dumps({"all": {}, "turns": A}))
    old = {"history": "gold", "split": "dev_seen", "config": {}, "turns": B}
    (tmp_path / "scores.json").write_text(json.dumps(old))
    [training] = read_evaluation(run / "dev_seen-00020.json")
    assert (training.data, training.split, training.history) == (None, "dev_seen", "gold")
    new = read_evaluation(write(tmp_path, "new", result(*B, split="dev_seen")))
    for others in (read_evaluation(tmp_path), new):
        [pair], _ = paired([training], others)
        assert compare(*pair).data == (others[0].data or "dev_seen")
    twice = [*new, *read_evaluation(write(tmp_path, "x", result(*B, split="dev_seen", data="y")))]
    with pytest.raises(ValueError, match="dev_seen-00020.json does not name its data set: sparc"):
        paired([training], twice)
    with pytest.raises(ValueError, match="it is a training run: name a file such as .*00020.json"):
        read_evaluation(tmp_path / "run")


def test_a_file_of_a_training_run_fits_an_evaluation(tmp_path: Path) -> None:
    """Both hash the gold query, and only eval.py writes the query itself."""
    hashed = [{**one, "gold_hash": "c3"} for one in A]
    (tmp_path / "dev-00040.json").write_text(json.dumps({"all": {}, "turns": hashed}))
    full = [{**one, "gold": "SELECT 1", "gold_hash": "c3"} for one in B]
    own = read_evaluation(write(tmp_path, "own", result(*full)))
    [pair], _ = paired(read_evaluation(tmp_path / "dev-00040.json"), own)
    assert compare(*pair).groups[0].ex.b == 75


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"results": []}, "results: expected a list that is not empty"),
        ({"config": {}}, "no key results: neither eval.py nor train_rl.py"),
        ([], "no key results"),
        ({"results": [3]}, "results[0]: expected an object, found 3"),
        ({"results": [{"data": "d"}]}, "results[0]: split: expected a text, found None"),
        ({"results": [result(3)]}, "results[0]: turns[0]: expected an object, found 3"),
        ({"results": [result({**A[0], "ex": 1})]}, "turns[0]: ex: expected true or false, found 1"),
        ({"results": [result({**A[0], "abilities": [1]})]}, "turns[0]: abilities: expected an obj"),
        ({"results": [result({**A[0], "samples": 3})]}, "samples: expected a list, found 3"),
        ({"results": [result({**A[0], "samples": [], "voted": 0})]}, "voted: expected the place"),
        ({"results": [result({**A[0], "samples": [3], "voted": 0})]}, "samples: ex: expected true"),
        ({"results": [result(A[0], A[0])]}, "turns[1]: turn_id dev:0:0 appears twice"),
    ],
)
def test_a_malformed_file_is_named_with_the_key(
    tmp_path: Path, content: object, words: str
) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        read_evaluation(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "scores.json")) and words in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (result({**A[0], "hardness": "extra"}), "dev:0:0: hardness is easy in A and extra in B"),
        (result({**A[0], "gold": "c3"}), "dev:0:0: gold is a1 in A and c3 in B"),
        (result(row("dev:7:0", 1)), "no turn in common"),
        (result(A[0], ex_rule="set"), "ex_rule is official in A and set in B"),
    ],
)
def test_evaluations_on_other_gold_are_not_compared(
    tmp_path: Path, other: dict[str, object], words: str
) -> None:
    first = result({**A[0], "gold": "a1"}, ex_rule="official")
    [a] = read_evaluation(write(tmp_path, "a", first))
    [b] = read_evaluation(write(tmp_path, "b", other))
    with pytest.raises(ValueError) as caught:
        compare(a, b)
    assert words in str(caught.value) and str(tmp_path / "b" / "scores.json") in str(caught.value)
