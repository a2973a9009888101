"""The dialogue grammar of the embedded world: which question follows which.

A follow-up says only what changes. Its wording decides what is kept of which earlier turn:

    only those with ... / of those , with ...   everything is kept
    what about japan ? / no , i meant japan     the filter of that column is replaced
    forget that , all with ...                  all filters are dropped
    and with any country ?                      that filter is dropped
    as before but ...                           the turn before the last one is changed
    the first one again but ...                 the first turn is changed
    no , i meant those with ...                 the last filter is taken back
    which bands have ...                        a new question: all is dropped
    ... that singer                             what an earlier result shows
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mtsql.toyworld import changes
from mtsql.toyworld.openings import OPENINGS, SUBJECTS, opening
from mtsql.toyworld.references import Shown, refer, shown_by
from mtsql.toyworld.states import Domain, Filter, RunQuery, State, to_sql

FOLLOW_UPS = {
    "filter": (8, 10),
    "value": (12, 26),
    "summary": (5, 4),
    "columns": (2, 1),
    "sort": (1, 1),
    "best": (4, 6),
    "names": (1, 1),
    "others": (1, 1),
    "forget": (1, 1),
    "drop": (1, 2),
    "correct": (2, 4),
    "subject": (1, 1),
    "before": (0, 4),
    "first": (0, 4),
    "result": (10, 30),
}
"""Kind of a follow-up -> its weight at turn 2 and at later turns."""
NUM_TURNS = {2: 3, 3: 4, 4: 4, 5: 2, 6: 1}
"""Number of turns of a dialogue -> its weight."""
FILTER_KINDS = ("text", "text", "text", "text", "number", "nested", "join")
SUMMARY_KINDS = ("count", "average", "group", "most", "most")
COLUMN_KINDS = ("add", "parent", "except")
MAX_ROWS = 25
"""Maximum number of rows of a turn's result. Opening turns may have up to MAX_FIRST_ROWS rows."""
MAX_FIRST_ROWS = 45
MAX_KINDS = 30
"""Kinds of follow-ups that are drawn for one dialogue before it ends, however short it is."""
TRIES_OF_A_KIND = 8
"""Follow-ups of a kind that are tried before another kind is drawn."""


@dataclass(frozen=True)
class AskedTurn:
    """A question of a dialogue with what it asks for, and with what others would take it for.

    base: the index of the turn that the question changes; None if it stands alone or speaks of a
    result. shown: the value that it speaks of. alone: what somebody asks for who knows no earlier
    turn. of_last: what somebody asks for who takes it for a change of the last turn; None unless
    that is wrong. forgets: the state without filters that it keeps. keeps: the state with filters
    that it drops. (None: there are no such filters.)
    """

    question: str
    state: State
    kind: str
    base: int | None = None
    shown: Shown | None = None
    alone: State | None = None
    of_last: State | None = None
    forgets: State | None = None
    keeps: State | None = None

    @property
    def misreadings(self) -> list[State]:
        """The states that it is taken for by somebody who knows the dialogue."""
        states = (self.of_last, self.forgets, self.keeps)
        return [state for state in states if state is not None]


@dataclass
class Dialogue:
    """The turns so far, and the values that their results show."""

    turns: list[AskedTurn] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def add(self, turn: AskedTurn, domain: Domain, run: RunQuery) -> None:
        """Add a turn. A value that its result shows, or that its question names, takes the place of
        an earlier one of the same column: "that singer" is the last one that was spoken of."""
        rows = run(to_sql(turn.state, domain)) or []
        new = shown_by(len(self.turns), turn.state, rows, domain)
        before = self.turns[-1].state.all_filters() if self.turns else ()
        named = {_value(f) for f in turn.state.all_filters() if f not in before}
        columns = {(table, column) for table, column, _ in named}
        self.turns.append(turn)
        self.shown = [
            old
            for old in self.shown
            if (old.table, old.column) not in columns or (old.table, old.column, old.value) in named
        ]
        if new is not None:
            self.shown = [
                old for old in self.shown if (old.table, old.column) != (new.table, new.column)
            ]
            self.shown.append(new)


def draw_dialogue(domain: Domain, rng: random.Random, run: RunQuery) -> list[AskedTurn]:
    """An opening question and follow-ups that fit it, or fewer turns than a dialogue needs if
    MAX_KINDS did not give enough."""
    num_turns = rng.choices(tuple(NUM_TURNS), tuple(NUM_TURNS.values()))[0]
    dialogue = Dialogue()
    question, state = opening(domain, rng, OPENINGS)
    first = AskedTurn(question, state, "opening")
    if not is_sound(first, (), domain, run):
        return []
    dialogue.add(first, domain, run)
    for _ in range(MAX_KINDS):
        if len(dialogue.turns) == num_turns:
            break
        turn = _sound_follow_up(dialogue, domain, rng, run)
        if turn is not None:
            dialogue.add(turn, domain, run)
    return dialogue.turns


