"""One sample's whole episode for one turn, as flat token ids that only ever grow.

Legend: `ids`, `loss_mask` and `logprobs` have one entry for each token after the prompt.
"""

from dataclasses import dataclass, field

from mtsql.agent.env import Outcome, SqlEnv
from mtsql.learner.packing import Sample, TokenScores
from mtsql.sql.dialogues import Turn


@dataclass
class Trajectory:
    """What one sample did for one turn: tokens for the learner, the finished environment for the
    rewards.

    `loss_mask` is born with the token: 1 where the policy sampled it (stop id included), 0 where
    the environment wrote it. `reply_spans[k]` is the half-open token range of the k-th model reply.

    Example: a prompt P, a reply of two tokens, an observation E, a last reply of one token:

        prompt_ids   P P P
        ids                 a0 a1 E  a2
        loss_mask           1  1  0  1
        reply_spans         (0, 2),  (3, 4)
    """

    turn: Turn
    sample: int
    prompt_ids: list[int]
    env: SqlEnv
    ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reply_spans: list[tuple[int, int]] = field(default_factory=list)
    max_tokens: int = 0
    """The budget for `ids`; 0 if there is none."""
    scores: TokenScores = field(default_factory=TokenScores)
    """What the learner computes for each token, where the trajectory is trained on."""

    def add_context(self, ids: list[int]) -> None:
        """Append tokens the policy did not choose; they are never trained on."""
        self.ids += ids
        self.loss_mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def add_sampled(self, ids: list[int], logprobs: list[float]) -> None:
        """Append one model reply with the log-prob each token was sampled at."""
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} sampled ids but {len(logprobs)} log-probs")
        self.reply_spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.loss_mask += [1] * len(ids)
        self.logprobs += logprobs

    @property
    def outcome(self) -> Outcome:
        """How the episode ended. ValueError if it has not."""
        outcome = self.env.outcome
        if outcome is None:
            raise ValueError(f"the episode of turn {self.turn.turn_id} has not ended")
        return outcome

    @property
    def num_sampled(self) -> int:
        """Tokens the policy sampled."""
        return sum(self.loss_mask)

    def to_sample(self, advantages: list[float]) -> Sample:
        """The learner's view: ids, mask, log-probs and one advantage for each token after the
        prompt. Without `advantages` the sample is for SFT, or only to be scored."""
        return Sample(
            prompt_ids=self.prompt_ids,
            ids=self.ids,
            loss_mask=self.loss_mask,
            advantages=advantages,
            old_logprobs=self.logprobs,
            scores=self.scores,
        )
