"""Demonstrations from gold SQL: the cold start of a model for any data set, without a teacher.

Of each turn, the gold query is run, checked and answered with, by the environment's own tools. Some
demonstrations begin with a query that is wrong in a way that the environment shows (`GoldConfig`).
Such a query is an edit of the parsed gold query. It is used only if its result is not the gold
one's, and if its observation shows the mistake: an error that names it, a result without rows, or
the last turn's query in the memory.

A demonstration depends on the seed, the turn and its database alone.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mtsql.agent.env import EnvConfig
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.demos import thoughts
from mtsql.demos.config import KINDS, NUM_REPLIES, GoldConfig
from mtsql.demos.filters import dropped, kept
from mtsql.demos.literals import looked_up_first, misspelled
from mtsql.demos.plan import Act, Plan, direct, looked_up, mended, recalled, steps_of, thinking
from mtsql.demos.scene import FirstTry, Scene
from mtsql.demos.structure import wrong_aggregates, wrong_columns, wrong_joins
from mtsql.sql.dialogues import Corpus, Turn
from mtsql.sql.sandbox import QueryStatus
from mtsql.sql.schema import Schema, schema_from_sqlite
from mtsql.sql.worker_pool import query_threads, the_pool

MAX_TRIES = 12
"""Edits of a kind that are tried on a turn before it is played without one."""
FIRST_TRIES: dict[str, Callable[[Scene], Iterator[FirstTry]]] = {
    "literal": misspelled,
    "look_up": looked_up_first,
    "column": wrong_columns,
    "join": wrong_joins,
    "aggregate": wrong_aggregates,
    "dropped": dropped,
    "kept": kept,
}
"""What makes the first tries of a kind."""
BY_MEMORY = ("dropped", "kept")
"""Kinds that the memory shows; all others need a run. Without that tool nothing shows a mistake, so
none is made."""
UNNAMED = ("column", "join")
"""Kinds whose first query may have other tables and columns: the first thought names none."""

LEFT_OUT = {
    QueryStatus.ERROR: "the gold query fails",
    QueryStatus.DENIED: "the gold query fails",
    QueryStatus.TIMEOUT: "the gold query takes too long",
    QueryStatus.TOO_LARGE: "the gold query's result is too large",
}
"""Why there is no demonstration of a turn, by how its gold query ends."""
NOTHING_FOUND = "the gold query finds nothing"
"""The honest verdict on a result without rows is no_pass, and the agent cannot know that the query
is right all the same. A demonstration would teach to pass such results, or to answer in spite of
no_pass."""


@dataclass(frozen=True)
class Demonstration:
    """How a turn is played, as `steps` of demonstrations.jsonl. first: the kind of its first try;
    empty if that is the gold query."""

    turn_id: str
    first: str
    steps: list[dict[str, Any]]

    @property
    def record(self) -> dict[str, Any]:
        """A line of demonstrations.jsonl."""
        return {"turn_id": self.turn_id, "first": self.first, "steps": self.steps}


@dataclass
class Made:
    """The demonstrations of a corpus, in its order, and what was counted.

    left_out: reason -> number of turns without a demonstration. drawn: kind -> demonstrations for
    which a first try of it was drawn, possible or not.
    """

    demonstrations: list[Demonstration] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)

    @property
    def num_turns(self) -> int:
        """The turns that were looked at."""
        return len(self.demonstrations) + self.left_out.total()

    def lines(self) -> list[str]:
        """What was made, for the screen."""
        played = Counter(one.first for one in self.demonstrations)
        lines = [f"{len(self.demonstrations)} of {self.num_turns} turns have a demonstration"]
        lines.append(f"  {played['']} begin with the gold query")
        for kind in KINDS:
            if self.drawn[kind]:
                drawn = f"drawn for {self.drawn[kind]} turns, not possible on the others"
                lines.append(f"  {played[kind]} with {kind} first ({drawn})")
        lines += [f"  {count} left out: {why}" for why, count in sorted(self.left_out.items())]
        return lines

    def text(self) -> str:
        """The text of demonstrations.jsonl."""
        return "".join(f"{json.dumps(one.record)}\n" for one in self.demonstrations)


Look = tuple[str, Demonstration | str]
"""The kind that was drawn for a turn, and its demonstration or why there is none."""


def demonstrations(
    corpus: Corpus,
    config: GoldConfig,
    env: EnvConfig,
    seed: int,
    show: Callable[[int, int], None] = lambda num_done, num_all: None,
) -> Made:
    """Demonstrations of all turns of a corpus within the limits of `env`. ValueError if there is
    none. `show` is told of each turn.

    Most use both of the paper's tools; `agent/demonstrations.py` fits them to fewer.
    """
    return gathered(look_at(corpus.turns, corpus, config, env, seed, show))


def gathered(looks: Sequence[Look]) -> Made:
    """What was found about the turns, in one. ValueError if none has a demonstration."""
    made = Made()
    for drawn, found in looks:
        if isinstance(found, str):
            made.left_out[found] += 1
        else:
            made.drawn[drawn] += 1
            made.demonstrations.append(found)
    if not made.demonstrations:
        why = "; ".join(f"{count} times {why}" for why, count in sorted(made.left_out.items()))
        raise ValueError(f"source=gold: no turn has a demonstration: {why or 'there is no turn'}")
    return made


def look_at(
    turns: Sequence[Turn],
    corpus: Corpus,
    config: GoldConfig,
    env: EnvConfig,
    seed: int,
    show: Callable[[int, int], None],
) -> list[Look]:
    """`demonstrate` each of the turns, in threads, because queries run in worker processes. There
    is one thread more than there are workers, which prepares the next query meanwhile."""
    used = {turn.db_id for turn in turns}
    paths = {db_id: database.path for db_id, database in corpus.databases.items() if db_id in used}
    with query_threads(the_pool().size + 1, "gold") as threads:
        schemas = dict(zip(paths, threads.map(schema_from_sqlite, paths.values()), strict=True))

        def look(turn: Turn) -> Look:
            return _look_at(turn, corpus, schemas[turn.db_id], config, env, seed)

        looks = []
        for number, found in enumerate(threads.map(look, turns)):
            show(number, len(turns))
            looks.append(found)
    return looks


def _look_at(
    turn: Turn, corpus: Corpus, schema: Schema, config: GoldConfig, env: EnvConfig, seed: int
) -> Look:
    rng = random.Random(f"{seed}/{turn.turn_id}")
    kind = config.draw(rng.random())
    scene = Scene(turn, corpus.databases[turn.db_id], schema, env, rng)
    return kind, demonstrate(scene, kind)


def demonstrate(scene: Scene, kind: str) -> Demonstration | str:
    """The demonstration of a turn whose first try is of this kind, if one is possible, and
    otherwise the gold query. Without a demonstration: why.

    kind: one of KINDS, or empty.
    """
    gold = scene.gold
    if not gold.is_ok:
        return LEFT_OUT[gold.status]
    if gold.is_empty:
        return NOTHING_FOUND
    turn_id = scene.turn.turn_id
    shown_by = MEMORY_RETRIEVE if kind in BY_MEMORY else EXEC_SQL
    if kind and shown_by in scene.config.tools:
        for first in islice(FIRST_TRIES[kind](scene), MAX_TRIES):
            plan = _with_first_try(first, kind, scene)
            if plan is not None:
                return Demonstration(turn_id, kind, steps_of(plan))
    return Demonstration(turn_id, "", steps_of(_at_once(scene)))


def _at_once(scene: Scene) -> Plan:
    gold = scene.turn.sql
    before = thoughts.asked(scene, gold)
    if scene.config.max_replies == 1:
        return [Act("answer", gold, before)]
    has_recall = bool(scene.turn.history) and scene.config.max_replies > 2
    plan = direct(gold, has_recall)
    return thinking(plan, {0: before, **_gold_thoughts(scene, plan)})


def _with_first_try(first: FirstTry, kind: str, scene: Scene) -> Plan | None:
    """The plan that begins with this try; None if it would need too many replies, if the try is
    right or if nothing shows that it is wrong."""
    gold, wrong = scene.turn.sql, first.sql
    has_history = bool(scene.turn.history)
    if first.look:
        plan = looked_up(wrong, first.look, gold, has_history)
        said = {len(plan) - 2: first.found}  # with the gold query, to the memory or to be run
    elif first.noticed == "memory" and wrong is not None:
        runs = EXEC_SQL in scene.config.tools
        plan = recalled(wrong, gold, runs)
        said = {2: first.after} if runs else {1: first.after}
        if runs:
            said[1] = thoughts.ran(scene.run(wrong), scene)
    elif wrong is not None:
        plan = mended(wrong, gold, has_history)
        said = {1: first.after}
    else:
        return None
    if len(plan) > min(scene.config.max_replies, NUM_REPLIES):
        return None
    if wrong is not None and (scene.is_right(wrong) or not scene.is_noticed(first)):
        return None
    before = first.before
    if not before and kind in UNNAMED:
        before = thoughts.try_first(scene)
    elif not before:
        before = thoughts.asked(scene, wrong or gold, kind != "dropped")
    if first.look and wrong is not None:
        said[1] = first.after
    return thinking(plan, {0: before, **_gold_thoughts(scene, plan), **said})


def _gold_thoughts(scene: Scene, plan: Plan) -> dict[int, str]:
    """The thoughts after a run of the gold query and after its recall."""
    said = {}
    for place, act in enumerate(plan[:-1]):
        if act.sql == scene.turn.sql and act.action == "exec_sql":
            said[place + 1] = thoughts.ran(scene.gold, scene)
        if act.sql == scene.turn.sql and act.action == "memory_retrieve":
            said[place + 1] = thoughts.coherent(scene)
    return said
