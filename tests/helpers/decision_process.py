"""A decision process so small that the gradient of the expected reward can be computed exactly.

A policy gives a few replies. Each is a good call, a bad call, a look (a call that earns nothing and
tells nothing) or an answer, which ends the trajectory. How often an answer is right depends on the
last call before it that is no look. The policy is a table: for each sequence of earlier replies,
a logit for each possible reply.

Legend: N logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial, prod

import numpy as np

from mtsql.rl.credit import Returns

REPLIES = ("good", "bad", "look", "answer")
WORTH = {"good": 1.0, "bad": 0.2}
"""What a call is worth; the process reward is the mean over the calls, as with proposals=all."""
CHANCE_OF_RIGHT = {"good": 0.9, "bad": 0.3, None: 0.5}


@dataclass(frozen=True)
class Played:
    """A trajectory: its replies, whether it ends with a right answer, and how likely it is."""

    replies: tuple[str, ...]
    is_right: bool
    chance: float

    @property
    def calls(self) -> list[str]:
        """The calls that are worth something."""
        return [reply for reply in self.replies if reply in WORTH]

    def worth(self, num_replies: int) -> float:
        """The mean worth of the calls among the first replies."""
        scores = [WORTH[reply] for reply in self.replies[:num_replies] if reply in WORTH]
        return sum(scores) / len(scores) if scores else 0.0


def always_paid(played: Played) -> Returns:
    """A right answer is worth 1, and so is a perfect process reward."""
    so_far = tuple(played.worth(end + 1) for end in range(len(played.replies)))
    return Returns(played.is_right + so_far[-1], len(played.replies), so_far)


def paid_if_right(played: Played) -> Returns:
    """The same, but the process reward counts only with a right answer."""
    returns = always_paid(played)
    reward = returns.reward if played.is_right else 0.0
    return Returns(reward, returns.num_replies, returns.so_far, played.is_right)


def shared_out_afterwards(played: Played) -> Returns:
    """What is wrong: each call gets its worth divided by the number of calls, which the replies
    after it decide, too."""
    steps = [WORTH.get(reply, 0.0) / max(1, len(played.calls)) for reply in played.replies]
    return Returns(played.is_right + sum(steps), len(steps), tuple(np.cumsum(steps).tolist()))


class Policy:
    """A softmax over the replies for each sequence of earlier ones, with logits drawn by `seed`.
    With `must_answer`, the last reply that is allowed is an answer."""

    def __init__(
        self,
        seed: int,
        max_replies: int,
        replies: tuple[str, ...] = REPLIES,
        must_answer: bool = False,
    ) -> None:
        self.max_replies = max_replies
        self.replies = replies
        self.must_answer = must_answer
        self.rng = np.random.default_rng(seed)
        self.places: dict[tuple[str, ...], slice] = {}
        self.chances: dict[tuple[str, ...], np.ndarray] = {}
        self.trajectories = list(self._continued((), 1.0))
        self.num_logits = len(self.places) * len(replies)

    def _continued(self, past: tuple[str, ...], chance: float) -> Iterator[Played]:
        """All trajectories that begin with `past`, which has this chance."""
        if past and past[-1] == "answer":
            calls = Played(past, True, chance).calls
            right = CHANCE_OF_RIGHT[calls[-1] if calls else None]
            yield Played(past, True, chance * right)
            yield Played(past, False, chance * (1 - right))
        elif len(past) == self.max_replies:
            yield Played(past, False, chance)
        elif self.must_answer and len(past) == self.max_replies - 1:
            yield from self._continued((*past, "answer"), chance)
        else:
            start = len(self.places) * len(self.replies)
            self.places[past] = slice(start, start + len(self.replies))
            logits = self.rng.normal(size=len(self.replies))
            self.chances[past] = np.exp(logits) / np.exp(logits).sum()
            for reply, share in zip(self.replies, self.chances[past], strict=True):
                yield from self._continued((*past, reply), chance * share)

    def gradient(self, played: Played, advantages: list[float]) -> np.ndarray:
        """(N,) the sum over the replies of the gradient of their log-probability times their
        advantage."""
        total = np.zeros(self.num_logits)
        for at, (reply, advantage) in enumerate(zip(played.replies, advantages, strict=True)):
            past = played.replies[:at]
            if past in self.places:  # else the reply was the only one allowed
                score = -self.chances[past]
                score[self.replies.index(reply)] += 1
                total[self.places[past]] += advantage * score
        return total

    def exact_gradient(self, returns: Callable[[Played], Returns]) -> np.ndarray:
        """(N,) the gradient of the expected reward."""
        parts = []
        for one in self.trajectories:
            rewards = [returns(one).reward] * len(one.replies)
            parts.append(one.chance * self.gradient(one, rewards))
        return np.sum(parts, axis=0)

    def groups(self, size: int) -> Iterator[tuple[tuple[Played, ...], float]]:
        """Every group of trajectories, in one order, with the chance of the group in any order."""
        for group in combinations_with_replacement(self.trajectories, size):
            repeats = prod(factorial(group.count(one)) for one in set(group))
            yield group, factorial(size) / repeats * prod(one.chance for one in group)

    def estimated(
        self,
        size: int,
        returns: Callable[[Played], Returns],
        estimate: Callable[[list[Returns]], list[list[float]]],
    ) -> tuple[np.ndarray, float]:
        """-> (N,) the expectation of the gradient that a group of this size gives, and the
        variance of that gradient, summed over the logits. `estimate` gives the advantages of each
        trajectory's replies."""
        first = np.zeros(self.num_logits)
        second = 0.0
        for group, chance in self.groups(size):
            advantages = estimate([returns(one) for one in group])
            pairs = zip(group, advantages, strict=True)
            found = sum(self.gradient(one, values) for one, values in pairs) / size
            first += chance * found
            second += chance * (found @ found)
        return first, second - first @ first

    def sampled_groups(self, size: int, num_groups: int) -> Iterator[tuple[Played, ...]]:
        """Groups as a rollout would sample them."""
        rng = np.random.default_rng(0)
        chances = [one.chance for one in self.trajectories]
        for group in rng.choice(len(chances), size=(num_groups, size), p=chances):
            yield tuple(self.trajectories[place] for place in group)
