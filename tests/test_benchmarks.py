"""The benchmarks measure what they say: all contestants do the same work, replies have the forced
lengths, and what is missing is named.

TRL is no requirement: where it is absent, the tests of its contestants are skipped.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mtsql.engine.config import EngineConfig
from mtsql.engine.sampling import SamplingConfig

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = {"num_layers": 1, "width": 64, "vocab": 1000, "threads": torch.get_num_threads()}
UPDATE = {**TINY, "num_samples": 2, "prompt_tokens": 20, "trl_batches": [2]}
WORKLOAD = {"num_prompts": 2, "num_samples": 2, "num_replies": 2}
STEP = {**TINY, **WORKLOAD, "trl_batch": 2, "cache_bytes": 30_000_000}
NEEDS_TRL = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")


@pytest.fixture
def module(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a benchmark by name, as running its file would."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module


def contest(benchmark: ModuleType, **flags: object) -> dict:
    return benchmark.contest(benchmark.Flags(**flags))


def workload(module: Callable[[str], ModuleType]):
    return module("workload").make_workload(**WORKLOAD, vocab=TINY["vocab"])


def test_flags_become_words_that_are_parsed_to_the_same_flags(module):
    from dataclasses import asdict

    from mtsql.run.config import parse_config

    flags = module("update").Flags(**UPDATE, who="trl_tuned", with_trl=True, trl_python="a b")
    words = module("flags").as_words(asdict(flags))
    assert parse_config(type(flags), words, "") == flags


@pytest.mark.slow
def test_our_update_and_the_padded_one_are_the_same_and_ours_computes_each_token_once(module):
    ours = contest(module("update"), **UPDATE, who="ours")
    padded = contest(module("update"), **UPDATE, who="padded")
    assert ours["loss"] == pytest.approx(padded["loss"], rel=1e-4)
    assert ours["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
    assert ours["computed_per_distinct"] == 1.0 < padded["computed_per_distinct"]


@pytest.mark.slow
def test_our_update_makes_no_tensor_of_positions_times_vocabulary(module):
    flags = {**UPDATE, "vocab": 60_000, "allocations": True}
    ours = contest(module("update"), **flags, who="ours")
    padded = contest(module("update"), **flags, who="padded")
    assert ours["largest_tensor_elements"] < ours["positions_times_vocab"] / 2
    assert ours["largest_activation_elements"] <= ours["largest_tensor_elements"]
    # The padded learner makes such a tensor, and the meter sees it.
    assert padded["largest_activation_elements"] >= padded["positions_times_vocab"]


def test_our_whole_update_plays_the_workload(module):
    work = workload(module)
    step = contest(module("step"), **STEP, who="ours")
    assert step["learn_tokens"] == work.num_tokens
    assert step["useful_tokens"] == work.num_sampled
    num_distinct = work.num_tokens - 4  # a row's last token is only sampled
    assert num_distinct <= step["rollout_tokens"] < 1.01 * num_distinct  # refused drafts
    assert step["secs"] == pytest.approx(step["rollout_secs"] + step["learn_secs"])


def test_the_stand_in_tokenizer_reads_back_the_ids_it_is_given(module):
    peer = module("trl_peer")
    script = peer.Script()
    words = peer.make_words(1000, script)
    ids = [0, 7, 999, 998, 997, 99, 100]

    def render(messages: list[dict]) -> list[int]:
        return words.apply_chat_template(messages, return_dict=False)

    assert render([{"role": "user", "content": peer.to_text(ids)}]) == ids
    call = {"function": {"name": "look", "arguments": {"row": 0}}}
    question = {"role": "user", "content": "t1"}
    asked = [question, {"role": "assistant", "content": "", "tool_calls": [call]}]
    before = render(asked)
    assert before[-1] == words.eos_token_id == 999
    result = {"role": "tool", "name": "look", "content": peer.to_text(ids)}
    assert render([*asked, result]) == before + ids


def test_the_stand_in_calls_the_tool_in_every_reply_but_the_last(module):
    peer = module("trl_peer")
    script = peer.Script()
    words = peer.make_words(1000, script)
    script.begin([[3, 4], [5, 6]], [[[1]], [[2]]])  # two rows with two replies each
    messages = [words.parse_response([1]) for _ in range(4)]
    first, second = (m["tool_calls"][0]["function"]["arguments"] for m in messages[:2])
    assert first == {"row": 0, "reply": 0}
    assert second == {"row": 1, "reply": 0}
    assert not any("tool_calls" in message for message in messages[2:])


def test_rows_end_at_their_forced_length(module):
    eos = 4
    forced = module("trl_peer").ForcedLengths([1, 3], eos=eos)
    allowed = []  # by step, then by row: the ids that may be sampled
    for _ in range(3):
        scores = forced(None, torch.zeros(2, 5))
        allowed.append([row.isfinite().nonzero()[:, 0].tolist() for row in scores])
    others = [0, 1, 2, 3]
    assert allowed == [[[eos], others], [others, others], [others, [eos]]]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["update.py", "step.py", "rollout.py"])
def test_a_missing_trl_is_named_before_anything_is_measured(script):
    flags = ["--with_trl", "true", "--trl_python", "no-such-python"]
    command = [sys.executable, str(FOLDER / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "--trl_python no-such-python" in done.stderr.splitlines()[-1]


@NEEDS_TRL
def test_trl_computes_our_loss_and_gradient(module):
    ours = contest(module("update"), **UPDATE, who="ours")
    trl = contest(module("update"), **UPDATE, who="trl")
    assert trl["loss"] == pytest.approx(ours["loss"], rel=1e-3, abs=1e-6)
    assert trl["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)


@NEEDS_TRL
def test_trl_plays_the_workload(module):
    trl = contest(module("step"), **STEP, who="trl_tuned")
    assert trl["useful_tokens"] == workload(module).num_sampled
    assert trl["rollout_tokens"] > trl["learn_tokens"]  # it prefills again


@pytest.mark.slow
def test_the_sql_benchmark_plays_as_many_runaways_as_it_says(module, tmp_path):
    sql = module("sql")
    figures = sql.small_queries(50, tmp_path)
    assert figures.keys() == {"from_1_threads_us", "from_16_threads_us", "cached_us"}
    flags = sql.Flags(
        num_layers=1,
        width=64,
        vocab=700,
        num_turns=2,
        num_samples=4,
        runaway_frac=0.25,
        max_vm_steps=1_000_000,
        toy_folder=str(tmp_path / "toy"),
    )
    found = sql.measure_rollouts(flags)
    assert found["queries"] == 2 * 8 * 4  # two rollouts of 8 rows with 3 calls and an answer
    assert found["runaways"] == 6
    assert found["deadlines_met"] == 0


def test_every_attack_of_the_benchmark_is_held(module, tmp_path, monkeypatch):
    """Those that end at once, here; the others are those of test_sandbox_bounds.py."""
    attacks = module("attacks")
    monkeypatch.chdir(tmp_path)
    denied = (
        "gold SQL through a view of sqlite_stmt",
        "an FTS table through a view",
        "DROP TABLE",
        "ATTACH",
    )
    for name in denied:
        assert attacks.attack(name, 5.0)["status"] == "denied"
    assert attacks.attack("rows without end", 5.0)["status"] == "too_large"


@pytest.mark.slow
def test_sharing_beginnings_changes_no_prediction(module, tmp_path, small_world):
    from helpers.models import save_embedded
    from mtsql.engine.engine import SamplingConfig
    from mtsql.model.policy import ModelConfig
    from mtsql.sql.datasets import DataConfig

    prefixes = module("prefixes")
    flags = prefixes.Flags(
        num_turns=9,
        model=ModelConfig(path=str(save_embedded(tmp_path / "model"))),
        data=DataConfig(toy_folder=str(tmp_path / "toy")),
        sampling=SamplingConfig(temperature=0.0, max_reply_tokens=4),
        style="full",
    )
    found = prefixes.compare(flags)
    assert found["turns"] == found["same_predictions"] == 9
    shared, single = found["with_sharing"], found["without_sharing"]
    assert shared["prompt_tokens"] == single["prompt_tokens_computed"] == single["prompt_tokens"]
    assert found["prompt_frac"] < 0.5 and shared["secs"] > 0


@pytest.mark.parametrize("max_draft", [0, 8])
def test_recorded_text_is_forced_with_drafts_and_without(module, tmp_path, max_draft):
    rows = [
        {"ids": [5, 6, 7, 8, 30, 31, 5, 6, 7, 9], "loss_mask": [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]},
        {"ids": [5, 6, 7, 8, 9], "loss_mask": [1] * 5},
    ]
    file = tmp_path / "recorded.json"
    file.write_text(json.dumps({"groups": [{"prompt_ids": [5, 6, 7, 2], "rows": rows}]}))
    forcing = module("workload")
    work = forcing.read_workload(str(file), vocab=40)
    assert work.lengths.tolist() == [[4, 4], [5, 0]]
    assert work.observations == [[[30, 31]], []]
    replies = []

    class Watched(forcing.ForcedLengths):
        def step(self):
            completions = super().step()
            replies.extend(done.ids for done in completions)
            return completions

    model = module("common").make_model(None, 1, 64, 40, "ours").eval()
    limits = EngineConfig(block_size=4, cache_bytes=1 << 20, max_draft=max_draft)
    engine = Watched(model, (), SamplingConfig(max_trajectory_tokens=64), limits)
    engine.play(work)
    assert sorted(replies) == [[5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7, 9]]
    assert engine.counts.distinct == work.num_tokens - 2
    assert (engine.counts.accepted > 0) == (max_draft > 0)


def test_a_file_that_was_not_recorded_is_named(module, tmp_path):
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="--recorded .*other.json: no file of record.py"):
        module("workload").read_workload(str(file), 40)
    file.write_text(json.dumps({"groups": [{"prompt_ids": [50], "rows": []}]}))
    with pytest.raises(ValueError, match="holds token 50, but --vocab is 40"):
        module("workload").read_workload(str(file), 40)
