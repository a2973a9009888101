"""Random workloads for the engine: groups that open at any time, observations that come late, rows
that are preempted or closed early. After every step the cache and the counts are checked."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from torch import Tensor

from helpers.cache_check import check_cache
from helpers.engine import VOCAB, keys
from mtsql.engine.completions import Completion
from mtsql.engine.config import CostTable
from mtsql.engine.engine import Engine
from mtsql.engine.prefixes import Prompt
from mtsql.engine.scheduler import Plan, Row

Make = Callable[..., Engine]
"""Makes an engine from the named arguments of `make_engine`."""
COSTS: tuple[CostTable | None, ...] = (((1, 1.0), (2, 1.0)), ((1, 1.0), (9, 2.0)), None)
"""By these everything is drafted, some of it, or what the model's shape suggests."""


@dataclass(frozen=True)
class Group:
    """Rows of one prompt."""

    turn: int
    prompt: list[int]
    num_samples: int
    observations: list[list[int]]
    opens_at: int  # step


@dataclass(frozen=True)
class Case:
    """A workload, and the limits of the engine that plays it."""

    seed: int
    groups: list[Group]
    sampling: dict[str, float]
    stop_ids: tuple[int, ...]
    is_roomy: bool  # nothing is preempted, and no block is forgotten
    limits: dict[str, int | CostTable | None]


