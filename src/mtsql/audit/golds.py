"""Check each turn: can its gold be judged, what pays the reward for it, and what for nothing.

Whether a gold can be judged is seen by running it as it is written. What a gold, an attack or a
rewriting earns is asked of the reward itself.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from mtsql.agent.env import SqlEnv
from mtsql.audit.attacks import attacks_on
from mtsql.audit.config import Config
from mtsql.audit.report import Case, Report
from mtsql.audit.rewritings import rewritings_of
from mtsql.audit.turns import over_turns
from mtsql.judge.agreement import is_ordered, rounded, stable_order
from mtsql.judge.guard import trial_of
from mtsql.judge.same_query import is_same_query
from mtsql.judge.sql_parser import parse_sql
from mtsql.rl.rewards import answer_scores
from mtsql.sql.dialogues import Corpus, Turn
from mtsql.sql.sandbox import Mirror, QueryResult, run_query
from mtsql.sql.schema import Schema, schema_from_sqlite


@dataclass
class Findings:
    """What was found about one turn.

    doubts: (check, detail, badness). attacks: name -> whether it is paid, without and with the
    guard. rewritings: kind -> (text, ex, em). set_aside: kind -> (text, why).
    """

    doubts: list[tuple[str, str, float]] = field(default_factory=list)
    attacks: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    rewritings: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    set_aside: dict[str, tuple[str, str]] = field(default_factory=dict)


def audit(corpus: Corpus, config: Config) -> Report:
    """Check every turn of the corpus."""
    start = time.monotonic()
    count_tokens, how = _token_counter(config.tokenizer)
    report, seen = Report(prompt_tokens=how), {}
    for turn, found in over_turns(lambda turn: _look(turn, corpus, config), corpus.turns, "audit"):
        key = (turn.db_id, _questions(turn), " ".join(turn.sql.split()))
        if key in seen:
            found.doubts.append(("duplicate", f"of {seen[key]}", 0.0))
        seen.setdefault(key, turn.turn_id)
        env = SqlEnv(turn, corpus.databases[turn.db_id], config.env, config.prompt_style)
        num_tokens = count_tokens(*env.reset())
        report.longest_prompt = max(report.longest_prompt, (num_tokens, turn.turn_id))
        if num_tokens > config.max_prompt_tokens:
            found.doubts.append(("prompt over budget", f"{num_tokens} tokens", num_tokens))
        _enter(found, turn, report)
    for cases in report.cases.values():
        cases.sort(key=lambda case: -case.badness)
    report.secs = time.monotonic() - start
    return report


def _questions(turn: Turn) -> tuple[str, ...]:
    return (*(question for question, _ in turn.history), turn.question)


def _enter(found: Findings, turn: Turn, report: Report) -> None:
    """Add a turn's findings to the report."""
    report.num_turns += 1
    for check, detail, badness in found.doubts:
        case = Case(turn.turn_id, turn.db_id, detail, turn.sql, badness)
        report.cases[check].append(case)
    for name, (is_paid_unguarded, is_paid) in found.attacks.items():
        attack = report.attacks[name]
        attack.num_turns += 1
        attack.num_paid_unguarded += is_paid_unguarded
        attack.num_paid += is_paid
    doubts = [check for check, _, _ in found.doubts if check.startswith("gold")]
    about = f" ({', '.join(doubts)})" if doubts else ""
    for kind, (text, ex, em) in found.rewritings.items():
        tally = report.rewritings[kind]
        tally.num_turns += 1
        tally.num_paid_ex += ex == 1.0
        tally.num_paid_em += em == 1.0
        if ex < 1.0:
            case = Case(turn.turn_id, turn.db_id, f"{kind}{about}: {text}", turn.sql)
            report.unpaid_rewritings.append(case)
            tally.num_unpaid_telling += not {"gold empty", "gold untellable"} & set(doubts)
    for kind, (text, why) in found.set_aside.items():
        report.rewritings[kind].num_set_aside += 1
        case = Case(turn.turn_id, turn.db_id, f"{kind}: {why}: {text}", turn.sql)
        report.rewritings_set_aside.append(case)


def _look(turn: Turn, corpus: Corpus, config: Config) -> Findings:
    """Everything about a turn that needs no other turn."""
    database = corpus.databases[turn.db_id]
    schema, db_path = database.schema, database.path
    limits, found = config.env.query, Findings()

    def doubt(check: str, detail: str, badness: float = 0.0) -> None:
        found.doubts.append((check, detail, badness))

    gold = run_query(db_path, turn.sql, limits)
    if not gold.is_ok:
        doubt("gold fails", f"{gold.status.value}: {gold.message}", gold.num_ticks)
    elif gold.is_empty:
        doubt("gold empty", f"{len(gold.rows)} rows, all NULL" if gold.rows else "no rows")
    ex, em = answer_scores(turn.sql, turn, schema, db_path, config.reward, limits)
    if ex < 1.0:
        doubt("gold unpaid ex", _why_unpaid(gold, em))
    elif em < 1.0:
        doubt("gold unpaid em", _why_unlike_itself(turn.sql, schema))
    if gold.is_ok:
        order = _order(turn.sql, gold, db_path, config)
        if order == "undetermined":
            doubt("gold undetermined", f"{len(gold.rows)} rows", len(gold.rows))
        elif order == "tied" and is_ordered(turn.sql):
            doubt("gold order tied", f"{len(gold.rows)} rows", len(gold.rows))
        trial = trial_of(turn.sql, schema, db_path, limits)
        if trial.is_unknown:
            doubt("gold unguarded", f"{len(gold.rows)} rows")
        elif not gold.is_empty and not trial.is_telling:
            doubt("gold untellable", f"{len(gold.rows)} rows", -len(gold.rows))
        if config.rewritings and ex == 1.0 and order in ("fixed", "tied"):
            _rewrite(turn, gold, order == "fixed", schema, db_path, config, found)
    paid = _attack(turn, gold, schema, db_path, config, found)
    if paid:
        detail = "; ".join(f"{name}: {sql}" for name, sql in paid.items())
        doubt("farmable", detail, len(paid))
    return found


