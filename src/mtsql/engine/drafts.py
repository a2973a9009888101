"""Drafts: guesses of a row's next tokens, so that one step can compute several of them.

Agents repeat themselves: a query that ran is answered again, names stand in the prompt, and the
rows of a group say much the same. So the draft of a row is the text that followed the last tokens
of the row when they occurred before, in its group's prompt or in the text of any row of the group.

    row a so far      ... SELECT name FROM
    row b so far      ... SELECT name FROM city WHERE ...
    draft for row a                        city WHERE ...

The engine computes a row's newest token and its draft in one step and samples at each position with
the noise of that position. A drafted token is accepted if it equals the token that was sampled
before it, so the tokens are the same as without drafts.

How much is drafted depends on what is the same in every run: the rows and their text, how often
drafts were accepted so far, and a table of what a step costs. It never depends on the clock.
"""

from dataclasses import dataclass

import numpy as np

from mtsql.engine.sampling import SamplingConfig
from mtsql.engine.scheduler import Prompt, Row
from mtsql.engine.step_costs import Costs

MIN_SUFFIX = 2
"""Tokens that must have occurred together before for what followed them to be a draft."""
MAX_SUFFIX = 8
"""Longest suffix that is compared. A longer one predicts hardly better (measured)."""
MAX_PLACES = 8
"""Earlier places of a suffix that are compared, the latest first."""
PRIOR_TRIALS = 4
"""Weight of the assumed acceptance, in drafted tokens."""
ASSUMED = (0.0, 0.0, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9)
"""Assumed acceptance by the length of the match that ends before the drafted token. Longer ones
count as the last."""

_BITS = 32  # of a token id or a position inside one integer


class GroupText:
    """The texts of a group (text 0 is its prompt, each row has one more) and an index of them.

    The index maps two neighbouring tokens to the place after them, as `text << 32 | position`. It
    holds integers only: it has many entries, which the garbage collector need not visit. The prompt
    is indexed with the first row that decodes: an evaluation opens many more groups than fit in the
    cache.
    """

    def __init__(self, prompt_ids: list[int]) -> None:
        self.texts = [prompt_ids]
        self.num_open = 0  # rows
        self._latest: dict[int, int] = {}  # pair of tokens -> the newest place after it
        self._older: dict[int, int] = {}  # place -> the next older one after the same pair

    def start(self, ids: list[int]) -> int:
        """Begin a text, with ids that are not indexed. Returns its number."""
        self.texts.append(ids)
        return len(self.texts) - 1

    def add(self, number: int, ids: list[int]) -> bool:
        """Append ids to a text. Returns whether its last two have occurred before."""
        if not self._latest:
            self._index(0, 0)
        text = self.texts[number]
        first = len(text)
        text += ids
        return self._index(number, first)

    def _index(self, number: int, first: int) -> bool:
        """Index a text from the position `first` on. Returns whether its last two have occurred
        before."""
        text = self.texts[number]
        before = text[first - 1] if first else None
        older = None
        for place, token in enumerate(text[first:], (number << _BITS) + first + 1):
            if before is not None:
                pair = before << _BITS | token
                older = self._latest.get(pair)
                if older is not None:
                    self._older[place] = older
                self._latest[pair] = place
            before = token
        return older is not None

    def find(self, tail: list[int], num: int) -> tuple[list[int], int]:
        """Up to `num` tokens that followed the longest suffix of `tail` when it occurred before,
        and the length of the suffix. Of equally long ones the latest is taken."""
        found: list[int] = []
        longest = MIN_SUFFIX - 1
        most = min(MAX_SUFFIX, len(tail))
        place = self._latest.get(tail[-2] << _BITS | tail[-1])
        for _ in range(MAX_PLACES):
            if place is None or longest == most:
                break
            text = self.texts[place >> _BITS]
            at = place & ((1 << _BITS) - 1)
            if at < len(text):
                length = MIN_SUFFIX
                end = min(most, at)
                while length < end and text[at - length - 1] == tail[-length - 1]:
                    length += 1
                if length > longest:
                    longest = length
                    found = text[at : at + num]
            place = self._older.get(place)
        return found, longest


@dataclass(eq=False, slots=True)
class _RowText:
    """What the drafter knows about a row."""

    group: GroupText
    number: int  # of the row's text in the group
    num_known: int = 0  # tokens after the prompt that are in the text
    is_known: bool = False  # whether the last two tokens have occurred before


