"""Look at a data set before training on it: golds that cannot be judged, rewards that can be had for nothing.

    python -m mtsql.audit                                                   # the toy world
    python -m mtsql.audit --data.train train.json --data.dev dev.json --data.tables tables.json \\
        --data.databases database --run runs/audit-sparc

Prints what it found with the worst cases, and writes `audit.json` (every case) and `leave_out.tsv` (turn id and reason)
to the run folder; `--data.leave_out runs/audit-sparc/leave_out.tsv` keeps a training from those turns. Each check of a
gold uses the reward's own rules and the limits of `env.query`; what an attack earns is asked of the reward itself.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import sqlparse
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtsql.agent.env import EnvLimits, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.config import parse_config, to_dict
from mtsql.rl.rewards import RewardConfig, answer_scores
from mtsql.sql.datasets import DataConfig, describe_losses, load_split
from mtsql.sql.dialogues import Corpus, Turn
from mtsql.sql.execution import executed_text
from mtsql.sql.guard import is_same_query, stable_order, trial_of
from mtsql.sql.sandbox import Mirror, QueryResult, run_query
from mtsql.sql.worker_pool import set_num_workers

CHECKS = {
    "gold fails": "the gold does not run within the limits",
    "gold empty": "the gold returns nothing: paid only with the structure",
    "gold undetermined": "which rows it returns depends on the order in which they are stored",
    "gold order tied": "its ORDER BY leaves the order of some rows open",
    "gold untellable": "no altered copy tells it from a constant: paid only with the structure",
    "duplicate": "the same question after the same questions, with the same gold",
    "prompt over budget": "the prompt is longer than max_prompt_tokens",
    "farmable": "an attack below is paid although the guard is on",
}
ATTACKS = {
    "SELECT 1": "the number 1, whatever was asked",
    "constant": "the gold's one row, written down",
    "constant FROM": "the same behind a FROM that does nothing",
    "no rows": "an answer that never returns a row",
    "copied": "an earlier turn's SQL, where the gold is another",
    "no filter": "the gold without its WHERE",
}
MAX_CONSTANT_CELLS = 8


@dataclass(frozen=True)
class Config:
    """Flags of python -m mtsql.audit."""

    run: str = "runs/audit"
    """Folder for audit.json and leave_out.tsv."""
    split: str = "train"
    """train, dev or dev_seen."""
    data: DataConfig = DataConfig()
    env: EnvLimits = EnvLimits()
    style: PromptStyle | None = None
    """Wording of the prompts (default: brief on the toy world, full on real data)."""
    reward: RewardConfig = RewardConfig()
    tokenizer: str | None = None
    """A model folder whose tokenizer counts the prompts; without one they are estimated at 4 characters a token."""
    max_prompt_tokens: int = 4000
    """Budget of a prompt."""
    leave_out: tuple[str, ...] = ("gold fails", "gold undetermined", "duplicate", "prompt over budget", "farmable")
    """Checks whose turns leave_out.tsv names; a turn with several has the first one as its reason."""
    max_dialogues: int = 0
    """Look only at the first so many dialogues (0 = all)."""

    def __post_init__(self):
        unknown = sorted(set(self.leave_out) - set(CHECKS))
        if unknown:
            raise ValueError(f"leave_out: no check {unknown[0]!r}; there are {', '.join(CHECKS)}")


@dataclass(frozen=True)
class Case:
    """A turn a check or an attack is about. `badness` orders cases, the worst first."""

    turn_id: str
    db_id: str
    detail: str
    gold: str
    badness: float = 0.0


@dataclass
class Attack:
    """Turns it can be tried on, and those on which it earns anything, by guard."""

    num_turns: int = 0
    num_paid_unguarded: int = 0
    num_paid: int = 0


@dataclass
class Report:
    """All that was found. `prompt_tokens` says how they were counted; the longest: tokens and turn id."""

    num_turns: int = 0
    prompt_tokens: str = ""
    longest_prompt: tuple[int, str] = (0, "")
    cases: dict[str, list[Case]] = field(default_factory=lambda: {name: [] for name in CHECKS})
    attacks: dict[str, Attack] = field(default_factory=lambda: {name: Attack() for name in ATTACKS})
    secs: float = 0.0


def audit(corpus: Corpus, config: Config) -> Report:
    """Check every turn of the corpus."""
    start = time.monotonic()
    count_tokens, how = _token_counter(config.tokenizer)
    style = config.style or (PromptStyle.BRIEF if config.data.is_toy else PromptStyle.FULL)
    report, seen, limits = Report(prompt_tokens=how), {}, config.env.query
    for turn in track(corpus.turns, "audit", console=Console(stderr=True), transient=True):
        schema, db_path = corpus.schemas[turn.db_id], corpus.db_paths[turn.db_id]

        def found(check: str, detail: str, badness: float = 0.0, turn: Turn = turn) -> None:
            report.cases[check].append(Case(turn.turn_id, turn.db_id, detail, turn.sql, badness))

        text = executed_text(turn.sql)
        gold = run_query(db_path, text, limits)
        if not gold.is_ok:
            found("gold fails", f"{gold.status.value}: {gold.message}", gold.secs)
        elif gold.is_empty:
            found("gold empty", f"{len(gold.rows)} rows, all NULL" if gold.rows else "no rows")
        if gold.is_ok:
            # With one blank more it is another text: it runs again, with other random numbers.
            others = [run_query(db_path, f"{text} ", limits), run_query(Mirror(db_path), text, limits)]
            doubt = _undetermined(text, gold, others)
            if doubt:
                found(doubt, f"{len(gold.rows)} rows", len(gold.rows))
            if not gold.is_empty and not trial_of(turn.sql, schema, db_path, limits).is_telling:
                found("gold untellable", f"{len(gold.rows)} rows", -len(gold.rows))
        paid = _attack(turn, gold, corpus, config, report.attacks)
        if paid:
            found("farmable", "; ".join(f"{name}: {sql}" for name, sql in paid.items()), len(paid))
        questions = (*(question for question, _ in turn.history), turn.question)
        key = (turn.db_id, questions, " ".join(turn.sql.split()))
        if key in seen:
            found("duplicate", f"of {seen[key]}")
        seen.setdefault(key, turn.turn_id)
        num_tokens = count_tokens(*SqlEnv(turn, schema, db_path, config.env, style).reset())
        report.longest_prompt = max(report.longest_prompt, (num_tokens, turn.turn_id))
        if num_tokens > config.max_prompt_tokens:
            found("prompt over budget", f"{num_tokens} tokens", num_tokens)
        report.num_turns += 1
    for cases in report.cases.values():
        cases.sort(key=lambda case: -case.badness)
    report.secs = time.monotonic() - start
    return report


def _undetermined(text: str, gold: QueryResult, others: list[QueryResult]) -> str | None:
    """The check that the gold fails, from its results with other random numbers and with the rows
    stored in the opposite order."""
    if not all(other.is_ok for other in others):
        return None  # the mirror has no index: too slow to tell
    orders = [stable_order(gold.rows, other.rows, text) for other in others]
    if None in orders:
        return "gold undetermined"
    return "gold order tied" if False in orders and "order by" in text.lower() else None


def _attack(
    turn: Turn, gold: QueryResult, corpus: Corpus, config: Config, attacks: dict[str, Attack]
) -> dict[str, str]:
    """Try every attack on a turn and count; -> those that the reward pays, by name, as `config.reward` is."""
    schema, db_path = corpus.schemas[turn.db_id], corpus.db_paths[turn.db_id]
    open_reward, paid = replace(config.reward, guard=False), {}
    tried: dict[str, set[str]] = {}
    for name, sql in _answers(turn, gold, corpus):
        if is_same_query(sql, turn.sql, schema):
            continue
        args = (sql, turn, schema, db_path)
        if name not in tried:
            attacks[name].num_turns += 1
        flags = tried.setdefault(name, set())
        if any(answer_scores(*args, open_reward, config.env.query)):
            flags.add("unguarded")
            if any(answer_scores(*args, config.reward, config.env.query)):
                flags.add("guarded")
                paid.setdefault(name, sql)
    for name, flags in tried.items():
        attacks[name].num_paid_unguarded += "unguarded" in flags
        attacks[name].num_paid += "guarded" in flags
    return paid


def _answers(turn: Turn, gold: QueryResult, corpus: Corpus) -> Iterator[tuple[str, str]]:
    """(attack, SQL): what one could answer without an idea of the question."""
    yield "SELECT 1", "SELECT 1"
    table = corpus.schemas[turn.db_id].tables[0].name
    if len(gold.rows) == 1 and len(gold.rows[0]) <= MAX_CONSTANT_CELLS:
        constant = "SELECT " + ", ".join(map(_literal, gold.rows[0]))
        yield "constant", constant
        yield "constant FROM", f'{constant} FROM "{table}" LIMIT 1'
    if gold.is_ok and not gold.rows:
        yield "no rows", f'SELECT * FROM "{table}" WHERE 1 = 2'
    for _, sql in turn.history:
        yield "copied", sql
    tokens = sqlparse.parse(turn.sql)[0].tokens
    if any(isinstance(token, sqlparse.sql.Where) for token in tokens):
        yield "no filter", "".join(" " if isinstance(token, sqlparse.sql.Where) else str(token) for token in tokens)


def _literal(cell: object) -> str:
    """A cell as SQL."""
    if cell is None:
        return "NULL"
    if isinstance(cell, bytes):
        return f"x'{cell.hex()}'"
    return "'" + cell.replace("'", "''") + "'" if isinstance(cell, str) else repr(cell)


def _token_counter(path: str | None) -> tuple[Callable[[list[dict], list[dict]], int], str]:
    """(a function from messages and tool schemas to tokens, how it counts)."""
    if path is None:
        return lambda messages, tools: len(json.dumps([messages, tools])) // 4, "estimated, 4 characters a token"
    from mtsql.llm.model import load_tokenizer  # torch takes seconds to import, and only this needs it
    from mtsql.llm.rendering import Renderer

    renderer = Renderer(load_tokenizer(path))
    return lambda messages, tools: len(renderer.render_prompt(messages, tools)), f"counted by {path}"


def leave_out_lines(report: Report, checks: tuple[str, ...]) -> list[str]:
    """`turn id<TAB>check: detail` of every turn that fails one of the checks, in the order of the checks."""
    lines: dict[str, str] = {}
    for check in checks:
        for case in report.cases[check]:
            lines.setdefault(case.turn_id, f"{case.turn_id}\t{check}: {' '.join(case.detail.split())}")
    return list(lines.values())


def show(report: Report, title: str, console: Console) -> None:
    """Print what was found as two tables."""
    checks = Table("check", "turns", "%", "worst case", title=f"{title}: {report.num_turns} turns, {report.secs:.0f} s")
    for name, cases in report.cases.items():
        worst = f"{cases[0].turn_id} ({cases[0].db_id}): {cases[0].detail}" if cases else ""
        checks.add_row(name, str(len(cases)), f"{100 * len(cases) / report.num_turns:.2f}", f"{worst:.160}")
    attacks = Table("attack", "tried on", "paid without guard", "paid with guard", "what it is")
    for name, attack in report.attacks.items():
        counts = (attack.num_turns, attack.num_paid_unguarded, attack.num_paid)
        attacks.add_row(name, *map(str, counts), ATTACKS[name])
    console.print(checks)
    console.print(attacks)
    num_tokens, turn_id = report.longest_prompt
    console.print(f"longest prompt: {num_tokens} tokens ({report.prompt_tokens}), {turn_id}")


def main(config: Config) -> None:
    """Load, check, print, write."""
    folder = Path(config.run)
    if (folder / "audit.json").exists():
        raise ValueError(f"run {folder} already holds an audit: name another folder or remove it")
    set_num_workers(config.env.num_sql_workers)
    corpus = load_split(config.data, config.split)
    corpus = replace(corpus, dialogues=corpus.dialogues[: config.max_dialogues or None])
    console = Console()
    if losses := describe_losses(corpus):
        console.print(f"{config.split}: {losses}")
    report = audit(corpus, config)
    show(report, config.split, console)
    folder.mkdir(parents=True, exist_ok=True)
    lines = leave_out_lines(report, config.leave_out)
    (folder / "leave_out.tsv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    written = {"config": to_dict(config), "checks": CHECKS, "skipped": len(corpus.skipped), **asdict(report)}
    (folder / "audit.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    console.print(f"{len(lines)} turns in {folder / 'leave_out.tsv'}; every case in {folder / 'audit.json'}")


if __name__ == "__main__":
    try:
        main(parse_config(Config, sys.argv[1:], __doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
