"""Who computes what in a step, without a model: rows are oldest first, blocks are never leaked."""

import torch

from mtsql.engine.blocks import BlockPool
from mtsql.engine.prefixes import Prompt
from mtsql.engine.scheduler import Plan, Row, Scheduler

SIZE = 4  # tokens in a block


def make_scheduler(blocks: int, rows: int = 4, scheduled: int = 16) -> Scheduler:
    pool = BlockPool(1, blocks, SIZE, 1, 1, torch.float32, torch.device("cpu"))
    return Scheduler(pool, max_rows=rows, max_scheduled_tokens=scheduled)


def open_group(scheduler: Scheduler, prompt_tokens: int, handles: list[int]) -> list[Row]:
    """Rows of one new prompt, waiting. It is like no other one."""
    prompt = Prompt([handles[0]] * prompt_tokens)
    rows = [Row(handle, prompt, key=0) for handle in handles]
    for row in rows:
        scheduler.wait(row)
    return rows


def step(scheduler: Scheduler) -> Plan:
    """Plan a step and compute it as the engine does: rows that are complete draw a token."""
    plan = scheduler.plan()
    for row in plan.decoding:
        row.cached += 1
    for owner, num in plan.chunks:
        if isinstance(owner, Prompt):
            scheduler.prefixes.computed(owner, num)
            if owner.is_ready:
                owner.hidden = torch.zeros(1)
        else:
            owner.cached += num
    for row in scheduler.running():
        if row.prompt.is_ready and row.cached == row.length:
            row.ids.append(2)
    return plan


def finish_reply(row: Row) -> None:
    """What the engine does with a row whose reply is handed out."""
    row.is_idle = True


def test_a_prompt_is_computed_once_for_its_group_in_chunks_within_the_budget():
    scheduler = make_scheduler(blocks=20, rows=2, scheduled=4)
    first, second = open_group(scheduler, 10, [0, 1])
    plans = [step(scheduler) for _ in range(3)]
    assert [plan.chunks for plan in plans] == [
        [(first.prompt, 4)],
        [(first.prompt, 4)],
        [(first.prompt, 2)],
    ]
    assert step(scheduler) == Plan(decoding=[first, second], chunks=[])


def test_decoding_rows_come_first_and_chunks_get_the_scheduled_tokens_that_are_left():
    scheduler = make_scheduler(blocks=40, scheduled=6)
    (old,) = open_group(scheduler, 3, [0])
    step(scheduler)
    (young,) = open_group(scheduler, 20, [1])
    (youngest,) = open_group(scheduler, 2, [2])
    assert step(scheduler) == Plan([old], [(young.prompt, 5)])
    for _ in range(2):
        step(scheduler)
    assert step(scheduler) == Plan([old], [(young.prompt, 5)])
    assert step(scheduler) == Plan([old, young], [(youngest.prompt, 2)])


def test_an_observation_is_a_chunk_of_its_row():
    scheduler = make_scheduler(blocks=20)
    (row,) = open_group(scheduler, 3, [0])
    step(scheduler)
    finish_reply(row)
    row.ids += [3, 3, 3]  # P P P a0 E E E: a0 was drawn, not yet computed
    scheduler.wait(row)
    assert step(scheduler) == Plan([], [(row, 4)])
    assert step(scheduler) == Plan([row], [])


def test_rows_wait_for_a_seat_oldest_first():
    scheduler = make_scheduler(blocks=40, rows=2)
    rows = open_group(scheduler, 3, [0, 1, 2, 3])
    scheduler.remove(rows[2])
    scheduler.wait(rows[2])  # it is older than row 3
    step(scheduler)
    assert scheduler.running() == rows[:2]
    assert scheduler.waiting == rows[2:]
    finish_reply(rows[0])
    step(scheduler)
    assert scheduler.running() == rows[1:3]
    assert scheduler.cached == rows[:3]  # the idle row keeps its blocks
    assert scheduler.waiting == rows[3:]


def test_the_youngest_row_is_preempted_when_blocks_run_out():
    scheduler = make_scheduler(blocks=4)
    (old,) = open_group(scheduler, 4, [0])
    (young,) = open_group(scheduler, 4, [1])
    for _ in range(5):
        step(scheduler)
    assert old.length == young.length == 9  # a block for the prompt, one for four tokens
    assert step(scheduler).decoding == [old]
    assert scheduler.waiting == [young]
    assert (young.slot, young.cached, young.prompt.cached) == (None, 0, 0)
    assert len(young.ids) == 5  # its tokens stay
    scheduler.remove(old)
    assert step(scheduler).chunks == [(young, 5)]  # its prompt is still known
    scheduler.remove(young)
    assert scheduler.pool.num_free == 4


def test_a_row_preempted_after_it_was_planned_leaves_the_plan():
    scheduler = make_scheduler(blocks=4)
    (old,) = open_group(scheduler, 4, [0])
    (young,) = open_group(scheduler, 4, [1])
    for _ in range(3):
        step(scheduler)
    finish_reply(old)
    old.ids += [3] * 4
    scheduler.wait(old)
    # The young row is planned first, since it decodes; then the old row's chunk takes its blocks.
    assert scheduler.plan() == Plan(decoding=[], chunks=[(old, 5)])
    assert scheduler.waiting == [young]


def test_a_preempted_idle_row_waits_when_it_is_extended():
    scheduler = make_scheduler(blocks=20)
    (row,) = open_group(scheduler, 3, [0])
    step(scheduler)
    finish_reply(row)
    scheduler.preempt(row)
    assert scheduler.waiting == []
    assert not scheduler.has_work
    scheduler.wait(row)
    assert scheduler.waiting == [row]
    assert scheduler.has_work


def test_there_is_no_work_while_idle_rows_hold_the_blocks():
    """The young row needs two blocks, and one more must stay free for the old row to grow."""
    scheduler = make_scheduler(blocks=4)
    (old,) = open_group(scheduler, 4, [0])
    step(scheduler)
    step(scheduler)
    finish_reply(old)
    (young,) = open_group(scheduler, 4, [1])
    assert not scheduler.has_work
    scheduler.remove(old)
    assert scheduler.has_work
    assert step(scheduler).chunks == [(young.prompt, 4)]


def test_a_row_copies_the_last_block_of_its_prompt_before_it_writes():
    scheduler = make_scheduler(blocks=10)
    rows = open_group(scheduler, 6, [0, 1])
    step(scheduler)
    step(scheduler)
    tables = [scheduler.tables[row.slot, : row.num_blocks].tolist() for row in rows]
    prompt = rows[0].prompt.blocks
    assert [table[0] for table in tables] == [prompt[0], prompt[0]]
    assert len({tables[0][1], tables[1][1], prompt[1]}) == 3


def test_a_draft_takes_known_blocks_that_nobody_uses_but_preempts_nobody():
    scheduler = make_scheduler(blocks=6)
    (gone,) = open_group(scheduler, 12, [0])
    step(scheduler)
    scheduler.remove(gone)  # three blocks stay known
    old, young = [open_group(scheduler, 4, [handle])[0] for handle in (1, 2)]
    for _ in range(2):
        step(scheduler)
    assert (len(scheduler.pool.empty), len(scheduler.pool.unused)) == (0, 2)
    assert scheduler.give_room(old, 30) == 10
    assert scheduler.cached == [old, young]
    assert scheduler.give_room(young, 30) == 2
    scheduler.take_back(old)
    assert scheduler.pool.num_free == 2