class Drafter:
    """Drafts for the rows of one engine."""

    def __init__(
        self, max_draft: int, costs: Costs, stop_ids: frozenset[int], sampling: SamplingConfig
    ) -> None:
        """`max_draft`: maximum length of a draft; `costs`: cost of a step by its tokens."""
        self.max_draft = max_draft
        self.costs = costs
        self.stop_ids = stop_ids
        self.sampling = sampling
        self._groups: dict[Prompt, GroupText] = {}
        self._rows: dict[int, _RowText] = {}  # by handle
        # Of the last `choose`:
        self._matches: list[list[int]] = []  # length of the match before each token of each draft
        self._chances: list[float] = []  # acceptance by the length of the match
        self._least = 0.0  # value of a token that is worth its cost
        self._forget()

    def _forget(self) -> None:
        """Forget what was accepted: the drafts of a rollout depend on this rollout only."""
        self._tried = [PRIOR_TRIALS] * len(ASSUMED)
        self._accepted = [PRIOR_TRIALS * share for share in ASSUMED]

    def open(self, row: Row) -> None:
        """Note a new row."""
        if not self._rows:
            self._forget()
        group = self._groups.get(row.prompt)
        if group is None:
            group = self._groups[row.prompt] = GroupText(row.prompt.ids)
        group.num_open += 1
        self._rows[row.handle] = _RowText(group, group.start(row.prompt.ids[-MAX_SUFFIX:]))

    def close(self, row: Row) -> None:
        """Forget a row. Its text remains for its group, as long as one of its rows is open."""
        group = self._rows[row.handle].group
        group.num_open -= 1
        if group.num_open:
            self._follow(row)
        else:
            del self._groups[row.prompt]
        del self._rows[row.handle]

    def _follow(self, row: Row) -> _RowText:
        """Add the row's newest tokens to the text of its group."""
        text = self._rows[row.handle]
        new = row.ids[text.num_known :]
        if new:
            text.is_known = text.group.add(text.number, new)
            text.num_known += len(new)
        return text

    def choose(self, rows: list[Row], num_chunk: int, max_tokens: int) -> list[list[int]]:
        """A draft for each decoding row, which may be empty, of at most `max_tokens` together.

        `num_chunk`: tokens of chunks that are computed in the same step. The most valuable tokens
        are taken, as many as make the expected tokens per cost of the step largest. Among equally
        valuable ones those of the longest row come first: a rollout ends with its longest row.
        """
        texts = [self._follow(row) for row in rows]
        self._matches = [[] for _ in rows]
        drafts: list[list[int]] = [[] for _ in rows]
        known = [i for i, text in enumerate(texts) if text.is_known]
        if not known or max_tokens <= 0:
            return drafts
        num_tokens = len(rows) + num_chunk
        costs = self.costs.between(num_tokens, num_tokens + self.max_draft * len(known))
        cost = self.costs.between(len(rows), len(rows)) + costs - costs[0]  # (1 + most drafted,)
        # A token that is worth less than what the cheapest one costs is not worth its cost.
        self._least = len(rows) / cost[0] * np.diff(cost).min()
        self._chances = [good / num for good, num in zip(self._accepted, self._tried, strict=True)]
        values: list[float] = []
        owners: list[int] = []
        for i in known:
            drafts[i], row_values = self._propose(i, rows[i], texts[i])
            values += row_values
            owners += [i] * len(row_values)
        if values:
            owner_of = np.array(owners)
            order = _most_valuable(np.array(values), owner_of, rows)[:max_tokens]
            gained = np.concatenate(([0.0], np.array(values)[order].cumsum()))
            num = int(np.argmax((len(rows) + gained) / cost[: len(gained)]))
            lengths = np.bincount(owner_of[order[:num]], minlength=len(rows)).tolist()
            for i in known:
                del drafts[i][lengths[i] :]
        return drafts

    def max_length(self, row: Row) -> int:
        """The longest draft that the budgets allow. The token after the draft needs room too."""
        return min(
            self.max_draft,
            self.sampling.max_reply_tokens - len(row.logprobs) - 1,
            self.sampling.max_trajectory_tokens - len(row.ids) - 1,
        )

    def _propose(self, index: int, row: Row, text: _RowText) -> tuple[list[int], list[float]]:
        """What may follow the text of the row `index`, up to a stop id, and the value of each
        token: the probability that it and all before it are accepted."""
        num = self.max_length(row)
        last = len(ASSUMED) - 1
        draft: list[int] = []
        values: list[float] = []
        matches = self._matches[index]
        tail = text.group.texts[text.number][-MAX_SUFFIX:]
        value = 1.0
        while len(draft) < num:  # a text that ends early is continued from another place
            found, length = text.group.find(tail, num - len(draft))
            if not found:
                break
            for token in found:
                value *= self._chances[min(length, last)]
                if value < self._least:
                    return draft, values
                matches.append(length)
                values.append(value)
                draft.append(token)
                if token in self.stop_ids:
                    return draft, values
                length += 1
            tail += found
        return draft, values

    def record(self, index: int, num_drafted: int, num_accepted: int) -> None:
        """Note how many drafted tokens of the row `index` of the last `choose` were accepted.

        The first refused token counts as tried; those after it say nothing.
        """
        last = len(ASSUMED) - 1
        matches = self._matches[index]
        for place in range(min(num_drafted, num_accepted + 1)):
            length = min(matches[place], last)
            self._tried[length] += 1
            self._accepted[length] += place < num_accepted


def _most_valuable(values: np.ndarray, owners: np.ndarray, rows: list[Row]) -> np.ndarray:
    """The order of drafted tokens by value, then by the length of the row that they are for."""
    lengths = np.array([row.length for row in rows])
    return np.lexsort((-lengths[owners], -values))
