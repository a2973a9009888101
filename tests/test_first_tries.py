"""First tries that are wrong: their text, that they are wrong by execution, and that it shows."""

import pytest

from helpers.demos import FRENCH, JOINED, make_scene, music
from mtsql.demos.config import KINDS
from mtsql.demos.gold import FIRST_TRIES, demonstrate
from mtsql.sql.sandbox import run_query

NAMES = "SELECT name FROM singer"
SONGS = f"SELECT T1.name , T2.genre {JOINED} WHERE T2.genre = 'Rock'"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return music(tmp_path_factory.mktemp("music"))


def played(scene_of, kind: str) -> dict[str, list[dict]]:
    """The first tries that are played over many seeds: wrong query -> its steps."""
    found = {}
    for seed in range(40):
        demo = demonstrate(scene_of(seed), kind)
        if demo.first:
            found[demo.steps[0]["sql"]] = demo.steps
    return found


def actions(steps: list[dict]) -> list[str]:
    return [step["action"] for step in steps]


@pytest.mark.parametrize(
    ("kind", "gold", "history", "expected"),
    [
        (
            "literal",
            f"{NAMES} WHERE country = 'France'",
            (),
            {f"{NAMES} WHERE country = '{text}'" for text in ("france", "Fra")},
        ),
        (
            "literal",
            'SELECT max(age) FROM singer WHERE country = "United States"',
            (),
            {
                f'SELECT max(age) FROM singer WHERE country = "{text}"'
                for text in ("united states", "United states", "United State", "US")
            },
        ),
        (
            "column",
            f"{NAMES} WHERE age > 40",
            (),
            # `song` has a name, but no age; no column of it is like age or name.
            {"SELECT name FROM song WHERE age > 40"},
        ),
        (
            "column",
            f"SELECT T2.name {JOINED}",
            (),
            {
                f"SELECT name {JOINED}",
                f"SELECT T2.name {JOINED.replace('T1.id', 'id')}",
                f"SELECT T2.name {JOINED.replace('T2.singer_id', 'T1.singer_id')}",
            },
        ),
        (
            "column",
            "SELECT song_length FROM song AS T9",
            (),
            {"SELECT song_length FROM singer AS T9"},
        ),
        (
            "join",
            SONGS,
            (),
            {
                "SELECT T1.name , T2.genre FROM singer AS T1 WHERE T2.genre = 'Rock'",
                SONGS.replace("T2.singer_id", "T2.id"),
            },
        ),
        (
            "aggregate",
            "SELECT country FROM singer GROUP BY country HAVING count(*) > 1",
            (),
            {"SELECT country FROM singer WHERE count(*) > 1 GROUP BY country"},
        ),
        (
            "aggregate",
            "select genre from song where id > 11 or id < 3 group by genre having max(id) > 13",
            (),
            {
                "select genre from song where id > 11 or id < 3 and max(id) > 13 group by genre",
            },
        ),
        (
            "dropped",
            f"{NAMES} WHERE age > 30 AND country = 'France'",
            (FRENCH,),
            {f"{NAMES} WHERE age > 30"},
        ),
        (
            "dropped",
            f"SELECT T2.genre {JOINED} WHERE T1.country = 'France'",
            (FRENCH,),
            {f"SELECT T2.genre {JOINED}"},
        ),
        (
            "kept",
            f"{NAMES} WHERE age > 30",
            (FRENCH,),
            {f"{NAMES} WHERE country = 'France' AND age > 30"},
        ),
        (
            "kept",
            f"select T2.genre {JOINED} order by T2.id",
            (FRENCH,),
            {f"select T2.genre {JOINED} where T1.country = 'France' order by T2.id"},
        ),
    ],
)
def test_first_tries_are_edits_of_the_gold_query(database, kind, gold, history, expected):
    found = played(lambda seed: make_scene(database, gold, "?", history, seed), kind)
    assert found.keys() == expected
    rows = run_query(database.path, gold).rows
    for wrong, steps in found.items():
        result = run_query(database.path, wrong)
        assert sorted(result.rows) != sorted(rows)
        verdict = steps[1]["exec_verdict"]
        assert verdict == ("pass" if result.is_ok and not result.is_empty else "no_pass")
        assert (verdict == "pass") == (kind in ("dropped", "kept"))
        assert steps[-1]["action"] == "answer" and steps[-1]["sql"] == gold
        assert all(step["think"] for step in steps)


def test_a_misspelled_value_is_looked_up_and_the_memory_saves_a_reply(database):
    gold = f"{NAMES} WHERE country = 'Netherlands'"
    look = "SELECT DISTINCT country FROM singer"
    first = demonstrate(make_scene(database, gold, "who is Dutch ?"), "literal").steps
    assert [step["sql"] for step in first[1:]] == [look, gold, gold]
    assert actions(first) == ["exec_sql", "exec_sql", "exec_sql", "answer"]
    assert [step["exec_verdict"] for step in first] == [None, "no_pass", "pass", "pass"]
    history = (("who is there ?", NAMES),)
    later = demonstrate(make_scene(database, gold, "who is Dutch ?", history), "literal").steps
    assert actions(later) == ["exec_sql", "exec_sql", "memory_retrieve", "answer"]
    assert [step["memory_verdict"] for step in later] == [None, None, None, "pass"]


