"""Check each turn: can its gold query be judged, and which answers does the reward pay?

To see whether a gold query can be judged, it is run as it is written. What a gold query, an attack
or a rewriting earns is computed by the reward itself. "The gold" is short for the gold query.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

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
from mtsql.rl.rewards import RewardConfig, answer_scores
from mtsql.sql.dialogues import Corpus, Turn
from mtsql.sql.sandbox import Mirror, run_query
from mtsql.sql.schema import Schema, schema_from_sqlite

Order = Literal["fixed", "tied", "undetermined", "unknown"]
TokenCounter = Callable[[list[dict], list[dict]], int]
"""A function from messages and tool schemas to the number of their tokens."""


@dataclass
class Findings:
    """What was found about one turn.

    doubts: (check, detail, badness). attacks: name -> whether it is paid (without the guard, with
    the guard). rewritings: kind -> (text, ex, em). set_aside: kind -> (text, reason).
    """

    doubts: list[tuple[str, str, float]] = field(default_factory=list)
    attacks: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    rewritings: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    set_aside: dict[str, tuple[str, str]] = field(default_factory=dict)

    def doubt(self, check: str, detail: str, badness: float = 0.0) -> None:
        """Note that the turn fails a check."""
        self.doubts.append((check, detail, badness))


def audit(corpus: Corpus, config: Config) -> Report:
    """Check every turn of the corpus."""
    start = time.monotonic()
    count_tokens, how = _token_counter(config.tokenizer)
    report = Report(prompt_tokens=how)
    first_with: dict[tuple, str] = {}  # (database, questions, gold) -> id of the first such turn

    def look(turn: Turn) -> Findings:
        return _TurnAudit(turn, corpus, config).findings()

    for turn, found in over_turns(look, corpus.turns, "audit"):
        key = (turn.db_id, _questions(turn), " ".join(turn.sql.split()))
        if key in first_with:
            found.doubt("duplicate", f"of {first_with[key]}")
        first_with.setdefault(key, turn.turn_id)
        env = SqlEnv(turn, corpus.databases[turn.db_id], config.env, config.prompt_style)
        num_tokens = count_tokens(*env.reset())
        report.longest_prompt = max(report.longest_prompt, (num_tokens, turn.turn_id))
        if num_tokens > config.max_prompt_tokens:
            found.doubt("prompt over budget", f"{num_tokens} tokens", num_tokens)
        _add(found, turn, report)
    for cases in report.cases.values():
        cases.sort(key=lambda case: -case.badness)
    report.secs = time.monotonic() - start
    return report


def _questions(turn: Turn) -> tuple[str, ...]:
    return (*(question for question, _ in turn.history), turn.question)


def _add(found: Findings, turn: Turn, report: Report) -> None:
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
    gold_doubts = [check for check, _, _ in found.doubts if check.startswith("gold")]
    about_gold = f" ({', '.join(gold_doubts)})" if gold_doubts else ""
    is_telling = "gold empty" not in gold_doubts and "gold untellable" not in gold_doubts
    for kind, (text, ex, em) in found.rewritings.items():
        tally = report.rewritings[kind]
        tally.num_turns += 1
        tally.num_paid_ex += ex == 1.0
        tally.num_paid_em += em == 1.0
        if ex < 1.0:
            detail = f"{kind}{about_gold}: {text}"
            report.unpaid_rewritings.append(Case(turn.turn_id, turn.db_id, detail, turn.sql))
            tally.num_unpaid_telling += is_telling
    for kind, (text, reason) in found.set_aside.items():
        report.rewritings[kind].num_set_aside += 1
        detail = f"{kind}: {reason}: {text}"
        report.rewritings_set_aside.append(Case(turn.turn_id, turn.db_id, detail, turn.sql))


class _TurnAudit:
    """Everything about one turn that needs no other turn."""

    def __init__(self, turn: Turn, corpus: Corpus, config: Config) -> None:
        database = corpus.databases[turn.db_id]
        self.turn = turn
        self.schema = database.schema
        self.db_path = database.path
        self.config = config
        self.limits = config.env.query
        self.gold = run_query(self.db_path, turn.sql, self.limits)
        self.found = Findings()

    def findings(self) -> Findings:
        """Run all checks that the configuration asks for."""
        gold = self.gold
        if not gold.is_ok:
            self.found.doubt("gold fails", f"{gold.status.value}: {gold.message}", gold.num_ticks)
        elif gold.is_empty:
            detail = f"{len(gold.rows)} rows, all NULL" if gold.rows else "no rows"
            self.found.doubt("gold empty", detail)
        ex, em = self.scores(self.turn.sql, self.config.reward)
        if ex < 1.0:
            self.found.doubt("gold unpaid ex", self.why_unpaid(em))
        elif em < 1.0:
            self.found.doubt("gold unpaid em", self.why_unlike_itself())
        if gold.is_ok:
            order = self.order()
            self.check_rows(order)
            if self.config.rewritings and ex == 1.0 and order in ("fixed", "tied"):
                self.try_rewritings(order == "fixed")
        paid = self.try_attacks()
        if paid:
            detail = "; ".join(f"{name}: {sql}" for name, sql in paid.items())
            self.found.doubt("farmable", detail, len(paid))
        return self.found

    def scores(self, sql: str, reward: RewardConfig) -> tuple[float, float]:
        """(ex, em) that the reward pays for an answer."""
        return answer_scores(sql, self.turn, self.schema, self.db_path, reward, self.limits)

    def why_unpaid(self, em: float) -> str:
        """Why the gold itself does not earn ex."""
        missing = "ex" if em == 1.0 else "ex and em"
        gold = self.gold
        if not gold.is_ok:
            return f"{missing}: the gold fails: {gold.status.value}: {gold.message}"
        num_rows = len(gold.rows)
        return f"{missing}: the gold runs and returns {num_rows} rows, but the reward refuses it"

    def why_unlike_itself(self) -> str:
        """Why the gold itself does not earn em."""
        if parse_sql(self.turn.sql, self.schema) is None:
            return "em: the gold is outside of the grammar that the official parser reads"
        return "em: the official comparison finds a difference between the gold and itself"

    def order(self) -> Order:
        """How far the gold fixes its result, whatever the order in which rows are stored.

        "fixed": completely. "tied": except for the order of rows. "undetermined": not even which
        rows it returns. "unknown": it did not run a second time.
        """
        sql = self.turn.sql
        # With one more blank it is another text, so it runs again, with other random numbers.
        again = run_query(self.db_path, f"{sql} ", self.limits)
        mirrored = run_query(Mirror(self.db_path), sql, self.limits)
        if not (again.is_ok and mirrored.is_ok):
            return "unknown"  # the mirror has no index, so the query may be too slow there
        orders = [stable_order(self.gold.rows, other.rows, sql) for other in (again, mirrored)]
        if None in orders:
            return "undetermined"
        return "fixed" if all(orders) else "tied"

    def check_rows(self, order: Order) -> None:
        """Note what makes the gold's rows weak evidence."""
        gold = self.gold
        detail = f"{len(gold.rows)} rows"
        if order == "undetermined":
            self.found.doubt("gold undetermined", detail, len(gold.rows))
        elif order == "tied" and is_ordered(self.turn.sql):
            self.found.doubt("gold order tied", detail, len(gold.rows))
        trial = trial_of(self.turn.sql, self.schema, self.db_path, self.limits)
        if trial.is_unknown:
            self.found.doubt("gold unguarded", detail)
        elif not gold.is_empty and not trial.is_telling:
            self.found.doubt("gold untellable", detail, -len(gold.rows))

    def try_rewritings(self, has_order: bool) -> None:
        """Answer with each rewriting of the gold that returns the gold's rows."""
        rows = rounded(self.gold.rows)
        for kind, text in rewritings_of(self.turn.sql, _own_schema(self.db_path)).items():
            result = run_query(self.db_path, text, self.limits)
            others = rounded(result.rows)
            if not result.is_ok:
                reason = f"{result.status.value}: {result.message}"
            elif Counter(others) != Counter(rows):
                reason = f"{len(others)} rows, not the gold's {len(rows)}"
            elif has_order and others != rows:
                reason = "another order of rows"
            else:
                self.found.rewritings[kind] = (text, *self.scores(text, self.config.reward))
                continue
            self.found.set_aside[kind] = (text, reason)

    def try_attacks(self) -> dict[str, str]:
        """Try every attack. Returns attack -> SQL for those that the configured reward pays."""
        guarded = self.config.reward
        unguarded = replace(guarded, guard=False)
        paid: dict[str, str] = {}
        for name, sql in attacks_on(self.turn, self.gold, self.schema):
            if is_same_query(sql, self.turn.sql, self.schema):
                continue
            is_paid_unguarded = any(self.scores(sql, unguarded))
            is_paid = is_paid_unguarded and any(self.scores(sql, guarded))
            before_unguarded, before = self.found.attacks.get(name, (False, False))
            self.found.attacks[name] = (before_unguarded or is_paid_unguarded, before or is_paid)
            if is_paid:
                paid.setdefault(name, sql)
        return paid


@lru_cache(maxsize=1000)
def _own_schema(db_path: Path) -> Schema:
    """The schema by which SQLite resolves names; tables.json may differ."""
    return schema_from_sqlite(db_path)


def _token_counter(path: str | None) -> tuple[TokenCounter, str]:
    """(a token counter, how it counts). path: a folder with a tokenizer."""
    if path is None:
        how = "estimated, 4 characters a token"
        return lambda messages, tools: len(json.dumps([messages, tools])) // 4, how
    # Imported here because torch takes seconds to import, and only this needs it.
    from mtsql.model.policy import load_tokenizer
    from mtsql.model.rendering import Renderer

    try:
        renderer = Renderer(load_tokenizer(path))
    except ValueError as error:  # its message names the flag of the training scripts
        raise ValueError(str(error).replace("model.path", "tokenizer", 1)) from error

    def count(messages: list[dict], tools: list[dict]) -> int:
        return len(renderer.render_prompt(messages, tools))

    return count, f"counted by {path}"