def _why_unpaid(gold: QueryResult, em: float) -> str:
    missing = "ex" if em == 1.0 else "ex and em"
    if not gold.is_ok:
        return f"{missing}: the gold fails: {gold.status.value}: {gold.message}"
    return f"{missing}: the gold runs and returns {len(gold.rows)} rows, but the reward refuses it"


def _why_unlike_itself(sql: str, schema: Schema) -> str:
    if parse_sql(sql, schema) is None:
        return "em: the gold is outside of the grammar that the official parser reads"
    return "em: the official comparison finds a difference between the gold and itself"


def _order(sql: str, gold: QueryResult, db_path: Path, config: Config) -> str:
    """What a gold's result owes to the way in which rows are stored: "fixed" (nothing), "tied" (at
    most the order of rows), "undetermined" (the rows), or "unknown"."""
    # With one blank more it is another text, so it runs again, with other random numbers.
    again = run_query(db_path, f"{sql} ", config.env.query)
    mirrored = run_query(Mirror(db_path), sql, config.env.query)
    if not (again.is_ok and mirrored.is_ok):
        return "unknown"  # the mirror has no index: too slow to tell
    orders = [stable_order(gold.rows, other.rows, sql) for other in (again, mirrored)]
    if None in orders:
        return "undetermined"
    return "fixed" if all(orders) else "tied"


def _rewrite(
    turn: Turn,
    gold: QueryResult,
    has_order: bool,
    schema: Schema,
    db_path: Path,
    config: Config,
    found: Findings,
) -> None:
    """Answer by each rewriting of the gold that returns the gold's rows."""
    limits, rows = config.env.query, rounded(gold.rows)
    for kind, text in rewritings_of(turn.sql, _own_schema(db_path)).items():
        result = run_query(db_path, text, limits)
        others = rounded(result.rows)
        if not result.is_ok:
            found.set_aside[kind] = (text, f"{result.status.value}: {result.message}")
        elif Counter(others) != Counter(rows):
            found.set_aside[kind] = (text, f"{len(others)} rows, not the gold's {len(rows)}")
        elif has_order and others != rows:
            found.set_aside[kind] = (text, "another order of rows")
        else:
            scores = answer_scores(text, turn, schema, db_path, config.reward, limits)
            found.rewritings[kind] = (text, *scores)


@lru_cache(maxsize=1000)
def _own_schema(db_path: Path) -> Schema:
    """The schema that SQLite resolves names by; tables.json may say something else."""
    return schema_from_sqlite(db_path)


def _attack(
    turn: Turn, gold: QueryResult, schema: Schema, db_path: Path, config: Config, found: Findings
) -> dict[str, str]:
    """Try every attack; -> those that the reward pays, by name, as `config.reward` is."""
    open_reward, paid = replace(config.reward, guard=False), {}
    for name, sql in attacks_on(turn, gold, schema):
        if is_same_query(sql, turn.sql, schema):
            continue
        args = (sql, turn, schema, db_path)
        is_paid_unguarded = any(answer_scores(*args, open_reward, config.env.query))
        is_paid = is_paid_unguarded and any(answer_scores(*args, config.reward, config.env.query))
        before = found.attacks.get(name, (False, False))
        found.attacks[name] = (before[0] or is_paid_unguarded, before[1] or is_paid)
        if is_paid:
            paid.setdefault(name, sql)
    return paid


def _token_counter(path: str | None) -> tuple[Callable[[list[dict], list[dict]], int], str]:
    """(a function from messages and tool schemas to tokens, how it counts)."""
    if path is None:
        how = "estimated, 4 characters a token"
        return lambda messages, tools: len(json.dumps([messages, tools])) // 4, how
    from mtsql.model.policy import (
        load_tokenizer,
    )  # torch takes seconds to import; only this needs it
    from mtsql.model.rendering import Renderer

    try:
        renderer = Renderer(load_tokenizer(path))
    except ValueError as error:  # which takes the folder for that of a model to train
        raise ValueError(str(error).replace("model.path", "tokenizer", 1)) from error
    return lambda messages, tools: len(
        renderer.render_prompt(messages, tools)
    ), f"counted by {path}"
