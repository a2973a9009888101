"""The flags of `mtsql audit`."""

from dataclasses import dataclass
from typing import Literal

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.audit.report import CHECKS
from mtsql.rl.rewards import RewardConfig
from mtsql.sql.datasets import DataConfig

LEFT_OUT_BY_DEFAULT = (
    "gold fails",
    "gold unpaid ex",
    "gold unguarded",
    "gold undetermined",
    "duplicate",
    "prompt over budget",
    "farmable",
)
"""Checks of turns that should not be trained on: the correct answer earns nothing or earns by luck,
a wrong one earns as much, or another turn is the same. A turn whose gold query earns ex but not em
stays, because it still teaches what is correct."""


@dataclass(frozen=True)
class Config:
    """Flags of mtsql audit."""

    run: str = "runs/audit"
    """Folder for audit.json and leave_out.tsv, or for farming.json."""
    split: Literal["train", "dev", "dev_seen"] = "train"
    """The split to look at."""
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig()
    style: PromptStyle | None = None
    """Wording of the prompts. null: brief on the embedded world, full on real data."""
    reward: RewardConfig = RewardConfig()
    tokenizer: str | None = None
    """A model folder whose tokenizer counts the tokens of prompts. null: 4 characters count as a
    token."""
    max_prompt_tokens: int = 4000
    """Maximum number of tokens of a prompt; the check `prompt over budget` lists longer ones."""
    leave_out: tuple[str, ...] = LEFT_OUT_BY_DEFAULT
    """Checks whose turns are written to leave_out.tsv. For a turn that fails several, the first of
    them is the reason."""
    max_dialogues: int = 0
    """Number of dialogues to look at, from the first one. 0: all."""
    rewritings: bool = False
    """Also answer each turn with other texts of its gold query that mean the same, and count which
    ones the reward pays. This takes several times as long."""
    farming: bool = False
    """Instead of an audit, let policies that understand nothing play turns of the split, and
    compare what they earn with what honest ones earn. Writes farming.json."""
    num_farming_turns: int = 100
    """Number of turns that these policies play, drawn from the split. 0: all."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.leave_out) - set(CHECKS))
        if unknown:
            raise ValueError(f"leave_out: no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
        if self.farming and self.rewritings:
            raise ValueError("rewritings has no effect with farming, which audits no gold")
        _require_at_least("num_farming_turns", self.num_farming_turns, 0)
        _require_at_least("max_dialogues", self.max_dialogues, 0)
        _require_at_least("max_prompt_tokens", self.max_prompt_tokens, 1)

    @property
    def prompt_style(self) -> PromptStyle:
        """The wording of the prompts of this data."""
        return self.style or ("brief" if self.data.is_toy else "full")


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
