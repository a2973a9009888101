"""The live display: what it says, how it fits the terminal, and that it leaves a clean screen."""

import io
import os
import pty
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from rich.console import Console

from mtsql.panel import show_held_out, step_panel, update_panel
from mtsql.run import live
from mtsql.run.live import LiveScreen, laid_out, live_screen, sparkline
from mtsql.run.screen import activity

EVALUATIONS = [
    {"stage": "eval", "update": 0, "dev_ex": 34.0, "dev_em": 50.0, "eval_secs": 10.0},
    {"stage": "eval", "update": 2, "dev_ex": 41.5, "eval_secs": 10.0, "wall_secs": 10.0},
]


def update(number: int, **values: object) -> dict:
    row = {"stage": "rl", "update": number, "curriculum_stage": number // 3, "grad_norm": None}
    row |= {"reward": number / 2, "reward/ex": 0.25, "reward/em": 0.5, "loss/entropy": 0.06}
    row |= {"loss/kl": None, "rollout_secs": 30.0, "learn_secs": 15.0, "wall_secs": 50.0}
    return row | {"outcome/answered": 0.9, "outcome/bad_call": 0.1, "warning": None} | values


def texts(lines) -> list[str]:
    return [f"{name} {'  '.join(parts)}".strip() for name, parts in lines]


def test_the_panel_of_an_update_has_every_number_that_matters():
    rows = [EVALUATIONS[0], update(1), update(2, warning="entropy, no_step"), EVALUATIONS[1]]
    rows += [update(3), update(4)]
    found = texts(update_panel(rows, 40, 305.0))
    assert found[:2] == ["update 4/40  stage 2  5:05 left", "reward 2.000  \u2581\u2588"]
    assert found[2] == "ex 0.250  em 0.500"
    assert "held-out dev EX 34.0 -> 41.5 (update 2)" in found
    assert "endings answered 90.0 %  bad_call 10.0 %" in found
    assert any(text.startswith("policy entropy 0.060  KL -  grad -") for text in found)
    # 4 * 50 s of updates and 10 s of the second evaluation; the first one has no row before it.
    assert any(text.startswith("time rollouts 57.1 %  learning 28.6 %  eval") for text in found)
    assert found[-1] == "warned entropy (update 2)  no_step (update 2)"


def test_an_evaluation_is_in_the_panel_before_the_next_update(monkeypatch):
    screen = LiveScreen(Console(file=io.StringIO()))
    rows = [EVALUATIONS[0], update(1), update(2)]
    screen.show(update_panel(rows, 40, 305.0))
    show_held_out([*rows, EVALUATIONS[1]])  # without a live display of the process
    assert "held-out dev EX 34.0" in texts(screen.lines)
    monkeypatch.setattr(live, "_current", screen)
    show_held_out([*rows, EVALUATIONS[1]])
    assert "held-out dev EX 34.0 -> 41.5 (update 2)" in texts(screen.lines)
    assert len(screen.lines) == len(update_panel(rows, 40, 305.0))


def test_the_panel_of_sft_has_its_step_and_loss():
    step = {"stage": "sft", "loss": 0.5, "lr": 1e-4, "grad_norm": 0.1, "tokens_per_sec": 1e5}
    rows = [step | {"loss": loss, "learn_mfu": 0.5} for loss in (0.9, 0.7, 0.5)]
    found = texts(step_panel(rows, "sft", 3, 30, 61.0))
    assert found[0] == "step 3/30  sft  1:01 left" and found[1].startswith("loss 0.700  \u2588")
    assert found[3] == "tokens/s learned 100k  MFU 50.0 %"
    assert texts(step_panel(rows[:1], "sft", 1, 30, None))[0] == "step 1/30  sft"


def test_lines_are_broken_between_parts_only():
    parts = ["answered 95.2 %", "bad_call 2.3 %", "", "unclosed_think 1.6 %"]
    found = laid_out([("endings", parts)], 45)
    assert found == [
        ("endings  ", "answered 95.2 %  bad_call 2.3 %"),
        ("         ", "unclosed_think 1.6 %"),
    ]


def test_a_sparkline_has_a_bar_for_each_value_or_means_of_neighbours():
    assert sparkline([]) == sparkline([1.0]) == ""
    assert sparkline([0.0, 1.0]) == "\u2581\u2588" and len(set(sparkline([2.0] * 5))) == 1
    long = sparkline([float(n) for n in range(10_000)])
    assert len(long) == 24 and list(long) == sorted(long)


@pytest.mark.parametrize(("width", "height"), [(200, 50), (60, 15), (40, 8), (20, 4)])
def test_the_display_is_never_larger_than_the_terminal(width, height):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=height)
    screen = LiveScreen(console)
    screen.lines = [(f"name {n}", [f"part {n}-{k} \u8868" for k in range(9)]) for n in range(30)]
    with screen.activity("update 1/40: rollout", "episodes") as show:
        show(37, 128)
        lines = [
            "".join(segment.text for segment in line).rstrip()
            for line in console.render_lines(screen, pad=False)
        ]
    assert len(lines) <= max(1, height - 3)
    assert max(len(line) for line in lines) < min(width, 79)
    assert lines[0].startswith("update 1/")


