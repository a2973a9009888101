"""Compare the reward of policies that understand nothing with the reward of honest ones.

A reward can be farmed if a policy that understands nothing earns much of what an honest one earns.
There are two rules for such blind policies:

- None may earn more than a third of the honest total.
- None may earn more than half of the honest value of a component.

The honest total and the honest values are the least that any honest policy earns.

The policies play text, and always in the same way. So a component that counts tokens tells nothing
here, and components of the group are not in the table: all trajectories of a policy would earn the
same.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtsql.agent.env import SqlEnv
from mtsql.agent.reply import format_reply
from mtsql.audit.config import Config
from mtsql.audit.policies import POLICIES, Scene
from mtsql.audit.turns import over_turns
from mtsql.rl.rewards import RewardWeights, reward_components, total_reward
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Corpus, Turn

MAX_TOTAL = 1 / 3
"""The largest share of the honest total that a blind policy may earn."""
MAX_TERM = 1 / 2
"""The largest share of the honest value of a component that a blind policy may earn. It holds for
components with a weight."""
TOTAL = "total"
SEED = 0


@dataclass(frozen=True)
class Earned:
    """The mean of each component for a policy, and of their weighted sum as `total`."""

    kind: str
    means: dict[str, float]


@dataclass
class FarmingReport:
    """The farming table, and which rules it breaks."""

    num_turns: int
    num_follow_ups: int
    """Turns with a history."""
    earned: dict[str, Earned] = field(default_factory=dict)
    """What each policy earns, by its name."""
    honest: dict[str, float] = field(default_factory=dict)
    """The least that an honest policy earns, by component."""
    broken: list[str] = field(default_factory=list)
    """A sentence for each rule that a blind policy breaks."""


def farm(corpus: Corpus, config: Config) -> FarmingReport:
    """Let every policy play the same turns."""
    turns = list(corpus.turns)
    if 0 < config.num_farming_turns < len(turns):
        turns = random.Random(SEED).sample(turns, config.num_farming_turns)
    played = [parts for _, parts in over_turns(lambda t: _play(t, corpus, config), turns, "farm")]
    report = FarmingReport(len(turns), sum(bool(turn.history) for turn in turns))
    for name, policy in POLICIES.items():
        terms = played[0][name]
        means = {term: fmean(parts[name][term] for parts in played) for term in terms}
        report.earned[name] = Earned(policy.kind, means)
    honest = [earned.means for earned in report.earned.values() if earned.kind == "honest"]
    report.honest = {term: min(means[term] for means in honest) for term in honest[0]}
    report.broken = list(_broken_rules(report, config.reward.weights))
    return report


def _play(turn: Turn, corpus: Corpus, config: Config) -> dict[str, dict[str, float]]:
    """The components that each policy earns on a turn, by the policy's name."""
    scene = Scene(turn, corpus.databases[turn.db_id], config.env)
    earned = {}
    for name, policy in POLICIES.items():
        env = SqlEnv(turn, scene.database, config.env, config.prompt_style)
        for reply in policy.play(scene):
            if env.outcome is None:
                env.step(format_reply(reply))
        parts = reward_components(Trajectory(turn, 0, [], env), config.reward)
        earned[name] = {**parts, TOTAL: total_reward(parts, config.reward.weights)}
    return earned


def _broken_rules(report: FarmingReport, weights: RewardWeights) -> Iterator[str]:
    for name, earned in report.earned.items():
        if earned.kind != "blind":
            continue
        for term, mean in earned.means.items():
            most = MAX_TOTAL if term == TOTAL else MAX_TERM
            has_weight = term == TOTAL or getattr(weights, term) > 0
            if has_weight and mean > most * max(0.0, report.honest[term]):  # penalties are below 0
                what = "the honest total" if term == TOTAL else f"the honest {term}"
                share = f"{_percent(mean, report.honest[term])} of {what}"
                yield f"{name}: {share}; at most {100 * most:.0f} % is allowed"


def show_farming(report: FarmingReport, title: str, console: Console) -> None:
    """Print the table, and below it each rule that is broken."""
    title = f"{title}: {report.num_turns} turns, {report.num_follow_ups} of them with a history"
    table = Table("policy", title=title, box=SIMPLE_HEAD, padding=0)
    for term in [*report.honest, "of_honest"]:
        table.add_column(term.replace("_", "\n"), justify="right", no_wrap=True)
    kind = None
    for name, earned in report.earned.items():
        if earned.kind != kind:
            kind = earned.kind
            table.add_section()
            table.add_row(Text(KINDS[kind], style="bold"))
        values = (f"{mean:.2f}" for mean in earned.means.values())
        share = _percent(earned.means[TOTAL], report.honest[TOTAL])
        table.add_row(name, *values, share)
    console.print(table)
    for sentence in report.broken:
        console.print(sentence, markup=False)
    if not report.broken:
        console.print(
            "No policy that understands nothing earns more than a third of the honest total, or "
            "more than half of the honest value of a component."
        )


KINDS = {
    "honest": "honest",
    "knowing": "knows the answer, skips steps",
    "blind": "understands nothing",
}


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"