def test_the_words_of_the_question_are_tried_as_the_spelling(database):
    gold = f"{NAMES} WHERE country = 'Netherlands'"
    scene = make_scene(database, gold, "who is from the Netherland , please ?")
    assert demonstrate(scene, "literal").steps[0]["sql"].endswith("country = 'Netherland'")


def test_a_long_column_is_looked_up_by_like_or_by_the_question(database):
    gold = f"{NAMES} WHERE country = 'Netherlands'"
    few = {"max_observation_rows": 1}
    scene = make_scene(database, gold, "who is from the Netherland ?", **few)
    look = "SELECT DISTINCT country FROM singer WHERE country LIKE '%netherland%'"
    assert demonstrate(scene, "literal").steps[1]["sql"] == look
    # Where no look-up can show the spelling, only the question can tell it.
    none = {"max_observation_rows": 0}
    asked = "who is from the Netherlands ?"
    found = played(lambda seed: make_scene(database, gold, asked, seed=seed, **none), "literal")
    mended = found[gold.replace("Netherlands", "netherlands")]
    assert [step["sql"] for step in mended[1:]] == [gold, gold]
    assert "Netherlands" in mended[1]["think"] and "question" in mended[1]["think"]
    assert not demonstrate(make_scene(database, gold, "who is Dutch ?", **none), "literal").first


def test_a_spelling_is_looked_up_first_only_if_nothing_tells_it(database):
    gold = f"{NAMES} WHERE country = 'France'"
    look = "SELECT DISTINCT country FROM singer"
    french = demonstrate(make_scene(database, gold, "who is french ?"), "look_up")
    assert french.first == "look_up" and french.steps[0]["sql"] == look
    assert [step["exec_verdict"] for step in french.steps] == [None, "pass", "pass"]
    assert not demonstrate(make_scene(database, gold, "who is from France ?"), "look_up").first
    # An earlier query has it: it is neither looked up nor misspelled.
    for kind in ("look_up", "literal"):
        assert not demonstrate(make_scene(database, gold, "and now ?", (FRENCH,)), kind).first


@pytest.mark.parametrize(
    ("kind", "gold", "history", "why"),
    [
        ("literal", "SELECT count(*) FROM singer WHERE country = 'France'", (), "a count of 0"),
        ("literal", f"{NAMES} WHERE country LIKE 'France'", (), "LIKE ignores case"),
        ("column", "SELECT 1", (), "no column"),
        ("join", f"SELECT T1.name {JOINED.replace('JOIN', 'LEFT JOIN')}", (), "an outer join"),
        ("aggregate", "SELECT country FROM singer WHERE age > 30", (), "no HAVING"),
        ("dropped", f"{NAMES} WHERE country = 'France'", (), "no history"),
        (
            "dropped",
            "SELECT DISTINCT country FROM singer WHERE country = 'France' AND age > 30",
            (("who is over 20 ?", f"{NAMES} WHERE age > 20"),),
            "another condition",
        ),
        ("dropped", f"{NAMES} WHERE age > 30 OR country = 'France'", (FRENCH,), "an OR"),
        (
            "dropped",
            "SELECT max(age) FROM singer WHERE age > 20",
            (("who is over 20 ?", f"{NAMES} WHERE age > 20"),),
            "the same without it",
        ),
        ("kept", f"{NAMES} WHERE country = 'France' AND age > 30", (FRENCH,), "it holds"),
        ("kept", f"{NAMES} WHERE country = 'Netherlands'", (FRENCH,), "nothing is left"),
        ("kept", f"{NAMES} WHERE age > 50 OR country = 'France'", (FRENCH,), "a part of it"),
        ("kept", "SELECT genre FROM song", (FRENCH,), "the table is gone"),
        ("kept", f"{NAMES} EXCEPT SELECT name FROM song", (FRENCH,), "a set operator"),
    ],
)
def test_a_try_that_is_right_or_does_not_show_is_not_made(database, kind, gold, history, why):
    assert not played(lambda seed: make_scene(database, gold, "?", history, seed), kind), why


def test_a_query_that_cannot_be_read_is_run_as_it_is(database):
    gold = "SELECT name , CASE WHEN age > 30 THEN 'old' ELSE 'young' END FROM singer"
    for kind in KINDS:
        assert not list(FIRST_TRIES[kind](make_scene(database, gold, "?", (FRENCH,))))
        demo = demonstrate(make_scene(database, gold, "?", (FRENCH,)), kind)
        assert actions(demo.steps) == ["exec_sql", "memory_retrieve", "answer"]
