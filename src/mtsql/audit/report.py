"""What an audit found: as data, as tables on the screen, as the file for `data.leave_out`."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from mtsql.audit.rewritings import REWRITINGS

CHECKS = {
    "gold fails": "the gold does not run within the limits",
    "gold unpaid ex": "the reward does not pay the gold itself in ex: it pays no right answer",
    "gold unpaid em": "the reward pays the gold itself in ex only",
    "gold empty": "the gold returns nothing: paid only with the structure",
    "gold undetermined": "which rows it returns depends on the order in which they are stored",
    "gold order tied": "its ORDER BY leaves the order of some rows open",
    "gold unguarded": "it runs on no altered copy: whatever agrees on the database is paid",
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
    "values listed": "the gold's one column, IN all values that it returns",
    "values between": "the same, BETWEEN the smallest and the largest",
}


@dataclass(frozen=True)
class Case:
    """A turn that a check, an attack or a rewriting is about. `badness` orders cases, the worst
    first."""

    turn_id: str
    db_id: str
    detail: str
    gold: str
    badness: float = 0.0


@dataclass
class Attack:
    """On how many turns it can be tried, and on how many it earns anything, by guard."""

    num_turns: int = 0
    num_paid_unguarded: int = 0
    num_paid: int = 0


@dataclass
class Rewriting:
    """How many golds have it, and how many of them are paid.

    num_unpaid_telling: those unpaid in ex although the gold is neither empty nor untellable.
    num_set_aside: those that did not return the gold's rows within the limits; they are not tried.
    """

    num_turns: int = 0
    num_paid_ex: int = 0
    num_paid_em: int = 0
    num_unpaid_telling: int = 0
    num_set_aside: int = 0


@dataclass
class Report:
    """All that was found. prompt_tokens: how they were counted. longest_prompt: its tokens and its
    turn's id."""

    num_turns: int = 0
    prompt_tokens: str = ""
    longest_prompt: tuple[int, str] = (0, "")
    cases: dict[str, list[Case]] = field(default_factory=lambda: {name: [] for name in CHECKS})
    attacks: dict[str, Attack] = field(default_factory=lambda: {name: Attack() for name in ATTACKS})
    rewritings: dict[str, Rewriting] = field(
        default_factory=lambda: {kind: Rewriting() for kind in REWRITINGS}
    )
    unpaid_rewritings: list[Case] = field(default_factory=list)
    rewritings_set_aside: list[Case] = field(default_factory=list)
    secs: float = 0.0


def leave_out_lines(report: Report, checks: tuple[str, ...]) -> list[str]:
    """`turn id<TAB>check: detail` of every turn that fails one of the checks, in their order."""
    lines: dict[str, str] = {}
    for check in checks:
        for case in report.cases[check]:
            detail = " ".join(case.detail.split())
            lines.setdefault(case.turn_id, f"{case.turn_id}\t{check}: {detail}")
    return list(lines.values())


def show(report: Report, title: str, has_rewritings: bool, console: Console) -> None:
    """Print what was found as tables."""
    title = f"{title}: {report.num_turns} turns, {report.secs:.0f} s"
    checks = Table("check", "turns", "%", "worst case", title=title)
    for name, cases in report.cases.items():
        worst = f"{cases[0].turn_id} ({cases[0].db_id}): {cases[0].detail}" if cases else ""
        checks.add_row(name, str(len(cases)), _percent(len(cases), report.num_turns), worst[:160])
    attacks = Table("attack", "tried on", "paid without guard", "paid with guard", "what it is")
    for name, attack in report.attacks.items():
        counts = (attack.num_turns, attack.num_paid_unguarded, attack.num_paid)
        attacks.add_row(name, *map(str, counts), ATTACKS[name])
    console.print(checks)
    console.print(attacks)
    if has_rewritings:
        console.print(_rewritings_table(report))
    num_tokens, turn_id = report.longest_prompt
    console.print(f"longest prompt: {num_tokens} tokens ({report.prompt_tokens}), {turn_id}")


def _rewritings_table(report: Report) -> Table:
    heads = ("same meaning", "tried on", "paid in ex", "%", "unpaid, telling gold", "paid in em")
    table = Table(*heads, "set aside", "example")
    for kind, found in report.rewritings.items():
        share = _percent(found.num_paid_ex, found.num_turns)
        counts = (found.num_turns, found.num_paid_ex, share, found.num_unpaid_telling)
        counts += (found.num_paid_em, found.num_set_aside)
        table.add_row(kind, *map(str, counts), REWRITINGS[kind][1])
    return table


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else "-"