def _sound_follow_up(
    dialogue: Dialogue, domain: Domain, rng: random.Random, run: RunQuery
) -> AskedTurn | None:
    """A sound turn of a kind that is drawn; None if none of TRIES_OF_A_KIND is sound."""
    is_later = len(dialogue.turns) > 1
    weights = [weight[is_later] for weight in FOLLOW_UPS.values()]
    kind = rng.choices(tuple(FOLLOW_UPS), weights)[0]
    for _ in range(TRIES_OF_A_KIND):
        turn = follow_up(kind, dialogue, domain, rng)
        if turn is not None and is_sound(turn, dialogue.turns, domain, run):
            return turn
    return None


def follow_up(
    kind: str, dialogue: Dialogue, domain: Domain, rng: random.Random
) -> AskedTurn | None:
    """A next turn of this kind, or None if the one drawn does not fit the dialogue."""
    turns = dialogue.turns
    last = turns[-1]
    if kind == "result":
        return _about_result(dialogue, domain, rng)
    if kind == "subject":
        question, state = opening(domain, rng, SUBJECTS)
        kept = _with_dropped(state, last.state, domain)
        return AskedTurn(question, state, kind, keeps=kept)
    if kind in ("before", "first"):
        base = len(turns) - 2 if kind == "before" else 0
        if kind == "first" and len(turns) < 3:
            return None
        return _of_earlier(kind, base, turns, domain, rng)
    if kind == "correct":
        return _correction(turns, domain, rng)
    change = _change(kind, last.state, domain, rng)
    if change is None:
        return None
    return _changed(change.words, kind, change, len(turns) - 1, turns, domain)


def _change(kind: str, state: State, domain: Domain, rng: random.Random) -> changes.Change | None:
    """A change of this kind that fits the state."""
    match kind:
        case "filter":
            return changes.add_filter(rng.choice(FILTER_KINDS), state, domain, rng)
        case "value":
            return changes.other_value(state, domain, rng)
        case "summary":
            return changes.summary(rng.choice(SUMMARY_KINDS), state, domain, rng)
        case "columns":
            return changes.columns(rng.choice(COLUMN_KINDS), state, domain, rng)
        case "sort" | "best":
            return changes.sorting(kind, state, domain, rng)
        case "names":
            return changes.names_again(state)
        case "others":
            return changes.other_rows(state)
        case "forget":
            return changes.only_this(state, domain, rng)
        case "drop":
            return changes.without_column(state, rng)
    raise ValueError(f"there is no kind of follow-up {kind!r}")


def _of_earlier(
    kind: str, base: int, turns: Sequence[AskedTurn], domain: Domain, rng: random.Random
) -> AskedTurn | None:
    """A change of an earlier turn than the last one."""
    inner = rng.choice(("filter", "filter", "value", "value", "best", "sort", "summary", "drop"))
    change = _change(inner, turns[base].state, domain, rng)
    if change is None or not change.after_but:
        return None
    opening_words = "as before but" if kind == "before" else "the first one again but"
    question = f"{opening_words} {change.after_but}"
    return _changed(question, kind, change, base, turns, domain)


def _correction(turns: Sequence[AskedTurn], domain: Domain, rng: random.Random) -> AskedTurn | None:
    """The user takes back a part of the last question."""
    last = turns[-1]
    if last.kind == "value" and last.base is not None:
        before = turns[last.base].state.filters
        [new] = [f for f in last.state.filters if f not in before]
        other = changes.another_value(new, domain, rng)
        words = f"no , i meant {other.after_but.removeprefix('for ')}"
        return _changed(words, "correct", other, len(turns) - 1, turns, domain)
    if last.kind == "filter" and last.base is not None:
        change = changes.add_filter(rng.choice(FILTER_KINDS), turns[last.base].state, domain, rng)
        if change is None:
            return None
        words = f"no , i meant {change.after_but.removeprefix('only ')}"
        return _changed(words, "correct", change, last.base, turns, domain)
    change = changes.other_number(last.state, domain, rng)
    if change is None:
        return None
    return _changed(change.words, "correct", change, len(turns) - 1, turns, domain)


