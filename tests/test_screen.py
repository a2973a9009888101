"""Lines of at most 80 columns, progress in a pipe, and a bar on a terminal only."""

import os
import pty
import subprocess
import sys

import pytest

from mtsql.run import screen
from mtsql.run.screen import Table, activity, duration, percent, rate, short, wrapped


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (0.0647, "0.065"),
        (-0.0647, "-0.06"),
        (12.345, "12.35"),
        (123.456, "123.5"),
        (1234.5, "1234"),
        (98765.0, "1e5"),
        (0.000021, "2e-5"),
        (-0.000021, "-2e-5"),
        (1.5e-12, "2e-12"),
        (9999.9, "1e4"),
    ],
)
def test_a_short_number_has_at_most_five_characters(value, text):
    assert short(value) == text and len(text) <= 5


def test_shares_and_rates_keep_their_width():
    shares = [percent(value) for value in (None, 0.0, 0.0859, 0.5625, 0.9994, 0.9996, 1.0)]
    assert shares == ["-", "0.0", "8.6", "56.2", "99.9", "100", "100"]
    rates = [rate(value) for value in (None, 0.0, 1912.4, 99_999.0, 99_999.9, 1.25e6, 2e7)]
    assert rates == ["-", "0", "1912", "99999", "100k", "1250k", "2e7"]


def test_a_duration_is_readable_from_seconds_to_days():
    secs = (0, 7.9, 65, 3599, 3600, 11_100, 35_999, 86_399, 86_400, 187_200, 9e5)
    assert [duration(value) for value in secs] == [
        "0:00",
        "0:07",
        "1:05",
        "59:59",
        "1h00m",
        "3h05m",
        "9h59m",
        "23h",
        "1d00h",
        "2d04h",
        "10d",
    ]
    assert duration(float("inf")) == "-"  # the sum of damaged rows


def test_a_long_line_is_broken_between_words_only():
    words = ["run", "runs/" + "x" * 90, *["sampling.max_trajectory_tokens=640,"] * 4]
    lines = wrapped(" ".join(words)).split("\n")
    assert " ".join(lines).split() == words
    assert all(len(line) <= 80 or "x" * 90 in line for line in lines) and len(lines) > 2
    assert wrapped("a  b" + " c" * 38) == "a  b" + " c" * 38  # 80 columns stay as they are


def test_a_table_repeats_its_header_and_keeps_its_columns():
    table = Table({"update": 9, "EX": 4})
    lines = [table.line(f"{number}/50", "1.0") for number in range(41)]
    has_header = [number for number, line in enumerate(lines) if "update" in line]
    assert has_header == [0, 20, 40]
    assert lines[0].split("\n") == ["   update   EX", "     0/50  1.0"]
    assert lines[1] == "     1/50  1.0"


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return now


def test_in_a_pipe_progress_is_a_line_every_ten_seconds(clock, capsys):
    with activity("probe") as show:
        for second in range(1, 31):
            clock[0] = 100.0 + second
            show(second * 4, 120)
    assert capsys.readouterr().out.splitlines() == [
        "probe: 40 of 120 episodes, 0:20 left",
        "probe: 80 of 120 episodes, 0:10 left",
    ]


def test_the_time_left_does_not_count_what_comes_before_the_work(clock, capsys):
    with activity("replaying", unit="demonstrations") as show:
        clock[0] += 1000.0
        show(0, 40)
        clock[0] += 10.0
        show(20, 40)
    assert capsys.readouterr().out.splitlines() == [
        "replaying: 0 of 40 demonstrations",
        "replaying: 20 of 40 demonstrations, 0:10 left",
    ]


def test_long_work_is_reported_less_often_but_once_a_minute(clock, capsys):
    with activity("probe") as show:
        for second in range(3600):
            clock[0] = 100.0 + second
            show(second, 3600)
    lines = capsys.readouterr().out.splitlines()
    times = [int(line.split()[1]) for line in lines]  # one episode a second
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert gaps == sorted(gaps) and gaps[0] == 10 and gaps[-1] == 60 and times[-1] > 3500


def test_other_ranks_and_quiet_work_print_nothing(clock, capsys):
    for options in ({"is_shown": False}, {"has_lines": False}):
        with activity("probe", **options) as show:
            clock[0] += 50
            show(1, 2)
    assert capsys.readouterr().out == ""


CODE = """
from mtsql.files import print_line
from mtsql.run.screen import activity
with activity("probe") as show:
    show(1, 2)
    print_line("a line")
    show(2, 2)
print_line("the end")
"""


def test_on_a_terminal_there_is_a_bar_and_lines_stand_above_it():
    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=side, env=env):
        os.close(side)
        shown = b""
        while b"the end\r\n" not in shown:
            shown += os.read(main, 4096)
    os.close(main)
    text = shown.decode()
    assert "\x1b[2K" in text and "2/2 episodes" in text  # the bar is drawn again and again
    assert "a line" in text and text.endswith("the end\r\n")


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_in_a_pipe_there_is_no_control_character(variables):
    env = {**os.environ, **variables}
    out = subprocess.check_output([sys.executable, "-c", CODE], env=env)
    assert out == b"a line\nthe end\n"


def test_a_terminal_without_utf_8_has_neither_a_bar_nor_escapes():
    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    env |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=side, env=env):
        os.close(side)
        shown = b""
        while b"the end\r\n" not in shown:
            shown += os.read(main, 4096)
    os.close(main)
    assert shown == b"a line\r\nthe end\r\n"
