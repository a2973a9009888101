"""A step that is not finite stops a training, and what it learned from can be read back."""

import math
from dataclasses import replace

import pytest
import train_rl

from helpers.learning import make_learner, sample_of
from helpers.thread_ranks import on_ranks
from mtsql.learner.packing import Sample, TokenScores
from mtsql.not_finite import read_batch, require_finite
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import NotFinite

GOOD = Sample([1, 2], [3, 4], [1, 1], advantages=[0.5, 0.5], old_logprobs=[-1.0, -2.0])
BAD = Sample([1], [5], [1], advantages=[1.0], old_logprobs=[-math.inf], ref_logprobs=[math.nan])
STATS = {"loss": math.nan, "grad_norm": math.inf, "num_tokens": 3.0}


def test_a_finite_step_leaves_no_file(tmp_path):
    require_finite({"loss": 0.5}, [BAD], Ranks(), tmp_path, 7)
    require_finite({}, [BAD], Ranks(), tmp_path, 7)  # no step was taken
    assert not list(tmp_path.iterdir())


def test_the_batch_is_read_back_as_it_was(tmp_path):
    with pytest.raises(NotFinite) as error:
        require_finite(STATS, [GOOD, BAD], Ranks(), tmp_path, 7)
    file = tmp_path / "not_finite/update-00007.jsonl"
    assert str(error.value) == (
        "loss, grad_norm is not finite in the optimizer step of update 7; sample 1 has a number "
        f"that is not finite itself; they are in {file} (docs/warnings.md)"
    )
    (first, second), about = read_batch(file)
    assert first == GOOD
    assert second.old_logprobs == [-math.inf] and math.isnan(second.ref_logprobs[0])
    assert (second.prompt_ids, second.ids, second.loss_mask) == ([1], [5], [1])
    assert about["update"] == 7 and about["faulty_samples"] == [1]
    assert about["not_finite"] == ["loss", "grad_norm"] and about["stats"]["grad_norm"] == math.inf


def test_what_a_step_wrote_into_its_samples_is_not_kept(tmp_path):
    used = replace(GOOD, scores=TokenScores([math.nan], [0.5]))
    with pytest.raises(NotFinite, match="all numbers of its samples are finite"):
        require_finite(STATS, [used], Ranks(), tmp_path, 7)
    [sample], _ = read_batch(tmp_path / "not_finite/update-00007.jsonl")
    assert sample == GOOD and sample.scores is None


def test_a_fault_of_the_weights_alone_is_said(tmp_path):
    with pytest.raises(NotFinite, match="all numbers of its samples are finite; they are in"):
        require_finite({"loss": math.inf}, [GOOD], Ranks(), tmp_path, 1)


def test_the_samples_of_all_ranks_are_kept_and_each_rank_stops(tmp_path):
    def step(ranks: Ranks) -> str:
        with pytest.raises(NotFinite) as error:
            require_finite(STATS, [[GOOD], [BAD, GOOD]][ranks.index], ranks, tmp_path, 2)
        return str(error.value)

    first, second = on_ranks(2, step)
    samples, about = read_batch(tmp_path / "not_finite/update-00002.jsonl")
    assert first == second and len(samples) == 3 and about["faulty_samples"] == [1]


def test_a_broken_log_prob_stops_an_update_of_train_rl(tmp_path):
    learner = make_learner()
    config = train_rl.Config(run=str(tmp_path))
    samples = [sample_of([1, 2], [3, 4], 1.0, -5.7), sample_of([1, 2], [5], -1.0, math.nan)]
    with pytest.raises(NotFinite, match="update 5"):
        train_rl.learn(config, learner, samples, update=4, lr=0.1)
    kept, about = read_batch(tmp_path / "not_finite/update-00005.jsonl")
    assert sorted(len(sample.ids) for sample in kept) == [1, 2]
    assert "loss" in about["not_finite"] and len(about["faulty_samples"]) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "line 1: expected the keys of a file of not_finite/"),
        ('{"stage": "rl"}\n', "line 1: expected the keys of a file of not_finite/"),
        ('{"not_finite": [], "stats": {}}\n{"ids": [1]}\n', "line 2: expected the keys advantages"),
        ('{"not_finite": [], "stats": {}}\n{"ids"', "line 2: not JSON"),
    ],
)
def test_another_file_is_refused(tmp_path, text, error):
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file}, {error}"):
        read_batch(file)