def _changed(
    question: str,
    kind: str,
    change: changes.Change,
    base: int,
    turns: Sequence[AskedTurn],
    domain: Domain,
) -> AskedTurn:
    """The turn that applies a change to the turn `base`, with its misreadings."""
    before = turns[base].state
    state = change.apply(before)
    kept = tuple(f for f in state.filters if f in before.filters)
    of_last = None
    if base != len(turns) - 1:
        of_last = change.apply(turns[-1].state)
    return AskedTurn(
        question,
        state,
        kind,
        base=base,
        alone=change.apply(State(domain.child)),
        of_last=of_last,
        forgets=changes.forgetful(state, kept) if kept else None,
        keeps=_with_dropped(state, before if of_last is None else turns[-1].state, domain),
    )


def _with_dropped(state: State, before: State, domain: Domain) -> State | None:
    """The state with the filters that it has dropped, None if none of them fits it."""
    if before.table != state.table or state.childless:
        return None
    dropped = tuple(f for f in before.filters if f not in state.filters)
    if not dropped:
        return None
    return replace(state, filters=(*dropped, *state.filters))


def _about_result(dialogue: Dialogue, domain: Domain, rng: random.Random) -> AskedTurn | None:
    known = known_values(dialogue.turns)
    unseen = [one for one in dialogue.shown if (one.table, one.column, one.value) not in known]
    if not unseen:
        return None
    shown = rng.choice(unseen)
    found = refer(shown, domain, rng)
    if found is None:
        return None
    question, state = found
    filters = dialogue.turns[-1].state.filters
    keeps = _with_dropped(state, dialogue.turns[-1].state, domain) if filters else None
    return AskedTurn(question, state, "result", shown=shown, keeps=keeps)


def guesses(turn: AskedTurn, earlier: Sequence[AskedTurn]) -> list[Filter]:
    """The filters whose value neither the question nor the SQL of an earlier turn says, though an
    earlier result does."""
    known = known_values(earlier)
    return [f for f in turn.state.all_filters() if f.guess is not None and _value(f) not in known]


def unknown_spellings(turn: AskedTurn, earlier: Sequence[AskedTurn]) -> list[Filter]:
    """The filters on text values whose spelling no earlier SQL shows."""
    known = known_values(earlier)
    return [f for f in turn.state.all_filters() if f.said and _value(f) not in known]


def known_values(earlier: Sequence[AskedTurn]) -> set[tuple[str, str, object]]:
    """The values in the SQL of earlier turns, with their tables and columns."""
    return {_value(f) for turn in earlier for f in turn.state.all_filters()}


def _value(f: Filter) -> tuple[str, str, object]:
    return f.table, "name" if f.of_row else f.column, f.value


def is_sound(turn: AskedTurn, earlier: Sequence[AskedTurn], domain: Domain, run: RunQuery) -> bool:
    """Whether the result of a turn makes a good question.

    The result is not empty, not long, and not only NULL or a count of zero. LIMIT does not decide a
    tie. The result differs from that of every earlier turn, from that without the newest filter and
    from that of each misreading.
    """
    state = turn.state
    rows = run(to_sql(state, domain))
    if not rows or len(rows) > (MAX_ROWS if earlier else MAX_FIRST_ROWS):
        return False
    if len(rows) == 1 and rows[0][0] in (None, 0):
        return False
    if _is_tie(state, domain, run):
        return False
    if any(rows == run(to_sql(one.state, domain)) for one in earlier):
        return False
    others = turn.misreadings
    if state.filters and not state.limit:
        others = [*others, replace(state, filters=state.filters[:-1])]
    hidden = guesses(turn, earlier)

    def guessed(f: Filter) -> object:
        return f.guess if f in hidden else f.value

    if hidden and _same_rows(rows, run(to_sql(state, domain, guessed))):
        return False
    return not any(_same_rows(rows, run(to_sql(other, domain))) for other in others)


def _same_rows(rows: list[tuple], others: list[tuple] | None) -> bool:
    """Whether two results have the same rows, in any order."""
    return others is not None and sorted(map(repr, rows)) == sorted(map(repr, others))


def _is_tie(state: State, domain: Domain, run: RunQuery) -> bool:
    """Whether LIMIT decides a tie, so that the result is a matter of chance."""
    if state.most:
        counts = run(_counts(state, domain))
        return not counts or len(counts) < 2 or counts[0][1] == counts[1][1]
    if not state.limit:
        return False
    values = run(to_sql(replace(state, limit=False, columns=(state.order,)), domain))
    return not values or values[0][0] in [row[0] for row in values[1:]]


def _counts(state: State, domain: Domain) -> str:
    """The groups with their sizes, the largest first."""
    grouped = to_sql(replace(state, most=False), domain)
    return f"{grouped} ORDER BY count(*) DESC"
