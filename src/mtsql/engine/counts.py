"""What an engine has done since it was made."""

from dataclasses import asdict, dataclass


@dataclass
class EngineCounts:
    """Counters of one engine, or of several together. They only grow."""

    computed: int = 0
    """Tokens run through the model."""
    distinct: int = 0
    """Those of them that were not computed before: all but the repeated ones of preempted rows and
    drafted ones that were not accepted."""
    row_steps: int = 0
    """Rows that drew tokens, over all iterations."""
    drafted: int = 0
    """Drafted tokens run through the model."""
    accepted: int = 0
    """Those of them that were equal to what was sampled."""
    prompt: int = 0
    """Tokens of the prompts that were opened, each group's prompt once."""
    prefix_hits: int = 0
    """Tokens of prompts that were found in the cache."""
    steps: int = 0
    """Engine iterations that ran the model."""
    eager_steps: int = 0
    """Those of them that did not run as a CUDA graph."""
    preemptions: int = 0
    """Rows that lost their blocks while they had something to do."""
    sampled: int = 0
    """Tokens of the complete replies. This and what follows is counted by `rl/rollout.py`."""
    attended: int = 0
    """Pairs of a distinct token and a token that it attends to, itself included."""
    sql_wait_secs: float = 0.0
    """Seconds in which the engine was not stepped because a rollout waited for observations."""
    judge_wait_secs: float = 0.0
    """Seconds at the end of a rollout in which the last trajectories were judged."""

    def __add__(self, other: "EngineCounts") -> "EngineCounts":
        """The counts of two engines together."""
        theirs = asdict(other)
        return EngineCounts(**{name: value + theirs[name] for name, value in asdict(self).items()})

    def __sub__(self, earlier: "EngineCounts") -> "EngineCounts":
        """What was done since an engine had counted `earlier`."""
        theirs = asdict(earlier)
        return EngineCounts(**{name: value - theirs[name] for name, value in asdict(self).items()})
