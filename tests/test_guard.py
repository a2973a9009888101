"""The guard: answers that agree with a gold by accident earn nothing, and each rule comes with the
honest answers that it must not hurt."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.databases import make_database
from helpers.official import conformance_pairs
from helpers.shows import SHOWS, USA
from helpers.unusual import NUM_SHOPS, make_unusual
from mtsql.judge.agreement import written_match
from mtsql.judge.guard import Evidence, evidence, trial_of
from mtsql.rl.rewards import RewardConfig, answer_scores
from mtsql.sql.dialogues import ExRule, Turn
from mtsql.sql.sandbox import QueryConfig, clear_result_cache, run_query
from mtsql.sql.schema import Database, Schema, load_schemas, schema_from_sqlite
from mtsql.sql.worker_pool import the_pool

LIMITS = QueryConfig()
Paid = Callable[..., tuple[float, float]]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("guard") / "shows.sqlite", SHOWS)


@pytest.fixture(scope="module")
def schema(db: Path) -> Schema:
    return schema_from_sqlite(db)


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Database:
    path = make_unusual(tmp_path_factory.mktemp("guard") / "shops.sqlite")
    return Database(schema_from_sqlite(path), path)


@pytest.fixture(scope="module")
def paid(db: Path, schema: Schema) -> Paid:
    """A function from an answer and a gold to what the reward pays: (ex, em)."""

    def scores(
        sql: str, gold: str, earlier: tuple[str, ...] = (), guard: bool = True
    ) -> tuple[float, float]:
        history = tuple(("?", earlier_sql) for earlier_sql in earlier)
        turn = Turn("train:0:0", len(history), "shows", "?", gold, history)
        return answer_scores(sql, turn, schema, db, RewardConfig(guard=guard), LIMITS)

    return scores


COUNT = "SELECT count(*) FROM singer WHERE country = 'USA'"
YOUNGEST = "SELECT name FROM singer ORDER BY age LIMIT 1"
OVER_26 = "SELECT name FROM singer WHERE age > 26"
JOINED = (
    "SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.singer_id = T2.singer_id "
    "WHERE T2.year = 2010"
)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (COUNT, "SELECT 2"),
        (COUNT, "SELECT 2 FROM singer LIMIT 1"),
        (COUNT, "SELECT 2 FROM singer WHERE name = 'Ann'"),
        (COUNT, "SELECT max(2) FROM singer"),
        (COUNT, "SELECT singer_id FROM singer WHERE name = 'Bob'"),
        (COUNT, "SELECT count(*) FROM singer WHERE country = 'France'"),
        ("SELECT max(age) FROM singer", "SELECT 52"),
        ("SELECT country FROM singer WHERE name = 'Ann'", "SELECT 'USA' FROM singer LIMIT 1"),
        (YOUNGEST, "SELECT 'Cid'"),
        # The column has a single value.
        ("SELECT planet FROM singer WHERE country = 'Peru'", "SELECT 'Earth'"),
        (YOUNGEST, "SELECT name FROM singer WHERE singer_id = 3"),
    ],
)
def test_constants_earn_nothing(paid: Paid, gold: str, answer: str) -> None:
    assert paid(answer, gold, guard=False)[0] == 1
    assert paid(answer, gold)[0] == 0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        # The filter keeps all rows.
        ("SELECT name FROM singer WHERE age > 20", "SELECT name FROM singer"),
        (f"{OVER_26} AND country = 'USA'", "SELECT name FROM singer WHERE name LIKE '%nn'"),
        (OVER_26, "SELECT name FROM singer WHERE age >= 26"),
        # This one earns em.
        (OVER_26, "SELECT name FROM singer WHERE age > 27"),
        ("SELECT count(*) FROM song", "SELECT count(*) FROM singer"),
        ("SELECT min(singer_id) FROM song", "SELECT min(singer_id) FROM singer"),
        ("SELECT name FROM singer ORDER BY singer_id", "SELECT name FROM singer ORDER BY name"),
        (
            "SELECT title FROM song WHERE year = 2001 OR year = 2003",
            "SELECT title FROM song WHERE year < 2010",
        ),
        (JOINED, "SELECT name FROM singer WHERE country = 'Peru'"),
    ],
)
def test_agreement_by_accident_earns_nothing(paid: Paid, gold: str, answer: str) -> None:
    assert paid(answer, gold, guard=False)[0] == 1
    assert paid(answer, gold)[0] == 0


SEEN = {
    "names": "SELECT name FROM place",
    "codes": "SELECT code FROM place",
    "threes": "SELECT name FROM shop WHERE grp = 3",
}


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("SELECT name FROM place", "SELECT name FROM place WHERE name IN ({names})"),
        ("SELECT code FROM place", "SELECT code FROM place WHERE code IN ({codes})"),
        ("SELECT code FROM place", "SELECT code FROM place WHERE code BETWEEN 'c0' AND 'c7'"),
        ("SELECT id FROM shop", "SELECT id FROM shop WHERE id BETWEEN 1 AND 120"),
        (
            "SELECT DISTINCT grp FROM shop",
            "SELECT DISTINCT grp FROM shop WHERE grp IN (0, 1, 2, 3, 4, 5, 6)",
        ),
        ("SELECT grp FROM shop", "SELECT grp FROM shop WHERE grp BETWEEN 0 AND 6"),
        (
            "SELECT DISTINCT place FROM shop",
            "SELECT DISTINCT place FROM shop WHERE place IN ({codes})",
        ),
        (
            "SELECT opened FROM shop",
            "SELECT opened FROM shop WHERE opened BETWEEN '2000-01-11' AND '2019-09-11'",
        ),
        ("SELECT max(grp) FROM shop", "SELECT 6"),
        (SEEN["threes"], "SELECT name FROM shop WHERE name IN ({threes})"),
    ],
)
def test_a_list_or_range_of_the_values_in_the_database_earns_nothing(
    unusual: Database, gold: str, answer: str
) -> None:
    for key, sql in SEEN.items():
        values = [f"'{value}'" for (value,) in run_query(unusual.path, sql).rows]
        answer = answer.replace(f"{{{key}}}", ", ".join(values))
    assert written_match(answer, gold, unusual.path, LIMITS)
    assert evidence(answer, gold, unusual.schema, unusual.path, LIMITS) is Evidence.DIFFERS


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (COUNT, "select COUNT(singer_id) from singer s where s.country in ('USA')"),
        (
            JOINED,
            "SELECT name FROM singer "
            "WHERE singer_id IN (SELECT singer_id FROM song WHERE year = 2010)",
        ),
        (
            JOINED,
            "SELECT s.name FROM song g, singer s "
            "WHERE g.year IN (2010) AND s.singer_id = g.singer_id",
        ),
        (
            "SELECT count(*) FROM song",
            "SELECT count(*) FROM song JOIN singer ON song.singer_id = singer.singer_id",
        ),
        ("SELECT max(age) FROM singer", "SELECT age FROM singer ORDER BY age DESC LIMIT 1"),
        (YOUNGEST, "SELECT name FROM singer WHERE age = (SELECT min(age) FROM singer)"),
        (
            "SELECT country, count(*) FROM singer GROUP BY country",
            "SELECT count(*), country FROM singer GROUP BY 2",
        ),
        ("SELECT avg(sales) FROM singer", "SELECT sum(sales) / count(sales) FROM singer"),
        (
            "SELECT sum(sales) FROM singer",
            "SELECT sum(sales) FROM (SELECT sales FROM singer ORDER BY sales DESC)",
        ),
        ("SELECT name FROM singer WHERE age > 20", "SELECT name FROM singer WHERE NOT age <= 20"),
        # Rows tie on some copies.
        (
            "SELECT title FROM song WHERE year >= 2010 ORDER BY year LIMIT 1",
            "SELECT title FROM song WHERE year >= 2010 ORDER BY year, title DESC LIMIT 1",
        ),
        (
            "SELECT name FROM singer WHERE singer_id NOT IN (SELECT singer_id FROM song)",
            "SELECT name FROM singer EXCEPT SELECT T1.name "
            "FROM singer T1 JOIN song T2 ON T1.singer_id = T2.singer_id",
        ),
    ],
)
def test_other_queries_with_the_same_meaning_are_paid(paid: Paid, gold: str, answer: str) -> None:
    assert paid(answer, gold) == (1, 0)


NOWHERE = "SELECT name FROM singer WHERE country = 'usa'"  # no rows: the values say USA


def test_an_empty_result_does_not_match_every_other_empty_result(paid: Paid) -> None:
    other = "SELECT title FROM song WHERE year = 1900"
    assert paid(other, NOWHERE, guard=False) == (1, 0)
    assert paid(other, NOWHERE) == (0, 0)
    null = "SELECT max(age) FROM singer WHERE country = 'usa'"
    assert paid("SELECT NULL", null, guard=False) == (1, 0)
    assert paid("SELECT NULL", null) == (0, 0)


def test_the_same_query_is_paid_although_its_result_is_empty(paid: Paid) -> None:
    # The gold has rows on copies.
    assert paid("SELECT name FROM singer WHERE NOT country <> 'usa'", NOWHERE) == (1, 0)
    assert paid(NOWHERE, NOWHERE) == (1, 1)
    assert paid("SELECT T1.name FROM singer AS T1 WHERE T1.country = 'usa'", NOWHERE) == (1, 1)
    swapped = "SELECT name FROM singer WHERE age > 99 AND country = 'usa'"
    assert paid(swapped, f"{NOWHERE} AND age > 99") == (1, 1)
    # The same structure, but another question.
    assert paid(NOWHERE.replace("usa", "chile"), NOWHERE) == (0, 1)


def test_an_answer_that_compiles_to_the_steps_of_the_gold_is_paid(paid: Paid) -> None:
    """Here no copy distinguishes the gold from other queries."""
    gold = 'SELECT name FROM singer WHERE country = "nowhere" LIMIT 1'
    assert paid(gold.replace('= "nowhere"', 'IN ("nowhere")'), gold)[0] == 1
    every = "SELECT song_id, title, year, singer_id FROM song"
    quoted = 'SELECT "song_id", `title`, [year], singer_id FROM "song"'
    assert paid(quoted, every, ("SELECT * FROM song",))[0] == 1


def test_under_the_rule_of_bird_the_guard_compares_sets_of_rows(db: Path, schema: Schema) -> None:
    gold = "SELECT country, age FROM singer"

    def paid_ex(sql: str, ex: ExRule) -> float:
        turn = Turn("dev:0:0", 0, "shows", "?", gold, ex=ex)
        return answer_scores(sql, turn, schema, db, RewardConfig(), LIMITS)[0]

    repeated = f"{gold} UNION ALL {gold}"
    assert (paid_ex(repeated, "set"), paid_ex(repeated, "official")) == (1, 0)
    swapped = "SELECT age, country FROM singer"
    assert (paid_ex(swapped, "set"), paid_ex(swapped, "official")) == (0, 1)
    rows = run_query(db, gold, LIMITS).rows
    constant = " UNION ".join(f"SELECT '{country}', {age}" for country, age in rows)
    assert written_match(constant, gold, db, LIMITS, "set") and paid_ex(constant, "set") == 0


@pytest.mark.parametrize(
    "answer", [USA, "select  T1.name FROM singer AS T1 WHERE T1.country = 'USA';"]
)
def test_an_earlier_turns_query_earns_nothing_again(paid: Paid, answer: str) -> None:
    france = USA.replace("USA", "France")
    assert paid(answer, france, (USA,), guard=False) == (0, 1)  # exact match ignores values
    assert paid(answer, france, (USA,)) == (0, 0)
    assert paid(answer, france, (USA, "SELECT name FROM singer")) == (0, 0)


def test_an_earlier_query_without_the_distinct_of_the_gold_earns_nothing(paid: Paid) -> None:
    plain = "SELECT country FROM singer"
    distinct = "SELECT DISTINCT country FROM singer"
    assert paid(plain, distinct, (plain,), guard=False) == (0, 1)  # exact match ignores DISTINCT
    assert paid(plain, distinct, (plain,)) == (0, 0)
    assert paid(plain, distinct) == (0, 1)


def test_a_turn_that_asks_for_the_earlier_query_again_is_paid(paid: Paid) -> None:
    assert paid(USA, USA, (USA,)) == (1, 1)
    assert paid(USA + ";", USA.replace("name", "singer.name"), (USA,)) == (1, 1)


def test_a_gold_that_no_copy_distinguishes_from_a_constant_is_paid_for_its_structure(
    paid: Paid, db: Path, schema: Schema
) -> None:
    gold = "SELECT count(*) FROM (SELECT * FROM singer LIMIT 1)"  # 1 if there are any singers
    answer = "SELECT 1 FROM singer LIMIT 1"
    assert evidence(answer, gold, schema, db, LIMITS) is Evidence.NONE
    assert paid(answer, gold, guard=False) == (1, 0)
    assert paid(answer, gold) == (0, 0)
    assert paid(gold.replace("count", "COUNT"), gold) == (1, 1)
    outside_grammar = "SELECT CASE WHEN 1 THEN 1 END FROM singer LIMIT 1"
    assert paid(f"{outside_grammar};", outside_grammar) == (1, 0)


def test_an_answer_that_fails_on_a_copy_differs(db: Path, schema: Schema) -> None:
    gold = "SELECT count(*) FROM singer"
    answer = f"{gold} WHERE NOT EXISTS (SELECT 1 FROM sqlite_master WHERE name = 'nothing') "
    assert evidence(answer, gold, schema, db, LIMITS) is Evidence.AGREES
    indexed = f"{gold} INDEXED BY nothing"
    assert evidence(indexed, gold, schema, db, LIMITS) is Evidence.DIFFERS


@pytest.mark.parametrize(
    "elsewhere",
    [
        "zeroblob(1000000000)",
        "json_extract('{}', 'no such table')",
        "abs(-9223372036854775807 - 1)",
        "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n)",
        "length(trim(hex(zeroblob(15000)), '1' || hex(zeroblob(15000)))) + random()",
    ],
)
def test_an_answer_that_fails_or_does_not_end_on_other_rows_differs(
    unusual: Database, elsewhere: str
) -> None:
    """It recognises the database by its number of rows. The gold ends on copies; otherwise an
    answer could choose to be judged on the database alone."""
    gold = "SELECT count(*) FROM shop WHERE grp = 3"
    is_here = f"(SELECT count(*) FROM shop) = {NUM_SHOPS}"
    [[count]] = run_query(unusual.path, gold).rows
    answer = f"SELECT CASE WHEN {is_here} THEN {count} ELSE {elsewhere} END"
    assert run_query(unusual.path, answer).rows == ((count,),)
    assert evidence(answer, gold, unusual.schema, unusual.path, LIMITS) is Evidence.DIFFERS


def test_copies_on_which_the_gold_varies_with_the_order_of_storage_are_not_used(
    db: Path, schema: Schema
) -> None:
    trial = trial_of("SELECT title FROM song LIMIT 1", schema, db, LIMITS)
    for copy in trial.copies:
        assert run_query(copy.database, "SELECT count(DISTINCT title) FROM song").rows == ((1,),)


def test_copies_need_no_files(
    db: Path, schema: Schema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nobody can delete them and no disk can be full. A new worker and a forked process have
    them too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.tempdir", None)
    answer = "SELECT singer.name FROM singer WHERE country IN ('USA')"
    assert evidence(answer, USA, schema, db, LIMITS) is Evidence.AGREES
    the_pool().stop()
    the_pool().resume()
    clear_result_cache()
    assert evidence(answer, USA, schema, db, LIMITS) is Evidence.AGREES
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(evidence(answer, USA, schema, db, LIMITS) is not Evidence.AGREES)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert evidence(answer, USA, schema, db, LIMITS) is Evidence.AGREES


def test_names_that_differ_in_letters_beyond_ascii_are_judged(tmp_path: Path) -> None:
    script = 'CREATE TABLE "É" (a INT); CREATE TABLE "é" (b INT); INSERT INTO "É" VALUES (1), (2);'
    path = make_database(tmp_path / "x.sqlite", script)
    turn = Turn("x:0:0", 0, "x", "?", 'SELECT a FROM "É"')
    schema = schema_from_sqlite(path)
    assert answer_scores(turn.sql, turn, schema, path, RewardConfig(), LIMITS)[0] == 1


def test_a_missing_database_gives_no_evidence(schema: Schema, tmp_path: Path) -> None:
    assert evidence("SELECT 1", USA, schema, tmp_path / "gone.sqlite", LIMITS) is Evidence.UNKNOWN


def test_most_published_predictions_that_match_officially_are_paid(shared: Path) -> None:
    """The few that are not paid agree by accident."""
    data = shared / "data"
    schemas = load_schemas(data / "tables.json")
    counts: Counter[tuple[str, Evidence | str]] = Counter()
    for pair in conformance_pairs(shared):
        if not pair["ex"]:
            continue
        pred = pair["pred"]
        gold = pair["gold"]
        db_path = data / pair["db"]
        kind = "em" if pair["em"] else "ex only"
        # Official verdicts ignore DISTINCT and `value`, but rewards do not.
        if written_match(pred, gold, db_path, LIMITS):
            counts[kind, evidence(pred, gold, schemas[pair["db_id"]], db_path, LIMITS)] += 1
        else:
            counts[kind, "no written match"] += 1
    assert sum(counts.values()) == 159
    assert counts["em", Evidence.AGREES] >= 75
    assert counts["em", Evidence.DIFFERS] <= 6  # their literals are wrong
    assert counts["ex only", Evidence.AGREES] >= 52
    assert counts["ex only", Evidence.DIFFERS] >= 9
