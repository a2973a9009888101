"""The benchmarks measure what they say: same work for all contestants, lengths as forced, and what is missing named.

TRL is no requirement: where it is absent, its contestants are left out here."""

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ("--width", "64", "--threads", str(torch.get_num_threads()))
UPDATE = (*TINY, "--layers", "1", "--group_size", "2", "--prompt", "20", "--trl_batches", "2")
STEP = (
    *TINY,
    "--num_layers",
    "1",
    "--vocab",
    "1000",
    "--num_prompts",
    "2",
    "--num_samples",
    "2",
    "--num_replies",
    "2",
    "--trl_batch",
    "2",
    "--cache_bytes",
    "30000000",
)
NEEDS_TRL = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")


@pytest.fixture
def module(monkeypatch):
    """Imports a benchmark by name, as running its file would."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module


def contest(module, name, *flags):
    return module(name).contest(module(name).make_parser().parse_args(flags))


def test_no_file_is_long_or_names_a_path_of_some_machine():
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        assert not any(start in text for start in ("/work/", "/home/", "/root/", "/tmp/")), path


@pytest.mark.slow
def test_our_update_and_the_padded_one_are_the_same_and_ours_computes_each_token_once(module):
    ours, padded = (
        contest(module, "update", *UPDATE, "--vocab", "1000", "--who", who)
        for who in ("ours", "padded")
    )
    assert ours["loss"] == pytest.approx(padded["loss"], rel=1e-4)
    assert ours["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
    assert ours["computed_per_distinct"] == 1.0 < padded["computed_per_distinct"]


@pytest.mark.slow
def test_our_update_makes_no_tensor_of_positions_times_vocabulary(module):
    flags = (*UPDATE, "--vocab", "60000", "--allocations")
    ours, padded = (contest(module, "update", *flags, "--who", who) for who in ("ours", "padded"))
    assert ours["largest_tensor_elements"] < ours["positions_times_vocab"] / 2
    assert ours["largest_activation_elements"] <= ours["largest_tensor_elements"]
    assert (
        padded["largest_activation_elements"] >= padded["positions_times_vocab"]
    )  # the meter sees what is there


def test_our_whole_update_plays_the_workload(module):
    step, work = (
        contest(module, "step", *STEP, "--who", "ours"),
        module("rollout").make_workload(2, 2, 2, 1000),
    )
    tokens = (
        sum(map(len, work.prompts))
        + work.useful
        + sum(len(o) for row in work.observations for o in row)
    )
    assert step["learn_tokens"] == tokens and step["useful_tokens"] == work.useful
    assert step["rollout_tokens"] == tokens - 4  # a row's last token is sampled, not computed
    assert step["secs"] == pytest.approx(step["rollout_secs"] + step["learn_secs"])


def test_the_double_reads_back_the_ids_it_is_given(module):
    peer = module("trl_peer")
    script = peer.Script()
    words = peer.make_words(1000, script)
    ids = [0, 7, 999, 998, 997, 99, 100]
    render = lambda messages: words.apply_chat_template(messages, return_dict=False)  # noqa: E731
    assert render([{"role": "user", "content": peer.to_text(ids)}]) == ids
    call = {"function": {"name": "look", "arguments": {"row": 0}}}
    asked = [
        {"role": "user", "content": "t1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    before = render(asked)
    assert before[-1] == words.eos_token_id == 999
    assert (
        render([*asked, {"role": "tool", "name": "look", "content": peer.to_text(ids)}])
        == before + ids
    )
    script.begin([[3, 4], [5, 6]], [[[1]], [[2]]])
    calls = [words.parse_response([1]).get("tool_calls") for _ in range(4)]
    asked = [c and c[0]["function"]["arguments"] for c in calls]
    assert asked == [{"row": 0, "reply": 0}, {"row": 1, "reply": 0}, None, None]


def test_rows_end_at_their_forced_length(module):
    forced = module("trl_peer").ForcedLengths([1, 3], eos=4)
    allowed = [
        [row.isfinite().nonzero()[:, 0].tolist() for row in forced(None, torch.zeros(2, 5))]
        for _ in range(3)
    ]
    assert [[4] == ids for step in allowed for ids in step] == [
        True,
        False,
        False,
        False,
        False,
        True,
    ]
    assert allowed[1][1] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("update.py", "--with_trl"),
        ("step.py", "--contestants trl"),
        ("rollout.py", "--with_trl true"),
    ],
)
def test_a_missing_trl_is_named_before_anything_is_measured(script, flags):
    command = [
        sys.executable,
        str(FOLDER / script),
        *flags.split(),
        "--trl_python",
        "no-such-python",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and "--trl_python no-such-python" in done.stderr.splitlines()[-1]


@NEEDS_TRL
def test_trl_computes_our_loss_and_gradient(module):
    flags = (*UPDATE, "--vocab", "1000")
    ours, trl = (contest(module, "update", *flags, "--who", who) for who in ("ours", "trl"))
    assert trl["loss"] == pytest.approx(ours["loss"], rel=1e-3, abs=1e-6)
    assert trl["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)


@NEEDS_TRL
def test_trl_plays_the_workload(module):
    trl = contest(module, "step", *STEP, "--who", "trl_tuned")
    work = module("rollout").make_workload(2, 2, 2, 1000)
    assert (
        trl["useful_tokens"] == work.useful and trl["rollout_tokens"] > trl["learn_tokens"]
    )  # it prefills again


@pytest.mark.slow
def test_the_sql_benchmark_plays_as_many_runaways_as_it_says(module, tmp_path):
    sql = module("sql")
    assert sql.small_queries(50, tmp_path).keys() == {
        "from_1_threads_us",
        "from_16_threads_us",
        "kept_us",
    }
    shape = {
        "num_layers": 1,
        "width": 64,
        "vocab": 700,
        "num_turns": 2,
        "num_samples": 4,
        "num_pairs": 1,
    }
    found = sql.rollouts(str(tmp_path / "toy"), runaway_frac=0.25, max_vm_steps=1_000_000, **shape)
    assert found["queries"] == 2 * 8 * 4 and found["runaways"] == 6 and found["deadlines_met"] == 0


def test_every_attack_of_the_benchmark_is_held(module, tmp_path, monkeypatch):
    """Those that end at once, here; the others are those of test_sandbox_bounds.py."""
    attacks = module("attacks")
    monkeypatch.chdir(tmp_path)
    for name in (
        "gold SQL through a view of sqlite_stmt",
        "an FTS table through a view",
        "DROP TABLE",
        "ATTACH",
    ):
        assert attacks.attack(name, 5.0)["status"] == "denied"
    assert attacks.attack("rows without end", 5.0)["status"] == "too_large"
