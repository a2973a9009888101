"""Which first tries the demonstrations from gold SQL have."""

from dataclasses import dataclass, fields

NUM_REPLIES = 4
"""Replies of the longest demonstration."""


@dataclass(frozen=True)
class GoldConfig:
    """Shares of the demonstrations made from gold SQL whose first query is not the gold one
    (`source=gold`). Each is a share of the turns on which a try of this kind is possible and can be
    noticed; all other demonstrations begin with the gold query. Together at most 1."""

    literal: float = 0.25
    """The first query spells a text value in another way and finds nothing. The database then shows
    the spelling."""
    look_up: float = 0.15
    """The first query looks up how the database spells a value that neither the question nor an
    earlier query spells so."""
    column: float = 0.05
    """The first query names a column that its table does not have, or one of two tables without
    saying which, and fails."""
    join: float = 0.1
    """The first query leaves out a table and fails, or joins on another column and finds
    nothing."""
    aggregate: float = 0.1
    """The first query has an aggregate in WHERE instead of HAVING and fails."""
    dropped: float = 0.2
    """The first query loses a condition of the last turn, and the memory shows it."""
    kept: float = 0.15
    """The first query keeps a condition of the last turn that the question no longer has, and the
    memory shows where it comes from."""

    def __post_init__(self) -> None:
        shares = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"gold.{name} is {share}: it must be between 0 and 1")
        total = sum(shares.values())
        if total > 1 + 1e-9:
            raise ValueError(f"gold: the shares are {total:g} together; at most 1")

    def draw(self, number: float) -> str:
        """The kind of first try that a number in [0, 1) stands for; empty for the gold query."""
        for field in fields(self):
            number -= getattr(self, field.name)
            if number < 0:
                return field.name
        return ""


KINDS = tuple(field.name for field in fields(GoldConfig))
"""The kinds of first tries, by the names of their shares."""
