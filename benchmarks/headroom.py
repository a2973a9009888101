"""What each ability is worth on the embedded world, before any model is trained.

    python benchmarks/headroom.py

A reader answers every turn of dev_seen and dev from what the world knows about the question. The
perfect reader always answers with the gold query. Each other reader lacks something, and the
execution match (EX, official) of its answers shows what that is worth:

    no history            it reads the question alone
    only the last turn    it takes every question for one about the last turn
    forgets filters       it drops the filters that a follow-up keeps without saying so
    keeps filters         it keeps the filters that a follow-up drops or replaces
    sees no results       it guesses a value that only an earlier result shows
    guesses spellings     it writes a value as the question does
    only the last SQL     only the last turn and sees no results: all but the last query is lost
    looks nothing up      sees no results and guesses spellings: what RL can gain by looking
    hasty                 no history, sees no results and guesses spellings

The headroom of an ability is 100 less the EX of its reader, by turn and by hardness of the gold.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flags import run_benchmark

from mtsql.judge.aggregate import LEVELS, TURNS, Score, aggregate
from mtsql.judge.execution_match import execution_match
from mtsql.judge.hardness import hardness
from mtsql.sql.schema import Schema, load_schemas
from mtsql.toyworld.dialogues import AskedTurn, guesses, unknown_spellings
from mtsql.toyworld.states import Domain, Filter, State, to_sql
from mtsql.toyworld.world import MadeDialogue, WorldConfig, make_dialogues, write_tables


@dataclass(frozen=True)
class Flags:
    """The world to look at; the defaults are that of the quick start."""

    seed: int = 0
    """Seed of the world."""
    size: WorldConfig = WorldConfig()


@dataclass(frozen=True)
class Lacks:
    """What a reader lacks."""

    history: bool = False
    earlier_turns: bool = False
    kept: bool = False
    dropped: bool = False
    results: bool = False
    spellings: bool = False


READERS = {
    "perfect": Lacks(),
    "no history": Lacks(history=True),
    "only the last turn": Lacks(earlier_turns=True),
    "forgets filters": Lacks(kept=True),
    "keeps filters": Lacks(dropped=True),
    "sees no results": Lacks(results=True),
    "guesses spellings": Lacks(spellings=True),
    "only the last SQL": Lacks(earlier_turns=True, results=True),
    "looks nothing up": Lacks(results=True, spellings=True),
    "hasty": Lacks(history=True, results=True, spellings=True),
}


def answer(turn: AskedTurn, earlier: Sequence[AskedTurn], domain: Domain, lacks: Lacks) -> str:
    """The query that a reader answers a turn with."""
    state = _understood(turn, lacks)
    unseen = _unseen(turn, earlier, lacks)
    unknown = unknown_spellings(turn, earlier) if lacks.spellings else []

    def literal(f: Filter) -> object:
        if f in unseen:
            return f.guess
        return f.said if f in unknown else f.value

    return to_sql(state, domain, literal)


def _understood(turn: AskedTurn, lacks: Lacks) -> State:
    """The state that a reader takes the question for."""
    if lacks.history and turn.alone is not None:
        return turn.alone
    if lacks.earlier_turns and turn.of_last is not None:
        return turn.of_last
    if lacks.kept and turn.forgets is not None:
        return turn.forgets
    if lacks.dropped and turn.keeps is not None:
        return turn.keeps
    return turn.state


def _unseen(turn: AskedTurn, earlier: Sequence[AskedTurn], lacks: Lacks) -> list[Filter]:
    """The values of earlier results that a reader guesses."""
    if lacks.results or lacks.history:
        return guesses(turn, earlier)
    is_far = turn.shown is not None and turn.shown.turn != len(earlier) - 1
    return guesses(turn, earlier) if lacks.earlier_turns and is_far else []


def scores(
    dialogues: Iterable[MadeDialogue],
    schemas: dict[str, Schema],
    databases: Path,
    lacks: Lacks,
) -> list[Score]:
    """The verdicts on a reader's answers to all turns. `databases` holds the database folders."""
    found = []
    for number, dialogue in enumerate(dialogues):
        domain = dialogue.domain
        path = databases / domain.db_id / f"{domain.db_id}.sqlite"
        for place, turn in enumerate(dialogue.turns):
            gold = to_sql(turn.state, domain)
            sql = answer(turn, dialogue.turns[:place], domain, lacks)
            ex = sql == gold or execution_match(sql, gold, path)
            level = hardness(gold, schemas[domain.db_id])
            found.append(Score(number, place, level, em=None, ex=ex))
    return found


def table(of_readers: dict[str, list[Score]]) -> str:
    """A Markdown table of the EX of readers, by turn and by hardness."""
    names = ["reader", *(f"turn {turn}" for turn in TURNS), *LEVELS]
    lines = [f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}"]
    for number, (reader, its_scores) in enumerate(of_readers.items()):
        summary = aggregate(its_scores)
        figures = [*summary.by_turn.values(), *summary.by_hardness.values()]
        if number == 0:
            cells = [str(one.count) for one in figures]
            lines.append(f"| turns | {' | '.join(cells)} |")
        cells = [f"{100 * (one.ex or 0):.1f}" if one.count else "-" for one in figures]
        lines.append(f"| {reader} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    flags: Flags, folder: Path, readers: dict[str, Lacks] = READERS
) -> dict[str, dict[str, list[Score]]]:
    """The scores of each reader on dev_seen and dev, by split and reader. The databases are
    written to `folder`."""
    domains, made = make_dialogues(folder, flags.seed, flags.size)
    write_tables(folder, domains)
    schemas = load_schemas(folder / "tables.json")
    of_splits = {}
    for split in ("dev_seen", "dev"):
        of_splits[split] = {
            name: scores(made[split], schemas, folder / "database", lacks)
            for name, lacks in readers.items()
        }
    return of_splits


def main(flags: Flags) -> None:
    """Print a table for each split."""
    with tempfile.TemporaryDirectory() as folder:
        for split, of_readers in measure(flags, Path(folder)).items():
            print(f"EX of readers on {split}, in per cent\n\n{table(of_readers)}\n")


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