def random_case(seed: int) -> Case:
    """Every case has prompts that begin alike; two thirds have prompts that repeat themselves."""
    rng = np.random.default_rng(seed)

    def ids(most: int, least: int = 0) -> list[int]:
        return rng.integers(1, VOCAB, rng.integers(least, most + 1)).tolist()

    size = int(rng.choice([4, 8]))
    beginnings = [ids(3 * size), ids(2 * size)]
    beginnings.append(beginnings[0][: int(rng.integers(0, 3 * size))] + ids(size))
    groups = []
    for turn in range(rng.integers(1, 6)):
        prompt = beginnings[rng.integers(0, 3)] + ids(6, least=1)
        if rng.random() < 0.3:
            prompt = prompt[: rng.integers(1, len(prompt) + 1)]
        if rng.random() < 0.6:
            prompt = [prompt[place % 5] for place in range(len(prompt))]
        observations = [ids(5) for _ in range(rng.integers(0, 3))]
        opens_at = int(rng.integers(0, 25)) if rng.random() < 0.4 else 0
        groups.append(Group(turn, prompt, int(rng.integers(1, 5)), observations, opens_at))
    temperature = float(rng.choice([0, 0.3, 1]))
    sampling: dict[str, float] = dict(
        temperature=temperature,
        top_p=float(rng.choice([1, 0.6])) if temperature else 1.0,
        max_reply_tokens=int(rng.integers(1, 14)),
        max_trajectory_tokens=int(rng.integers(6, 40)),
    )
    is_roomy = bool(rng.random() < 0.3)
    longest = max(len(group.prompt) for group in groups) + sampling["max_trajectory_tokens"]
    least = -(-int(longest) // size) + 1
    rows = int(rng.integers(1, 9))
    limits = dict(
        size=size,
        blocks=400 if is_roomy else least + int(rng.integers(0, 12)),
        rows=rows,
        scheduled=rows + int(rng.integers(0, 20)),
        max_draft=int(rng.integers(1, 9)),
        step_costs=COSTS[rng.integers(0, 3)],
    )
    stop_ids = tuple(rng.integers(1, VOCAB, rng.integers(0, 4)).tolist())
    return Case(seed, groups, sampling, stop_ids, is_roomy, limits)


def play_alone(case: Case, make: Make) -> dict[tuple[int, int], list[Completion]]:
    """The replies of each row, by turn and sample, of an engine for each group without drafts, that
    shares no beginnings and preempts nobody."""
    played: dict[tuple[int, int], list[Completion]] = defaultdict(list)
    for group in case.groups:
        engine = make(stop_ids=case.stop_ids, blocks=400, max_draft=0, **case.sampling)
        engine.scheduler.prefixes.is_shared = False
        handles = engine.open_group(group.prompt, keys(group.num_samples, group.turn))
        while engine.has_work:
            for done in engine.step():
                replies = played[group.turn, handles.index(done.handle)]
                replies.append(done)
                _go_on(engine, done.handle, group.observations[len(replies) - 1 :])
    return played


def _go_on(engine: Engine, handle: int, left: list[list[int]]) -> None:
    """Give a row its next observation, or close it if there is none or no room for it."""
    num_ids = len(engine._rows[handle].ids)
    if left and num_ids + len(left[0]) < engine.sampling.max_trajectory_tokens:
        engine.extend(handle, left[0])
    else:
        engine.close(handle)


class Player:
    """Plays a case in an engine of its limits, and counts what the engine counts."""

    def __init__(self, case: Case, make: Make) -> None:
        self.case = case
        self.rng = np.random.default_rng(case.seed)
        self.engine = make(stop_ids=case.stop_ids, **case.limits, **case.sampling)
        self.played: dict[tuple[int, int], list[Completion]] = {}
        self.closed_early: set[tuple[int, int]] = set()
        self.names: dict[int, tuple[int, int]] = {}  # handle -> turn and sample
        self.late: list[tuple[int, int]] = []  # step and handle of replies without observation
        self.num_empty = 0  # latest steps that computed nothing
        # What the engine should have counted:
        self.computed = 0
        self.drafted = 0
        self.accepted = 0
        self.row_tokens: dict[Row, int] = {}  # most tokens of a row ever cached, without its prompt
        self.prompt_tokens: dict[Prompt, set[int]] = defaultdict(set)  # positions it has computed
        self.texts: set[tuple[int, ...]] = set()  # beginnings of prompts that were computed

    def play(self) -> None:
        """Play until all rows are closed."""
        step = 0
        left = list(self.case.groups)
        while left or self.engine._rows:
            for group in [one for one in left if one.opens_at <= step]:
                left.remove(group)
                self._open(group)
            if self.engine.has_work:
                self._step(step)
            else:  # only late observations can free or use the cache
                assert left or self.late
            for since, handle in [one for one in self.late if one[0] <= step]:
                self.late.remove((since, handle))
                group = self.case.groups[self.names[handle][0]]
                num_done = len(self.played[self.names[handle]])
                _go_on(self.engine, handle, group.observations[num_done - 1 :])
            self._disturb()
            check_cache(self.engine)
            step += 1
            assert step < 3000
        self._check_counts()

    def _open(self, group: Group) -> None:
        handles = self.engine.open_group(group.prompt, keys(group.num_samples, group.turn))
        for sample, handle in enumerate(handles):
            self.names[handle] = group.turn, sample
            self.played[group.turn, sample] = []

    def _step(self, step: int) -> None:
        engine = self.engine
        before = self._progress()
        plans: list[tuple[Plan, list[int]]] = []
        compute = engine._compute

        def watched(plan: Plan) -> Tensor:
            plans.append((plan, [len(row.ids) for row in plan.decoding]))
            for owner, num in plan.chunks:
                if isinstance(owner, Prompt):
                    places = range(owner.cached, owner.cached + num)
                    self.prompt_tokens[owner].update(places)
                    self.texts.update(tuple(owner.ids[: place + 1]) for place in places)
            return compute(plan)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "_compute", watched)
            completions = engine.step()
        for plan, lengths in plans:
            self._count(plan, lengths)
        for done in completions:
            self.played[self.names[done.handle]].append(done)
            self.late.append((step + int(self.rng.integers(0, 6)), done.handle))
        for row in engine._rows.values():
            num_own = row.cached - len(row.prompt.ids)
            self.row_tokens[row] = max(num_own, self.row_tokens.get(row, 0))
        # The youngest row may preempt itself and leave its place to an older one that waits.
        self.num_empty = self.num_empty + 1 if self._progress() == before else 0
        assert self.num_empty < 2 or not engine.has_work

    def _progress(self) -> tuple[int, int]:
        rows = self.engine._rows.values()
        return self.engine.counts.computed, sum(len(row.ids) for row in rows)

    def _count(self, plan: Plan, lengths: list[int]) -> None:
        """`lengths`: tokens of the decoding rows before the step."""
        assert plan.num_tokens <= self.engine.max_scheduled_tokens
        self.computed += plan.num_tokens
        drafts = plan.drafts or [[]] * len(lengths)
        for row, draft, length in zip(plan.decoding, drafts, lengths, strict=True):
            new = row.ids[length:]
            self.drafted += len(draft)
            is_equal = [one == other for one, other in zip(draft, new)]
            self.accepted += [*is_equal, False].index(False)

    def _disturb(self) -> None:
        """Sometimes preempt or close a row."""
        engine = self.engine
        cached = engine.scheduler.cached
        if cached and not self.case.is_roomy and self.rng.random() < 0.1:
            engine.scheduler.preempt(cached[self.rng.integers(0, len(cached))])
        if engine._rows and self.rng.random() < 0.01:
            handle = list(engine._rows)[self.rng.integers(0, len(engine._rows))]
            self.closed_early.add(self.names[handle])
            self.late = [one for one in self.late if one[1] != handle]
            engine.close(handle)

    def _check_counts(self) -> None:
        counts = self.engine.counts
        assert counts.computed == self.computed
        assert (counts.drafted, counts.accepted) == (self.drafted, self.accepted)
        assert counts.prompt == sum(len(group.prompt) for group in self.case.groups)
        of_prompts = counts.distinct - sum(self.row_tokens.values())
        num_computed = sum(map(len, self.prompt_tokens.values()))
        assert len(self.texts) <= of_prompts <= num_computed
        if not self.closed_early:
            num_found = counts.prompt - num_computed
            assert counts.prefix_hits >= num_found
            if self.case.is_roomy:
                assert counts.prefix_hits == num_found
                assert counts.preemptions == 0

    def check_end(self) -> None:
        """The engine holds nothing any more."""
        engine = self.engine
        scheduler = engine.scheduler
        assert engine.pool.num_free == engine.pool.num_blocks
        assert len(scheduler.slots) == len(scheduler.tables)
        assert not scheduler.waiting and not scheduler.cached and not scheduler.prefixes.computing
        assert not engine.drafter._groups and not engine.drafter._rows