@pytest.mark.parametrize(("width", "expected"), [(70, "0:00:"), (60, "0:00:"), (45, "")])
def test_a_narrow_terminal_shows_whole_numbers_of_what_goes_on(width, expected):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=20)
    screen = LiveScreen(console)
    with screen.activity("update 12/40: rollout", "episodes") as show:
        show(61, 128)
        console.print(screen)
    line = next(line for line in out.getvalue().splitlines() if "rollout" in line)
    assert "61/128 episodes" in line and "--:--" in line and "\u2026" not in line
    assert expected in line and ("\u2501" in line) == (width == 70)


def test_a_narrower_terminal_breaks_the_lines_that_are_there():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    screen = LiveScreen(console)
    screen.lines = [("name", ["x" * 60]), ("other", ["y"])]
    console.render_lines(screen, pad=False)
    screen.live._live_render._shape = (69, 3)
    console.width = 40
    reset, *_ = screen.live.process_renderables([])
    # A blank line, one in two parts and another one: from the last of four lines up to the first.
    assert str(reset).count("\x1b[1A") == 3


def test_without_a_terminal_and_on_other_ranks_nothing_is_shown(capsys, monkeypatch):
    with live_screen():
        assert live.current() is None
    monkeypatch.setattr(live, "is_terminal", lambda: True)
    monkeypatch.setenv("RANK", "1")
    with live_screen(), activity("x", is_shown=False):
        assert live.current() is None
    assert capsys.readouterr().out == ""


CODE = """
import sys, time
from mtsql.files import print_line
from mtsql.run.live import current, live_screen
from mtsql.run.screen import activity
try:
    with live_screen():
        with activity("update 1/4: rollout") as show:
            show(1, 2)
            current().show([("reward", ["1.500"])])
            print_line("[bold]a line[/bold]")
            print("an error line", file=sys.stderr)
            print_line("ready")
            time.sleep(30)
except KeyboardInterrupt:
    pass
print_line("the end")
"""


@dataclass
class Seen:
    text: str
    code: int


def run_on_a_terminal(code: str, stop_at: bytes) -> Seen:
    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "LINES": "15"}
    shown = b""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=side, stderr=side, env=env, start_new_session=True
    )
    os.close(side)
    while b"the end\r\n" not in shown:
        before = stop_at in shown
        shown += os.read(main, 4096)
        if stop_at in shown and not before:
            process.send_signal(signal.SIGINT)
    process.wait()
    os.close(main)
    return Seen(shown.decode(), process.returncode)


def test_ctrl_c_leaves_a_clean_screen():
    seen = run_on_a_terminal(CODE, b"ready")
    assert "[bold]a line[/bold]" in seen.text and "an error line" in seen.text
    assert "1/2 episodes" in seen.text and "1.500" in seen.text
    last = seen.text[seen.text.rindex("\x1b[?25h") :]  # the cursor is shown again
    assert last.endswith("the end\r\n") and "1.500" not in last
    # What was drawn last is erased: as many lines as it had.
    assert last.count("\x1b[1A\x1b[2K") == 2 and seen.code == 0
