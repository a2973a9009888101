"""The findings of an audit: as data, as tables on the screen, as the file for `data.leave_out`."""

from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from mtsql.audit.rewritings import REWRITINGS

CHECKS = {
    "gold fails": "the gold does not run within the limits",
    "gold unpaid ex": "the reward pays no ex for the gold itself, hence none for a correct answer",
    "gold unpaid em": "the reward pays ex but not em for the gold itself",
    "gold empty": "the gold returns nothing: paid only with the structure",
    "gold undetermined": "which rows the gold returns depends on the order of storage",
    "gold order tied": "the gold's ORDER BY leaves the order of some rows open",
    "gold unguarded": "the gold runs on no altered copy: any agreement on the database is paid",
    "gold untellable": "no altered copy distinguishes the gold from a constant: paid only with the "
    "structure",
    "duplicate": "the same question after the same questions, with the same gold",
    "prompt over budget": "the prompt is longer than max_prompt_tokens",
    "farmable": "an attack below is paid although the guard is on",
}
"""Check -> what it means that a turn fails it. "The gold" is short for the gold query."""
ATTACKS = {
    "SELECT 1": "the number 1, whatever the question is",
    "constant": "the gold's only row, written down",
    "constant FROM": "the same with a FROM that has no effect",
    "no rows": "an answer that never returns a row",
    "copied": "an earlier turn's SQL, where the gold differs from it",
    "no filter": "the gold without its WHERE",
    "values listed": "the gold's only column, IN all values that it returns",
    "values between": "the same, BETWEEN the smallest and the largest",
}
"""Attack -> what it answers."""

MAX_WORST_CASE = 160
"""Limit of the characters of a worst case on the screen."""


@dataclass(frozen=True)
class Case:
    """A turn that a check or a rewriting is about. Cases with the highest `badness` come first."""

    turn_id: str
    db_id: str
    detail: str
    gold: str
    badness: float = 0.0


@dataclass
class Attack:
    """The turns on which an attack can be tried, and those on which it earns anything."""

    num_turns: int = 0
    num_paid_unguarded: int = 0
    num_paid: int = 0


@dataclass
class Rewriting:
    """How many gold queries have a kind of rewriting, and how many of those rewritings are paid.

    num_unpaid_telling: the rewriting earns no ex, although the gold query passes the checks `gold
    empty` and `gold untellable`.
    num_set_aside: the rewriting did not return the gold query's rows within the limits, so it is
    not tried as an answer.
    """

    num_turns: int = 0
    num_paid_ex: int = 0
    num_paid_em: int = 0
    num_unpaid_telling: int = 0
    num_set_aside: int = 0


@dataclass
class Report:
    """All findings of an audit.

    prompt_tokens: how tokens were counted. longest_prompt: its number of tokens and its turn's id.
    """

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
    """Print the findings as tables."""
    console.print(_checks_table(report, title))
    for name, meaning in CHECKS.items():
        if report.cases[name]:
            console.print(f"{name}: {meaning}")
    console.print(_attacks_table(report))
    if has_rewritings:
        console.print(_rewritings_table(report))
    num_tokens, turn_id = report.longest_prompt
    console.print(f"longest prompt: {num_tokens} tokens ({report.prompt_tokens}), {turn_id}")


def _checks_table(report: Report, title: str) -> Table:
    title = f"{title}: {report.num_turns} turns, {report.secs:.0f} s"
    table = Table("check", "turns", "%", "worst case", title=title)
    for name, cases in report.cases.items():
        worst = ""
        if cases:
            case = cases[0]
            worst = f"{case.turn_id} ({case.db_id}): {case.detail}"[:MAX_WORST_CASE]
        table.add_row(name, str(len(cases)), _percent(len(cases), report.num_turns), worst)
    return table


def _attacks_table(report: Report) -> Table:
    table = Table("attack", "tried on", "paid without guard", "paid with guard", "what it is")
    for name, attack in report.attacks.items():
        counts = (attack.num_turns, attack.num_paid_unguarded, attack.num_paid)
        table.add_row(name, *map(str, counts), ATTACKS[name])
    return table


def _rewritings_table(report: Report) -> Table:
    heads = ("tried\non", "paid\nin ex", "%", "wrongly\nunpaid", "paid\nin em", "set\naside")
    numbers = [Column(head, justify="right", no_wrap=True) for head in heads]
    table = Table("same meaning", *numbers, "example", box=SIMPLE_HEAD, padding=0)
    for kind, found in report.rewritings.items():
        table.add_row(
            kind,
            str(found.num_turns),
            str(found.num_paid_ex),
            _percent(found.num_paid_ex, found.num_turns),
            str(found.num_unpaid_telling),
            str(found.num_paid_em),
            str(found.num_set_aside),
            REWRITINGS[kind].example,
        )
    return table


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else "-"
