"""The dialogues of the embedded world: what a question keeps, drops, refers to or corrects decides
its result, and the demonstrations make the corresponding mistakes."""

import re
import sqlite3
from collections import Counter
from contextlib import closing
from itertools import pairwise

import pytest

from mtsql.toyworld.demonstrations import HASTY
from mtsql.toyworld.dialogues import guesses, unknown_spellings
from mtsql.toyworld.states import Filter, State, say, to_sql
from mtsql.toyworld.world import WorldConfig, make_dialogues

SIZE = WorldConfig(num_train_databases=12, num_dev_databases=1, train_dialogues=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, the dialogues of train)."""
    folder = tmp_path_factory.mktemp("toy")
    return folder, make_dialogues(folder, 5, SIZE)[1]["train"]


@pytest.fixture(scope="module")
def dialogues(made):
    return made[1]


def turns_of(dialogues, kind):
    """(turn, the turns before it, domain) for every turn of a kind; at least ten of them."""
    found = [
        (turn, dialogue.turns[:place], dialogue.domain)
        for dialogue in dialogues
        for place, turn in enumerate(dialogue.turns)
        if turn.kind == kind
    ]
    assert len(found) >= 10
    return found


def added(new: State, old: State) -> tuple[Filter, ...]:
    return tuple(f for f in new.filters if f not in old.filters)


def test_a_mistake_about_the_dialogue_costs_the_execution_match(made):
    folder, dialogues = made
    num = Counter()
    for dialogue in dialogues:
        domain = dialogue.domain
        path = folder / "database" / domain.db_id / f"{domain.db_id}.sqlite"
        with closing(sqlite3.connect(path)) as connection:
            results = []
            for place, turn in enumerate(dialogue.turns):
                rows = connection.execute(to_sql(turn.state, domain)).fetchall()
                assert rows not in results
                results.append(rows)
                wrong = [to_sql(state, domain) for state in turn.misreadings]
                if guesses(turn, dialogue.turns[:place]):
                    wrong.append(to_sql(turn.state, domain, lambda f: f.guess or f.value))
                for sql in wrong:
                    num[turn.kind] += 1
                    try:
                        others = connection.execute(sql).fetchall()
                    except sqlite3.OperationalError:
                        continue
                    assert sorted(map(repr, others)) != sorted(map(repr, rows)), (sql, turn)
    assert len(num) >= 12 and sum(num.values()) > 800


def test_the_wording_decides_which_turn_is_changed(dialogues):
    for turn, earlier, _ in turns_of(dialogues, "before"):
        assert turn.question.startswith("as before but ") and turn.base == len(earlier) - 2
        assert turn.of_last is not None
    for turn, earlier, _ in turns_of(dialogues, "first"):
        assert turn.question.startswith("the first one again but ") and turn.base == 0
        assert len(earlier) >= 3
    for turn, earlier, _ in turns_of(dialogues, "filter"):
        last = earlier[-1].state
        [new] = added(turn.state, last)
        assert turn.question.endswith(say(new)) and set(last.filters) < set(turn.state.filters)


def test_a_value_takes_the_place_of_the_one_of_its_column(dialogues):
    for turn, earlier, _ in turns_of(dialogues, "value"):
        last = earlier[-1].state
        [new] = added(turn.state, last)
        assert turn.question == f"what about {new.said} ?" != f"what about {new.value} ?"
        [old] = added(last, turn.state)
        assert (old.table, old.column) == (new.table, new.column)
        assert turn.keeps is not None and {old, new} <= set(turn.keeps.filters)


def test_what_a_question_drops_is_dropped(dialogues):
    for turn, earlier, _ in turns_of(dialogues, "forget"):
        assert len(turn.state.filters) == 1 and turn.keeps is not None
        assert set(earlier[-1].state.filters) < set(turn.keeps.filters)
    for turn, earlier, _ in turns_of(dialogues, "drop"):
        [gone] = added(earlier[-1].state, turn.state)
        assert turn.question == f"and with any {gone.column} ?" != "and with any name ?"
    for turn, _, _ in turns_of(dialogues, "subject"):
        assert turn.base is None and turn.alone is None


def test_a_correction_takes_back_what_the_last_question_said(dialogues):
    kinds = Counter()
    for turn, earlier, _ in turns_of(dialogues, "correct"):
        words = turn.question.split()
        kinds[words[0], earlier[-1].kind] += 1
        if earlier[-1].kind == "value":
            [taken_back] = added(earlier[-1].state, earlier[-2].state)
            [new] = added(turn.state, earlier[-1].state)
            assert taken_back not in turn.state.filters
            assert (new.table, new.column) == (taken_back.table, taken_back.column)
        elif earlier[-1].kind == "filter":
            assert earlier[-1].state.filters[-1] not in turn.state.filters
            assert earlier[-1].state.filters[-1] in turn.of_last.filters
        elif words[0] == "sorry":
            before, after = words[3], words[5]
            assert before in (*earlier[-1].state.columns, earlier[-1].state.order)
            assert after in (*turn.state.columns, turn.state.order)
    assert {("no", "filter"), ("no", "value")} <= set(kinds)
    assert sum(count for (word, _), count in kinds.items() if word == "sorry") >= 5


def test_a_question_about_a_named_row_fits_a_row_of_one_table_only(dialogues):
    num, num_in_both = 0, 0
    for turn, _, domain in [*turns_of(dialogues, "opening"), *turns_of(dialogues, "subject")]:
        state = turn.state
        if not (state.is_of_named_row and turn.question.startswith("what is the")):
            continue
        num += 1
        other = domain.other_table(state.table)
        if state.filters[0].value in domain.values[other, "name"]:
            num_in_both += 1
            assert (other, state.columns[0]) not in domain.values
    assert num > num_in_both >= 5


def test_rows_are_left_out_where_names_tell_them_apart(dialogues):
    turns = [turn for turn, _, _ in turns_of(dialogues, "columns")]
    states = [turn.state for turn in turns if turn.question.startswith("leave out")]
    assert states and all("name" in state.columns for state in states)


def test_a_value_that_is_spoken_of_is_the_last_one_of_its_column(dialogues):
    for turn, earlier, _ in turns_of(dialogues, "result"):
        shown = turn.shown
        for before, later in pairwise(earlier[shown.turn :]):
            values = {
                "name" if f.of_row else f.column: f.value
                for f in later.state.all_filters()
                if f.table == shown.table and f not in before.state.all_filters()
            }
            assert values.get(shown.column, shown.value) == shown.value, (turn, later)


def test_an_agent_that_misread_the_schema_thinks_what_the_error_says(made):
    folder, dialogues = made
    num = 0
    for dialogue in dialogues:
        db_id = dialogue.domain.db_id
        path = folder / "database" / db_id / f"{db_id}.sqlite"
        with closing(sqlite3.connect(path)) as connection:
            for first, second in (pair for steps in dialogue.steps for pair in pairwise(steps)):
                found = re.fullmatch(r"(\w+) is not there", second["think"])
                if found:
                    with pytest.raises(sqlite3.OperationalError, match=rf"[ .]{found[1]}$"):
                        connection.execute(first["sql"])
                    num += 1
    assert num >= 20


def test_only_the_earlier_result_shows_the_value_that_is_spoken_of(made):
    folder, dialogues = made
    for turn, earlier, domain in turns_of(dialogues, "result"):
        path = folder / "database" / domain.db_id / f"{domain.db_id}.sqlite"
        shown = turn.shown
        [hidden] = guesses(turn, earlier)
        assert hidden.value == shown.value and shown.value not in turn.question
        assert all(repr(shown.value) not in to_sql(one.state, domain) for one in earlier)
        with closing(sqlite3.connect(path)) as connection:
            asked = to_sql(earlier[shown.turn].state, domain)
            assert connection.execute(asked).fetchall() == [(shown.value,)]


def test_later_turns_need_the_dialogue_and_the_database_more_than_the_first(dialogues):
    count, unknown, far = Counter(), Counter(), Counter()
    for dialogue in dialogues:
        for place, turn in enumerate(dialogue.turns):
            earlier = dialogue.turns[:place]
            where = min(place, 2)
            count[where] += 1
            unseen = bool(guesses(turn, earlier))
            unknown[where] += unseen or bool(unknown_spellings(turn, earlier))
            far[where] += unseen or turn.of_last is not None
    shares = [unknown[where] / count[where] for where in range(3)]
    assert shares[0] == 0 and min(shares[1:]) > 0.45
    assert far[0] == 0 and far[2] / count[2] > 0.25


def test_demonstrations_make_each_mistake_and_are_hasty_at_the_named_rates(dialogues):
    hasty, count, thoughts, shapes = Counter(), Counter(), Counter(), Counter()
    for dialogue in dialogues:
        for place, (turn, steps) in enumerate(zip(dialogue.turns, dialogue.steps, strict=True)):
            earlier = dialogue.turns[:place]
            is_unknown = bool(guesses(turn, earlier) or unknown_spellings(turn, earlier))
            count[is_unknown] += 1
            hasty[is_unknown] += len(steps) == 1
            gold = to_sql(turn.state, dialogue.domain)
            assert len(steps) <= 4 and steps[-1]["sql"] == gold
            shapes[tuple(step["action"] for step in steps)] += 1
            for step in steps:
                words = step["think"].split()
                thoughts[" ".join(words[:1])] += 1
                if words[:2] == ["not", "the"]:
                    assert turn.of_last is not None
    for is_unknown, share in HASTY.items():
        assert hasty[is_unknown] / count[is_unknown] == pytest.approx(share, abs=0.06)
    for word in ("keep", "drop", "not", "that", "nothing", "look", "name"):
        assert thoughts[word] >= 3, word
    looked_into_memory = ("memory_retrieve", "exec_sql", "answer")
    assert (
        shapes[looked_into_memory] >= 10 and shapes["exec_sql", "memory_retrieve", "answer"] >= 10
    )
